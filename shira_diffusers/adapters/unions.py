"""The union of the entries of several deltas, planned once and used for any strengths."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FEW = 4
_RANGE = 2**20  # positions marked at a time: what stays in a core's cache (measured)
_SPARSE = 1000  # positions an entry; where there are more, to look at all of them takes longer than sorting


@dataclass(frozen=True, slots=True)
class Union:
    """Where several deltas lie.

    Args:
        indices: int32 or int64 ``[n]``, the sorted union of the deltas' indices.
        places: for each delta int64 ``[nnz]``, where its entries stand in ``indices``; None when it holds them all.
    """

    indices: Tensor
    places: tuple[Tensor | None, ...]


def plan_union(indices: Sequence[Tensor]) -> Union:
    """Plan the union of sorted indices without duplicates, int32 or int64 ``[nnz]`` each, on their device."""
    entries = sum(own.numel() for own in indices)
    if len(indices) == 1:
        return Union(indices[0], (None,))
    if indices[0].is_cpu and 0 < _span(indices) <= _SPARSE * entries:
        merged, places = _by_marks(indices)
    elif len(indices) > _FEW:
        merged = torch.cat(list(indices)).unique()
        places = [torch.searchsorted(merged, own) for own in indices]
    else:
        merged, places = _one_by_one(indices)
    whole = merged.numel()
    return Union(merged, tuple(None if place.numel() == whole else place for place in places))


def _span(indices: Sequence[Tensor]) -> int:
    """Positions up to the last one that is held."""
    return max((int(own[-1]) + 1 for own in indices if own.numel()), default=0)


def _by_marks(indices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Mark all that is held, range by range, and count the marks: no sorting."""
    edges = torch.arange(0, _span(indices) + _RANGE, _RANGE, device="cpu").to(indices[0].dtype)
    cuts = [torch.searchsorted(own, edges).tolist() for own in indices]
    places = [torch.empty(own.numel(), dtype=torch.int64, device="cpu") for own in indices]
    marks = min(_RANGE, _span(indices))
    held = torch.empty(marks, dtype=torch.bool, device="cpu")
    rank = torch.empty(marks, dtype=torch.int64, device="cpu")
    merged, counted = [], 0
    for k, start in enumerate(edges[:-1].tolist()):
        spans = [slice(cut[k], cut[k + 1]) for cut in cuts]
        local = [(own[span] - start).long() for own, span in zip(indices, spans, strict=True)]
        held.zero_()
        for at in local:
            held[at] = True
        here = held.nonzero().view(-1)
        rank[here] = torch.arange(counted, counted + here.numel(), device="cpu")
        for place, span, at in zip(places, spans, local, strict=True):
            torch.index_select(rank, 0, at, out=place[span])
        merged.append((here + start).to(indices[0].dtype))
        counted += here.numel()
    return torch.cat(merged), places


def _one_by_one(indices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Merge one after another: no slower than sorting for a few, but quadratic in their number."""
    merged = indices[0]
    places = [torch.arange(merged.numel(), device=merged.device)]
    for own in indices[1:]:
        merged, kept, place = _merge(merged, own)
        places = [kept[old] for old in places] + [place]
    return merged, places


def _merge(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The union of two sorted index tensors, and where the entries of each stand in it."""
    at = torch.searchsorted(first, second)
    shared = torch.zeros_like(second, dtype=torch.bool)
    inside = at < first.numel()
    shared[inside] = first[at[inside]] == second[inside]
    added = second[~shared]
    place_first = torch.arange(first.numel(), device=first.device) + torch.searchsorted(added, first)
    place_added = torch.arange(added.numel(), device=first.device) + torch.searchsorted(first, added)
    merged = torch.empty(first.numel() + added.numel(), dtype=first.dtype, device=first.device)
    merged[place_first] = first
    merged[place_added] = added
    place_second = torch.empty_like(at)
    place_second[shared] = place_first[at[shared]]
    place_second[~shared] = place_added
    return merged, place_first, place_second
