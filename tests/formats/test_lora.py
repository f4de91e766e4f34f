"""LoRA files of diffusers, PEFT and kohya converted: at density 1 the weights that their own libraries make of them."""

import json
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline, WanPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoHaConfig, LoKrConfig, OFTConfig, PeftConfig, get_peft_model
from peft.tuners.lora import config as lora_configs
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shira_diffusers import (
    AdapterFormatError,
    AdapterMismatchError,
    ResidentStateError,
    ShiraAdapter,
    ShiraError,
    SparseDelta,
    convert_lora,
    save_adapter,
)
from shira_diffusers.formats.peft_export import save_peft_adapter
from tests import loras, tiny

ROUNDING = {"rtol": 0.0, "atol": 4e-6}  # of float32, two of its steps for weights up to about 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One LoRA of UNet and text encoder as diffusers and as kohya write it, and the UNet's alone."""
    folder = tmp_path_factory.mktemp("loras")
    unet, text = loras.adapted(tiny.unet(), loras.UNET), loras.adapted(tiny.text_encoder(), loras.TEXT, 1)
    loras.of_diffusers(folder / "diffusers", unet, text)
    loras.of_diffusers(folder / "unet", unet)
    loras.of_kohya(folder / "kohya.safetensors", unet, text)
    return folder


def assert_weights(adapter: ShiraAdapter, expected: dict[str, torch.Tensor], component: str = "unet") -> None:
    """With the adapter active, a pipeline has these weights in one component, to rounding."""
    pipe = tiny.pipeline()
    pipe.load_shira(adapter, "it")
    own = tiny.weights_of(getattr(pipe, component))
    assert own.keys() == expected.keys()
    for name, weight in own.items():
        torch.testing.assert_close(weight, expected[name], **ROUNDING, msg=name)


@pytest.mark.parametrize("name", ["diffusers", "kohya.safetensors"])
def test_everything_is_as_peft_merges_it(files: Path, name: str) -> None:
    found = convert_lora(files / name, tiny.pipeline(), 1.0)
    assert_weights(found.adapter, loras.merged(loras.adapted(tiny.unet(), loras.UNET)))
    text = loras.merged(loras.adapted(tiny.text_encoder(), loras.TEXT, 1))
    assert_weights(found.adapter, text, "text_encoder")
    assert found.report.total.kept == pytest.approx(1.0)
    assert set(found.report.components) == {"unet", "text_encoder"}


def test_the_unet_is_as_diffusers_fuses_it(files: Path) -> None:
    twin = tiny.pipeline()
    twin.load_lora_weights(files / "unet")
    twin.fuse_lora(components=["unet"])
    assert_weights(convert_lora(files / "unet", tiny.pipeline(), 1.0).adapter, tiny.weights_of(twin.unet))


def test_a_dora_is_as_diffusers_fuses_it(tmp_path: Path) -> None:
    loras.of_diffusers(tmp_path, loras.adapted(tiny.unet(), loras.UNET, use_dora=True))
    twin = tiny.pipeline()
    twin.load_lora_weights(tmp_path)
    twin.fuse_lora(components=["unet"])
    assert_weights(convert_lora(tmp_path, tiny.pipeline(), 1.0).adapter, tiny.weights_of(twin.unet))


def test_magnitudes_of_lycoris_are_read(files: Path, tmp_path: Path) -> None:
    """They scale the rows of base + update to norms of their own; diffusers leaves them out."""
    state = load_file(files / "kohya.safetensors")
    path = "mid_block.resnets.0.conv1"
    layer = f"lora_unet_{path.replace('.', '_')}"
    magnitude = torch.rand(64, 1, 1, 1) + 0.5
    save_file(state | {f"{layer}.dora_scale": magnitude}, tmp_path / "dora.safetensors")
    base = tiny.weights_of(tiny.unet())[f"{path}.weight"]
    plain = loras.merged(loras.adapted(tiny.unet(), loras.UNET))
    expected = plain[f"{path}.weight"] / plain[f"{path}.weight"].flatten(1).norm(dim=1).view(-1, 1, 1, 1) * magnitude
    found = convert_lora(tmp_path / "dora.safetensors", tiny.pipeline(), 1.0).adapter
    torch.testing.assert_close(found.deltas[f"unet.{path}.weight"].to_dense(), expected - base)
    assert_weights(found, plain | {f"{path}.weight": expected})
    save_file(state | {f"{layer}.dora_scale": torch.rand(1, 64, 1, 1)}, tmp_path / "dora.safetensors")
    with pytest.raises(AdapterFormatError, match=r"one scale per output only:\n  - lora_unet_mid.*\(1, 64, 1, 1\)"):
        convert_lora(tmp_path / "dora.safetensors", tiny.pipeline())


