"""The numerical contract: what is written, and that every bit comes back."""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import permutations
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from shira_diffusers import (
    AdapterMismatchError,
    Resident,
    ResidentStateError,
    ShiraAdapter,
    ShiraError,
    SparseDelta,
    load_adapter,
    save_adapter,
)
from shira_diffusers.engine import state
from tests import reference, tiny


def same_as_oracle(model: nn.Module, base: dict, adapters: dict, scales: dict) -> bool:
    expected = reference.apply(base, adapters, scales)
    return all(tiny.same_bits(parameter, expected[name]) for name, parameter in model.named_parameters())


_WRITE = torch.Tensor.scatter_


@pytest.fixture
def model() -> UNet2DConditionModel:
    return tiny.unet()


@pytest.fixture
def adapters(model: UNet2DConditionModel) -> dict[str, ShiraAdapter]:
    return {
        "a": tiny.adapter_for(model, 1, dtype=torch.float16),
        "b": tiny.adapter_for(model, 2, only=("attn2", "conv1"), density=0.4),
        "c": tiny.adapter_for(model, 3, dtype=torch.bfloat16, density=0.01),
    }


@pytest.fixture
def resident(model: UNet2DConditionModel, adapters: dict[str, ShiraAdapter]) -> Resident:
    resident = Resident(model)
    for name, adapter in adapters.items():
        resident.add(adapter, name)
    return resident


def test_before_during_after_with_deltas_of_one() -> None:
    """Arithmetic that a reader can check by eye."""
    layer = nn.Linear(3, 2, bias=False)
    nn.init.constant_(layer.weight, 10.0)
    resident = Resident(layer)
    resident.add(ShiraAdapter({"weight": SparseDelta(torch.tensor([0, 4]), torch.ones(2), (2, 3))}), "ones")
    assert layer.weight.tolist() == [[10, 10, 10], [10, 10, 10]]
    resident.set({"ones": 0.5})
    assert layer.weight.tolist() == [[10.5, 10, 10], [10, 10.5, 10]]
    resident.set({"ones": -2})
    assert layer.weight.tolist() == [[8, 10, 10], [10, 8, 10]]
    resident.clear()
    assert layer.weight.tolist() == [[10, 10, 10], [10, 10, 10]]


@pytest.mark.parametrize("scales", [{"a": 1.0}, {"b": 0.3, "a": 1.7}, {"a": 0.1, "b": -1.3, "c": 2.5}, {"c": 0}])
def test_bit_equal_to_the_oracle(model: nn.Module, adapters: dict, dtype: torch.dtype, scales: dict) -> None:
    model.to(dtype)
    base = tiny.snapshot(model)
    resident = Resident(model)
    for name, adapter in adapters.items():
        resident.add(adapter, name)
    resident.set(scales)
    assert same_as_oracle(model, base, adapters, scales)
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_float64_weights_keep_their_precision() -> None:
    model = tiny.linears().double()
    base = tiny.snapshot(model)
    adapter = tiny.adapter_for(model, only=("",))
    resident = Resident(model)
    resident.add(adapter, "a")
    resident.set({"a": 0.7})
    assert same_as_oracle(model, base, {"a": adapter}, {"a": 0.7})
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_the_order_of_names_decides_not_the_order_of_the_call(resident: Resident, model: nn.Module) -> None:
    weights = {"a": 0.37, "b": 1.61, "c": -0.73}
    results = []
    for order in permutations(weights):
        resident.set({name: weights[name] for name in order})
        results.append(tiny.snapshot(model))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_a_switch_leaves_no_trace_of_what_was_active_before(
    resident: Resident, model: nn.Module, adapters: dict, dtype: torch.dtype
) -> None:
    model.to(dtype)
    base = tiny.snapshot(model)
    for scales in [{"a": 1.0}, {"a": 1.0, "b": 1.0}, {"b": 2.0}, {"b": 0.1}, {}, {"c": 1.0, "a": 3.0}, {"c": 1.0}]:
        resident.set(scales)
        assert same_as_oracle(model, base, adapters, scales)
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_the_engine_is_told(resident: Resident) -> None:
    assert resident.engines == {}
    resident.set({"a": 1.0})
    assert resident.engines == {"": "torch"}


def test_addresses_and_unmasked_entries_never_change(resident: Resident, model: nn.Module, adapters: dict) -> None:
    base = tiny.snapshot(model)
    parameters = dict(model.named_parameters())
    addresses = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    for scales in [{"a": 1.0}, {"b": 1.0, "c": 1.0}, {}]:
        resident.set(scales)
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses
        assert all(now is parameters[name] for name, now in model.named_parameters())
    resident.set({"a": 1.0})
    for name, parameter in model.named_parameters():
        changed = (parameter != base[name]).flatten().nonzero().flatten()
        delta = adapters["a"].deltas.get(name)
        held = delta.indices.long() if delta else torch.empty(0, dtype=torch.int64)
        assert torch.equal(changed, held), name


def test_negative_zeros_nans_and_infinities_of_the_base_return() -> None:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-0.0, 0.0, torch.nan, torch.inf], [1e-45, -torch.inf, 1.0, -0.0]]))
    base = tiny.snapshot(layer)
    resident = Resident(layer)
    resident.add(ShiraAdapter({"weight": SparseDelta(torch.arange(8), torch.ones(8), (2, 4))}), "all")
    resident.set({"all": 1.0})
    assert layer.weight[0, 0] == 1
    resident.set({"all": 0.0})
    resident.clear()
    tiny.assert_same_bits(layer, base)


