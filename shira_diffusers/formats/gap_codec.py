"""Code sorted flat indices as the gaps between them, as docs/format.md specifies: per weight, or many at once.

``encode_gaps`` and ``decode_gaps`` are the definition; ``decode_many`` is the fast way for intact gaps of many weights.
NumPy only; what has torch hands in its running sum, which takes a quarter of the time.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shira_diffusers.errors import AdapterFormatError

Gaps = NDArray[Any]
Indices = NDArray[Any]
Sums = NDArray[np.int32] | NDArray[np.int64]

ESCAPES = {"uint8": 255, "uint16": 65535}
"""The element of a dtype that ends no gap; int32 has none."""

_DTYPES = ("uint8", "uint16", "int32")
# elements: they stay in a core's cache, and the sums of the first two fit int32
_CHUNKS = {"uint8": 2**17, "uint16": 2**15, "int32": 2**15}
_THREADED = 2**20  # elements from which on threads are worth starting


def encode_gaps(indices: Indices) -> Gaps:
    """Code sorted flat indices as gaps ``g_j = i_j - i_(j-1) - 1``, ``i_(-1) = -1``, in the smallest of three dtypes.

    Args:
        indices: int32 or int64 ``(nnz,)``, strictly increasing.

    Returns:
        uint8 or uint16, each gap as ``g // max`` elements of the dtype's maximum and then ``g % max``; or int32,
        each gap itself.
    """
    return encode_many([indices])


def encode_many(indices: Sequence[Indices]) -> Gaps:
    """``encode_gaps`` of several weights, end to end, each starting anew, in the dtype that is smallest for all."""
    gaps: list[NDArray[np.int64]] = [each.astype(np.int64) for each in indices]
    gaps = [each - np.concatenate([[-1], each])[:-1] - 1 for each in gaps]
    longest = max((int(each.max(initial=0)) for each in gaps), default=0)
    dtypes = [dtype for dtype in _DTYPES if dtype in ESCAPES or longest < 2**31]
    best = min(dtypes, key=lambda dtype: sum(_coded_nbytes(each, dtype) for each in gaps))
    return np.concatenate([np.empty(0, best), *(_escape(each, best) for each in gaps)], dtype=best)


def _coded_nbytes(gaps: NDArray[np.int64], dtype: str) -> int:
    escapes = int((gaps // ESCAPES[dtype]).sum()) if dtype in ESCAPES else 0
    return (len(gaps) + escapes) * np.dtype(dtype).itemsize


def _escape(gaps: NDArray[np.int64], dtype: str) -> Gaps:
    if dtype not in ESCAPES:
        return gaps.astype(dtype)
    top = ESCAPES[dtype]
    ends = np.cumsum(gaps // top + 1) - 1
    coded = np.full(int(ends[-1]) + 1 if len(ends) else 0, top, dtype)
    coded[ends] = gaps % top
    return coded


def decode_gaps(coded: Gaps, numel: int) -> NDArray[np.int64]:
    """Decode ``encode_gaps``: flat indices, int64 ``(nnz,)``, for a weight of ``numel`` entries.

    Raises:
        AdapterFormatError: another dtype, an unfinished escape, negative gaps (unsorted or duplicate indices) or an
            index out of range.
    """
    if coded.ndim != 1 or coded.dtype.name not in _DTYPES:
        raise AdapterFormatError(
            f"gaps are {coded.dtype} {coded.shape}, expected uint8, uint16 or int32 of one dimension"
        )
    top = ESCAPES.get(coded.dtype.name)
    if len(coded) and coded[-1] == top:
        raise AdapterFormatError("the last gap is unfinished: an escape without a remainder; the file is damaged")
    if coded.min(initial=0) < 0:
        at = int(np.flatnonzero(coded < 0)[0])
        raise AdapterFormatError(
            f"gap {at} is {coded[at]}: indices are unsorted or duplicate, expected gaps of 0 or more"
        )
    ended = np.ones(len(coded), np.bool_) if top is None else coded != top
    indices: NDArray[np.int64] = np.cumsum(coded + ended.astype(np.int64))[ended] - 1
    if len(indices) and indices[-1] >= numel:
        raise AdapterFormatError(f"indices are out of range: up to {indices[-1]}, expected at most {numel - 1}")
    return indices


def split_gaps(coded: Gaps, counts: Sequence[int]) -> list[Gaps]:
    """The coded elements of each of several weights, which code ``counts`` indices.

    Raises:
        AdapterFormatError: they code another number of indices in all, or the last gap is unfinished.
    """
    top = ESCAPES.get(coded.dtype.name)
    ends = np.arange(len(coded)) if top is None else np.flatnonzero(coded != top)
    if len(ends) != sum(counts):
        raise AdapterFormatError(f"gaps code {len(ends):,} indices, expected {sum(counts):,}")
    if len(coded) and coded[-1] == top:
        raise AdapterFormatError("the last gap is unfinished: an escape without a remainder; the file is damaged")
    bounds = [0, *(int(ends[at - 1]) + 1 if at else 0 for at in accumulate(counts))]
    return [coded[a:b] for a, b in pairwise(bounds)]


class _Chunk(NamedTuple):
    """Some coded elements, of all weights, and which indices they end: ``[first, last)`` of those of all weights."""

    coded: Gaps
    first: int
    last: int


def _running_sum(sums: Sums) -> None:
    np.cumsum(sums, out=sums)


def decode_many(
    coded: Gaps,
    counts: Sequence[int],
    numels: Sequence[int],
    *,
    running_sum: Callable[[Sums], None] = _running_sum,
    threads: int = 1,
) -> NDArray[np.int32] | None:
    """Decode the gaps of several weights, end to end, in one pass.

    Args:
        coded: uint8, uint16 or int32, one dimension.
        counts: how many indices each weight has.
        numels: entries of each weight, at most 2^31 - 1.
        running_sum: replaces int32 or int64 ``(n,)`` by its running sum.
        threads: how many to use for many elements.

    Returns:
        Indices, int32 ``(sum of counts,)``, end to end; None if they are not as ``decode_gaps`` would give them for
        each weight.
    """
    name = coded.dtype.name
    top, step = ESCAPES.get(name), _CHUNKS[name]
    parts = [coded[at : at + step] for at in range(0, len(coded), step)]
    found = [len(part) if top is None else int(np.count_nonzero(part != top)) for part in parts]
    total, bounds = sum(counts), [0, *accumulate(found)]
    if bounds[-1] != total or (len(coded) and coded[-1] == top) or (top is None and coded.min(initial=0) < 0):
        return None
    out = np.empty(total, np.int32)
    ends = np.cumsum(np.asarray(counts, np.int64))
    held = np.flatnonzero(np.asarray(counts))  # the weights that have indices
    lasts = ends[held] - 1  # where each one's last index is

    def decode(chunk: _Chunk) -> tuple[int, NDArray[np.int64]]:
        """Write indices, counted from the chunk's start; how far it reaches, and each weight's last index in it."""
        part, first, last = chunk
        ended = part != top if top else np.ones(len(part), np.bool_)
        sums = np.add(part, ended, dtype=np.int32 if top else np.int64)
        running_sum(sums)
        own = sums if len(sums) == last - first else sums[ended]
        out[first:last] = own
        inside = lasts[np.searchsorted(lasts, first) : np.searchsorted(lasts, last)]
        return int(sums[-1]), own[inside - first].astype(np.int64)

    chunks = [_Chunk(part, a, b) for part, a, b in zip(parts, bounds[:-1], bounds[1:], strict=True)]
    results = run(decode, chunks, threads if len(coded) >= _THREADED else 1)
    carries = [0, *accumulate(reach for reach, _ in results)]
    # over all weights: one more than each weight's last index, all weights before it counted in full
    reached = [carry + own for carry, (_, own) in zip(carries[:-1], results, strict=True)]
    reach = np.concatenate([np.zeros(1, np.int64), *reached])
    if (np.diff(reach) > np.asarray(numels, np.int64)[held]).any():
        return None
    edges = np.unique(np.concatenate([np.asarray(bounds, np.int64), ends]))
    of_chunk = np.searchsorted(bounds, edges[:-1], side="right") - 1
    of_weight = np.searchsorted(lasts, edges[:-1])
    offsets = np.asarray(carries, np.int64)[of_chunk] - reach[of_weight] - 1
    for a, b, offset in zip(edges[:-1].tolist(), edges[1:].tolist(), offsets.astype(np.int32), strict=True):
        out[a:b] += offset
    return out


def run(action: Callable[[Any], Any], over: Sequence[Any], threads: int) -> list[Any]:
    """``[action(each) for each in over]``, by several threads where ``threads`` says so."""
    if min(threads, len(over)) < 2:
        return [action(each) for each in over]
    with ThreadPoolExecutor(threads, "shira-decode") as pool:
        return list(pool.map(action, over))
