"""What a map remembers is looked at again at each use, and keeps no model alive."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from shira_diffusers import Resident
from shira_diffusers.weights.finder import WeightMap, live_weights, unwrap, weights_of
from tests import tiny

NAME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def attention(model: nn.Module) -> nn.Module:
    return model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")


def test_it_is_the_same_as_long_as_nothing_changes() -> None:
    model = tiny.unet()
    weights = weights_of(model)
    found, version = weights[NAME], weights.version
    assert weights_of(model) is weights
    again = weights_of(model).live([NAME])[NAME]
    assert (again.data_ptr(), weights.version) == (found.data_ptr(), version)
    model.train()
    model.requires_grad_(False)
    assert weights_of(model) is weights
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    assert weights_of(compiled) is not weights


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(attention(model), "to_q", nn.Linear(32, 32)),
        lambda model: attention(model).add_module("more", nn.Linear(1, 1)),
        lambda model: attention(model).fuse_projections(),
        lambda model: attention(model).to_q.compile(backend="eager"),
        lambda model: inject_adapter_in_model(LoraConfig(target_modules=["to_q"]), model),
        lambda model: model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level"),
        lambda model: setattr(model, "mid_block", None),
    ],
)
def test_a_changed_model_is_looked_at_anew(change: Callable[[nn.Module], object]) -> None:
    model = tiny.unet()
    weights = weights_of(model)
    change(model)
    assert weights_of(model) is not weights


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: setattr(attention(model).to_q, "weight", nn.Parameter(attention(model).to_q.weight.clone())),
        lambda model: setattr(attention(model).to_q.weight, "data", attention(model).to_q.weight.data.clone()),
        lambda model: setattr(attention(model).to_q.weight, "data", attention(model).to_q.weight.data.t()),
    ],
)
def test_a_weight_that_moved_is_found_where_it_is(change: Callable[[nn.Module], object]) -> None:
    model = tiny.unet()
    weights = weights_of(model)
    weights.live([NAME])
    version = weights.version
    change(model)
    assert weights_of(model) is weights
    found, fresh = weights.live([NAME])[NAME], WeightMap(model)[NAME]
    assert weights.version != version
    assert weights.live([NAME])[NAME].data_ptr() == found.data_ptr()
    assert found.data_ptr() == fresh.data_ptr() == attention(model).to_q.weight.data_ptr()
    assert (found.dtype, found.stride()) == (fresh.dtype, fresh.stride())


def test_the_memory_that_weights_leave_goes_at_once() -> None:
    model = tiny.linears()
    resident = Resident(model)
    resident.add(tiny.adapter_for(model, 1, only=("",)), "a")
    resident.set({"a": 1.0})
    storage = weakref.ref(model[0].weight.untyped_storage())
    layer = weakref.ref(model[2])
    model.half()
    model[2] = nn.Linear(20, 12)
    assert storage() is None
    assert layer() is None


def test_a_model_that_is_dropped_goes_at_once() -> None:
    model = tiny.linears()
    resident = Resident(model)
    resident.add(tiny.adapter_for(model, 1, only=("",)), "a")
    resident.set({"a": 1.0})
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model, resident
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(attention(model), "to_q", nn.Linear(32, 32)),
        lambda model: setattr(attention(model).to_q, "weight", nn.Parameter(attention(model).to_q.weight.clone())),
        lambda model: setattr(attention(model).to_q.weight, "data", attention(model).to_q.weight.data.clone()),
        lambda model: attention(model).fuse_projections(),
        lambda model: attention(model).to_q.compile(backend="eager"),
        lambda model: inject_adapter_in_model(LoraConfig(target_modules=["to_q"]), model),
        lambda model: model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level"),
        lambda model: setattr(model, "mid_block", None),
    ],
)
def test_a_glance_at_a_changed_model_is_not_confirmed(change: Callable[[nn.Module], object]) -> None:
    model = tiny.unet()
    weights, live = live_weights(model, (NAME,))
    kept = [*model.modules(), *model.parameters()]  # so that a glance still finds them
    glanced = weights.glance(model, (NAME,))
    assert glanced is not None
    assert glanced[NAME].data_ptr() == live[NAME].data_ptr()
    version = weights.version
    assert weights.confirm()
    assert weights.version == version
    change(model)
    assert weights.glance(model, (NAME,)) is None or not weights.confirm()
    assert weights.glance(model, (NAME,)) is None or weights.version != version
    assert kept


def test_weights_of_another_version_are_not_glanced_at() -> None:
    model = tiny.unet()
    weights, _ = live_weights(model, (NAME,))
    other = NAME.replace("to_q", "to_k")
    live_weights(model, (other,))
    attention(model).to_k.weight.data = attention(model).to_k.weight.data.clone()
    live_weights(model, (other,))
    assert weights.glance(model, (NAME,)) is None
    assert live_weights(model, (NAME,))[0] is weights
    assert weights.glance(model, (NAME,)) is not None


def test_a_layer_in_the_place_of_one_that_lives_on_is_written_alone() -> None:
    model = tiny.linears()
    resident = Resident(model)
    for seed, name in enumerate("ab"):
        resident.add(tiny.adapter_for(model, seed, only=("",)), name)
    base = tiny.snapshot(model)
    for name in "abab":
        resident.set({name: 1.0})
    old, model[2] = model[2], copy.deepcopy(model[2])
    before = tiny.snapshot(old)
    resident.set({"a": 1.0})
    tiny.assert_same_bits(old, before)
    assert not torch.equal(model[2].weight, old.weight)
    resident.clear()
    tiny.assert_same_bits(old, before)
    tiny.assert_same_bits(model, base)
