"""The union of the entries of several deltas, by each of the ways in which it is found."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shira_diffusers.adapters import merge
from shira_diffusers.adapters.merge import plan_union

sorted_indices = st.lists(st.integers(0, 40), unique=True, max_size=30).map(sorted)


@pytest.fixture(params=[(2**20, 1000), (7, 1000), (1, 1000), (2**20, 0)], ids=["marks", "ranges", "single", "sorting"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("_RANGE", "_SPARSE"), request.param, strict=True):
        monkeypatch.setattr(merge, name, value)


@pytest.mark.usefixtures("way")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_small_weights_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more positions are looked at than the weight has: a million for each of 160 took a third of a second."""
    looked_at, nonzero = [], torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda marks: (looked_at.append(marks.numel()), nonzero(marks))[1])
    plan_union([torch.arange(0, 300, 3), torch.arange(0, 300, 2)])
    assert looked_at == [299]
