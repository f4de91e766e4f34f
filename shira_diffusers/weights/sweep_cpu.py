"""The switch itself: one sweep over the tiles of the weights that restores what leaves and overwrites what arrives.

``TorchSweep`` runs anywhere, on a CPU with one thread for each of torch's; ``launches.TritonSweep`` is one launch on
CUDA. Both check on the way that what leaves is still what was written, and can undo what they did bit by bit.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from threading import Barrier
from typing import Protocol

import torch
from torch import Tensor

from shira_diffusers.weights.finite import all_finite
from shira_diffusers.weights.scatter import bits_of, flat_view, is_byte_dtype, put_bits
from shira_diffusers.weights.tiles import RUN

_ALONE = 2**15  # entries; torch gives no more than these to several threads, and fewer are not worth a second one


@dataclass(frozen=True, slots=True)
class Side:
    """Entries that leave, or that arrive, by tile.

    Args:
        at: int32 or int64, places in each weight's memory: ``[n]``, or ``[n / RUN]`` whole runs, counted in runs.
        runs: whether ``at`` counts runs.
        starts: int32 ``[tiles + 1]``, where each tile's entries begin.
        base: ``[n]``, bits below them: read for a side that leaves, filled for one that arrives.
        written: ``[n]``, bits of the adapters in their place: likewise.
    """

    at: Tensor
    runs: bool
    starts: Tensor
    base: Tensor
    written: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What a switch does to weights of one dtype on one device.

    Args:
        weights: dense, in the order of the tiles.
        tiles: how many tiles each has.
        leaving, arriving: either may be None; with one ``at`` for both, ``arriving.base`` is the saved base already.
        delta: of what arrives, float32, float16 or bfloat16 ``[n]``.
        scales: one for each weight.
    """

    weights: Sequence[Tensor]
    tiles: Sequence[int]
    leaving: Side | None
    arriving: Side | None
    delta: Tensor | None
    scales: Sequence[float]

    @property
    def stays(self) -> bool:
        """Whether the same entries leave and arrive: a strength was changed."""
        return self.leaving is not None and self.arriving is not None and self.leaving.at is self.arriving.at

    @property
    def entries(self) -> int:
        """How many entries are touched."""
        return sum(side.written.numel() for side in (self.leaving, self.arriving) if side is not None)


class Sweep(Protocol):
    """Carries out steps.

    ``finite`` tells after a ``run`` whether all that was written is finite; if not, a sum was too large for the dtype
    (or the base is not finite there), and ``undo`` is due.
    """

    finite: bool

    def run(self) -> bool:
        """Do it. Returns whether all that left was what ``written`` tells; if not, ``undo`` is due."""

    def undo(self) -> None:
        """Put back every bit of what was done, wherever ``run`` broke off."""


def threads_for(entries: int) -> int:
    """How many threads a switch of so many entries on a CPU is worth."""
    return 1 if entries < _ALONE else torch.get_num_threads()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """So many threads, each of which computes alone; torch would start as many again in each."""
    all_here = Barrier(threads, timeout=60)  # or an idle thread would take the next job; Ctrl-C leaves nobody behind
    try:
        pool = ThreadPoolExecutor(threads, "shira", initializer=_compute_alone)
        for job in [pool.submit(all_here.wait) for _ in range(threads)]:
            job.result()
    finally:
        torch.set_num_threads(threads)  # theirs stays; this is for the thread that calls, and for those to come
    return pool


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread's first question sets its number
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


@cache
def _limit(dtype: torch.dtype) -> float:
    """Up to where sums round to the maximum of an 8-bit float: half a step above it. Some versions of torch go on."""
    values = torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float()
    second, top = values[values.isfinite()].unique()[-2:].tolist()
    return float(top + (top - second) / 2)


