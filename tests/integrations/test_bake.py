"""Baked checkpoints: the bits of a resident pipeline, all else as it was, and nothing at all after an error."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shira_diffusers import (
    AdapterFormatError,
    AdapterMismatchError,
    Resident,
    ShiraAdapter,
    ShiraError,
    SparseDelta,
)
from shira_diffusers.adapters.base_probes import probe_base
from shira_diffusers.integrations import bake
from shira_diffusers.integrations.bake import Mix, bake_checkpoint
from shira_diffusers.integrations.single_file import rows_by_name
from tests import original_layout, tiny

UNET_FILE = "diffusion_pytorch_model.safetensors"


def mix_for(pipe: DiffusionPipeline, components: tuple[str, ...] = ("unet", "text_encoder")) -> Mix:
    """Two adapters that overlap, of several dtypes, not in the order of their names."""
    second = tiny.adapter_for(pipe, 1, dtype=torch.bfloat16, components=components)
    return {"b": (tiny.adapter_for(pipe, 0, components=components), 0.7), "a": (second, -1.3)}


def activate(pipe: DiffusionPipeline, mix: Mix) -> None:
    for name, (adapter, _) in mix.items():
        pipe.load_shira(adapter, name, activate=False)
    pipe.set_shira({name: strength for name, (_, strength) in mix.items()})


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def header(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def saved(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> DiffusionPipeline:
    pipe = tiny.pipeline(dtype)
    pipe.save_pretrained(folder, **options)
    return pipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "200KB"}, {"variant": "fp16"}], ids=["", "shards", "fp16"])
def test_a_folder_has_the_bits_of_a_resident_pipeline(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, object]
) -> None:
    pipe = saved(tmp_path / "base", dtype, **options)
    mix, before = mix_for(pipe), contents(tmp_path / "base")
    told: list[tuple[int, int]] = []
    baked = bake_checkpoint(tmp_path / "base", mix, tmp_path / "out", lambda *done: told.append(done))
    variant = {"variant": "fp16"} if "variant" in options else {}
    found = type(pipe).from_pretrained(tmp_path / "out", torch_dtype=dtype, **variant)
    base = tiny.snapshot(pipe)
    activate(pipe, mix)
    tiny.assert_same_bits(found, tiny.snapshot(pipe))
    assert any(not torch.equal(weight, base[name]) for name, weight in tiny.snapshot(found).items())
    assert contents(tmp_path / "base") == before
    after = contents(tmp_path / "out")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == set(baked.files)
    assert all(name.startswith(("unet/", "text_encoder/")) for name in baked.files)
    assert all(header(tmp_path / "base" / name) == header(tmp_path / "out" / name) for name in baked.files)
    assert baked.weights == len({name for adapter, _ in mix.values() for name in adapter.deltas})
    assert baked.left_out == baked.strangers == []
    assert told[-1][0] == told[-1][1] > 0 and told == sorted(told)


@pytest.mark.parametrize("make", [tiny.pipeline, tiny.sdxl_pipeline])
def test_a_single_file_of_the_original_layout(tmp_path: Path, make: Callable[[], DiffusionPipeline]) -> None:
    pipe = make()
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(original_layout.single_file(pipe), base, {"format": "pt", "author": "me"})
    encoders = ("text_encoder", "text_encoder_2") if hasattr(pipe, "text_encoder_2") else ("text_encoder",)
    mix = mix_for(pipe, ("unet", *encoders))
    baked = bake_checkpoint(base, mix, out)
    activate(pipe, mix)
    expected, found, before = original_layout.single_file(pipe), load_file(out), load_file(base)
    assert found.keys() == before.keys() == expected.keys()
    assert all(tiny.same_bits(found[key], expected[key]) for key in expected)
    for part in ("model.diffusion_model", "cond_stage_model" if make is tiny.pipeline else "conditioner.embedders.1"):
        assert any(not torch.equal(found[key], before[key]) for key in found if key.startswith(part)), part
    assert header(base) == header(out)
    assert baked.files == ["out.safetensors"]


def test_all_weights_of_the_original_layout_are_found() -> None:
    """Those of the UNet and of the encoders' layers; a file with other keys has none."""
    for pipe in (tiny.pipeline(), tiny.sdxl_pipeline()):
        tensors = original_layout.single_file(pipe)
        rows = rows_by_name({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        named = {name for name in tiny.weights_of(pipe) if not name.startswith("vae.")}
        short = {name.replace(".text_model.", ".") for name in rows}
        missing = {name for name in named if name.replace(".text_model.", ".") not in short}
        assert missing <= {"text_encoder_2.text_projection.weight"}
        assert not rows_by_name({name: tuple(weight.shape) for name, weight in tiny.weights_of(pipe).items()})


def test_joint_tensors_of_transformers() -> None:
    """Of Flux and SD3, whose files have q, k and v in one tensor, and Flux's single blocks their MLP too."""
    width = 3072  # diffusers' conversion knows Flux of this width only
    ends = {"img_in": 64, "txt_in": 4096, "final_layer.linear": width, "final_layer.adaLN_modulation.1": width}
    ends |= {f"{part}.{layer}": width for part in ("time_in", "vector_in") for layer in ("in_layer", "out_layer")}
    shapes = {f"{name}.{leaf}": (width, 1) for name in ends for leaf in ("weight", "bias")}
    shapes |= {f"final_layer.adaLN_modulation.1.{leaf}": (2 * width, 1) for leaf in ("weight", "bias")}
    parts = {"mod.lin": 6, "attn.qkv": 3, "attn.proj": 1, "mlp.0": 4, "mlp.2": 1}
    for stream, (part, height), leaf in product(("img", "txt"), parts.items(), ("weight", "bias")):
        shapes[f"double_blocks.0.{stream}_{part}.{leaf}"] = (height * width, 1)
    for part, height in {"linear1": 7, "linear2": 1, "modulation.lin": 3}.items():
        shapes |= {f"single_blocks.0.{part}.{leaf}": (height * width, 1) for leaf in ("weight", "bias")}
    for owner in ("double_blocks.0.img_attn.", "double_blocks.0.txt_attn.", "single_blocks.0."):
        shapes |= {f"{owner}norm.{one}_norm.scale": (128,) for one in ("query", "key")}
    found = rows_by_name({f"model.diffusion_model.{key}": shape for key, shape in shapes.items()})
    expected = {
        "transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", width, width),
        "transformer_blocks.0.attn.add_v_proj": ("double_blocks.0.txt_attn.qkv", 2 * width, width),
        "transformer_blocks.0.ff_context.net.2": ("double_blocks.0.txt_mlp.2", 0, width),
        "single_transformer_blocks.0.attn.to_v": ("single_blocks.0.linear1", 2 * width, width),
        "single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", 3 * width, 4 * width),
    }
    for name, (key, first, height) in expected.items():
        assert found[f"transformer.{name}.weight"] == (f"model.diffusion_model.{key}.weight", first, height)
    assert "transformer.norm_out.linear.weight" not in found  # its halves change places
    assert not rows_by_name({key: shape for key, shape in shapes.items() if "mod.lin" not in key})


