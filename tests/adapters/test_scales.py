"""Strengths by component, block and layer: diffusers' own expansion of them is the oracle."""

import copy
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

from shira_diffusers import Resident, ShiraAdapter, ShiraError
from shira_diffusers.adapters.scales import blocks_of, check_scale, scale_of
from shira_diffusers.integrations.attention import remove_shira_attn_processors, set_shira_attn_processors
from tests import reference, tiny

SD15 = {
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
SDXL = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
}
WITH_ATTENTION = {"SD 1.5": {"down": (0, 1, 2), "up": (1, 2, 3)}, "SDXL": {"down": (1, 2), "up": (0, 1)}}


def denoiser(family: str) -> UNet2DConditionModel:
    return tiny.unet(**(SD15 if family == "SD 1.5" else SDXL))


def block_forms(family: str, section: str, layers: int) -> list[Any]:
    """None, a number, lists, and for the first two blocks with attention each of nothing, a number and lists."""
    several = [0.25 * (layer + 1) for layer in range(layers)]
    nodes = (None, 0.5, [0.75], several)
    blocks = [f"block_{i}" for i in WITH_ATTENTION[family][section]][:2]
    forms = [{b: n for b, n in zip(blocks, each, strict=True) if n is not None} for each in product(nodes, repeat=2)]
    return [None, 0.5, [0.75], several, *filter(None, forms)]


def forms_of(family: str) -> list[dict[str, Any]]:
    down, up = block_forms(family, "down", 2), block_forms(family, "up", 3)
    together = zip(down, [0.3, [0.3], None] * 9, up, strict=False)
    every = [*((form, None, None) for form in down), *((None, None, form) for form in up), *together]
    forms = [{k: v for k, v in zip(("down", "mid", "up"), form, strict=True) if v is not None} for form in every]
    return [form for form in forms if form]


def expected_scale(expanded: dict[str, float], name: str) -> float:
    """As PEFT's layers take it from what diffusers expands, see ``set_weights_and_activate_adapters``."""
    return next((scale for layer, scale in expanded.items() if layer in name), 1.0)


@pytest.mark.parametrize("family", ["SD 1.5", "SDXL"])
def test_all_forms_of_diffusers(family: str) -> None:
    unet = denoiser(family)
    names = [name for name in tiny.weights_of(unet) if ".attentions." in name]
    assert len(names) > 100
    forms = forms_of(family)
    assert len(forms) > 50
    for form in forms:
        scale = check_scale("a", {"unet": form}, {"unet": blocks_of(unet)})
        expanded = _maybe_expand_lora_scales(unet, [copy.deepcopy(form)])[0]
        wrong = [name for name in names if scale_of(scale, "unet", name) != expected_scale(expanded, name)]
        assert not wrong, (form, wrong)


FINER = [
    {"down": {"block_1": 0.5}},
    {"up": {"block_0": [0.5, 0.2, 1.5]}, "mid": [0.1]},
    {"down": [0.0, 2.0], "up": {"block_1": [0.3], "block_2": 0.0}},
]


@pytest.mark.parametrize("family", ["SD 1.5", "SDXL"])
def test_finer_scales_to_the_bit(family: str) -> None:
    """On all weights: those of resnets and samplers too."""
    unet = denoiser(family)
    adapters = {name: tiny.adapter_for(unet, i, only=("",)).prefixed("unet") for i, name in enumerate("ab")}
    base = {f"unet.{name}": weight for name, weight in tiny.snapshot(unet).items()}
    resident = Resident({"unet": unet})
    for name, adapter in adapters.items():
        resident.add(adapter, name)
    for mix in (*({"a": {"unet": blocks}} for blocks in FINER), {"a": {"unet": FINER[1]}, "b": {"unet": FINER[2]}}):
        resident.set(mix)
        assert resident.active == mix
        expected = reference.apply(base, adapters, mix)
        tiny.assert_same_bits(unet, {name.removeprefix("unet."): weight for name, weight in expected.items()})
    resident.clear()
    tiny.assert_same_bits(unet, {name.removeprefix("unet."): weight for name, weight in base.items()})


def test_a_layer_and_its_samplers() -> None:
    blocks = {"down": {"block_1": [0.5, 0.2]}}
    names = {"attentions.0.x": 0.5, "resnets.1.x": 0.2, "downsamplers.0.conv.weight": 0.5}
    for name, scale in names.items():
        assert scale_of({"unet": blocks}, "unet", f"down_blocks.1.{name}") == scale
        assert scale_of({"unet": blocks}, "unet", f"down_blocks.2.{name}") == 1.0
        assert scale_of({"unet": blocks}, "text_encoder", f"down_blocks.1.{name}") == 1.0
    assert scale_of({"unet": blocks}, "unet", "conv_in.weight") == 1.0


