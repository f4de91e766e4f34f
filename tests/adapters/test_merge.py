"""Several adapters into one: the sum, and that nothing depends on how it was asked for."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shira_diffusers import AdapterMismatchError, ShiraAdapter, ShiraError, SparseDelta, fuse
from shira_diffusers.adapters.merge import MERGE_METHODS, fuse_scaled, merge_method, plan_union
from tests import reference, tiny


def adapters(dtype: torch.dtype = torch.float32) -> dict[str, ShiraAdapter]:
    model = tiny.linears()
    return {
        "c": tiny.adapter_for(model, 1, only=("",), dtype=dtype),
        "a": tiny.adapter_for(model, 2, only=("0", "1"), density=0.5),
        "b": tiny.adapter_for(model, 3, only=("2",), density=1.0),
    }


def slow_sum(parts: Sequence[ShiraAdapter], scales: Sequence[float], name: str, shape: tuple[int, ...]) -> Tensor:
    total = torch.zeros(shape)
    for part, scale in zip(parts, scales, strict=True):
        if name in part.deltas:
            delta = part.deltas[name]
            total += scale * reference.dense(delta.indices, delta.values, shape)
    return total


def test_the_sum_equals_the_dense_sum(dtype: torch.dtype) -> None:
    parts, scales = list(adapters(dtype).values()), [0.3, -1.7, 2.0]
    fused = fuse(parts, scales)
    assert set(fused.deltas) == {name for part in parts for name in part.deltas}
    for name, delta in fused.deltas.items():
        assert delta.values.dtype == torch.float32
        assert torch.equal(delta.to_dense(), slow_sum(parts, scales, name, delta.shape))
        union = {i for part in parts if name in part.deltas for i in part.deltas[name].indices.tolist()}
        assert delta.indices.tolist() == sorted(union)


def test_a_mapping_adds_in_the_order_of_names() -> None:
    named, weights = adapters(), {"c": 0.3, "a": -1.7, "b": 2.1}
    fused = fuse(named, [weights[name] for name in named])
    ordered = fuse([named[name] for name in "abc"], [weights[name] for name in "abc"])
    backwards = fuse(dict(reversed(named.items())), [weights[name] for name in reversed(named)])
    assert fused.deltas == ordered.deltas == backwards.deltas


def test_weights() -> None:
    parts = list(adapters().values())
    assert fuse(parts).deltas == fuse(parts, 1.0).deltas == fuse(parts, [1, 1, 1]).deltas
    assert fuse(parts, 0.5).deltas == fuse(parts, [0.5] * 3).deltas
    assert not any(delta.values.any() for delta in fuse(parts, 0).deltas.values())


def test_a_scale_for_each_parameter() -> None:
    part = adapters()["c"]
    fused = fuse_scaled([(part, lambda name: 2.0 if name == "0.weight" else 0.5)])
    for name, delta in fused.deltas.items():
        assert torch.equal(delta.values, part.deltas[name].values * (2.0 if name == "0.weight" else 0.5))


@pytest.mark.parametrize(
    ("weights", "method", "message"),
    [
        ([1.0], "sum", "got 1 weight for 3 adapters"),
        ([1.0, torch.nan, 1.0], "sum", "finite numbers"),
        (float("inf"), "sum", "finite numbers"),
        pytest.param(10**400, "sum", "finite numbers", id="an integer that no float holds"),
        (1e39, "sum", r"3 of 3 parameters become too large for float32 .*use smaller weights:\n  - 0\.weight"),
        (1.0, "ties", "unknown merge method 'ties', expected one of sum"),
    ],
)
def test_what_is_refused(weights: object, method: str, message: str) -> None:
    with pytest.raises(ShiraError, match=message):
        fuse(list(adapters().values()), weights, method)


def test_weights_by_name() -> None:
    named = {name: adapters()[name] for name in "ba"}
    by_name = fuse(named, {"a": 0.25, "b": None})
    assert by_name.deltas == fuse([named["a"], named["b"]], [0.25, 1.0]).deltas
    assert by_name.deltas == fuse(named, [None, 0.25]).deltas
    for weights in (np.array([1.0, 0.25]), torch.tensor([1.0, 0.25]), [np.float32(1), torch.tensor(0.25)]):
        assert fuse(named, weights).deltas == by_name.deltas


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.25}, r"expected a weight for each of \['c', 'a', 'b'\], got weights for \['a'\]"),
        ({"unet": 0.25}, r"expected a weight for each of"),
        ({"a": 1.0, "b": 1.0, "c": {"unet": 0.5}}, "for a strength per component use pipe.set_shira"),
        ("0.5", "expected one number for all adapters, one each"),
        (["1", 1.0, 1.0], "expected one number for all adapters"),
        (True, "expected one number for all adapters"),
    ],
)
def test_bad_weights_by_name(weights: object, message: str) -> None:
    with pytest.raises(ShiraError, match=message):
        fuse(adapters(), weights)


def test_weights_by_name_need_names() -> None:
    with pytest.raises(ShiraError, match=r"\{name: number\} for adapters \{name: adapter\}, got \{'a': 0\.25\}"):
        fuse([adapters()["a"]], {"a": 0.25})


def test_nothing_to_fuse() -> None:
    for nothing in ([], {}):
        with pytest.raises(ShiraError, match="at least one adapter"):
            fuse(nothing)


@pytest.mark.parametrize("adapters", ["a.safetensors", ["a.safetensors"], {"x": "a.safetensors"}])
def test_files_are_no_adapters(adapters: object) -> None:
    with pytest.raises(ShiraError, match=r"expected adapters, .* got str 'a.safetensors'; read files with"):
        fuse(adapters)  # type: ignore[arg-type]


def test_one_adapter_is_no_list() -> None:
    with pytest.raises(ShiraError, match="in a list or by name, got one ShiraAdapter; put it into a list"):
        fuse(adapters()["a"])  # type: ignore[arg-type]


def test_other_shapes_are_refused_all_at_once() -> None:
    one = SparseDelta(torch.tensor([0]), torch.ones(1), (2, 3))
    other = SparseDelta(torch.tensor([0]), torch.ones(1), (3, 2))
    parts = [ShiraAdapter({"a": one, "b": one, "c": one}), ShiraAdapter({"a": other, "b": other, "c": one})]
    with pytest.raises(AdapterMismatchError, match=r"2 of 3 parameters[\s\S]*a: \(2, 3\) and \(3, 2\)[\s\S]*b: "):
        fuse(parts)


@pytest.mark.parametrize("prefix", ["", "text_encoder."])
def test_the_two_names_of_a_text_encoders_weights_are_one(prefix: str) -> None:
    """As when the adapters are loaded; one that has both names keeps them, for loading to refuse."""
    old, new = f"{prefix}text_model.a.weight", f"{prefix}a.weight"
    one, two = (
        SparseDelta(torch.tensor([0]), torch.ones(1), (2, 3)),
        SparseDelta(torch.tensor([1]), torch.ones(1), (2, 3)),
    )
    probe = torch.tensor([0.5]).half()
    first, second = ShiraAdapter({old: one}, {}, {old: probe}), ShiraAdapter({new: two})
    for parts, name in (((first, second), old), ((second, first), new)):
        fused = fuse(parts, [2.0, 2.0])
        assert {n: delta.to_dense().flatten().tolist() for n, delta in fused.deltas.items()} == {
            name: [2, 2, 0, 0, 0, 0]
        }
        assert torch.equal(fused.base_probes[name], probe)
    assert fuse([first, ShiraAdapter({old: one, new: two})]).names == tuple(sorted([old, new]))


def test_metadata_keeps_what_all_agree_on() -> None:
    one, two = adapters()["a"], adapters()["b"]
    one = one.with_metadata(mask="wm", density="0.1", instance_prompt="in sks style")
    two = two.with_metadata(mask="rand", density="0.1", instance_prompt="a blue fire")
    assert fuse([one, two]).metadata == {"base_model": "tiny", "instance_prompt": "in sks style, a blue fire"}


def test_a_method_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_wins(union: object, values: Sequence[Tensor], scales: Sequence[object]) -> Tensor:
        return torch.full((union.indices.numel(),), float(len(values)))

    monkeypatch.setitem(MERGE_METHODS, "count", last_wins)
    assert merge_method("count") is last_wins
    fused = fuse([adapters()["a"], adapters()["c"]], method="count")
    assert set(fused.deltas["0.weight"].values.tolist()) == {2.0}
    assert set(fused.deltas["2.weight"].values.tolist()) == {1.0}


def test_the_base_is_still_known_after_fusing() -> None:
    shape, base = (2, 6), torch.arange(12.0)

    def part(indices: list[int], told: int) -> ShiraAdapter:
        places = torch.tensor(indices)
        delta = SparseDelta(places, torch.ones(len(indices)), shape)
        return ShiraAdapter({"w": delta}, {}, {"w": base[places[:told]].half()})

    fused = fuse([part([0, 4, 9], 2), part([2, 4, 11], 3)])
    assert fused.deltas["w"].indices.tolist() == [0, 2, 4, 9, 11]
    assert torch.equal(fused.base_probes["w"], torch.tensor([0.0, 2.0, 4.0]).half())  # 9 was not told


def test_nothing_is_said_of_the_base_where_no_adapter_does() -> None:
    assert fuse(list(adapters().values())).base_probes == {}


# ---------------------------------------------------------------- the union of their entries

sorted_indices = st.lists(st.integers(0, 40), unique=True, max_size=30).map(sorted)


@settings(max_examples=100, deadline=None)
@given(st.lists(sorted_indices, min_size=1, max_size=8), st.sampled_from([torch.int32, torch.int64]))
def test_the_union_and_the_places_in_it(parts: list[list[int]], dtype: torch.dtype) -> None:
    union = plan_union([torch.tensor(part, dtype=dtype) for part in parts])
    assert union.indices.tolist() == sorted(set().union(*parts))
    assert union.indices.dtype == dtype
    for part, place in zip(parts, union.places, strict=True):
        if place is None:
            assert len(part) == union.indices.numel()
        else:
            assert place.dtype == torch.int64
            assert union.indices[place].tolist() == part


def test_positions_beyond_32_bits() -> None:
    parts = [torch.tensor([0, 2**33, 2**33 + 5]), torch.tensor([7, 2**33])]
    union = plan_union(parts)
    assert union.indices.tolist() == [0, 7, 2**33, 2**33 + 5]
    assert [union.indices[place].tolist() for place in union.places if place is not None] == [p.tolist() for p in parts]
