"""Adapters extracted from fine-tuned models on disk: at density 1 the tuned model, from folders, shards and files."""

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5EncoderModel

from shira_diffusers import (
    AdapterFormatError,
    AdapterMismatchError,
    Resident,
    ShiraAdapter,
    ShiraError,
    extract_adapter,
)
from tests import tiny
from tests.original_layout import single_file

PARTS = ("unet", "text_encoder")


def tuned_pipeline() -> StableDiffusionPipeline:
    """The tiny pipeline with every parameter of two components changed, and the autoencoder as it was."""
    pipe, generator = tiny.pipeline(), torch.Generator().manual_seed(1)
    for part in PARTS:
        for parameter in getattr(pipe, part).parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base; the tuned one whole, in shards, and with the variant fp16 beside it."""
    root, pipe = tmp_path_factory.mktemp("models"), tuned_pipeline()
    tiny.pipeline().save_pretrained(root / "base")
    pipe.save_pretrained(root / "tuned")
    pipe.save_pretrained(root / "sharded", max_shard_size="300KB")
    pipe.save_pretrained(root / "variants")
    tiny.pipeline().save_pretrained(root / "variants", variant="fp16")
    return root


def assert_tuned(adapter: ShiraAdapter) -> None:
    pipe, expected = tiny.pipeline(), tiny.snapshot(tuned_pipeline())
    pipe.load_shira(adapter, "it")
    for name, weight in tiny.snapshot(pipe).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("tuned", ["tuned", "sharded", "variants"])
def test_pipelines(folders: Path, tuned: str) -> None:
    found = extract_adapter(folders / "base", folders / tuned, 1.0)
    assert_tuned(found.adapter)
    assert set(found.report.components) == set(PARTS)  # what does not differ does not count
    assert found.adapter.metadata["source"] == "difference" and found.adapter.base_probes


def test_the_top_entries_are_kept(folders: Path) -> None:
    found = extract_adapter(folders / "base", folders / "sharded", 0.05, dtype=torch.float16)
    before, after = tiny.snapshot(tiny.pipeline()), tiny.snapshot(tuned_pipeline())
    changes = torch.cat([(after[name] - before[name]).flatten().abs() for name in after if name.startswith(PARTS)])
    threshold = changes.topk(round(0.05 * changes.numel())).values[-1]
    assert found.adapter.nnz == pytest.approx(0.05 * changes.numel(), abs=1)
    assert min(float(d.values.float().abs().min()) for d in found.adapter.deltas.values()) >= 0.999 * threshold
    assert {delta.values.dtype for delta in found.adapter.deltas.values()} == {torch.float16}


def test_single_models(folders: Path) -> None:
    """A component's folder or file beside the pipeline's folder, and two of them, whose names have no component."""
    unet = folders / "tuned" / "unet"
    expected = extract_adapter(folders / "base", folders / "tuned", 0.1, ranking="layer").adapter.part("unet")
    beside = [unet, folders / "sharded" / "unet", unet / "diffusion_pytorch_model.safetensors"]
    for tuned in beside:
        tiny.assert_same_adapter(
            extract_adapter(folders / "base", tuned, 0.1, ranking="layer").adapter.part("unet"), expected
        )
    folder = folders / "base" / "unet"
    file = folder / "diffusion_pytorch_model.safetensors"
    for base, tuned in (*((folder, tuned) for tuned in beside), (file, beside[2]), (file, folders / "tuned")):
        found = extract_adapter(base, tuned, 0.1, ranking="layer")
        tiny.assert_same_adapter(found.adapter, expected)
        assert list(found.report.components) == [""]


def test_names_of_older_transformers(folders: Path, tmp_path: Path) -> None:
    """Before 5.6 the names of CLIP began with ``text_model.``, and its files had position ids."""
    file = folders / "tuned" / "text_encoder" / "model.safetensors"
    older = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in load_file(file).items()}
    save_file(older | {"text_model.embeddings.position_ids": torch.arange(16)}, tmp_path / "older.safetensors")
    found = extract_adapter(folders / "base", tmp_path / "older.safetensors", 1.0).adapter
    expected = extract_adapter(folders / "base", folders / "tuned", 1.0).adapter
    tiny.assert_same_adapter(found.part("text_encoder"), expected.part("text_encoder"))


def original_keys(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """A checkpoint as the original Stable Diffusion names it, of the tiny UNet and text encoder."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    names = dict(DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"])
    blocks = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
    }
    inner = {
        "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "norm2.": "out_layers.0.", "conv2.": "out_layers.3.",
        "time_emb_proj.": "emb_layers.1.", "conv_shortcut.": "skip_connection.",
    }  # fmt: skip
    found = {}
    for key, tensor in pipe.unet.state_dict().items():
        block = next((each for each in blocks if key.startswith(f"{each}.")), None)
        own = names.get(key) if block is None else blocks[block] + key.removeprefix(block)
        assert own is not None, key
        if ".resnets." in key:
            for name, theirs in inner.items():
                own = own.replace(f".{name}", f".{theirs}")
        found[f"model.diffusion_model.{own}"] = tensor
    text = pipe.text_encoder.state_dict()
    prefix = "cond_stage_model.transformer.text_model."
    return found | {prefix + key.removeprefix("text_model."): tensor for key, tensor in text.items()}