class TorchSweep:
    """Tile by tile with torch's index kernels."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self._tiles = [(step, *place) for step in map(Prepared, steps) for place in step.tiles()]
        self._entries = sum(step.step.entries for step in {id(t[0]): t[0] for t in self._tiles}.values())
        self._begun: list[_Tile] = []
        self.finite = True

    def run(self) -> bool:
        """As ``Sweep.run``."""
        same = self._run_all()
        self.finite = all(tile.finite for tile in self._begun)
        return same

    def _run_all(self) -> bool:
        threads = threads_for(self._entries)
        if threads == 1 or not self._tiles[0][0].memory[0].is_cpu:
            return self._run(self._tiles)
        size = -(-len(self._tiles) // threads)
        parts = [self._tiles[first : first + size] for first in range(0, len(self._tiles), size)]
        jobs = [_pool(threads).submit(self._run, part) for part in parts]
        try:
            return all([job.result() for job in jobs])
        finally:
            wait(jobs)  # after Ctrl-C too: nothing is written any more once this has returned

    @torch.inference_mode()  # both normal and inference tensors can be written in it
    def _run(self, places: Iterable[tuple["Prepared", int, int]]) -> bool:
        same = True
        for step, weight, number in places:
            tile = step.tile(weight, number)
            self._begun.append(tile)
            same &= tile.run()
        return same

    @torch.inference_mode()
    def undo(self) -> None:
        """As ``Sweep.undo``."""
        while self._begun:
            self._begun.pop().undo()


class Prepared:
    """A step with the memory of its weights as integers, and its starts as numbers."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.memory = [bits_of(flat_view(weight.detach())) for weight in step.weights]
        self._first = list(accumulate(step.tiles, initial=0))
        self._sides = [(side, side.starts.tolist()) for side in (step.leaving, step.arriving) if side is not None]

    def tiles(self) -> Iterator[tuple[int, int]]:
        """The weight and the number of each tile that has entries."""
        for weight, (first, end) in enumerate(pairwise(self._first)):
            for number in range(first, end):
                if any(starts[number] < starts[number + 1] for _, starts in self._sides):
                    yield weight, number

    def write(self, side: Side, values: Tensor) -> None:
        """Overwrite all entries of a side, weight by weight."""
        starts = dict((id(one), numbers) for one, numbers in self._sides)[id(side)]
        for memory, (first, end) in zip(self.memory, pairwise(self._first), strict=True):
            part = _part(replace(side, base=values), slice(starts[first], starts[end]), memory)
            put_bits(part.memory, part.at.long(), part.base)

    def tile(self, weight: int, number: int) -> "_Tile":
        step, memory = self.step, self.memory[weight]
        cuts = {id(side): slice(starts[number], starts[number + 1]) for side, starts in self._sides}
        leaving = None if step.leaving is None else _part(step.leaving, cuts[id(step.leaving)], memory)
        arriving = None if step.arriving is None else _part(step.arriving, cuts[id(step.arriving)], memory)
        delta = None if step.delta is None else step.delta[cuts[id(step.arriving)]]
        dtype = step.weights[weight].dtype
        return _Tile(leaving, arriving, delta, step.scales[weight], dtype, step.stays)


@dataclass(slots=True)
class _Part:
    """A side's entries in one tile: ``[n]``, or whole runs ``[n / RUN, RUN]``, as ``memory`` is then."""

    memory: Tensor
    at: Tensor
    base: Tensor
    written: Tensor


def _part(side: Side, cut: slice, memory: Tensor) -> _Part:
    base, written = side.base[cut], side.written[cut]
    if not side.runs:
        return _Part(memory, side.at[cut], base, written)
    at = side.at[cut.start // RUN : cut.stop // RUN]
    return _Part(memory.view(-1, RUN), at, base.view(-1, RUN), written.view(-1, RUN))


@dataclass(slots=True)
class _Tile:
    """One tile of a step, and how far it has come; ``seen`` are the bits that left, if not those once written.

    ``finite`` is whether all that arrived is. Looking at it here costs 3 % of a switch, as the values are in the cache.
    """

    leaving: _Part | None
    arriving: _Part | None
    delta: Tensor | None
    scale: float
    dtype: torch.dtype
    stays: bool
    left: bool = False
    arrived: bool = False
    finite: bool = True
    seen: Tensor | None = None

    def run(self) -> bool:
        """Returns whether what leaves was there."""
        same = True if self.leaving is None else self._leave(self.leaving)
        if self.arriving is not None:
            self._arrive(self.arriving)
        return same

    def _leave(self, part: _Part) -> bool:
        at = part.at.long()  # nothing writes by int32; resident ones stay so
        seen = part.memory.index_select(0, at)
        same = torch.equal(seen, part.written)
        self.seen = None if same else seen
        self.left = True
        if not self.stays:
            put_bits(part.memory, at, part.base)
        return same

    def _arrive(self, part: _Part) -> None:
        assert self.delta is not None
        at = part.at.long()
        if not self.stays:
            torch.index_select(part.memory, 0, at, out=part.base)
        base = part.base.view(self.dtype)
        total = self.delta.view(base.shape).to(torch.float32, copy=True)
        total.mul_(self.scale).add_(0.0)  # as a sum that begins at zero: no -0
        wide = base if self.dtype in (torch.float32, torch.float64) else base.float()
        written = part.written.view(self.dtype)
        if is_byte_dtype(self.dtype):
            total.add_(wide).masked_fill_((total.abs() > _limit(self.dtype)) & wide.isfinite(), torch.nan)
            written.copy_(total)
        else:
            torch.add(wide, total, out=written)
        self.finite = bool(all_finite(written.float() if is_byte_dtype(self.dtype) else written))
        self.arrived = True
        put_bits(part.memory, at, part.written)

    def undo(self) -> None:
        """Put back what was there, in reverse."""
        if self.arriving is not None and self.arrived and not self.stays:
            put_bits(self.arriving.memory, self.arriving.at.long(), self.arriving.base)
        if self.leaving is not None and self.left:
            bits = self.leaving.written if self.seen is None else self.seen
            put_bits(self.leaving.memory, self.leaving.at.long(), bits)
