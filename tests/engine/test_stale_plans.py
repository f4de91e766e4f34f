"""Weights replaced, tied, untied or laid over each other since a mix was planned; and errors after the last write."""

import pytest
import torch
from torch import Tensor, nn

from shira_diffusers import (
    MERGE_METHODS,
    AdapterMismatchError,
    Resident,
    ResidentStateError,
    ShiraAdapter,
    ShiraError,
    SparseDelta,
)
from shira_diffusers.weights.finder import weights_of
from tests import tiny


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(6, 5, bias=False), "b": nn.Linear(6, 5, bias=False)})


def adapter(*values: float) -> ShiraAdapter:
    at = torch.tensor([1, 17, 29], dtype=torch.int32)
    deltas = {f"{n}.weight": SparseDelta(at, torch.full((3,), v), (5, 6)) for n, v in zip("ab", values, strict=True)}
    return ShiraAdapter(deltas)


def warm(model: nn.Module, one: ShiraAdapter) -> Resident:
    resident = Resident(model)
    resident.add(one, "x")
    for _ in range(2):
        resident.set({"x": 1.0})
        resident.clear()
    return resident


@pytest.mark.parametrize("shape", [(2, 2), (6, 5), (3, 10)], ids=["smaller", "transposed", "other"])
def test_a_layer_of_another_shape_is_refused_and_nothing_is_written(shape: tuple[int, int]) -> None:
    model = two_layers()
    resident = warm(model, adapter(1.0, 2.0))
    model["b"] = nn.Linear(shape[1], shape[0], bias=False)
    base = tiny.snapshot(model)
    with pytest.raises(AdapterMismatchError, match=r"b.weight: expected \(5, 6\), got"):
        resident.set({"x": 1.0})
    assert resident.active == {}
    tiny.assert_same_bits(model, base)


def test_a_view_of_another_shape_is_refused() -> None:
    model = two_layers()
    resident = warm(model, adapter(1.0, 2.0))
    model["b"].weight.data = model["b"].weight.data.view(6, 5)
    with pytest.raises(AdapterMismatchError, match=r"b.weight: expected \(5, 6\), got \(6, 5\)"):
        resident.set({"x": 1.0})


def test_a_smaller_layer_while_active_is_refused() -> None:
    model = two_layers()
    resident = warm(model, adapter(1.0, 2.0))
    resident.set({"x": 1.0})
    model["b"] = nn.Linear(2, 2, bias=False)
    held = tiny.snapshot(model)
    with pytest.raises(ResidentStateError, match=r"b\.weight"):
        resident.clear()
    tiny.assert_same_bits(model, held)


def test_tying_after_planning_is_refused_where_deltas_differ() -> None:
    model = two_layers()
    resident = warm(model, adapter(1.0, 2.0))
    model["b"].weight = model["a"].weight
    base = tiny.snapshot(model)
    with pytest.raises(AdapterMismatchError, match="tied weight"):
        resident.set({"x": 1.0})
    tiny.assert_same_bits(model, base)


def test_untying_after_planning_adapts_both() -> None:
    model = two_layers()
    model["b"].weight = model["a"].weight
    resident = warm(model, adapter(1.0, 1.0))
    model["b"].weight = nn.Parameter(model["b"].weight.detach().clone())
    base = tiny.snapshot(model)
    resident.set({"x": 1.0})
    for name in "ab":
        expected = base[f"{name}.weight"].clone()
        expected.view(-1)[[1, 17, 29]] += 1
        assert torch.equal(model[name].weight, expected)
    resident.clear()
    tiny.assert_same_bits(model, base)


@pytest.mark.parametrize("untied", ["a", "b"])
@pytest.mark.parametrize("named", ["ab", "a"])
def test_untying_while_active_takes_the_mix_off_both(named: str, untied: str) -> None:
    model = two_layers()
    model["b"].weight = model["a"].weight
    base = model["a"].weight.detach().clone()
    deltas = adapter(1.0, 1.0).deltas
    resident = warm(model, ShiraAdapter({f"{name}.weight": deltas[f"{name}.weight"] for name in named}))
    for end in (resident.clear, lambda: resident.set({"x": 2.0})):
        resident.set({"x": 1.0})
        model[untied].weight = nn.Parameter(model[untied].weight.detach().clone())
        saved = model.state_dict()
        assert all(torch.equal(saved[f"{name}.weight"], base) for name in "ab")
        end()
        scale = resident.active.get("x", 0.0)
        for name in "ab":
            expected = base.clone()
            expected.view(-1)[[1, 17, 29]] += scale if name in named else 0.0
            assert torch.equal(model[name].weight, expected), name
        resident.clear()
        model["b"].weight = model["a"].weight


@pytest.mark.parametrize("way", ["remembered", "of another version", "forgotten"])
@pytest.mark.parametrize("untied", ["a", "b"])
def test_tying_a_layer_while_active_is_noted_by_the_next_switch(untied: str, way: str) -> None:
    model = two_layers()
    base = model["a"].weight.detach().clone()
    deltas = adapter(1.0, 1.0).deltas
    resident = warm(model, ShiraAdapter({"a.weight": deltas["a.weight"]}))
    resident.set({"x": 1.0})
    weights = weights_of(model)
    for track in weights._tracks.values():
        track.version -= way == "of another version"  # as when other weights are found elsewhere meanwhile
    if way == "forgotten":  # as after many mixes
        weights._tracks.clear()
    model["b"].weight = model["a"].weight
    resident.set({"x": 2.0})
    model[untied].weight = nn.Parameter(model[untied].weight.detach().clone())
    assert all(torch.equal(saved, base) for saved in model.state_dict().values())
    resident.clear()
    for name in "ab":
        assert torch.equal(model[name].weight, base), name


