"""Decode gaps on an accelerator: the same as ``gaps.decode_many`` in plain torch, without waiting for the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from shira_diffusers.formats.gap_codec import ESCAPES, fits_int32


class Found(NamedTuple):
    """Indices, int32 ``[sum of counts]``, and whether they mean anything: a bool of no dimension on the device."""

    indices: Tensor
    good: Tensor


def decode_many_on_device(
    raw: Tensor, dtype: torch.dtype, lengths: list[int], counts: list[int], sizes: Tensor
) -> Found:
    """Decode the gaps of several weights, end to end.

    Args:
        raw: their coded elements, ``[sum of lengths]``; of uint16 ones the bits as int16, which every device can read.
        dtype: of the elements, one of ``gaps.GAP_DTYPES``.
        lengths: how many elements each weight has, at least one.
        counts: how many indices each weight must have.
        sizes: int64 ``[3, weights]`` on the device of ``raw``: lengths, counts and entries (below 2^31) of each.

    Returns:
        Indices, and whether all are as ``gaps.decode_gaps`` would give them. No element makes any kernel fail.
    """
    total, top = sum(counts), ESCAPES.get(dtype)
    wide = raw.to(torch.int32 if fits_int32(dtype, sum(lengths)) else torch.int64)
    if dtype == torch.uint16:
        wide &= 0xFFFF
    last, numels = sizes[0].cumsum(0) - 1, sizes[2]
    good = wide.min() >= 0
    if top is None:
        sums = (wide + 1).cumsum(0, dtype=wide.dtype)
        indices = sums if len(sums) == total else sums.new_zeros(total)
        held = last + 1
    else:
        ended = wide != top
        sums = wide.add_(ended).cumsum(0, dtype=wide.dtype)
        place = ended.cumsum(0)  # int64, as scatter wants it
        held = place[last]
        good = good & ended[last].all()
        place = torch.where(ended, place - 1, total).clamp_(max=total)  # what is no index goes behind all indices
        indices = sums.new_zeros(total + 1).scatter(0, place, sums)[:total]
    reach = sums[last]
    starts = torch.cat([reach.new_zeros(1), reach[:-1]])
    good = good & (held == sizes[1].cumsum(0)).all() & (reach - starts <= numels).all()
    indices = indices - (starts + 1).repeat_interleave(sizes[1], output_size=total)
    return Found(indices.to(torch.int32), good)