def test_scales_by_component_and_block(pipe: object) -> None:
    adapter, other = tiny.adapter_for(pipe, 1), tiny.adapter_for(pipe, 2)
    base = tiny.snapshot(pipe)
    resident = Resident(tiny.modules_of(pipe))
    resident.add(adapter, "a")
    resident.add(other, "b")
    for scale in [
        {"unet": 0.3},
        {"text_encoder": 0.0, "unet": 2},
        {"unet": {"down": 0.1, "mid": 0.7, "up": -1.1}},
        {"unet": {"mid": 0.0}, "text_encoder": 0.4},
    ]:
        scales = {"a": scale, "b": 0.6}
        resident.set(scales)
        expected = reference.apply(base, {"a": adapter, "b": other}, scales)
        assert all(tiny.same_bits(now, expected[name]) for name, now in tiny.snapshot(pipe).items())
    resident.clear()
    tiny.assert_same_bits(pipe, base)


@pytest.mark.parametrize(
    "scale",
    [
        torch.nan,
        float("inf"),
        "1",
        True,
        {"vae_2": 1.0},
        {"unet": {"left": 1.0}},
        {"unet": {"down": torch.nan}},
        {"unet": "x"},
    ],
)
def test_a_bad_scale_changes_nothing(pipe: object, scale: object) -> None:
    resident = Resident(tiny.modules_of(pipe))
    resident.add(tiny.adapter_for(pipe, 1), "a")
    resident.set({"a": 1.0})
    before = tiny.snapshot(pipe)
    with pytest.raises(ShiraError, match="weight of adapter 'a'"):
        resident.set({"a": scale})
    assert resident.active == {"a": 1.0}
    tiny.assert_same_bits(pipe, before)


def test_unknown_adapters_and_methods_change_nothing(resident: Resident, model: nn.Module) -> None:
    resident.set({"a": 1.0})
    before = tiny.snapshot(model)
    with pytest.raises(ShiraError, match="'x', 'y', loaded are 'a', 'b', 'c'"):
        resident.set({"a": 1.0, "x": 1.0, "y": 1.0})
    with pytest.raises(ShiraError, match="unknown merge method 'average', expected one of sum"):
        resident.set({"b": 1.0}, method="average")
    with pytest.raises(ShiraError, match="no adapter named 'x'"):
        resident.remove("x")
    with pytest.raises(ShiraError, match="no adapter named 'x'"):
        resident.adapter("x")
    assert resident.active == {"a": 1.0}
    tiny.assert_same_bits(model, before)


class WriteFailsAt:
    """Stands in for ``Tensor.scatter_``, by which all is written, and breaks off in the middle of one call."""

    def __init__(self, at: int | None, error: type[BaseException]) -> None:
        self.calls, self._at, self._error = 0, at, error

    def __get__(self, tensor: torch.Tensor, owner: type) -> Callable[..., torch.Tensor]:
        return lambda dim, index, values: self._write(tensor, dim, index, values)

    def _write(self, tensor: torch.Tensor, dim: int, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls - 1 != self._at:
            return _WRITE(tensor, dim, index, values)
        half = len(values) // 2
        _WRITE(tensor, dim, index[:half], values[:half])
        raise self._error("power cut")


def switches() -> Iterator[tuple[dict, dict]]:
    yield {}, {"a": 1.0}
    yield {"a": 1.0}, {"b": 1.0}
    yield {"a": 1.0}, {"a": 0.5}
    yield {"a": 1.0, "b": 0.5}, {"b": 1.0, "c": 1.0}
    yield {"a": 1.0}, {}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("before", "after"), switches())
def test_an_exception_at_any_write_restores_everything(
    monkeypatch: pytest.MonkeyPatch, before: dict, after: dict, error: type[BaseException]
) -> None:
    parts = {"one": tiny.linears(1), "two": tiny.linears(2)}
    model = nn.ModuleDict(parts)
    resident = Resident(parts)
    for seed, name in enumerate("abc"):
        adapter = tiny.adapter_for(model, seed, only=("",) if name != "c" else ("one", "0.weight"))
        resident.add(adapter, name)
    base = tiny.snapshot(model)
    resident.set(before)
    bits = tiny.snapshot(model)
    counter = WriteFailsAt(None, error)
    monkeypatch.setattr(torch.Tensor, "scatter_", counter)
    resident.set(after)
    writes = counter.calls
    resident.set(before)
    assert writes >= 2
    for at in range(writes):
        monkeypatch.setattr(torch.Tensor, "scatter_", WriteFailsAt(at, error))
        with pytest.raises(error, match="power cut"):
            resident.set(after)
        tiny.assert_same_bits(model, bits)
        assert resident.active == before
        resident.verify()
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_foreign_writes_are_detected_and_left_alone(resident: Resident, model: nn.Module, adapters: dict) -> None:
    name = next(iter(adapters["a"].deltas))
    resident.set({"a": 1.0})
    with torch.no_grad():
        model.get_parameter(name).add_(1.0)
    bits = tiny.snapshot(model)
    for act in (
        resident.verify,
        resident.clear,
        resident.disable,
        lambda: resident.set({"b": 1.0}),
        lambda: resident.remove("a"),
    ):
        with pytest.raises(ResidentStateError, match="modified outside shira_diffusers") as caught:
            act()
        assert name in str(caught.value)
        assert "bake" in str(caught.value)
        tiny.assert_same_bits(model, bits)
        assert resident.active == {"a": 1.0}
    resident.bake()
    resident.set({"b": 1.0})
    resident.clear()
    tiny.assert_same_bits(model, bits)