def test_one_model_alone(tmp_path: Path) -> None:
    """A component's file, its folder, and an adapter without component names."""
    model = tiny.unet()
    model.save_pretrained(tmp_path / "unet")
    adapter = tiny.adapter_for(model)
    bake_checkpoint(tmp_path / "unet", {"a": (adapter, 0.5)}, tmp_path / "folder")
    for name, named in (("plain", adapter), ("prefixed", adapter.prefixed("unet"))):
        bake_checkpoint(tmp_path / "unet" / UNET_FILE, {"a": (named, 0.5)}, tmp_path / f"{name}.safetensors")
    resident = Resident(model)
    resident.add(adapter, "a")
    resident.set({"a": 0.5})
    expected = tiny.snapshot(model)
    tiny.assert_same_bits(UNet2DConditionModel.from_pretrained(tmp_path / "folder"), expected)
    for name in ("plain", "prefixed"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert all(tiny.same_bits(found[key], weight) for key, weight in expected.items())


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    names, numel = [f"layers.{i}.weight" for i in range(12)], 512 * 1024
    save_file({name: torch.ones(512, 1024) for name in names}, tmp_path / "base.safetensors")
    delta = SparseDelta(torch.tensor([0, numel - 1]), torch.ones(2), (512, 1024))
    mix = {"a": (ShiraAdapter(dict.fromkeys(names, delta)), 1.0)}
    tracemalloc.start()
    bake_checkpoint(str(tmp_path / "base.safetensors"), mix, str(tmp_path / "out.safetensors"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * 4 * numel
    found = load_file(tmp_path / "out.safetensors")
    assert all(weight.sum() == numel + 2 for weight in found.values()) and len(found) == 12


def test_weights_without_the_mix_are_left_out(tmp_path: Path) -> None:
    """Pickles of an adapted model, and single files beside the folder's components; hidden files are not copied."""
    pipe = saved(tmp_path / "base")
    for name in ("unet/diffusion_pytorch_model.bin", "v1-5.ckpt", "v1-5.safetensors", "vae/model.bin", ".git/HEAD"):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_bytes(b"x")
    baked = bake_checkpoint(tmp_path / "base", mix_for(pipe), tmp_path / "out")
    assert baked.left_out == ["unet/diffusion_pytorch_model.bin", "v1-5.ckpt", "v1-5.safetensors"]
    left = contents(tmp_path / "base").keys() - contents(tmp_path / "out").keys()
    assert left == {*baked.left_out, ".git/HEAD"}


@pytest.mark.parametrize(
    ("target", "message"), [("nowhere", "links to nothing"), ("..", "links to a folder that it is in")]
)
def test_links_that_lead_nowhere_or_back_are_refused(tmp_path: Path, target: str, message: str) -> None:
    pipe = saved(tmp_path / "base")
    for name in ("vae/link", f"unet/{UNET_FILE}"):
        (tmp_path / "base" / name).unlink(missing_ok=True)
        (tmp_path / "base" / name).symlink_to(target)
        with pytest.raises(ShiraError, match=f"{name} {message}"):
            bake_checkpoint(tmp_path / "base", mix_for(pipe), tmp_path / "out")
    assert_nothing_left(tmp_path, {"base"})


def test_another_base_is_named(tmp_path: Path) -> None:
    pipe = saved(tmp_path / "base")
    deltas = tiny.adapter_for(pipe).deltas
    known = ShiraAdapter(deltas, {}, probe_base(deltas, tiny.weights_of(pipe)))
    other = ShiraAdapter(deltas, {}, {name: torch.randn(3).half() for name in known.base_probes})
    mix = {"known": (known, 1.0), "other": (other, 1.0), "bare": (ShiraAdapter(deltas), 1.0)}
    assert bake_checkpoint(tmp_path / "base", mix, tmp_path / "out").strangers == ["other"]


def assert_nothing_left(folder: Path, names: set[str]) -> None:
    assert {path.name for path in folder.iterdir()} == names


def test_what_does_not_fit_is_refused_with_nothing_written(tmp_path: Path) -> None:
    pipe = saved(tmp_path / "base")
    good = tiny.adapter_for(pipe)
    odd = SparseDelta(torch.tensor([1]), torch.ones(1), (2, 2))
    to_q = next(name for name in good.deltas if name.endswith("to_q.weight"))
    wrong = ShiraAdapter({**good.deltas, "unet.nowhere.weight": odd, "prior.weight": odd, to_q: odd})
    with pytest.raises(AdapterMismatchError) as caught:
        bake_checkpoint(tmp_path / "base", {"a": (wrong, 1.0)}, tmp_path / "out")
    message = str(caught.value)
    assert f"the mix does not fit {tmp_path / 'base'}: 3 of {len(wrong.deltas)} weights differ" in message
    assert "unet.nowhere.weight: no such tensor" in message and "prior.weight: no such tensor" in message
    assert f"{to_q}: expected (64, 64), got (2, 2)" in message
    with pytest.raises(AdapterMismatchError, match="holds no deltas"):
        bake_checkpoint(tmp_path / "base", {"a": (ShiraAdapter({}), 1.0)}, tmp_path / "out")
    assert_nothing_left(tmp_path, {"base"})


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_missing_shard_is_named(tmp_path: Path, variant: str | None) -> None:
    """Where a weight would be in it: an index may stay of a variant that was not fetched."""
    pipe = saved(tmp_path / "base", variant=variant, max_shard_size="200KB")
    mix, unet = mix_for(pipe), tmp_path / "base" / "unet"
    (index,) = unet.glob("*.index*.json")
    places = json.loads(index.read_text())["weight_map"]
    shard = unet / places[next(name for name in mix["b"][0].deltas if name.startswith("unet.")).removeprefix("unet.")]
    kept = shard.rename(tmp_path / "kept")
    with pytest.raises(AdapterFormatError) as caught:
        bake_checkpoint(tmp_path / "base", mix, tmp_path / "out")
    assert str(caught.value) == f"{index} names shards that are not there; get all files:\n  - {shard}"
    kept.rename(shard)
    stale = {key: f"gone-{name}" for key, name in places.items()}
    (unet / "other.safetensors.index.json").write_text(json.dumps({"weight_map": stale}))
    assert bake_checkpoint(tmp_path / "base", mix, tmp_path / "out").weights
    assert_nothing_left(tmp_path, {"base", "out"})


def test_weights_that_cannot_hold_it(tmp_path: Path) -> None:
    """Quantized ones, sums out of float16's range, and a damaged file: found before or while writing."""
    pipe = saved(tmp_path / "base", torch.float16)
    file = tmp_path / "base" / "unet" / UNET_FILE
    mix = mix_for(pipe)
    with pytest.raises(ShiraError, match=r"float16"):
        bake_checkpoint(tmp_path / "base", {"a": (mix["a"][0], 1e6)}, tmp_path / "out")
    whole = load_file(file)
    save_file({key: tensor.to(torch.int8) for key, tensor in whole.items()}, file)
    with pytest.raises(AdapterMismatchError, match=r"values of dtype I8, expected one of F64, F32, F16, BF16"):
        bake_checkpoint(tmp_path / "base", mix, tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(AdapterFormatError, match="damaged or truncated"):
        bake_checkpoint(tmp_path / "base", mix, tmp_path / "out")
    assert_nothing_left(tmp_path, {"base"})


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    pipe = saved(tmp_path / "base")
    file, mix = tmp_path / "base" / "unet" / UNET_FILE, mix_for(pipe)
    for base, output, message in (
        (tmp_path / "bases", tmp_path / "out", r"no checkpoint at .*bases: .*did you mean .*base\?"),
        (Path("owner/name"), tmp_path / "out", "no checkpoint at owner/name: .*hf download owner/name --local-dir"),
        (tmp_path / "base", tmp_path / "base", "base exists, expected a new folder; choose another name"),
        (file, file, "exists, expected a new file"),
        (file, tmp_path / "out", "is a single file: expected an output that ends in .safetensors"),
        (tmp_path / "base", tmp_path / "a" / "b", "expected a name in a folder that exists"),
    ):
        with pytest.raises(ShiraError, match=message):
            bake_checkpoint(base, mix, output)
    assert_nothing_left(tmp_path, {"base"})


@pytest.mark.parametrize("single", [False, True])
def test_an_error_while_writing_leaves_nothing(tmp_path: Path, single: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = saved(tmp_path / "base")
    base = tmp_path / "base" / "unet" / UNET_FILE if single else tmp_path / "base"
    overwrite, calls = bake._overwrite, iter(range(3))

    def fail(weights: dict[str, Tensor], mix: Mix) -> None:
        overwrite(weights, mix)
        if next(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(bake, "_overwrite", fail)
    with pytest.raises(OSError, match="No space left"):
        bake_checkpoint(base, mix_for(pipe, ("unet",)), tmp_path / "out.safetensors")
    assert_nothing_left(tmp_path, {"base"})


def test_a_weight_without_dimensions(tmp_path: Path) -> None:
    save_file({"s": torch.tensor(1.0), "w": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    adapter = ShiraAdapter({"s": SparseDelta(torch.tensor([0]), torch.tensor([0.5]), ())})
    bake_checkpoint(tmp_path / "m.safetensors", {"a": (adapter, 2.0)}, tmp_path / "o.safetensors")
    written = load_file(tmp_path / "o.safetensors")
    assert written["s"].shape == () and written["s"] == 2.0 and torch.equal(written["w"], torch.ones(2, 2))


def test_two_names_of_one_weight_are_refused(tmp_path: Path) -> None:
    pipe = saved(tmp_path / "base")
    adapter = tiny.adapter_for(pipe, only=("q_proj",))
    name = next(iter(adapter.deltas))
    other = name.replace("text_model.", "") if ".text_model." in name else name.replace(".", ".text_model.", 1)
    both = ShiraAdapter({name: adapter.deltas[name], other: tiny.adapter_for(pipe, 5, only=("q_proj",)).deltas[name]})
    with pytest.raises(AdapterMismatchError, match="the same tied weight here"):
        bake_checkpoint(tmp_path / "base", {"a": (both, 1.0)}, tmp_path / "out")
    assert_nothing_left(tmp_path, {"base"})


def test_the_metadata_stays(tmp_path: Path) -> None:
    pipe = saved(tmp_path / "base")
    bake_checkpoint(tmp_path / "base", mix_for(pipe), tmp_path / "out")
    with safe_open(tmp_path / "out" / "unet" / UNET_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    shutil.rmtree(tmp_path / "base")  # nothing of the copy is in it
    assert type(pipe).from_pretrained(tmp_path / "out")
