"""Cut weights into tiles, short ranges that a switch visits one by one, so that memory is touched once.

In each tile the entries that leave are restored before those that arrive are read and overwritten; two adapters that
share entries need no plan of their pair.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

BLOCK_SIZE = 32
"""Entries of an aligned run, as masks of the family ``block`` have them: 64 bytes of fp16, a cache line."""


def tile_for(entries: int, density: float) -> int:
    """How many positions a tile has, to hold about ``entries`` entries at a density: a power of two, whole blocks."""
    return max(BLOCK_SIZE, 2 ** round(math.log2(entries / max(density, 1e-6))))


def find_starts(
    grid: Mapping[str, int], tile: int, names: Sequence[str], bounds: Sequence[int], indices: Tensor
) -> Tensor:
    """Find where each tile's entries begin among sorted entries.

    Args:
        grid: how many tiles each weight has, in order; it has all ``names``, in the same order.
        tile: positions of a weight in each of its tiles.
        names: ``names[k]`` has the entries ``bounds[k]`` to ``bounds[k + 1]``.
        indices: int32 or int64 ``(n,)``, sorted row-major positions in each weight.

    Returns:
        int32 ``(tiles + 1,)`` on the device of the indices; a tile's entries end where the next one's begin.
    """
    held = set(names)
    before = [0, *accumulate(int(name in held) for name in grid)]  # how many of the names come before
    low = torch.tensor([bounds[k] for k in before[:-1]], dtype=torch.int64, device="cpu")
    high = torch.tensor([bounds[k] for k in before[1:]], dtype=torch.int64, device="cpu")
    tiles = torch.tensor(list(grid.values()), dtype=torch.int64, device="cpu")
    owner = torch.arange(len(tiles), device="cpu").repeat_interleave(tiles)
    number = torch.arange(len(owner), device="cpu") - (tiles.cumsum(0) - tiles)[owner]
    device = indices.device
    found = _search(indices, (number * tile).to(device), low[owner].to(device), high[owner].to(device))
    return torch.cat([found, found.new_tensor([bounds[-1]])]).to(torch.int32)


def _search(indices: Tensor, edges: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """For each edge the first place in ``low`` to ``high`` whose index is not below it: binary search, all at once."""
    if not indices.numel():
        return low
    for _ in range(int((high - low).max()).bit_length() if len(low) else 0):
        middle = (low + high) // 2
        below = (low < high) & (indices[middle.clamp_max(indices.numel() - 1)] < edges)
        low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
    return low


def in_runs(indices: Tensor, bounds: Sequence[int], numels: Sequence[int]) -> bool:
    """Whether entries (int32 or int64 ``(n,)``) form whole blocks of ``BLOCK_SIZE``, as the weights themselves do."""
    if not indices.numel() or any(size % BLOCK_SIZE for size in (*bounds, *numels)):
        return False
    inside = torch.arange(BLOCK_SIZE, dtype=indices.dtype, device=indices.device)
    for part in (indices[:BLOCK_SIZE], indices):  # most others differ at once
        runs = part.view(-1, BLOCK_SIZE)
        if not bool(((runs[:, :1] + inside == runs).all(1) & (runs[:, 0] % BLOCK_SIZE == 0)).all()):
            return False
    return True