@pytest.mark.parametrize("everywhere", [True, False])
def test_the_base_put_back_by_another_is_no_harm(
    resident: Resident, model: nn.Module, adapters: dict, everywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``state_dict`` gives the base, and whoever loads that again writes it; the next switch goes on from there."""
    resident.clear()
    base = tiny.snapshot(model)
    resident.set({"a": 1.0})
    kept = model.state_dict() if everywhere else {k: v for k, v in model.state_dict().items() if "mid_block" in k}
    model.load_state_dict(kept, strict=False)
    bits = tiny.snapshot(model)
    with pytest.raises(ResidentStateError, match="modified outside shira_diffusers"):
        resident.verify()
    monkeypatch.setattr(torch.Tensor, "scatter_", WriteFailsAt(1, RuntimeError))
    with pytest.raises(RuntimeError, match="power cut"):
        resident.set({"b": 1.0})
    monkeypatch.undo()
    tiny.assert_same_bits(model, bits)
    resident.set({"a": 0.5})
    expected = reference.apply(base, adapters, {"a": 0.5})
    assert all(tiny.same_bits(now, expected[name]) for name, now in tiny.snapshot(model).items())
    resident.verify()
    model.load_state_dict(kept, strict=False)
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_what_a_resident_shows(resident: Resident) -> None:
    resident.clear()
    assert repr(resident) == "<Resident of UNet2DConditionModel; 3 adapters, active: none>"
    resident.set({"b": 0.5, "a": 1})
    resident.remove("c")
    assert repr(resident) == "<Resident of UNet2DConditionModel; 2 adapters, active: b=0.5, a=1>"
    parts = Resident({"first": nn.Linear(2, 2), "second": torch.compile(nn.Conv2d(2, 2, 1))})
    assert repr(parts) == "<Resident of first: Linear, second: Conv2d; 0 adapters, active: none>"
    assert repr(Resident({})) == "<Resident of nothing; 0 adapters, active: none>"


def test_one_weight_that_others_wrote() -> None:
    model = tiny.linears()
    resident = Resident(model)
    resident.add(tiny.adapter_for(model, only=("0.",)), "a")
    resident.set({"a": 1.0})
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(
        ResidentStateError, match=r"^1 adapted weight was modified outside shira_diffusers while adapters were"
    ):
        resident.clear()


LARGE = {
    torch.float16: 65504.0,
    torch.bfloat16: 3.38e38,
    torch.float32: 3.4e38,
    torch.float8_e4m3fn: 448.0,
    torch.float8_e5m2: 57344.0,
}


def near_the_limit(dtype: torch.dtype) -> tuple[nn.Linear, Resident, dict[str, torch.Tensor]]:
    """Entries 0 and 1 hold the dtype's largest value; "up" doubles them, "down" halves them; "b" is active."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        model.weight.view(-1)[:2] = LARGE[dtype]
    model.to(dtype)
    resident = Resident(model)
    values = torch.tensor([LARGE[dtype], LARGE[dtype], 1.0, 2.0])
    for name, sign in (("up", 1.0), ("down", -0.5)):
        resident.add(ShiraAdapter({"weight": SparseDelta(torch.arange(4), sign * values, (4, 8))}), name)
    resident.add(ShiraAdapter({"weight": SparseDelta(torch.arange(2, 6), torch.ones(4), (4, 8))}), "b")
    resident.set({"b": 0.5})
    return model, resident, tiny.snapshot(model)


@pytest.mark.parametrize("dtype", LARGE)
@pytest.mark.parametrize("mix", [{"up": 1.0}, {"up": 1.0, "b": 1.0}, {"down": 1.0, "up": 0.75}])
def test_sums_out_of_range_are_refused(dtype: torch.dtype, mix: dict) -> None:
    model, resident, before = near_the_limit(dtype)
    message = rf"1 weight would become infinite or NaN with .*up=[\s\S]*weight: 2 of \d entries in {str(dtype)[6:]}"
    with pytest.raises(ShiraError, match=message):
        resident.set(mix)
    assert resident.active == {"b": 0.5}
    tiny.assert_same_bits(model, before)
    resident.verify()
    resident.set({"down": 1.0})
    assert resident.active == {"down": 1.0}
    with pytest.raises(ShiraError, match="2 of 4 entries"):
        resident.set({"down": -1.0})  # the same entries: a new strength
    assert resident.active == {"down": 1.0}
    resident.clear()
    assert bool((model.weight.view(-1)[:2].float() >= 0.98 * LARGE[dtype]).all())


def test_what_a_cast_has_made_infinite_is_not_baked() -> None:
    model = tiny.linears()
    resident = Resident(model)
    resident.add(tiny.adapter_for(model, only=("",), size=1.0), "a")
    resident.set({"a": 2e5})
    model.half()
    held = tiny.snapshot(model)
    with pytest.raises(ShiraError, match=r"would become infinite or NaN with a=200000.0[\s\S]*entries in float16"):
        resident.bake()
    assert resident.active == {"a": 2e5}
    tiny.assert_same_bits(model, held)
    resident.clear()
    tiny.assert_same_bits(model, tiny.snapshot(tiny.linears().half()))


def test_all_components_are_refused_together() -> None:
    parts = {"fine": nn.Linear(4, 4).half(), "wide": nn.Linear(4, 4).half()}
    before = {name: tiny.snapshot(part) for name, part in parts.items()}
    resident = Resident(parts)
    for name, size in (("fine", 1.0), ("wide", 1e3)):
        adapter = ShiraAdapter({"weight": SparseDelta(torch.arange(3), torch.full((3,), size), (4, 4))})
        resident.add(adapter.prefixed(name), name)
    with pytest.raises(ShiraError, match=r"1 weight would.*fine=100.0, wide=100.0[\s\S]*wide.weight: 3 of 3 entries"):
        resident.set({"fine": 100.0, "wide": 100.0})
    assert resident.active == {}
    for name, part in parts.items():
        tiny.assert_same_bits(part, before[name])


def test_a_base_that_is_not_finite_may_be_adapted() -> None:
    model = nn.Linear(4, 4).half()
    with torch.no_grad():
        model.weight.view(-1)[:2] = torch.tensor([torch.nan, torch.inf])
    before = tiny.snapshot(model)
    resident = Resident(model)
    resident.add(ShiraAdapter({"weight": SparseDelta(torch.arange(4), torch.ones(4), (4, 4))}), "a")
    resident.set({"a": 1.0})
    assert resident.active == {"a": 1.0}
    assert torch.equal(model.weight.view(-1)[2:4], (before["weight"].view(-1)[2:4].float() + 1.0).half())
    with pytest.raises(ShiraError, match="2 of 4 entries in float16"):
        resident.set({"a": 1e5})
    resident.clear()
    tiny.assert_same_bits(model, before)


def test_a_failing_load_with_a_scale_out_of_range_leaves_nothing() -> None:
    pipe = tiny.pipeline(torch.float16)
    before = tiny.snapshot(pipe)
    with pytest.raises(ShiraError, match=r"\d+ weights would become infinite or NaN with a=1e\+20"):
        pipe.load_shira(tiny.adapter_for(pipe), "a", scale=1e20)
    assert pipe.list_shira() == {}
    tiny.assert_same_bits(pipe, before)


def test_a_foreign_write_of_a_free_entry_is_none_of_our_business(resident: Resident, model: nn.Module) -> None:
    resident.set({"c": 1.0})
    with torch.no_grad():
        model.conv_in.weight.add_(1.0)
    base = model.conv_in.weight.clone()
    resident.clear()
    assert torch.equal(model.conv_in.weight, base)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(4, 6)
        self.second.weight = self.first.weight


def test_tied_weights_are_written_once() -> None:
    model = Tied()
    delta = SparseDelta(torch.tensor([3, 5]), torch.ones(2), (6, 4))
    base = tiny.snapshot(model)
    resident = Resident(model)
    resident.add(ShiraAdapter({"first.weight": delta, "second.weight": delta}), "both")
    resident.add(ShiraAdapter({"second.weight": delta}), "second")
    resident.set({"both": 1.0})
    assert torch.equal(model.first.weight.view(-1)[[3, 5]], base["first.weight"].view(-1)[[3, 5]] + 1)
    resident.set({"both": 1.0, "second": 2.0})
    assert torch.equal(model.first.weight.view(-1)[[3, 5]], base["first.weight"].view(-1)[[3, 5]] + 3)
    resident.set({"second": 1.0})
    assert torch.equal(model.first.weight.view(-1)[[3, 5]], base["first.weight"].view(-1)[[3, 5]] + 1)
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_a_mix_that_was_baked_into_a_tied_weight_is_the_base_of_the_next() -> None:
    model = Tied()
    delta = SparseDelta(torch.tensor([3, 5]), torch.ones(2), (6, 4))
    resident = Resident(model)
    resident.add(ShiraAdapter({"first.weight": delta}), "a")
    resident.set({"a": 1.0})
    resident.bake()
    baked = tiny.snapshot(model)
    resident.set({"a": 2.0})
    assert torch.equal(model.second.weight.view(-1)[[3, 5]], baked["first.weight"].view(-1)[[3, 5]] + 2)
    resident.clear()
    tiny.assert_same_bits(model, baked)


def test_strengths_by_block_of_a_tied_weight_are_those_of_the_name_in_the_adapter(model: nn.Module) -> None:
    up, down = "up_blocks.1.resnets.0.time_emb_proj.weight", "down_blocks.0.resnets.0.time_emb_proj.weight"
    tied = model.up_blocks[1].resnets[0].time_emb_proj
    model.down_blocks[0].resnets[0].time_emb_proj.weight = tied.weight
    base, resident = tied.weight.detach().clone(), Resident(model)
    for name, weight in (("a", up), ("b", down)):
        delta = SparseDelta(torch.tensor([0]), torch.tensor([8.0]), tuple(base.shape))
        resident.add(ShiraAdapter({weight: delta}), name)
    for before in ({"b": 1.0}, {}):
        resident.set(before)
        resident.set({"a": {"": {"up": 0.5}}})
        assert tied.weight.flatten()[0] == base.flatten()[0] + 4


def test_the_base_is_known_by_any_name_of_a_tied_weight() -> None:
    model = tiny.linears()
    other = nn.Linear(2, 2)
    model.add_module("other", other)
    names = [name for name, weight in model.named_parameters() if weight.ndim == 2]
    first = model.get_parameter(names[0])
    other.weight = first
    tuned = {names[0]: first.detach() + 1}
    one = ShiraAdapter.from_difference({names[0]: first.detach()}, tuned)
    two = ShiraAdapter.from_difference({"other.weight": first.detach()}, {"other.weight": first.detach() + 1})
    resident = Resident(model)
    resident.add(one, "one")
    resident.set({"one": 1.0})
    assert resident.check(two) == "same"


def test_different_deltas_for_one_tied_weight_are_refused() -> None:
    model = Tied()
    one, two = (SparseDelta(torch.tensor([3]), torch.tensor([v]), (6, 4)) for v in (1.0, 2.0))
    base = tiny.snapshot(model)
    resident = Resident(model)
    odd = ShiraAdapter({"first.weight": one, "second.weight": two})
    for refusing in (lambda: resident.add(odd, "odd"), lambda: resident.check(odd)):
        with pytest.raises(AdapterMismatchError, match=r"second.weight: has different deltas from first.weight.*tied"):
            refusing()
    assert resident.names == [] and resident.active == {}
    tiny.assert_same_bits(model, base)


def test_one_module_under_two_names_is_one_component() -> None:
    model = tiny.linears()
    resident = Resident({"left": model, "right": model})
    base = tiny.snapshot(model)
    resident.add(tiny.adapter_for(model, only=("0",)).prefixed("left"), "a")
    resident.set({"a": 1.0})
    assert not torch.equal(model[0].weight, base["0.weight"])
    resident.clear()
    tiny.assert_same_bits(model, base)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"unet": nn.Linear(2, 2), "vae": None, "size": 3}, r"leave out what is no module:\n  - 'vae': None.*\n.*int"),
        (3, r"expected a module, \{component: module\} or a pipeline, got int"),
        ([nn.Linear(2, 2)], "got list"),
        (nn.ModuleList([nn.Linear(2, 2)]), "expected models, which can be called; .*\n  - '': ModuleList"),
    ],
)
def test_what_is_no_module_is_refused(given: object, message: str) -> None:
    with pytest.raises(ShiraError, match=message):
        Resident(given)