def test_an_original_checkpoint(folders: Path, tmp_path: Path) -> None:
    save_file(original_keys(tuned_pipeline()), tmp_path / "original.safetensors")
    found = extract_adapter(folders / "base", tmp_path / "original.safetensors", 1.0)
    assert_tuned(found.adapter)


def test_two_original_checkpoints(folders: Path, tmp_path: Path) -> None:
    """The adapter has a pipeline's names: it loads there, and has the bits that two folders give."""
    for name, pipe in (("base", tiny.pipeline()), ("tuned", tuned_pipeline())):
        save_file(single_file(pipe), tmp_path / f"{name}.safetensors")
    found = extract_adapter(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", 1.0)
    assert_tuned(found.adapter)
    assert set(found.report.components) == set(PARTS)
    tiny.assert_same_adapter(found.adapter, extract_adapter(folders / "base", folders / "tuned", 1.0).adapter)


def test_two_original_checkpoints_of_xl(tmp_path: Path) -> None:
    """q, k and v of its second text encoder are rows of one tensor."""
    pipe = tiny.sdxl_pipeline()
    save_file(single_file(pipe), tmp_path / "base.safetensors")
    changed = ("unet.down_blocks.0.resnets.0.conv1.weight", "text_encoder_2.encoder.layers.1.self_attn.k_proj.weight")
    own = {name.replace(".text_model.", "."): p for name, p in tiny.weights_of(pipe).items()}
    with torch.no_grad():
        for name in changed:
            own[name] += 1
    save_file(single_file(pipe), tmp_path / "tuned.safetensors")
    found = extract_adapter(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", 1.0).adapter
    assert set(found.deltas) == set(changed)
    for delta in found.deltas.values():
        torch.testing.assert_close(delta.to_dense(), torch.ones(delta.shape))


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Of 320 MB on each side, in shards, only a weight at a time becomes memory of the process."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        places = {}
        for shard in range(10):
            weight = torch.randn(8_000_000, generator=generator) if name == "base" or shard == 3 else None
            file = f"model-{shard}.safetensors"
            if weight is None:
                (tmp_path / name / file).hardlink_to(tmp_path / "base" / file)
            else:
                save_file({f"layer{shard}.weight": weight.view(2000, 4000)}, tmp_path / name / file)
            places[f"layer{shard}.weight"] = file
        index = tmp_path / name / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    own = _anonymous()
    found = extract_adapter(tmp_path / "base", tmp_path / "tuned", 0.01)
    assert list(found.adapter.deltas) == ["layer3.weight"] and found.adapter.nnz == 80_000
    assert _anonymous() - own < 400e6  # float64 squares, bins and scores of one weight of 32 MB


def _anonymous() -> float:
    """The peak of the memory that is the process' own so far, in bytes; mapped files do not count for long."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def test_what_cannot_be_compared(folders: Path, tmp_path: Path) -> None:
    base = folders / "base"
    with pytest.raises(AdapterMismatchError, match="no weight is changed"):
        extract_adapter(base, base)
    with pytest.raises(AdapterMismatchError, match="only on one side"):
        extract_adapter(base / "unet", base / "vae")
    with pytest.raises(AdapterMismatchError, match="no component in common"):
        save_file({"stranger": torch.ones(2)}, tmp_path / "stranger.safetensors")
        extract_adapter(base, tmp_path / "stranger.safetensors")
    with pytest.raises(FileNotFoundError, match="no model at"):
        extract_adapter(base, tmp_path / "nowhere")
    with pytest.raises(ShiraError, match="density"):
        extract_adapter(base, folders / "tuned", 2.0)
    tiny.sdxl_pipeline().unet.save_pretrained(tmp_path / "wide")
    with pytest.raises(AdapterMismatchError, match="expected the same parameters"):
        extract_adapter(base / "unet", tmp_path / "wide")


def test_damaged_models(folders: Path, tmp_path: Path) -> None:
    base = folders / "base" / "unet"
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFormatError, match="holds no model"):
        extract_adapter(base, tmp_path / "empty")
    (tmp_path / "shards").mkdir()
    index = tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(AdapterFormatError, match=r"(?s)names shards that are not there.*gone.safetensors"):
        extract_adapter(base, tmp_path / "shards")
    for text in ("no JSON", "{}", "[]", '{"weight_map": 3}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(AdapterFormatError, match="is no index of shards"):
            extract_adapter(base, tmp_path / "shards")
    (tmp_path / "cut.safetensors").write_bytes((base / "diffusion_pytorch_model.safetensors").read_bytes()[:-9])
    with pytest.raises(AdapterFormatError, match="damaged or truncated"):
        extract_adapter(base, tmp_path / "cut.safetensors")
    two = tmp_path / "two"
    two.mkdir()
    for name in ("one", "other"):
        save_file({"a": torch.ones(2)}, two / f"{name}.safetensors")
    with pytest.raises(AdapterFormatError, match=r"got one.safetensors, other.safetensors"):
        extract_adapter(base, two)


@pytest.mark.parametrize("target", ["nowhere", "diffusion_pytorch_model.safetensors"], ids=["nothing", "itself"])
def test_a_component_whose_file_is_a_broken_link_is_not_left_out(folders: Path, tmp_path: Path, target: str) -> None:
    shutil.copytree(folders / "tuned", tmp_path / "tuned")
    link = tmp_path / "tuned" / "unet" / "diffusion_pytorch_model.safetensors"
    link.unlink()
    link.symlink_to(target)
    for tuned in (tmp_path / "tuned", tmp_path / "tuned" / "unet"):
        with pytest.raises(AdapterFormatError, match=rf"{link} is a link to nothing.*; get all files"):
            extract_adapter(folders / "base" / "unet" if tuned.name == "unet" else folders / "base", tuned)


@pytest.mark.parametrize(("text", "message"), [("{ not json", "is not JSON"), ("[]", "expected a JSON object")])
def test_a_damaged_config_is_named(folders: Path, tmp_path: Path, text: str, message: str) -> None:
    shutil.copytree(folders / "base", tmp_path / "base")
    (tmp_path / "base" / "unet" / "config.json").write_text(text)
    save_file({"model.diffusion_model.x": torch.ones(3)}, tmp_path / "tuned.safetensors")
    with pytest.raises(AdapterFormatError, match=rf"unet/config\.json .*{message}.*; get an intact copy"):
        extract_adapter(tmp_path / "base", tmp_path / "tuned.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems take UTF-8 names only")
def test_a_path_that_is_not_utf_8(folders: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"tuned\xff")
    shutil.copytree(folders / "tuned" / "unet", odd)
    with pytest.raises(AdapterFormatError, match=r"udcff/.* cannot be read: .* UTF-8 names only; rename"):
        extract_adapter(folders / "base" / "unet", odd)


def tied_t5() -> T5EncoderModel:
    return tiny.t5(32)


def tied_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=True, **sizes))


@pytest.mark.parametrize(
    "twice", [(), ("base",), ("tuned",), ("base", "tuned")], ids=["neither", "base", "tuned", "both"]
)
@pytest.mark.parametrize(
    ("make", "tied"),
    [(tied_t5, ("shared", "encoder.embed_tokens")), (tied_llama, ("model.embed_tokens", "lm_head"))],
    ids=["t5", "llama"],
)
def test_tied_weights(
    tmp_path: Path, make: Callable[[], PreTrainedModel], tied: tuple[str, str], twice: tuple[str, ...]
) -> None:
    """Older files store both names of a tied weight, transformers the first alone."""
    tuned = make()
    torch.manual_seed(1)
    for parameter in tuned.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    for side, model in (("base", make()), ("tuned", tuned)):
        model.save_pretrained(tmp_path / side)
        file = tmp_path / side / "model.safetensors"
        state = load_file(file)
        if side in twice:
            state[f"{tied[1]}.weight"] = state[f"{tied[0]}.weight"].clone()
        save_file(state, file, {"format": "pt"})
    adapter = extract_adapter(tmp_path / "base", tmp_path / "tuned", 1.0).adapter
    model = make()
    before = tiny.snapshot(model)
    resident = Resident(model)
    resident.add(adapter, "it")
    resident.set({"it": 1.0})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, tuned.get_parameter(name), rtol=0.0, atol=1e-6, msg=name)
    resident.clear()
    tiny.assert_same_bits(model, before)
