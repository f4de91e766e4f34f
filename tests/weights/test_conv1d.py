"""GPT-2's Conv1D, a Linear whose weight is stored as (in, out), is adapted as other layers are."""

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from shira_diffusers import (
    Resident,
    ShiraAdapter,
    SparseDelta,
    build_masks,
    mask_gradients,
    remove_shira_attn_processors,
    set_shira_attn_processors,
)
from shira_diffusers.training.tuner import SparseTuner
from shira_diffusers.weights.targets import select

TOKENS = torch.arange(10)[None]
BLOCK = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(config).eval()


def loss_of(model: GPT2LMHeadModel) -> Tensor:
    return model(TOKENS, labels=TOKENS).loss


def test_presets_target_its_layers(model: GPT2LMHeadModel) -> None:
    blocks = [f"transformer.h.{k}.{layer}.weight" for k in range(2) for layer in BLOCK]
    assert sorted(select(model)) == sorted(blocks)
    assert sorted(select(model, "attention")) == [name for name in sorted(blocks) if "attn" in name]
    assert select(model, "all-linear").keys() == {*blocks, "lm_head.weight"}


def test_cross_attention_is_attention() -> None:
    config = GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1, add_cross_attention=True)
    chosen = select(GPT2LMHeadModel(config), "attention")
    assert {name.removeprefix("transformer.h.0.crossattention.") for name in chosen if "cross" in name} == {
        "c_attn.weight",
        "q_attn.weight",
        "c_proj.weight",
    }


@pytest.mark.parametrize("family", ["struct", "struct_rows", "rand", "wm", "block"])
def test_masked_gradients_are_the_dense_ones(model: GPT2LMHeadModel, family: str) -> None:
    loss_of(model).backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    masks = build_masks(model, family, 0.05)
    with mask_gradients(model, masks):
        loss_of(model).backward()
        for name, parameter in model.named_parameters():
            expected = torch.zeros(parameter.numel())
            if name in masks:
                expected[masks[name]] = dense[name].flatten()[masks[name]]
                assert parameter.grad is not None
                assert torch.equal(parameter.grad.flatten(), expected)
            else:
                assert parameter.grad is None


@pytest.mark.parametrize("family", ["struct", "struct_rows", "rand"])
def test_the_tuner_gets_the_dense_gradient_at_the_mask(model: GPT2LMHeadModel, family: str) -> None:
    masks = build_masks(model, family, 0.05)
    loss_of(model).backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters() if name in masks and p.grad is not None}
    model.zero_grad()
    tuner = SparseTuner(model, masks)
    loss_of(model).backward()
    expected = torch.cat([dense[name].flatten()[mask] for name, mask in masks.items()])
    assert torch.allclose(tuner.deltas.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_side_branch_does_what_the_overwritten_weight_does(model: GPT2LMHeadModel, scale: float) -> None:
    masks = build_masks(model, "rand", 0.05, "all-linear", seed=1)
    weights = dict(model.named_parameters())
    deltas = {
        name: SparseDelta(mask.int(), torch.randn(len(mask)), tuple(weights[name].shape))
        for name, mask in masks.items()
        if "lm_head" not in name
    }
    adapter = ShiraAdapter(deltas)
    with torch.no_grad():
        base = model(TOKENS).logits
        resident = Resident(model)
        resident.add(adapter, "a")
        with resident.using({"a": scale}):
            expected = model(TOKENS).logits
        set_shira_attn_processors(model, adapter, scale)
        beside = model(TOKENS).logits
        remove_shira_attn_processors(model)
        assert not torch.allclose(expected, base, atol=1e-2)
        assert torch.allclose(beside, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(TOKENS).logits, base)
