"""Memory of what has left is used again, and only that."""

import copy
import pickle

import pytest
import torch
from torch import nn

from shira_diffusers import Resident
from shira_diffusers.weights import sweep_cpu
from shira_diffusers.weights.sweep_cpu import BufferPool
from tests import reference, tiny


@pytest.fixture(autouse=True)
def of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_cpu, "_LONG", 0)


@pytest.fixture
def model() -> nn.Sequential:
    return tiny.linears()


@pytest.fixture
def resident(model: nn.Sequential) -> Resident:
    resident = Resident(model)
    for seed, name in enumerate("ab"):
        resident.add(tiny.adapter_for(model, seed, only=("",)), name)
    return resident


def held(model: nn.Module) -> list[int]:
    (group,) = model._shira.overwritten
    return [group.base.data_ptr(), group.written.data_ptr()]


def test_what_comes_is_put_where_what_left_was(model: nn.Sequential, resident: Resident) -> None:
    first, second = [], []
    for _ in range(3):
        resident.set({"a": 1.0})
        first.append(set(held(model)))
        resident.set({"b": 1.0})
        second.append(set(held(model)))
    assert first[0] == first[1] == first[2]
    assert second[0] == second[1] == second[2]
    assert not first[0] & second[0]
    resident.clear()  # as between two pictures
    assert model._shira.pool.nbytes
    resident.set({"a": 0.5})
    assert set(held(model)) == second[0]


def test_a_slider_keeps_the_saved_bits(model: nn.Sequential, resident: Resident) -> None:
    base, adapters = tiny.snapshot(model), {name: resident.adapter(name) for name in "ab"}
    for mix in ({"a": 1.0}, {"a": 0.5}, {"a": -1.0}, {"b": 1.0}, {"a": 0.25}, {"a": 0.75}, {"a": 1.0, "b": 1.0}):
        resident.set(mix)
        expected = reference.apply(base, adapters, mix)
        assert all(tiny.same_bits(now, expected[name]) for name, now in tiny.snapshot(model).items()), mix
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_a_switch_that_fails_takes_nothing_that_is_used(
    model: nn.Sequential, resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.snapshot(model)
    for name in "aba":
        resident.set({name: 1.0})
    active = tiny.snapshot(model)

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("shira_diffusers.engine.switch._write_copies", fails)
            resident.set({"b": 1.0})
        tiny.assert_same_bits(model, active)
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_memory_goes_with_the_last_adapter_and_with_a_move(model: nn.Sequential, resident: Resident) -> None:
    resident.set({"a": 1.0})
    resident.clear()
    assert model._shira.pool.nbytes
    model.half()
    assert not model._shira.pool.nbytes
    resident.set({"a": 1.0})
    resident.remove("a")
    assert model._shira.pool.nbytes
    resident.remove("b")
    assert not model._shira.pool.nbytes


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_copies_hold_none(duplicate: object) -> None:
    own = BufferPool()
    own.keep([torch.ones(100)])
    assert own.nbytes == 400
    assert callable(duplicate)
    assert duplicate(own).nbytes == 0


def test_a_buffer_serves_what_fits_in_it_and_is_not_much_smaller() -> None:
    own, like = BufferPool(), torch.ones(1, dtype=torch.float16)
    own.keep([torch.ones(100)])
    for count in (201, 99):
        assert own.take(count, like).shape == (count,)
        assert own.nbytes == 400
    taken = own.take(200, like)
    assert (taken.shape, taken.dtype, own.nbytes) == ((200,), torch.float16, 0)
    own.keep([taken, torch.ones(10)], still_used=[taken[:5]])
    assert own.nbytes == 40


def test_short_ones_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    own = BufferPool()
    own.keep([torch.ones(100)])
    assert not own.nbytes
