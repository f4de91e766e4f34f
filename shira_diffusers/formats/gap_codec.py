"""Sorted flat indices coded as the gaps between them, as docs/format.md has it: one weight's, or many weights' at once.

``encode_gaps`` and ``decode_gaps`` are the definition; ``decode_many`` is the fast way for intact gaps of many weights.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shira_diffusers.errors import AdapterFormatError

GAP_DTYPES = (torch.uint8, torch.uint16, torch.int32)
ESCAPES = {torch.uint8: 255, torch.uint16: 65535}
"""The element of a dtype that is no gap's last; int32 has none."""

_ESCAPED = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


def encode_gaps(indices: Tensor) -> Tensor:
    """Code sorted flat indices as gaps ``g_j = i_j - i_(j-1) - 1``, ``i_(-1) = -1``, in the smallest of three dtypes.

    Args:
        indices: int32 or int64 ``[nnz]``, strictly increasing.

    Returns:
        uint8 or uint16, each gap as ``g // max`` elements of the dtype's maximum and then ``g % max``; or int32,
        each gap itself.
    """
    flat: NDArray[np.int64] = indices.cpu().numpy().astype(np.int64)
    gaps = flat - np.concatenate([np.full(1, -1), flat])[:-1] - 1
    options = [_escape(gaps, np.dtype(np.uint8)), _escape(gaps, np.dtype(np.uint16))]
    if gaps.max(initial=0) < 2**31:
        options.append(gaps.astype(np.int32))
    return torch.from_numpy(min(options, key=lambda coded: coded.nbytes))


def _escape(gaps: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[Any]:
    top = _ESCAPED[dtype]
    ends = np.cumsum(gaps // top + 1) - 1
    coded = np.full(int(ends[-1]) + 1 if len(ends) else 0, top, dtype)
    coded[ends] = gaps % top
    return coded


def decode_gaps(coded: Tensor, numel: int) -> Tensor:
    """Decode ``encode_gaps``: flat indices, int64 ``[nnz]``, for a weight of ``numel`` entries.

    Raises:
        AdapterFormatError: another dtype, an unfinished escape, negative gaps (unsorted or duplicate indices) or an
            index out of range.
    """
    if coded.ndim != 1 or coded.dtype not in GAP_DTYPES:
        raise AdapterFormatError(
            f"gaps are {coded.dtype} {tuple(coded.shape)}, expected uint8, uint16 or int32 of one dimension"
        )
    raw = coded.numpy()
    steps = raw.astype(np.int64)
    if raw.dtype in _ESCAPED:
        top = _ESCAPED[raw.dtype]
        if len(raw) and raw[-1] == top:
            raise AdapterFormatError("the last gap is unfinished: an escape without a remainder; the file is damaged")
        ends = np.flatnonzero(raw != top)
        sums = np.cumsum(steps)[ends]
    else:
        if (steps < 0).any():
            at = int(np.flatnonzero(steps < 0)[0])
            raise AdapterFormatError(
                f"gap {at} is {steps[at]}: indices are unsorted or duplicate, expected gaps of 0 or more"
            )
        sums = np.cumsum(steps)
    indices = sums + np.arange(len(sums))
    if len(indices) and indices[-1] >= numel:
        raise AdapterFormatError(f"indices are out of range: up to {indices[-1]}, expected at most {numel - 1}")
    return torch.from_numpy(indices)


def decode_many(
    coded: Sequence[Tensor], counts: Sequence[int], numels: Sequence[int], out: Sequence[NDArray[np.int32]]
) -> bool:
    """Decode the gaps of several weights in one pass.

    Args:
        coded: on the CPU, of one dtype of ``GAP_DTYPES``, one dimension and at least one element each.
        counts: how many indices each must have.
        numels: entries of each weight, below 2^31.
        out: where the indices go, ``[count]`` each.

    Returns:
        Whether all are as ``decode_gaps`` would give them; if not, what is in ``out`` means nothing.
    """
    ends = np.fromiter(accumulate(map(len, coded)), np.int64, len(coded)) - 1
    raw = np.concatenate([part.numpy() for part in coded]) if len(coded) > 1 else coded[0].numpy()
    top = ESCAPES.get(coded[0].dtype)
    if top is None and raw.min() < 0:
        return False
    ended = raw != top if top else np.ones(len(raw), np.bool_)
    # over all weights: the sum of elements plus the number of indices, so each index of the first weight plus 1
    wide = np.add(raw, ended, dtype=np.int32 if fits_int32(coded[0].dtype, len(raw)) else np.int64)
    np.cumsum(wide, out=wide)
    starts = [0, *wide[ends[:-1]].tolist()]
    reach = wide[ends].tolist()
    if any(b - a > n for a, b, n in zip(starts, reach, numels, strict=True)):
        return False
    found = wide[ended] if top else wide
    # found increases, so a weight's last index reaches its end where its count is right and its last gap is finished
    if len(found) != sum(counts) or not np.array_equal(found[np.cumsum(counts) - 1], reach):
        return False
    first = 0
    for start, count, indices in zip(starts, counts, out, strict=True):
        np.subtract(found[first : first + count], start + 1, out=indices, casting="same_kind")
        first += count
    return True


def fits_int32(dtype: torch.dtype, length: int) -> bool:
    """Whether the sum of any ``length`` coded elements, each counted as at most its dtype's maximum, fits int32."""
    return dtype in ESCAPES and length * ESCAPES[dtype] < 2**31