def test_a_deepcopy_has_its_own_state(resident: Resident, model: nn.Module, adapters: dict) -> None:
    base = tiny.snapshot(model)
    resident.set({"a": 1.0})
    twin = copy.deepcopy(model)
    other = Resident(twin)
    assert other.active == {"a": 1.0}
    assert other.names == ["a", "b", "c"]
    other.clear()
    tiny.assert_same_bits(twin, base)
    assert same_as_oracle(model, base, adapters, {"a": 1.0})
    resident.set({"b": 1.0})
    tiny.assert_same_bits(twin, base)
    assert {key: value.clone() for key, value in twin.state_dict().items()}.keys() == base.keys()


CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "float64": lambda module: module.to(torch.float64),
    "float64 and back": lambda module: module.to(torch.float64).to(torch.float32),
    "half and back": lambda module: module.half().float(),
    "half, bfloat16": lambda module: module.half().to(torch.bfloat16),
    "device": lambda module: module.to("cpu"),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_casting_while_active_equals_casting_the_base(
    resident: Resident, model: nn.Module, adapters: dict, cast: Callable[[nn.Module], nn.Module]
) -> None:
    plain = tiny.snapshot(cast(tiny.unet()))
    resident.set({"a": 1.0, "b": 0.5})
    cast(model)
    resident.verify()
    saved = model.state_dict()
    assert all(tiny.same_bits(saved[name], plain[name]) for name in plain)
    resident.set({"a": 0.5, "b": 0.5})
    assert same_as_oracle(model, plain, adapters, {"a": 0.5, "b": 0.5})
    resident.clear()
    tiny.assert_same_bits(model, plain)


