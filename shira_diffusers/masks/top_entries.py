"""Find the top entries of a score, and the cutoff of many scores that share one budget, exactly.

Scores are float32 and not negative, so their bits, read as integers, are in the same order. The cutoff is found by
counting the upper and then the lower halves of those bits: two passes, in which one score at a time is in memory.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_HALF = 16
BINS = 2**15
"""As many as there are upper halves of scores; values of one bin differ by less than 1 %."""


class Cutoff(NamedTuple):
    """Where the top entries of several scores end.

    Args:
        level: of the last entry that is among them, as ``bits_of`` gives it.
        kept: how many of the entries of just this score are among them. equal: how many there are.
    """

    level: int
    kept: int
    equal: int


def bits_of(score: Tensor) -> Tensor:
    """The bits of a score, float32 of any shape, as int32 of its shape: in the same order."""
    return score.contiguous().view(torch.int32)


def bin_of(score: Tensor) -> Tensor:
    """The bin of each value of a score, float32 of any shape: int32; bin 0 holds zeros."""
    return bits_of(score) >> _HALF


def counts_by_bin(scores: Iterable[Tensor]) -> Tensor:
    """How many values of scores, ``(numel,)`` each, lie in each bin: int64 ``(BINS,)``, on the CPU."""
    counts = torch.zeros(BINS, dtype=torch.int64, device="cpu")
    for score in scores:
        counts += torch.bincount(bin_of(score), minlength=BINS).cpu()
    return counts


def cutoff(counts: Tensor, scores: Iterable[Tensor], wanted: int) -> Cutoff:
    """Where the ``wanted`` highest values of scores, ``(numel,)`` each, end.

    Args:
        counts: their ``counts_by_bin``, ``(BINS,)``.
        scores: the same ones, ``(numel,)`` each, in any order.
        wanted: at most as many as there are; of none the cutoff lies above all.
    """
    if not wanted:
        return Cutoff(2**31 - 1, 0, 1)
    upper, left = _from_the_top(counts, wanted)
    inside = torch.zeros(2**_HALF, dtype=torch.int64, device="cpu")
    for score in scores:
        bits = bits_of(score)
        inside += torch.bincount(bits[bits >> _HALF == upper] & 0xFFFF, minlength=2**_HALF).cpu()
    lower, kept = _from_the_top(inside, left)
    return Cutoff(upper << _HALF | lower, kept, int(inside[lower]))


def _from_the_top(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin of the ``wanted``-th highest value, and how many of that bin are among the highest."""
    above = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(above, wanted))
    return len(counts) - 1 - at, wanted - (int(above[at - 1]) if at else 0)


def top_indices(score: Tensor, count: int) -> Tensor:
    """The sorted flat indices, int64 ``(count,)``, of the highest of a score ``(numel,)``; ties go to the lowest."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=score.device)
    threshold = torch.topk(score, count, sorted=True).values[-1]
    above = (score > threshold).nonzero().flatten()
    level = (score == threshold).nonzero().flatten()[: count - above.numel()]
    return torch.cat([above, level]).sort().values
