"""How the deltas of a mix are laid end to end, and for how long a plan holds."""

import copy
import pickle

import pytest
import torch
from torch import nn

from shira_diffusers import Resident, ShiraAdapter, SparseDelta
from shira_diffusers.engine.plan import end_to_end
from shira_diffusers.formats.shira_file import load_adapter, save_adapter
from tests import tiny


def test_neighbours_are_viewed_and_others_copied() -> None:
    whole = torch.arange(10)
    empty = whole[4:4]
    for parts in ([whole[:4], whole[4:]], [whole[2:4], empty, whole[4:9]], [empty, whole[3:5]]):
        joined = end_to_end(parts)
        assert torch.equal(joined, torch.cat(parts))
        assert joined.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert end_to_end([empty, empty]).numel() == 0
    for parts in (
        [whole[4:], whole[:4]],
        [whole[:4], whole[5:]],
        [whole[:4].clone(), whole[4:]],
        [whole[:6:2], whole[6:]],
        [whole[:4], whole[4:].view(torch.float64)],
    ):
        joined = end_to_end(parts)
        assert torch.equal(joined, torch.cat(parts))
        assert joined.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


def test_an_adapter_from_a_file_is_not_held_twice(tmp_path: object) -> None:
    model = tiny.unet()
    file = save_adapter(tiny.adapter_for(model, 1), tmp_path / "a.safetensors")
    resident = Resident(model)
    resident.add(load_adapter(file), "a")
    resident.set({"a": 1.0})
    (saved,) = model._shira.overwritten
    first = next(iter(model._shira.adapters["a"].deltas.values()))
    assert saved.plan.indices.data_ptr() == first.indices.data_ptr()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_a_copied_plan_knows_no_addresses(duplicate: object) -> None:
    model = tiny.linears()
    resident = Resident(model)
    resident.add(tiny.adapter_for(model, 1, only=("",)), "a")
    resident.set({"a": 1.0})
    (saved,) = model._shira.overwritten
    assert saved.plan.found
    assert callable(duplicate)
    twin = duplicate(saved)
    assert not twin.plan.found
    assert torch.equal(twin.plan.indices, saved.plan.indices)
    assert torch.equal(twin.written, saved.written)


def two_names_of_one_weight() -> tuple[nn.ModuleDict, Resident]:
    model = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
    model["two"].weight = model["one"].weight
    resident = Resident(model)
    for name in ("one", "two"):
        delta = SparseDelta(torch.arange(5), torch.ones(5), (8, 8))
        resident.add(ShiraAdapter({f"{name}.weight": delta}), name)
    return model, resident


def test_a_plan_by_another_name_of_a_tied_weight_is_used_again() -> None:
    model, resident = two_names_of_one_weight()
    base = tiny.snapshot(model)
    resident.set({"one": 1.0})
    resident.set({"two": 1.0})  # while ``one`` leaves, the weight goes by its name
    adapted = tiny.snapshot(model)
    resident.clear()
    resident.set({"two": 1.0})
    tiny.assert_same_bits(model, adapted)
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_clearing_after_one_weight_was_cast_overwrites_nothing() -> None:
    model = tiny.linears()
    for parameter in model.parameters():
        parameter.data.zero_().neg_()  # -0, of which adding 0 would make 0
    resident = Resident(model)
    resident.add(tiny.adapter_for(model, 1, only=("",)), "a")
    base = tiny.snapshot(model)
    resident.set({"a": 1.0})
    model[0].weight.data = model[0].weight.data.half()
    resident.clear()
    assert resident.changed()[0] == 0
    model[0].weight.data = model[0].weight.data.float()
    tiny.assert_same_bits(model, base)
