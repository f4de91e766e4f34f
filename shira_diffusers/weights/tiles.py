"""Tiles: short ranges of the weights. A switch goes over them one by one, so that memory is touched once.

In each tile the entries that leave are restored before those that arrive are read and overwritten; two adapters that
share entries need no plan of their pair.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

RUN = 32
"""Entries of an aligned run, as masks of the family ``block`` have them."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Weights by name, cut into tiles: ranges of ``tile`` entries in row-major order, the last one shorter."""

    names: tuple[str, ...]
    numels: tuple[int, ...]
    tile: int

    @property
    def tiles(self) -> tuple[int, ...]:
        """How many tiles each weight has."""
        return tuple(-(-numel // self.tile) for numel in self.numels)


def tile_for(entries_a_tile: int, density: float) -> int:
    """The power of two that holds about so many entries at a density, and whole runs."""
    return max(RUN, 2 ** round(math.log2(entries_a_tile / max(density, 1e-6))))


def find_starts(grid: Grid, names: Sequence[str], bounds: Sequence[int], indices: Tensor) -> Tensor:
    """Where each tile's entries begin among sorted entries.

    Args:
        grid: its names hold ``names``, both sorted.
        names: ``names[k]`` has the entries ``bounds[k]`` to ``bounds[k + 1]``.
        indices: int32 or int64 ``[n]``, sorted row-major positions in each weight.

    Returns:
        int32 ``[tiles + 1]`` on the device of the indices; a tile's entries end where the next one's begin.
    """
    place = dict(zip(names, range(len(names)), strict=True))
    before = [0, *accumulate(int(name in place) for name in grid.names)]  # how many of the names come before
    low = torch.tensor([bounds[k] for k in before[:-1]], dtype=torch.int64, device="cpu")
    high = torch.tensor([bounds[k] for k in before[1:]], dtype=torch.int64, device="cpu")
    tiles = torch.tensor(grid.tiles, dtype=torch.int64, device="cpu")
    owner = torch.arange(len(tiles), device="cpu").repeat_interleave(tiles)
    number = torch.arange(len(owner), device="cpu") - (tiles.cumsum(0) - tiles)[owner]
    device = indices.device
    found = _search(indices, (number * grid.tile).to(device), low[owner].to(device), high[owner].to(device))
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
    """Whether all entries come in aligned runs of ``RUN``, in weights that are made of such."""
    if not indices.numel() or any(size % RUN for size in (*bounds, *numels)):
        return False
    inside = torch.arange(RUN, dtype=indices.dtype, device=indices.device)
    for part in (indices[:RUN], indices):  # most others differ at once
        runs = part.view(-1, RUN)
        if not bool(((runs[:, :1] + inside == runs).all(1) & (runs[:, 0] % RUN == 0)).all()):
            return False
    return True