@pytest.mark.parametrize(
    ("component", "targets", "options"),
    [
        ("unet", ["to_q", "conv1"], {"use_rslora": True, "lora_alpha": 7}),
        ("unet", ["to_q", "ff.net.2"], {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_q": 1}}),
        ("unet", ["to_v", "conv1"], {"use_dora": True}),
        ("text_encoder", ["q_proj", "fc1"], {"lora_alpha": 3}),
    ],
    ids=["rslora", "patterns", "dora", "text encoder"],
)
def test_peft_folders(tmp_path: Path, component: str, targets: list[str], options: dict[str, object]) -> None:
    expected = loras.of_peft(tmp_path, getattr(tiny.pipeline(), component), targets, **options)
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert_weights(convert_lora(source, tiny.pipeline(), 1.0).adapter, expected, component)


def test_modules_alone(files: Path, tmp_path: Path) -> None:
    """PEFT's folder for any module, and what ``save_lora_adapter`` writes for one of diffusers'."""
    model = tiny.linears()
    expected = loras.of_peft(tmp_path / "peft", tiny.linears(), ["0", "1"])
    found = convert_lora(tmp_path / "peft", model, 1.0)
    assert set(found.report.components) == {""}
    for name, delta in found.adapter.deltas.items():
        torch.testing.assert_close(tiny.weights_of(model)[name] + delta.to_dense(), expected[name])
    unet = tiny.unet()
    unet.add_adapter(unet_config := loras.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]))
    loras.randomized(unet, 0).save_lora_adapter(tmp_path / "own")
    assert unet_config.r == 2
    own = convert_lora(tmp_path / "own", tiny.unet(), 1.0).adapter
    whole = loras.merged(unet)
    for name, delta in own.deltas.items():
        torch.testing.assert_close(tiny.weights_of(tiny.unet())[name] + delta.to_dense(), whole[name])


def test_layers_besides_attention_as_the_training_scripts_save_them(tmp_path: Path) -> None:
    """Their converter renames only attention's matrices; diffusers' loader then leaves attention out, silently."""
    unet = loras.adapted(tiny.unet(), ["to_q", "conv1"], use_dora=True)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    assert {".lora.down." in key for key in state if "magnitude" not in key} == {True, False}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, state, unet_lora_adapter_metadata=unet.peft_config["default"].to_dict()
    )
    assert_weights(convert_lora(tmp_path, tiny.pipeline(), 1.0).adapter, loras.merged(unet))