def test_lists_of_numpy_and_torch_are_copied() -> None:
    unet = denoiser("SDXL")
    given = [0.5, 0.25, 1.0]
    for layers in (given, tuple(given), np.array(given), torch.tensor(given), [np.float32(0.5), 0.25, torch.tensor(1)]):
        checked = check_scale("a", {"unet": {"up": {"block_0": layers}}}, {"unet": blocks_of(unet)})
        assert checked == {"unet": {"up": {"block_0": given}}}
        assert checked["unet"]["up"]["block_0"] is not layers


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (
            {"unet": {"down": {"block_3": 1.0}}},
            r"unet\.down\.'block_3': no such block, the model has block_0, block_1, b",
        ),
        ({"unet": {"down": {"1": 1.0}}}, r"unet\.down\.'1': no such block"),
        ({"unet": {"down": {1: 1.0}}}, r"unet\.down\.1: no such block"),
        ({"unet": {"mid": {"block_0": 1.0}}}, r"unet\.mid\.'block_0': no such block, the model has no numbered"),
        ({"unet": {"down": {"block_1": [1.0, 2.0, 3.0]}}}, r"down\.block_1: expected 2 numbers, one per layer.*got 3"),
        ({"unet": {"up": [1.0, 2.0]}}, r"unet\.up: expected 3 numbers"),
        ({"unet": {"up": []}}, r"unet\.up: expected 3 numbers, one per layer, or a list of one, got 0"),
        ({"unet": {"mid": [1.0, 2.0]}}, r"unet\.mid: expected 1 numbers"),
        ({"unet": {"up": {"block_0": [1.0, torch.nan, "x"]}}}, r"block_0\[1\]: nan\n  - unet\.up\.block_0\[2\]: 'x'"),
        ({"unet": {"up": {"block_0": {"0": 1.0}}}}, r"unet\.up\.block_0: \{'0': 1\.0\}"),
        ({"unet": [1.0, 2.0]}, r"unet: \[1\.0, 2\.0\]"),
        ({"text_encoder": {"down": 0.5}}, r"text_encoder\.'down': no such block, the model has none"),
        ({"vae": 0.5}, r"components of \['text_encoder', 'unet'\][\s\S]*'vae': no such component in this adapter"),
    ],
)
def test_what_is_not_there(scale: object, message: str) -> None:
    """Diffusers raises for some of these, and passes over others."""
    unet, encoder = denoiser("SDXL"), tiny.text_encoder()
    resident = Resident({"unet": unet, "text_encoder": encoder, "vae": tiny.autoencoder()})
    weights = {"unet": unet, "text_encoder": encoder}
    deltas = {n: d for part, m in weights.items() for n, d in tiny.adapter_for(m).prefixed(part).deltas.items()}
    resident.add(ShiraAdapter(deltas), "a")
    resident.set({"a": 0.5})
    before = tiny.snapshot(unet)
    with pytest.raises(ShiraError, match=message):
        resident.set({"a": scale})
    tiny.assert_same_bits(unet, before)
    assert resident.active == {"a": 0.5}


def test_a_list_for_blocks_of_different_numbers_of_layers() -> None:
    unet = {"unet": {"down": (1, 2)}}
    expected = r"unet\.down: expected a list of one number, or \{'block_0': .* its blocks have 1 or 2 layers, got 2$"
    with pytest.raises(ShiraError, match=expected):
        check_scale("a", {"unet": {"down": [0.5, 1.0]}}, unet)
    for fits in ([0.5], {"block_0": [0.5], "block_1": [0.5, 1.0]}):
        assert check_scale("a", {"unet": {"down": fits}}, unet) == {"unet": {"down": fits}}


def test_blocks_of_models() -> None:
    assert blocks_of(denoiser("SD 1.5")) == {"down": (2, 2, 2, 2), "mid": (1,), "up": (3, 3, 3, 3)}
    assert blocks_of(tiny.text_encoder()) == blocks_of(tiny.sd3_transformer()) == {}


def test_finer_scales_beside_a_model() -> None:
    unet = denoiser("SD 1.5")
    adapter = tiny.adapter_for(unet, only=("attn", "ff.net"))
    both = ShiraAdapter(
        {**adapter.prefixed("unet").deltas, **tiny.adapter_for(tiny.text_encoder()).prefixed("te").deltas}
    )
    scale = {"unet": {"down": {"block_1": [0.5, 0.0]}, "up": [0.1, 0.2, 0.3], "mid": 0.0}, "te": 0.4}
    resident = Resident({"unet": unet})
    resident.add(adapter.prefixed("unet"), "a")
    before = tiny.run_unet(unet)
    resident.set({"a": {"unet": scale["unet"]}})
    expected = tiny.run_unet(unet)
    resident.clear()
    set_shira_attn_processors(unet, both, scale, component="unet")
    assert torch.allclose(tiny.run_unet(unet), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-4)
    remove_shira_attn_processors(unet)
    for wrong, message in [
        ({"vae": 1.0}, "'vae': no such component in this adapter"),
        ({"unet": {"down": {"block_9": 1.0}}}, "'block_9': no such block"),
        ({"te": torch.nan}, "te: nan"),
    ]:
        with pytest.raises(ShiraError, match=message):
            set_shira_attn_processors(unet, both, wrong, component="unet")
    assert torch.equal(tiny.run_unet(unet), before)
