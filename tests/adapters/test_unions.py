"""The union of the entries of several deltas."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira_diffusers.adapters.merge import plan_union

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
