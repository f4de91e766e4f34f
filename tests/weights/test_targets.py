"""Which weights a preset or pattern names, counted on the real architectures."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn
from transformers import Gemma2Config, Gemma2Model, T5Config, T5EncoderModel

from shira_diffusers import AdapterMismatchError
from shira_diffusers.weights.targets import canonical_name, named_weights, select
from tests import tiny

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)}
SDXL = {
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("config", "attention", "with_feed_forward", "fraction"), [(SD15, 128, 160, 0.28), (SDXL, 560, 700, 0.85)]
)
def test_the_presets_on_real_unets(config: dict, attention: int, with_feed_forward: int, fraction: float) -> None:
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    assert len(select(model, "attention")) == attention
    chosen = select(model)
    assert len(chosen) == with_feed_forward
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(weight.numel() for weight in chosen.values()) / total == pytest.approx(fraction, abs=0.01)
    assert all(weight.ndim == 2 for weight in select(model, "all-linear").values())
    assert any(weight.ndim == 4 for weight in select(model, "all").values())
    assert len(select(model, "all")) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in model.modules())


def test_the_presets_on_transformers() -> None:
    sd3 = select(tiny.sd3_transformer())
    assert "transformer_blocks.0.attn.add_q_proj.weight" in sd3
    assert "transformer_blocks.0.attn.to_add_out.weight" in sd3
    assert "transformer_blocks.0.ff_context.net.2.weight" in sd3
    assert not [name for name in sd3 if name.startswith(("proj_out", "norm_out", "context_embedder"))]
    flux = select(tiny.flux_transformer())
    assert "single_transformer_blocks.0.proj_out.weight" in flux
    assert "single_transformer_blocks.0.proj_mlp.weight" in flux
    assert "proj_out.weight" not in flux
    wan = select(tiny.wan_transformer())
    assert {"blocks.0.ffn.net.0.proj.weight", "blocks.0.attn2.add_k_proj.weight"} <= wan.keys()


def test_the_presets_on_text_encoders() -> None:
    model = tiny.text_encoder()
    assert len(select(model, "attention")) == 8
    assert len(select(model)) == 12


@pytest.mark.parametrize(
    ("model", "config", "attention", "feed_forward"),
    [
        (T5EncoderModel, T5Config, ("q", "k", "v", "o"), ("wi", "wo")),
        (
            Gemma2Model,
            Gemma2Config,
            ("q_proj", "k_proj", "v_proj", "o_proj"),
            ("gate_proj", "up_proj", "down_proj"),
        ),
    ],
    ids=["T5", "Gemma, Llama, Qwen"],
)
def test_the_presets_on_text_encoders_of_transformers(
    model: type, config: type, attention: tuple[str, ...], feed_forward: tuple[str, ...]
) -> None:
    sizes = {"vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        encoder = model(config(**sizes))
    leaves = [name.split(".")[-2] for name in select(encoder)]
    assert sorted(leaves) == sorted(attention + feed_forward)
    assert sorted(name.split(".")[-2] for name in select(encoder, "attention")) == sorted(attention)


def test_components() -> None:
    chosen = select({"unet": tiny.unet(), "text_encoder": tiny.text_encoder()}, "attention")
    assert {name.partition(".")[0] for name in chosen} == {"unet", "text_encoder"}
    assert select({"unet": tiny.unet()}, "single_transformer_blocks.*.proj_out|.*to_q") != {}


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("to_q", 8),
        ("attn2.to_q", 4),
        (["to_q", "to_k"], 16),
        ("*attn2.to_*", 16),
        ("mid_block.*", 18),
        (r".*\.attn[12]\.to_q", 8),
        (re.compile(r"mid_block\..*to_q(\.weight)?"), 2),
        ("conv_in", 1),
        ("conv_in.weight", 1),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight", 1),
    ],
)
def test_patterns(targets: object, count: int) -> None:
    chosen = select(tiny.unet(), targets)
    assert len(chosen) == count, list(chosen)


def test_a_suffix_begins_at_a_dot() -> None:
    model = nn.ModuleDict({"to_q": nn.Linear(2, 2), "goto_q": nn.Linear(2, 2), "to_qkv2": nn.Linear(2, 2)})
    assert list(select(model, "to_q")) == ["to_q.weight"]


@pytest.mark.parametrize("targets", ["to_x", [], ["to_x", "to_y"], re.compile("to_q"), "("])
def test_what_matches_nothing(targets: object) -> None:
    with pytest.raises(AdapterMismatchError, match=r"match none of the \d+ Linear and Conv2d weights"):
        select(tiny.unet(), targets)


def test_the_weights_are_the_live_ones() -> None:
    model = tiny.unet()
    weights = named_weights(model)
    assert all(weight.data_ptr() == model.get_parameter(name).data_ptr() for name, weight in weights.items())
    assert not any(weight.requires_grad for weight in weights.values())
    assert named_weights(model, every=True).keys() == dict(model.named_parameters()).keys()


def test_names_through_wrappers() -> None:
    plain = list(named_weights(tiny.unet()))
    model = tiny.unet()
    model.fuse_qkv_projections()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    model.mid_block = torch.compile(model.mid_block, backend="eager")
    compiled = torch.compile(model, backend="eager")
    assert list(named_weights(compiled)) == plain
    assert list(select(compiled, "to_q")) == list(select(tiny.unet(), "to_q"))
    for name in ("_orig_mod.a._orig_mod.b.weight", "a.b.base_layer.weight", "a.b.weight"):
        assert canonical_name(name) == "a.b.weight"


def test_a_layer_named_like_a_fused_copy() -> None:
    """Some models have a ``to_qkv`` of their own, of nothing else: it is a weight like any other."""
    model = nn.ModuleDict({"to_qkv": nn.Linear(2, 6), "to_out": nn.Linear(2, 2)})
    assert list(named_weights(model)) == ["to_qkv.weight", "to_out.weight"]


def test_tied_weights_appear_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert list(named_weights(model)) == ["a.weight"]


def test_the_message_shows_what_there_is() -> None:
    with pytest.raises(AdapterMismatchError) as told:
        select(tiny.unet(), "to_x")
    assert "conv_in.weight" in str(told.value)
    assert "attention+ff" in str(told.value)