def test_the_denoisers_own_file_for_a_pipeline(tmp_path: Path) -> None:
    """What ``pipe.transformer.save_lora_adapter`` writes names no component."""
    pipe = tiny.sd3_pipeline()
    pipe.transformer.add_adapter(loras.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"]))
    loras.randomized(pipe.transformer, 0).save_lora_adapter(tmp_path)
    own = convert_lora(tmp_path, tiny.sd3_pipeline(), 1.0).adapter
    whole = loras.merged(pipe.transformer)
    assert own.deltas
    for name, delta in own.part("transformer").deltas.items():
        before = tiny.weights_of(tiny.sd3_pipeline().transformer)[name]
        torch.testing.assert_close(before + delta.to_dense(), whole[name], **ROUNDING)


def test_alphas_and_ranks_of_each_layer(tmp_path: Path) -> None:
    """Each layer's own ``alpha / r`` counts, in attention too, where diffusers takes the commonest alpha."""
    state, expected = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, r, alpha in (
        ("attn1.to_q", 1, 1.0),
        ("attn1.to_k", 3, 2.0),
        ("ff.net.2", 3, 2.0),
        ("attn2.to_v", 3, 2.0),
    ):
        path = f"mid_block.attentions.0.transformer_blocks.0.{name}"
        width, height = tiny.weights_of(tiny.unet())[f"{path}.weight"].T.shape
        down, up = torch.randn(r, width), torch.randn(height, r)
        key = f"lora_unet_{path.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        expected[f"unet.{path}.weight"] = up @ down * (alpha / r)
    del state[f"{key}.alpha"]  # is r then
    expected[f"unet.{path}.weight"] = up @ down
    save_file(state, tmp_path / "mixed.safetensors")
    found = convert_lora(tmp_path / "mixed.safetensors", tiny.pipeline(), 1.0).adapter
    assert found.deltas.keys() == expected.keys()
    for name, delta in found.deltas.items():
        torch.testing.assert_close(delta.to_dense(), expected[name])


def test_three_factors_of_a_convolution(tmp_path: Path) -> None:
    """LyCORIS' LoCon with ``use_tucker``: 1 x 1 down, 3 x 3 in the middle, 1 x 1 up."""
    path, key = "mid_block.resnets.0.conv1", "lora_unet_mid_block_resnets_0_conv1"
    down, mid, up = torch.randn(2, 64, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(64, 2, 1, 1)
    factors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    save_file({f"{key}.{name}": tensor for name, tensor in factors.items()}, tmp_path / "tucker.safetensors")
    found = convert_lora(tmp_path / "tucker.safetensors", tiny.pipeline(), 1.0).adapter
    expected = torch.einsum("or,rshw,si->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0]) / 2
    torch.testing.assert_close(found.deltas[f"unet.{path}.weight"].to_dense(), expected)


@pytest.mark.parametrize("kind", ["diff_b", "w_norm", "hada_w1_a", "oft_blocks", "scalar"])
def test_a_lora_with_more_in_it(files: Path, tmp_path: Path, kind: str) -> None:
    """What LyCORIS puts beside factors is not left out without a word, and the remedy is one."""
    state = load_file(files / "kohya.safetensors")
    key = f"lora_unet_conv_out.{kind}"
    save_file(state | {key: torch.ones(4)}, tmp_path / "more.safetensors")
    with pytest.raises(AdapterFormatError, match=rf"1 of {len(state) + 1} tensors is of another.*extract:\n  - {key}"):
        convert_lora(tmp_path / "more.safetensors", tiny.pipeline())


@pytest.mark.parametrize("factor", ["lora_down.weight", "lora_up.weight", "lora_mid.weight"])
def test_factors_without_dimensions(files: Path, tmp_path: Path, factor: str) -> None:
    key = f"lora_unet_mid_block_resnets_0_conv1.{factor}"
    save_file(load_file(files / "kohya.safetensors") | {key: torch.tensor(1.0)}, tmp_path / "zero.safetensors")
    with pytest.raises(AdapterFormatError, match=rf"expected factors of two dimensions or more, .*\n  - {key}: \(\)"):
        convert_lora(tmp_path / "zero.safetensors", tiny.pipeline())


def test_biases_are_refused(tmp_path: Path) -> None:
    loras.of_peft(tmp_path / "peft", tiny.unet(), ["conv1"], lora_bias=True)
    loras.of_diffusers(tmp_path / "diffusers", loras.adapted(tiny.unet(), ["conv1"], lora_bias=True))
    for source in (tmp_path / "peft", tmp_path / "diffusers"):
        with pytest.raises(AdapterFormatError, match=r"changes biases too \(lora_bias\).*\n  - unet\..*conv1.weight"):
            convert_lora(source, tiny.pipeline())


@pytest.mark.parametrize(
    "config",
    [
        OFTConfig(r=0, oft_block_size=4, target_modules=["to_q", "conv1"]),
        LoHaConfig(r=2, alpha=3, target_modules=["to_q", "conv1"]),
        LoKrConfig(r=2, alpha=3, target_modules=["to_q", "conv1"]),
    ],
    ids=["oft", "loha", "lokr"],
)
def test_other_methods_of_peft(tmp_path: Path, config: PeftConfig) -> None:
    """As PEFT merges them; OFT turns the base's own rows."""
    model = get_peft_model(tiny.unet(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad * 0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    assert_weights(convert_lora(tmp_path, tiny.pipeline(), 1.0).adapter, tiny.weights_of(model.merge_and_unload()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "of another method: expected LORA, LOHA, LOKR, OFT, got IA3; merge it"),
        ({"alora_invocation_tokens": [1]}, "got an aLoRA, which acts on some tokens only"),
        ({"peft_type": "FOO"}, r"adapter_config.json is no configuration of PEFT's .KeyError: 'FOO'.; get an intact"),
        (
            {"megatron_config": {"a": 1}, "megatron_core": "megatron.core"},
            "cannot be loaded into this model by PEFT .ModuleN",
        ),
        ({"r": 10**10}, r"claims a rank of 10,000,000,000, expected one of \d+ or less, as its tensors have"),
        ({"rank_pattern": {"to_q": 10**10}}, "claims a rank of 10,000,000,000, expected"),
        ({"alpha_pattern": {"(": 1}}, r"its configuration is damaged: .*\(\(\).* is no regular expression .missing \)"),
        ({"exclude_modules": "("}, r"its configuration is damaged: '\(' is no regular expression .missing \)"),
    ],
    ids=["ia3", "alora", "unknown", "a library that is not there", "r", "rank_pattern", "alpha_pattern", "exclude"],
)
def test_configurations_that_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    loras.of_peft(tmp_path, tiny.unet(), ["to_q"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises((AdapterFormatError, AdapterMismatchError), match=message):
        convert_lora(tmp_path, tiny.pipeline())


def with_header(folder: Path, extra: dict[str, torch.Tensor], **change: object) -> Path:
    """A UNet's LoRA of diffusers, with more tensors and with some of its configuration changed."""
    file = loras.of_diffusers(folder, loras.adapted(tiny.unet(), ["to_q"])) / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    config |= {f"unet.{key}": value for key, value in change.items()}
    save_file(load_file(file) | extra, file, {"lora_adapter_metadata": json.dumps(config)})
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 10**10}, "claims a rank of 10,000,000,000, expected one of 64 or less"),
        ({"rank_pattern": {"to_q": 10**10}}, "claims a rank of 10,000,000,000, expected one of 64 or less"),
        ({"alpha_pattern": {"(": 1}}, r"its configuration is damaged: '.*' is no regular expression"),
    ],
    ids=str,
)
def test_headers_that_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(AdapterFormatError, match=message):
        convert_lora(with_header(tmp_path, {}, **change), tiny.pipeline())


@pytest.mark.parametrize("config", ["{", "[" * 100_000, "[]"], ids=["cut", "nested", "list"])
def test_a_damaged_configuration_in_a_header(files: Path, tmp_path: Path, config: str) -> None:
    state = load_file(files / "unet" / "pytorch_lora_weights.safetensors")
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": config})
    with pytest.raises(AdapterFormatError, match="its header is damaged: expected a JSON object as lora_adapter_meta"):
        convert_lora(tmp_path / "a.safetensors", tiny.pipeline())


def test_a_scale_in_header_and_tensors_is_refused(tmp_path: Path) -> None:
    """diffusers refuses it too; the header was left out, so that layers without an alpha got another scale."""
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.alpha"
    file = with_header(tmp_path, {key: torch.tensor(5.0)})
    with pytest.raises(AdapterFormatError, match=rf"says scales twice: in its header .lora_adapter_.* and in {key}"):
        convert_lora(file, tiny.pipeline())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_lora_that_changed_its_base_is_refused(tmp_path: Path, start: str) -> None:
    """PEFT takes the start away from the base when it loads such a folder: ``B A`` alone is another update."""
    loras.of_peft(tmp_path, tiny.unet(), ["to_q"], init_lora_weights=start)
    with pytest.raises(AdapterFormatError, match=f"started from a changed base .init_lora_weights='{start}'"):
        convert_lora(tmp_path, tiny.pipeline())


def test_a_kasa_is_refused(tmp_path: Path) -> None:
    """It truncates the base when it is put into a model, and ``lora_diag`` is between its factors."""
    if not hasattr(lora_configs, "KasaConfig"):
        pytest.skip("this PEFT has no KaSA")
    loras.of_peft(tmp_path, tiny.unet(), ["to_q"], kasa_config=lora_configs.KasaConfig())
    with pytest.raises(AdapterFormatError, match="is a KaSA, which takes singular values away from the base"):
        convert_lora(tmp_path, tiny.pipeline())


@pytest.mark.parametrize("num_samples", [4, 10**12])
def test_a_monteclora_is_as_peft_merges_it(tmp_path: Path, num_samples: int) -> None:
    """Its noise is of the training alone: no memory is taken for it, whatever the configuration says."""
    if not hasattr(lora_configs, "MontecloraConfig"):
        pytest.skip("this PEFT has no MonteCLoRA")
    noise = lora_configs.MontecloraConfig(num_samples=4, buffer_size=2)
    expected = loras.of_peft(tmp_path, tiny.unet(), ["to_q", "to_k"], monteclora_config=noise)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["monteclora_config"] |= {"num_samples": num_samples}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_weights(convert_lora(tmp_path, tiny.pipeline(), 1.0).adapter, expected)


@pytest.mark.parametrize("factor", ["target_modules_bd_a", "target_modules_bd_b"])
def test_block_diagonal_factors_are_as_peft_merges_them(tmp_path: Path, factor: str) -> None:
    if not hasattr(lora_configs, "BdLoraConfig"):
        pytest.skip("this PEFT has no BD-LoRA")
    blocks = lora_configs.BdLoraConfig(**{factor: ["to_q"]}, nblocks=2, match_strict=False)
    expected = loras.of_peft(tmp_path, tiny.unet(), ["to_q", "to_k"], r=4, use_bdlora=blocks)
    assert_weights(convert_lora(tmp_path, tiny.pipeline(), 1.0).adapter, expected)


@pytest.mark.parametrize("old", ["text_model.", "^text_model.", r"text_model\."])
def test_patterns_by_the_older_names_of_a_text_encoder(tmp_path: Path, old: str) -> None:
    """As transformers before 5.6 has them: they name the same layers."""
    layers = [f"encoder.layers.{number}.self_attn.q_proj" for number in (0, 1)]
    patterns = {"alpha_pattern": {layers[0]: 9}, "rank_pattern": {layers[1]: 4}}
    expected = loras.of_peft(tmp_path, tiny.text_encoder(), ["q_proj"], **patterns)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    state = {key.replace(".encoder.", ".text_model.encoder."): tensor for key, tensor in load_file(weights).items()}
    save_file(state, weights)
    renamed = {name: {old + key: value for key, value in own.items()} for name, own in patterns.items()}
    config.write_text(json.dumps(json.loads(config.read_text()) | renamed))
    assert_weights(convert_lora(tmp_path, tiny.pipeline(), 1.0).adapter, expected, "text_encoder")


def test_patterns_by_the_older_names_in_a_header(tmp_path: Path) -> None:
    alphas = {"encoder.layers.0.self_attn.q_proj": 9}
    text = loras.adapted(tiny.text_encoder(), ["q_proj"], alpha_pattern=alphas)
    text.peft_config["default"].alpha_pattern = {f"text_model.{key}": alpha for key, alpha in alphas.items()}
    loras.of_diffusers(tmp_path, loras.adapted(tiny.unet(), ["to_q"]), text)
    assert_weights(convert_lora(tmp_path, tiny.pipeline(), 1.0).adapter, loras.merged(text), "text_encoder")


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B", "lora_magnitude"])
def test_a_layer_without_one_of_its_tensors(tmp_path: Path, matrix: str) -> None:
    loras.of_peft(tmp_path / "peft", tiny.unet(), ["to_q", "to_v"], use_dora=True)
    loras.of_diffusers(tmp_path / "diffusers", loras.adapted(tiny.unet(), ["to_q", "to_v"], use_dora=True))
    for file in tmp_path.glob("*/*.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        state = load_file(file)
        del state[next(key for key in sorted(state) if matrix in key)]
        save_file(state, file, metadata)
        with pytest.raises((AdapterFormatError, AdapterMismatchError), match=r"incomplete|does not fit"):
            convert_lora(file, tiny.pipeline())


def test_sdxl_of_kohya(tmp_path: Path) -> None:
    """Two text encoders, of which each gets its own part."""
    pipe = tiny.sdxl_pipeline()
    state = loras.kohya_keys(loras.adapted(tiny.sdxl_pipeline().unet, ["to_q", "ff.net.2"]), "lora_unet", 5.0)
    for number, part in ((1, "text_encoder"), (2, "text_encoder_2")):
        model = loras.adapted(getattr(tiny.sdxl_pipeline(), part), loras.TEXT, number)
        keys = loras.kohya_keys(model, "lora_te", 5.0)
        renamed = {
            key.replace("lora_te_text_model_", "lora_te_").replace("lora_te_", f"lora_te{number}_text_model_"): tensor
            for key, tensor in keys.items()
        }
        state |= renamed
    save_file(state, tmp_path / "sdxl.safetensors")
    adapter = convert_lora(tmp_path / "sdxl.safetensors", pipe, 1.0).adapter
    assert {name.partition(".")[0] for name in adapter.deltas} == {"unet", "text_encoder", "text_encoder_2"}
    second = loras.merged(loras.adapted(tiny.sdxl_pipeline().text_encoder_2, loras.TEXT, 2))
    pipe.load_shira(adapter)
    for name, weight in tiny.weights_of(pipe.text_encoder_2).items():
        torch.testing.assert_close(weight, second[name], **ROUNDING)


def test_the_target_is_untouched_and_its_mix_comes_back(files: Path) -> None:
    pipe = tiny.pipeline()
    before = tiny.snapshot(pipe)
    plain = convert_lora(files / "kohya.safetensors", pipe, 0.05).adapter
    tiny.assert_same_bits(pipe, before)
    pipe.load_shira(tiny.adapter_for(pipe), "other")
    with_mix, layers = tiny.snapshot(pipe), [type(module) for module in pipe.unet.modules()]
    again = convert_lora(files / "kohya.safetensors", pipe, 0.05)
    tiny.assert_same_bits(pipe, with_mix)
    assert pipe.get_active_shira() == {"other": 1.0}
    assert [type(module) for module in pipe.unet.modules()] == layers
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())
    tiny.assert_same_adapter(again.adapter, plain)  # the mix is not taken for the base
    assert all(torch.equal(again.adapter.base_probes[name], probe) for name, probe in plain.base_probes.items())
    assert plain.base_probes


def test_fp16_pipelines_with_offloading(files: Path) -> None:
    """The update does not depend on the base's dtype, nor on where it lies."""
    expected = convert_lora(files / "kohya.safetensors", tiny.pipeline(), 0.05).adapter
    pipe = tiny.pipeline(torch.float16)
    for model in tiny.modules_of(pipe).values():  # as enable_sequential_cpu_offload does
        accelerate.cpu_offload(model, torch.device("cpu"))
    tiny.assert_same_adapter(convert_lora(files / "kohya.safetensors", pipe, 0.05).adapter, expected)
    assert pipe.unet.conv_in._hf_hook is not None
    calibrated = convert_lora(files / "unet", pipe, 0.05, calibration=lambda: tiny.run_unet(pipe.unet)).adapter
    assert calibrated.nnz == convert_lora(files / "unet", tiny.pipeline(), 0.05).adapter.nnz


def test_a_lora_beside_and_a_fused_one(files: Path) -> None:
    pipe = tiny.pipeline()
    expected = convert_lora(files / "unet", pipe, 0.05).adapter
    pipe.load_lora_weights(files / "unet", adapter_name="beside")
    tiny.assert_same_adapter(convert_lora(files / "unet", pipe, 0.05).adapter, expected)
    assert pipe.get_list_adapters() == {"unet": ["beside"]}
    pipe.fuse_lora(components=["unet"])
    with pytest.raises(ResidentStateError, match="has a LoRA fused"):
        convert_lora(files / "unet", pipe, 0.05)


def test_metadata_says_what_was_done(files: Path) -> None:
    def draw() -> None:
        tiny.picture(pipe)

    pipe = tiny.pipeline()
    found = convert_lora(files / "kohya.safetensors", pipe, 0.05, ranking="global", calibration=draw)
    metadata = dict(found.adapter.metadata)
    assert metadata["source"] == "lora" and metadata["lora"] == "kohya.safetensors"
    assert metadata["mask"] == "top-global" and metadata["calibrated"] == "1"
    assert float(metadata["energy_kept"]) == pytest.approx(found.report.total.kept, abs=1e-4)
    assert found.report.total.kept < float(metadata["effect_kept"]) < 1


def test_progress_counts_weights(files: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = convert_lora(files / "unet", tiny.pipeline(), 0.05, ranking="layer", progress=lambda *at: seen.append(at))
    assert seen == [(k + 1, len(found.adapter.deltas)) for k in range(len(found.adapter.deltas))]


def _damaged(folder: Path, files: Path) -> dict[str, tuple[Path, type[ShiraError | OSError], str]]:
    good = load_file(files / "kohya.safetensors")
    shira = save_adapter(tiny.adapter_for(tiny.pipeline()), folder / "shira.safetensors")
    loras.of_peft(folder / "peft", tiny.unet(), ["to_q"])
    delta = SparseDelta(torch.arange(48, dtype=torch.int32), torch.ones(48), (16, 32))
    save_peft_adapter(ShiraAdapter({"0.weight": delta}), folder / "peft shira")
    (folder / "loose").mkdir()
    (folder / "peft" / "adapter_model.safetensors").rename(folder / "loose" / "adapter_model.safetensors")
    made = {
        "loha": {"lora_unet_mid_block_resnets_0_conv1.hada_w1_a": torch.ones(2, 2)},
        "half": {key: tensor for key, tensor in good.items() if "lora_up" not in key},
        "rank 0": {key: t if t.ndim == 0 else t[:0] if "down" in key else t[:, :0] for key, t in good.items()},
        "other": {"conv.weight": torch.ones(2)},
        "nan": {key: tensor * torch.nan for key, tensor in good.items()},
    }
    paths = {name: folder / f"{name}.safetensors" for name in (*made, "cut", "pickle")}
    for name, tensors in made.items():
        save_file(tensors, paths[name])
    paths["cut"].write_bytes((files / "kohya.safetensors").read_bytes()[:-50])
    torch.save(good, paths["pickle"])
    return {
        "missing": (folder / "nowhere", FileNotFoundError, "no adapter at"),
        "ours": (shira, AdapterFormatError, "is a SHiRA adapter already"),
        "peft's": (folder / "peft shira", AdapterFormatError, "is a SHiRA adapter already"),
        "loha": (paths["loha"], AdapterFormatError, "is more than a LoRA or a LoCon: 1 of 1 tensor"),
        "half": (paths["half"], AdapterMismatchError, "cannot be loaded into this model by diffusers"),
        "rank 0": (
            paths["rank 0"],
            AdapterMismatchError,
            "a positive integer value but the value passed is 0",
        ),
        "other": (paths["other"], AdapterFormatError, "is no LoRA: expected keys with lora_A.* got 'conv.weight'"),
        "nan": (paths["nan"], AdapterFormatError, "the update holds NaN or infinity"),
        "cut": (paths["cut"], AdapterFormatError, "damaged or truncated"),
        "pickle": (paths["pickle"], AdapterFormatError, "a pickle, which is never loaded"),
        "no weights": (folder / "peft", AdapterFormatError, "has no adapter_model.safetensors"),
        "no config": (folder / "loose", AdapterFormatError, "needs the adapter_config.json"),
    }


KINDS = (
    "missing",
    "ours",
    "peft's",
    "loha",
    "half",
    "rank 0",
    "other",
    "nan",
    "cut",
    "pickle",
    "no weights",
    "no config",
)


@pytest.fixture(scope="module")
def damaged(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, type[Exception], str]]:
    return _damaged(tmp_path_factory.mktemp("damaged"), files)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_factors_in_8_bit_floats(files: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {k: t.to(dtype) if t.ndim else t for k, t in load_file(files / "kohya.safetensors").items()}
    save_file(stored, tmp_path / "lora8.safetensors")
    (tmp_path / "wide").mkdir()
    save_file({key: tensor.float() for key, tensor in stored.items()}, tmp_path / "wide" / "lora8.safetensors")
    narrow, wide = (
        convert_lora(folder / "lora8.safetensors", tiny.pipeline()).adapter for folder in (tmp_path, tmp_path / "wide")
    )
    tiny.assert_same_adapter(narrow, wide)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_files(damaged: dict[str, tuple[Path, type[Exception], str]], kind: str) -> None:
    file, error, message = damaged[kind]
    pipe = tiny.pipeline()
    before = tiny.snapshot(pipe)
    with pytest.raises(error, match=message):
        convert_lora(file, pipe)
    tiny.assert_same_bits(pipe, before)


def test_layers_of_other_shapes_that_diffusers_lets_pass(tmp_path: Path) -> None:
    """It widens layers of Flux for LoRAs with more inputs."""
    key = "transformer.transformer_blocks.0.attn.to_q"
    state = {f"{key}.lora_A.weight": torch.ones(2, 33), f"{key}.lora_B.weight": torch.ones(32, 2)}
    save_file(state, tmp_path / "wide.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"to_q.weight: expected an update of \(32, 32\), got \(32, 33\)"):
        convert_lora(tmp_path / "wide.safetensors", tiny.flux_pipeline())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny.sdxl_pipeline, "cannot be loaded into this model by diffusers .*size mismatch"),
        (tiny.sd3_pipeline, "does not fit: 0 of its"),
        (tiny.unet, "a UNet2DConditionModel alone does not know these keys; give the pipeline"),
    ],
    ids=["sdxl", "sd3", "module"],
)
def test_other_models(files: Path, make: Callable[[], StableDiffusionPipeline], message: str) -> None:
    with pytest.raises(AdapterMismatchError, match=message):
        convert_lora(files / "kohya.safetensors", make())


def test_peft_for_no_model_or_several(tmp_path: Path) -> None:
    loras.of_peft(tmp_path, tiny.unet(), ["to_q"])
    with pytest.raises(AdapterMismatchError, match=r"does not fit: \d+ of its \d+ tensors belong to no layer"):
        convert_lora(tmp_path, tiny.sd3_pipeline())
    two = {"one": tiny.unet(), "two": tiny.unet(1)}
    with pytest.raises(ShiraError, match="fits several models: one, two"):
        convert_lora(tmp_path, two)
    found = convert_lora(tmp_path, two, component="two").adapter
    assert all(name.startswith("two.") for name in found.deltas)
    with pytest.raises(ShiraError, match="no component 'three', expected one of one, two"):
        convert_lora(tmp_path, two, component="three")


@pytest.mark.parametrize("name", ["diffusers", "kohya.safetensors"])
def test_one_component_of_a_file(files: Path, name: str) -> None:
    """The part of the whole file's update that is its own; what the file has for others is left out."""
    whole = convert_lora(files / name, tiny.pipeline(), 1.0).adapter
    for part in ("unet", "text_encoder"):
        found = convert_lora(files / name, tiny.pipeline(), 1.0, component=part).adapter
        tiny.assert_same_adapter(found, whole.part(part).prefixed(part))
    with pytest.raises(AdapterMismatchError, match="nothing for the component 'vae', expected one of text_encoder, un"):
        convert_lora(files / name, tiny.pipeline(), component="vae")
    with pytest.raises(ShiraError, match="no component 'other', expected one of vae, text_encoder, unet"):
        convert_lora(files / name, tiny.pipeline(), component="other")
    with pytest.raises(ShiraError, match="component 'unet' of a single model, expected none"):
        convert_lora(files / name, tiny.unet(), component="unet")


def test_the_second_transformer_of_wan(tmp_path: Path) -> None:
    """Its LoRAs are files that name the first one, as diffusers' ``load_into_transformer_2`` expects; or none."""
    pipe = wan_pipeline()
    pipe.transformer.add_adapter(loras.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"]))
    loras.randomized(pipe.transformer, 0).save_lora_adapter(tmp_path / "own")
    WanPipeline.save_lora_weights(tmp_path / "named", get_peft_model_state_dict(pipe.transformer))
    for source in (tmp_path / "named", tmp_path / "own"):
        first = convert_lora(source, wan_pipeline(), 1.0).adapter
        second = convert_lora(source, wan_pipeline(), 1.0, component="transformer_2").adapter
        tiny.assert_same_adapter(second, first.part("transformer").prefixed("transformer_2"))


def wan_pipeline() -> WanPipeline:
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=tiny.wan_transformer(),
        transformer_2=tiny.wan_transformer(),
    )


def test_peft_of_another_kind(tmp_path: Path) -> None:
    """Weights that were saved whole are no part of a LoRA: refused, not left out."""
    loras.of_peft(tmp_path, tiny.unet(), ["to_q"], modules_to_save=["conv_in"])
    with pytest.raises(AdapterMismatchError, match=r"belong to no layer.*\n  - .*conv_in"):
        convert_lora(tmp_path, tiny.pipeline())


@pytest.mark.parametrize(("options", "message"), [({"density": 0.0}, "density"), ({"ranking": "best"}, "ranking")])
def test_bad_arguments(files: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ShiraError, match=message):
        convert_lora(files / "kohya.safetensors", tiny.pipeline(), **options)


def test_the_config_of_a_folder_counts(tmp_path: Path) -> None:
    """``lora_alpha`` is nowhere else: twice the alpha, twice the update."""
    loras.of_peft(tmp_path, tiny.unet(), ["to_q"])
    one = convert_lora(tmp_path, tiny.pipeline(), 1.0).adapter
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    two = convert_lora(tmp_path, tiny.pipeline(), 1.0).adapter
    assert all(torch.equal(2 * one.deltas[name].values, two.deltas[name].values) for name in one.deltas)