def test_casting_one_layer_while_active(resident: Resident, model: nn.Module, adapters: dict) -> None:
    """``module.to`` of a part does not reach the state; the saved bits are cast when they are needed."""
    plain = tiny.unet()
    plain.mid_block.half()
    resident.set({"a": 1.0, "b": 1.0})
    model.mid_block.half()
    resident.set({"b": 1.0})
    assert same_as_oracle(model, tiny.snapshot(plain), adapters, {"b": 1.0})
    resident.clear()
    tiny.assert_same_bits(model, tiny.snapshot(plain))


def test_casting_one_layer_and_then_the_others_while_active(
    resident: Resident, model: nn.Module, adapters: dict
) -> None:
    """What was laid out as two dtypes is one again: all of the mix arrives."""
    plain = copy.deepcopy(model)
    resident.set({"a": 1.0})
    for cast in (lambda module: module.mid_block.half(), lambda module: module.half()):
        cast(model)
        cast(plain)
        resident.set({"a": 0.5})
        assert same_as_oracle(model, tiny.snapshot(plain), adapters, {"a": 0.5})
    resident.clear()
    tiny.assert_same_bits(model, tiny.snapshot(plain))


@pytest.mark.parametrize("narrow", [torch.float8_e4m3fn, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("back", ["whole", "layers"])
def test_casting_layers_down_and_back_while_active(
    narrow: torch.dtype, back: str, resident: Resident, model: nn.Module, adapters: dict
) -> None:
    """Neither cast reaches the state while a layer is narrow; what is restored is the base, rounded as well."""

    def there_and_back(model: nn.Module) -> None:
        layers = [layer for layer in model.mid_block.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        for layer in layers:
            layer.to(narrow)
        for layer in layers if back == "layers" else [model]:
            layer.to(torch.float32)

    plain = tiny.unet()
    there_and_back(plain)
    base = tiny.snapshot(plain)
    resident.set({"a": 1.0, "b": 0.5})
    there_and_back(model)
    resident.verify()
    saved = model.state_dict()
    assert all(tiny.same_bits(saved[name], base[name]) for name in base)
    resident.set({"a": 0.5})
    assert same_as_oracle(model, base, adapters, {"a": 0.5})
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_state_dict_while_active_is_the_base(resident: Resident, model: nn.Module) -> None:
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resident.set({"a": 1.0, "b": 1.0})
    bits = tiny.snapshot(model)
    saved = model.state_dict()
    assert saved.keys() == base.keys()
    assert all(tiny.same_bits(saved[name], base[name]) for name in base)
    tiny.assert_same_bits(model, bits)
    parent = nn.ModuleDict({"denoiser": model})
    nested = parent.state_dict()
    assert all(tiny.same_bits(nested[f"denoiser.{name}"], base[name]) for name in base)


def test_state_dict_of_tied_weights_stays_tied() -> None:
    model = Tied()
    base = tiny.snapshot(model)["first.weight"]
    resident = Resident(model)
    resident.add(ShiraAdapter({"first.weight": SparseDelta(torch.tensor([3]), torch.ones(1), (6, 4))}), "a")
    resident.set({"a": 1.0})
    saved = model.state_dict()
    assert torch.equal(saved["first.weight"], base)
    assert saved["first.weight"].data_ptr() == saved["second.weight"].data_ptr()


def test_without_adapters_state_dict_is_not_copied(resident: Resident, model: nn.Module) -> None:
    assert model.state_dict()["conv_in.weight"].data_ptr() == model.conv_in.weight.data_ptr()
    assert not [name for name in model.state_dict() if "_shira" in name]
    assert not [name for name, _ in model.named_parameters() if "_shira" in name]
    assert not [name for name, _ in model.named_buffers() if "_shira" in name]


def test_disable_and_enable(resident: Resident, model: nn.Module, adapters: dict) -> None:
    base = tiny.snapshot(model)
    resident.set({"a": 0.5, "b": 1.0})
    for _ in range(2):
        resident.disable()
        tiny.assert_same_bits(model, base)
        assert resident.active == {}
    for _ in range(2):
        resident.enable()
        assert same_as_oracle(model, base, adapters, {"a": 0.5, "b": 1.0})
        assert resident.active == {"a": 0.5, "b": 1.0}
    resident.disable()
    resident.remove("a")
    resident.enable()
    assert same_as_oracle(model, base, adapters, {"b": 1.0})
    resident.disable()
    resident.set({"c": 1.0})  # a new mix replaces what was put aside
    resident.enable()
    assert resident.active == {"c": 1.0}


def test_enable_with_nothing_put_aside_changes_nothing(resident: Resident, model: nn.Module) -> None:
    base = tiny.snapshot(model)
    resident.enable()
    resident.disable()
    resident.enable()
    assert resident.active == {}
    tiny.assert_same_bits(model, base)


def test_bake_makes_the_mix_the_base(resident: Resident, model: nn.Module, adapters: dict) -> None:
    base = tiny.snapshot(model)
    resident.set({"a": 1.0})
    resident.bake()
    assert resident.active == {}
    assert resident.names == ["a", "b", "c"]
    assert same_as_oracle(model, base, adapters, {"a": 1.0})
    baked = tiny.snapshot(model)
    resident.set({"a": 1.0})
    assert same_as_oracle(model, baked, adapters, {"a": 1.0})
    resident.clear()
    tiny.assert_same_bits(model, baked)


def test_using_returns_to_the_mix_before(resident: Resident, model: nn.Module, adapters: dict) -> None:
    base = tiny.snapshot(model)
    resident.set({"a": 1.0})
    with resident.using({"b": 2.0, "c": 1.0}):
        assert same_as_oracle(model, base, adapters, {"b": 2.0, "c": 1.0})
        with resident.using({}):
            tiny.assert_same_bits(model, base)
        assert resident.active == {"b": 2.0, "c": 1.0}
    assert resident.active == {"a": 1.0}
    with pytest.raises(ZeroDivisionError), resident.using({"b": 1.0}):
        raise ZeroDivisionError
    assert same_as_oracle(model, base, adapters, {"a": 1.0})
    with pytest.raises(ShiraError), resident.using({"x": 1.0}):
        pytest.fail("an unknown adapter was used")
    assert same_as_oracle(model, base, adapters, {"a": 1.0})


def test_using_remembers_what_is_disabled_and_what_was_deleted_inside(resident: Resident, model: nn.Module) -> None:
    base = tiny.snapshot(model)
    resident.set({"a": 1.0, "b": 1.0})
    resident.disable()
    with resident.using({"c": 1.0}):
        resident.remove("a")
    tiny.assert_same_bits(model, base)
    resident.enable()
    assert resident.active == {"b": 1.0}


def test_going_back_and_forth_plans_nothing_whatever_the_size(
    resident: Resident, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_REMEMBERED_BYTES", 0)
    planned = []
    for name in "abab":
        resident.set({name: 1.0})
        resident.clear()
        planned.append(model._shira.remembered[0][0])
    assert planned[2] is planned[0] and planned[3] is planned[1]
    resident.set({"c": 1.0})
    assert len(model._shira.remembered) == 2, "older mixes leave when there is no room"


def test_plans_on_the_memory_of_adapters_from_files_cost_none(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = Resident(model)
    for seed in range(5):
        file = save_adapter(tiny.adapter_for(model, seed), tmp_path / f"{seed}.safetensors")
        resident.add(load_adapter(file), str(seed))
    monkeypatch.setattr(state, "_REMEMBERED_BYTES", resident.adapter("0").nbytes)

    def planned() -> list[object]:
        plans = []
        for name in resident.names:
            resident.set({name: 1.0})
            plans.append(model._shira.remembered[0][0])
        return plans

    assert planned() == planned()
    monkeypatch.setattr(state, "_REMEMBERED", 3)
    resident.set({"0": 1.0, "1": 1.0})
    assert len(model._shira.remembered) == 3


def test_remove_keeps_the_rest_of_the_mix(resident: Resident, model: nn.Module, adapters: dict) -> None:
    base = tiny.snapshot(model)
    resident.set({"a": 0.5, "b": 2.0})
    resident.remove("a")
    assert resident.active == {"b": 2.0}
    assert resident.names == ["b", "c"]
    assert same_as_oracle(model, base, adapters, {"b": 2.0})
    resident.remove("b")
    tiny.assert_same_bits(model, base)


def test_another_adapter_in_the_place_of_one(resident: Resident, model: nn.Module, adapters: dict) -> None:
    base = tiny.snapshot(model)
    resident.set({"a": 0.5, "b": 2.0})
    resident.replace(adapters["c"], "a")
    assert resident.active == {"a": 0.5, "b": 2.0} and resident.names == ["a", "b", "c"]
    assert same_as_oracle(model, base, {**adapters, "a": adapters["c"]}, {"a": 0.5, "b": 2.0})
    with pytest.raises(ShiraError, match="no adapter named 'x'"):
        resident.replace(adapters["c"], "x")
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_an_adapter_of_other_components_in_the_place_of_one(pipe: object) -> None:
    resident, base = Resident(tiny.modules_of(pipe)), tiny.snapshot(pipe)
    one, other = tiny.adapter_for(pipe, 1, components=("unet",)), tiny.adapter_for(pipe, 2)
    resident.add(one, "a")
    resident.set({"a": {"unet": 0.5}})
    for adapter, parts in ((other, ["text_encoder", "unet"]), (one, ["unet"])):
        resident.replace(adapter, "a")
        assert sorted(resident.components_of("a")) == parts and resident.active == {"a": {"unet": 0.5}}
        expected = reference.apply(base, {"a": adapter}, {"a": {"unet": 0.5}})
        tiny.assert_same_bits(pipe, expected)
    resident.clear()
    tiny.assert_same_bits(pipe, base)


@pytest.mark.parametrize("when", ["active", "put aside"])
def test_a_component_that_was_left_out_of_the_mix_by_itself_stays_out(when: str, pipe: object) -> None:
    resident, base = Resident(tiny.modules_of(pipe)), tiny.snapshot(pipe)
    adapter, other = tiny.adapter_for(pipe, 1), tiny.adapter_for(pipe, 2)
    resident.add(adapter, "a")
    resident.set({"a": 1.0})
    Resident({"unet": pipe.unet}).set({})
    mix = {"a": {"unet": 0.0, "text_encoder": 1.0}}
    assert resident.active == mix
    tiny.assert_same_bits(pipe, reference.apply(base, {"fused": resident.fused()}, {"fused": 1.0}))
    if when == "put aside":
        resident.disable()
    resident.replace(other, "a")
    resident.enable()
    assert resident.active == mix
    tiny.assert_same_bits(pipe, reference.apply(base, {"a": other}, mix))


@pytest.mark.parametrize("when", ["active", "put aside", "of the mix before"])
def test_a_replacement_drops_strengths_for_components_that_it_lacks(when: str, pipe: object) -> None:
    resident, base = Resident(tiny.modules_of(pipe)), tiny.snapshot(pipe)
    one, both = tiny.adapter_for(pipe, 1, components=("unet",)), tiny.adapter_for(pipe, 2)
    resident.add(both, "a")
    resident.set({"a": {"unet": 0.5, "text_encoder": 0.25}})
    if when == "put aside":
        resident.disable()
    with resident.using({}) if when == "of the mix before" else nullcontext():
        resident.replace(one, "a")
    resident.enable()
    assert resident.active == {"a": {"unet": 0.5}}
    assert Resident({"unet": pipe.unet, "text_encoder": tiny.text_encoder()}).active == {"a": {"unet": 0.5}}
    tiny.assert_same_bits(pipe, reference.apply(base, {"a": one}, {"a": {"unet": 0.5}}))
    resident.set(resident.active)
    resident.replace(both, "a")  # what was dropped does not come back
    tiny.assert_same_bits(pipe, reference.apply(base, {"a": both}, {"a": {"unet": 0.5}}))
    resident.clear()
    tiny.assert_same_bits(pipe, base)


def test_what_cannot_take_the_place_leaves_all_as_it_was(resident: Resident, model: nn.Module, adapters: dict) -> None:
    resident.set({"a": 0.5})
    with torch.no_grad():
        tiny.weights_of(model, ("attn1.to_q",)).popitem()[1].add_(1)  # modified outside shira_diffusers
    before = tiny.snapshot(model)
    with pytest.raises(ResidentStateError, match="modified outside shira_diffusers"):
        resident.replace(adapters["b"], "a")
    tiny.assert_same_bits(model, before)
    assert resident.active == {"a": 0.5} and resident.names == ["a", "b", "c"]
    tiny.assert_same_adapter(resident.adapter("a"), adapters["a"])


@pytest.mark.parametrize("name", ["", "other"])
@pytest.mark.parametrize("scale", [{"unet": 0.5}, {"unet": {"down": 0.3}, "text_encoder": 2}, {"text_encoder": 0.5}])
def test_strengths_hold_by_whatever_name_a_component_is_known(name: str, scale: dict, pipe: object) -> None:
    """A mix that one owner has set is put aside, brought back, fused and shown by another."""
    both, unet = Resident(tiny.modules_of(pipe)), Resident({name: pipe.unet} if name else pipe.unet)
    base, adapter = tiny.snapshot(pipe), tiny.adapter_for(pipe, 1)
    both.add(adapter, "a")
    both.add(tiny.adapter_for(pipe, 2), "b")
    both.set({"a": scale})
    expected = reference.apply(base, {"a": adapter}, {"a": scale})

    def use(resident: Resident, mix: dict) -> None:
        with resident.using(mix):
            pass

    acts = [
        lambda: (unet.disable(), unet.enable()),
        lambda: use(unet, {"b": 1.0}),
        lambda: unet.set(unet.active),
        lambda: (unet.add(unet.fused(), "mix"), unet.set({"mix": 1.0})),
    ]
    for act in acts:
        act()
        tiny.assert_same_bits(pipe, expected)


def test_two_residents_of_a_module_share_its_state(resident: Resident, model: nn.Module) -> None:
    base = tiny.snapshot(model)
    resident.set({"a": 1.0})
    other = Resident(model)
    assert other.active == {"a": 1.0}
    other.clear()
    assert resident.active == {}
    tiny.assert_same_bits(model, base)


def test_fused_gives_the_same_bits_as_the_mix(resident: Resident, model: nn.Module) -> None:
    resident.set({"a": 0.3, "b": -1.2, "c": 0.9})
    mixed = tiny.snapshot(model)
    resident.add(resident.fused(), "one")
    resident.set({"one": 1.0})
    tiny.assert_same_bits(model, mixed)
    resident.clear()
    with pytest.raises(ShiraError, match="no adapter is active"):
        resident.fused()


def test_what_does_not_fit_is_refused_whole(model: nn.Module, adapters: dict) -> None:
    resident = Resident(model)
    base = tiny.snapshot(model)
    first, second, *_ = adapters["a"].deltas
    wrong_shape = SparseDelta(torch.tensor([0]), torch.ones(1), (3, 7))
    cases = {
        r"1 of \d+ parameters differ[\s\S]*expected \(.*, got \(3, 7\)": {**adapters["a"].deltas, first: wrong_shape},
        r"2 of 2 parameters differ[\s\S]*x.weight[\s\S]*y.weight": {"x.weight": wrong_shape, "y.weight": wrong_shape},
        "holds no deltas": {},
    }
    for message, deltas in cases.items():
        with pytest.raises(AdapterMismatchError, match=message):
            resident.add(ShiraAdapter(deltas, {"base_model": "tiny"}), "x")
    with pytest.raises(AdapterMismatchError, match="it was trained on 'tiny'"):
        resident.add(ShiraAdapter({second: wrong_shape}, {"base_model": "tiny"}), "x")
    assert resident.names == []
    tiny.assert_same_bits(model, base)


@pytest.mark.parametrize("name", ["", None, 3])
def test_names_are_strings(model: nn.Module, adapters: dict, name: object) -> None:
    with pytest.raises(ShiraError, match="must be a string"):
        Resident(model).add(adapters["a"], name)


def test_a_file_is_no_adapter(resident: Resident) -> None:
    for take in (lambda file: resident.add(file, "new"), lambda file: resident.replace(file, "a"), resident.check):
        with pytest.raises(ShiraError, match=r"expected a ShiraAdapter, got str .* read files with load_adapter"):
            take("a.safetensors")
    assert "new" not in resident.names and "a" in resident.names


def test_a_name_is_used_once(resident: Resident, adapters: dict) -> None:
    with pytest.raises(ValueError, match="'a' is in use"):
        resident.add(adapters["b"], "a")
    assert resident.adapter("a").deltas == adapters["a"].deltas


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = tiny.linears()
    base = tiny.snapshot(model)
    adapter = tiny.adapter_for(model, only=("",))
    resident = Resident(model)
    resident.add(adapter, "a")
    resident.set({"a": 1.0})
    assert same_as_oracle(model, base, {"a": adapter}, {"a": 1.0})
    with torch.inference_mode():
        resident.set({"a": 0.5})
        resident.clear()
    tiny.assert_same_bits(model, base)


def test_switching_in_inference_mode_and_after_it(resident: Resident, model: nn.Module) -> None:
    with torch.inference_mode():
        resident.set({"a": 1.0})
    resident.set({"a": 0.5, "b": 1.0})
    model.half().float()
    resident.clear()
    tiny.assert_same_bits(model, tiny.snapshot(tiny.unet().half().float()))


def test_a_switch_inside_of_autocast_is_seen(resident: Resident, model: nn.Module) -> None:
    """A region of autocast keeps its casts of weights that require gradients, as those of pipelines do."""

    def call() -> torch.Tensor:
        return model(torch.ones(1, 4, 8, 8), 3, encoder_hidden_states=torch.ones(1, 3, 32)).sample

    def alone(mix: dict) -> torch.Tensor:
        resident.set(mix)
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    mixes = [{"a": 1.0}, {"b": 1.0}, {}]
    expected = [alone(mix) for mix in mixes]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for mix, picture in zip(mixes, expected, strict=True):
            resident.set(mix)
            assert torch.equal(call(), picture)


def test_a_backward_that_needs_weights_of_before_a_switch_fails(resident: Resident, model: nn.Module) -> None:
    latents = torch.ones(1, 4, 8, 8, requires_grad=True)
    with resident.using({"a": 1.0}):
        loss = model(latents, 3, encoder_hidden_states=torch.ones(1, 3, 32)).sample.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_base_is_told_from_a_sibling_and_from_another_model(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for _, weight in tiny.weights_of(tuned, ("to_q", "conv1")).items():
            weight.view(-1)[::7] += 0.5
    adapter = ShiraAdapter.from_difference(model, tuned, metadata={"base_model": "tiny"})
    sibling = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in sibling.parameters():
            parameter.mul_(1.1)
    assert Resident(model).check(adapter) == "same"
    assert Resident(copy.deepcopy(model).half()).check(adapter) == "same"
    assert Resident(copy.deepcopy(model).bfloat16()).check(adapter) == "same"
    assert Resident(sibling).check(adapter) == "sibling"
    assert Resident(tiny.unet(99)).check(adapter) == "other"
    assert Resident(model).check(ShiraAdapter(adapter.deltas)) is None
    resident = Resident(model)
    resident.add(adapter, "a")
    resident.set({"a": 1.0})
    assert resident.check(adapter) == "same"  # told from the base below what is active
    with caplog.at_level("INFO"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a sibling is worth a line in the log, not a warning
        Resident(sibling).add(adapter, "a")
    assert "sibling" in caplog.text
    with pytest.warns(UserWarning, match="trained on another model than this one; it was trained on 'tiny'"):
        Resident(tiny.unet(99)).add(adapter, "a")


def test_a_warning_about_another_base_points_at_who_called(pipe: StableDiffusionPipeline) -> None:
    other, tuned = tiny.unet(99), tiny.unet(99)
    tiny.weights_of(tuned, ("to_q",)).popitem()[1].add_(1)
    probed = ShiraAdapter.from_difference(other, tuned).prefixed("unet")
    resident = Resident(tiny.modules_of(pipe))
    resident.add(tiny.adapter_for(pipe, 1), "c")
    with pytest.warns(UserWarning, match="trained on another model") as caught:
        here = inspect.currentframe().f_lineno
        resident.add(probed, "a")
        resident.replace(probed, "c")
        pipe.load_shira(probed, "b")
        pipe.load_shira(probed, "b", hotswap=True)
    assert [(one.filename, one.lineno - here) for one in caught] == [(__file__, line) for line in (1, 2, 3, 4)]


def test_a_sequential_still_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    before = model(x)
    resident = Resident(model)
    resident.add(tiny.adapter_for(model, only=("",)), "a")
    assert torch.equal(model(x), before)
    resident.set({"a": 1.0})
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_by_type_while_active_keeps_the_base(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"wide": nn.Linear(100, 100)})  # positions that float16 does not hold
    expected = copy.deepcopy(model)
    resident = Resident(model)
    resident.add(tiny.adapter_for(model, only=("",)), "a")
    resident.set({"a": 1.0})
    model.type(dtype)
    resident.set({"a": 0.5})
    resident.clear()
    tiny.assert_same_bits(model, tiny.snapshot(expected.type(dtype)))


def test_plain_modules_of_other_libraries() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    adapter = tiny.adapter_for(model, only=("q_proj", "mlp"))
    before = model(torch.tensor([[1, 2, 3]])).logits
    resident = Resident(model)
    resident.add(adapter, "a")
    with resident.using({"a": 1.0}):
        assert not torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)


def test_many_adapters_come_and_go(model: nn.Module) -> None:
    base = tiny.snapshot(model)
    resident = Resident(model)
    for i in range(30):
        resident.add(tiny.adapter_for(model, i, density=0.01), f"n{i:03}")
        resident.set({f"n{i:03}": 1.0, f"n{i // 2:03}": 0.5})
    for name in list(resident.names):
        resident.remove(name)
    tiny.assert_same_bits(model, base)
    assert resident.names == []