def test_another_weight_in_the_place_of_a_tied_one_is_left_alone() -> None:
    model = two_layers()
    other = model["b"]
    other_base = other.weight.detach().clone()
    model["b"] = nn.Linear(6, 5, bias=False)
    model["b"].weight = model["a"].weight
    base = model["a"].weight.detach().clone()
    resident = warm(model, adapter(1.0, 1.0))
    resident.set({"x": 1.0})
    model["b"] = other
    resident.clear()
    assert torch.equal(model["a"].weight, base) and torch.equal(other.weight, other_base)


def test_weights_that_overlap_since_are_refused() -> None:
    model = two_layers()
    resident = warm(model, adapter(1.0, 2.0))
    memory = torch.randn(45)
    model["a"].weight.data, model["b"].weight.data = memory[:30].view(5, 6), memory[15:].view(5, 6)
    held = memory.clone()
    with pytest.raises(ResidentStateError, match="shares memory"):
        resident.set({"x": 1.0})
    assert torch.equal(memory, held) and resident.active == {}


def test_adapters_with_two_names_of_one_tied_weight_switch_either_way() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(300, 300, bias=False) for name in "ab"})
    model["b"].weight = model["a"].weight
    base: Tensor = model["a"].weight.detach().clone()
    resident = Resident(model)
    deltas = {}
    for name in "ab":
        at = torch.randperm(90_000)[:27_000].sort().values.int()
        deltas[name] = SparseDelta(at, torch.randn(27_000), (300, 300))
        resident.add(ShiraAdapter({f"{name}.weight": deltas[name]}), name)
    for mix in ({"b": 1.0}, {"a": 1.0}, {"a": 1.0, "b": 0.5}, {"b": 1.0}, {"b": 0.5}, {"a": 1.0}):
        resident.set(mix)
        expected = torch.zeros(300, 300)
        for name in sorted(mix):
            expected += mix[name] * deltas[name].to_dense()
        assert torch.equal(model["a"].weight, base + expected), mix
    resident.clear()
    assert torch.equal(model["a"].weight, base)


def test_a_hook_that_raises_after_a_switch_loses_no_base() -> None:
    models = {"one": two_layers(), "two": two_layers()}
    base = {name: tiny.snapshot(model) for name, model in models.items()}
    resident = Resident(models)
    resident.add(ShiraAdapter({f"{m}.{n}": d for m in models for n, d in adapter(1.0, 2.0).deltas.items()}), "x")

    def fail() -> None:
        raise RuntimeError("no cache")

    models["one"]._reset_stateful_cache = fail
    with pytest.raises(RuntimeError, match="no cache"):
        resident.set({"x": 1.0})
    assert resident.active == {"x": 1.0}  # the switch was done
    del models["one"]._reset_stateful_cache
    resident.clear()
    for name, model in models.items():
        tiny.assert_same_bits(model, base[name])


@pytest.mark.parametrize("second", [{}, {"x": 0.5}])
def test_an_interrupt_in_a_commit_takes_everything_back(
    second: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"one": two_layers(), "two": two_layers()}
    base = {name: tiny.snapshot(model) for name, model in models.items()}
    resident = Resident(models)
    resident.add(ShiraAdapter({f"{m}.{n}": d for m in models for n, d in adapter(1.0, 2.0).deltas.items()}), "x")
    resident.set({"x": 1.0})
    adapted = {name: tiny.snapshot(model) for name, model in models.items()}
    state = type(models["one"]._shira)
    real, calls = state.set_overwritten, []

    def interrupted(self: object, *fresh: object) -> None:
        calls.append(self)
        real(self, *fresh)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(state, "set_overwritten", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resident.set(second)
    monkeypatch.undo()
    assert resident.active == {"x": 1.0}
    for name, model in models.items():
        tiny.assert_same_bits(model, adapted[name])
    resident.clear()
    for name, model in models.items():
        tiny.assert_same_bits(model, base[name])


def test_a_weight_without_memory_is_refused() -> None:
    model = two_layers()
    resident = warm(model, adapter(1.0, 2.0))
    model["b"].weight.untyped_storage().resize_(0)
    with pytest.raises(ResidentStateError, match=r"b\.weight has no memory"):
        resident.set({"x": 1.0})
    assert resident.active == {}


def test_an_empty_weight_beside_others_changes_nothing_for_them() -> None:
    model = two_layers()
    model["c"] = nn.Linear(0, 3, bias=False)
    base = tiny.snapshot(model)
    nothing = SparseDelta(torch.empty(0, dtype=torch.int32), torch.empty(0), (3, 0))
    resident = warm(model, ShiraAdapter({**adapter(1.0, 2.0).deltas, "c.weight": nothing}))
    resident.set({"x": 1.0})
    assert torch.equal(model["a"].weight.view(-1)[[1, 17]], base["a.weight"].view(-1)[[1, 17]] + 1)
    resident.clear()
    tiny.assert_same_bits(model, base)


@pytest.mark.parametrize("result", [None, torch.zeros(2), torch.tensor(1.0)])
def test_a_merge_method_of_the_user_that_gives_no_sum_per_entry_is_refused(
    result: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two_layers()
    base = tiny.snapshot(model)
    resident = Resident(model)
    for name in "xy":
        resident.add(adapter(1.0, 2.0), name)
    monkeypatch.setitem(MERGE_METHODS, "odd", lambda union, values, scales: result)
    with pytest.raises(ShiraError, match=r"'odd': expected a tensor of shape \(6,\)"):
        resident.set({"x": 1.0, "y": 1.0}, method="odd")
    assert resident.active == {}
    tiny.assert_same_bits(model, base)
