"""Switch weights tile by tile with torch's index kernels, on a CPU with as many threads as torch uses.

In: steps. Out: weights overwritten in place, or as they were. What leaves is restored before what arrives is read, so
two adapters that share entries need no plan of their pair; on the way it is checked that what leaves is still what was
written. Training reads and writes its entries here too (``access``), and what has left a model gives its memory to what
comes next (``BufferPool``).
"""

import ctypes
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import accumulate
from threading import Barrier

import numpy as np
import torch
from torch import Tensor

from shira_diffusers.weights.scatter import (
    Write,
    bits_dtype,
    bits_of,
    cast,
    flat_view,
    gather,
    overwrite,
    storage_indices,
    writers_of,
)
from shira_diffusers.weights.steps import EntryPlan, SavedEntries, SwitchStep

_ALONE = 2**15  # entries; torch gives no more than these to several threads, and fewer are not worth a second one
# Entries per tile: at 2 % of float32 weights these lie in 1.6 MB, which stays in a core's L2 of 2 MB. On a Xeon SD 1.5
# takes 171 ms by such tiles and 216 ms by tiles of 2^16; shorter ones are no faster.
_ENTRIES = 2**13
_SMALL = 2**12  # with fewer entries per weight than this, to go from weight to weight costs more than the entries
_LONG = 2**17  # bytes from which on a CPU's memory is mapped and cleared page by page, anew each time
_KEPT = 2  # the saved and the written bits of one mix

Piece = tuple[Tensor, Write, Tensor, Tensor, Tensor]
"""The entries in one tile: the memory as integers, what writes it, places in it, the saved and the written bits."""
Tile = tuple[Piece | None, Piece | None, Tensor | None, float, torch.dtype, bool]
"""What leaves and what arrives, its delta, scale and dtype, and whether the entries are the same."""
Layout = tuple[Tensor, Sequence[Tensor], list[int], int]
"""Places; per tile the memory that they are in and how many they are; and the unit of places: entries, or runs."""
Access = tuple[Callable[[], Tensor], Callable[[Tensor], None]]
"""What reads entries, ``(n,)`` of the weights' dtype, and what overwrites them with such, both bit for bit."""


def threads_for(entries: int) -> int:
    """How many threads to use for a switch of this many entries on a CPU."""
    return 1 if entries < _ALONE else torch.get_num_threads()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool of threads that each compute on one core; torch would start as many again in each."""
    all_here = Barrier(
        threads, timeout=60
    )  # or an idle thread would take the next job; Ctrl-C leaves no thread waiting
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


if hasattr(os, "register_at_fork"):  # where there are forks
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive one


@cache
def _limit(dtype: torch.dtype) -> float:
    """Up to where sums round to the maximum of an 8-bit float: half a step above it. Some versions of torch go on."""
    values = torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float()
    second, top = values[values.isfinite()].unique()[-2:].tolist()
    return float(top + (top - second) / 2)


class TorchSweep:
    """Carries out steps over different weights, tile by tile, with torch's index kernels.

    Attributes:
        finite: after ``run``, whether all that was written is finite; if not, a sum was too large for the dtype (or the
            base is not finite there), and ``undo`` is due.
    """

    def __init__(self, steps: Sequence[SwitchStep]) -> None:
        self._tiles = [tile for step in steps for tile in _tiles_of(step)]
        self._threads = threads_for(sum([step.entries for step in steps])) if steps[0].first.is_cpu else 1
        self._undo: list[tuple[Write, Tensor, Tensor]] = []  # what to write where, last first
        self.finite = True

    def run(self, confirm: Callable[[], bool] = lambda: True) -> bool:
        """Restore what leaves, then read, mix and overwrite what arrives.

        Args:
            confirm: whether these are the weights to write; asked first, on a GPU while that works.

        Returns:
            Whether that is so and all that left still held the bits in ``written``; if not, ``undo`` is due.
        """
        if not confirm():
            return False
        if self._threads == 1:
            return self._run(self._tiles)
        size = max(1, -(-len(self._tiles) // self._threads))
        parts = [self._tiles[first : first + size] for first in range(0, len(self._tiles), size)]
        jobs = [_pool(self._threads).submit(self._run, part) for part in parts]
        try:
            return all([job.result() for job in jobs])
        finally:
            wait(jobs)  # after Ctrl-C too: nothing is written any more once this has returned

    @torch.inference_mode()  # both normal and inference tensors can be written in it
    def _run(self, tiles: Iterable[Tile]) -> bool:
        same = True
        for leaving, arriving, delta, scale, dtype, stays in tiles:
            if leaving is not None:
                memory, write, at, base, written = leaving
                places = at.long()  # nothing writes by int32; resident ones stay so
                seen = memory.index_select(0, places)
                if not torch.equal(seen, written):
                    same, written = False, seen
                self._undo.append((write, at, written))
                if not stays:
                    write(0, places, base)
            if arriving is not None and delta is not None:
                self._arrive(arriving, delta, scale, dtype, stays)
        return same

    def _arrive(self, piece: Piece, delta: Tensor, scale: float, dtype: torch.dtype, stays: bool) -> None:
        memory, write, at, saved, bits = piece
        places = at.long()
        if not stays:
            torch.index_select(memory, 0, places, out=saved)
        base, written = saved.view(dtype), bits.view(dtype)
        total = delta.to(torch.float32, copy=True)
        total.mul_(scale).add_(0.0)  # as a sum that begins at zero: no -0
        if dtype.itemsize == 1:
            wide = base.float()
            total.add_(wide).masked_fill_((total.abs() > _limit(dtype)) & wide.isfinite(), torch.nan)
            written.copy_(total)
            ends = written.float().aminmax()
        else:
            wide = base if dtype in (torch.float32, torch.float64) else base.float()
            torch.add(wide, total, out=written)
            ends = written.aminmax()
        # as ``all_finite``; to look at it here costs 3 % of a switch, as the values are in the cache
        if not bool(torch.isfinite(torch.stack(ends)).all()):
            self.finite = False
        if not stays:
            self._undo.append((write, at, saved))
        write(0, places, bits)

    @torch.inference_mode()
    def undo(self) -> None:
        """Put back every bit of what was done, wherever ``run`` broke off."""
        while self._undo:
            write, at, bits = self._undo.pop()
            write(0, at.long(), bits)


def _tiles_of(step: SwitchStep) -> list[Tile]:
    """The tiles of a step that have entries."""
    if isinstance(step.scales, int | float) and _is_ranged(step):
        firsts = _shares(step)
        layouts = {id(plan): _in_range(plan, step, firsts) for plan in step.plans}
        scales = [float(step.scales)] * (1 + len(firsts))
    else:
        grid, tile = step.grid(_ENTRIES if step.first.is_cpu else None)
        layouts = {id(plan): _by_weight(plan, step, grid, tile) for plan in step.plans}
        scales = [s for scale, count in zip(step.scale(grid), grid.values(), strict=True) for s in [scale] * count]
    leaving: Sequence[Piece | None] = [None] * len(scales)
    arriving: Sequence[Piece | None] = leaving
    deltas: Sequence[Tensor | None] = [None] * len(scales)
    if step.outgoing is not None:
        leaving = _pieces(step.outgoing, layouts[id(step.outgoing.plan)])
    if step.incoming is not None and step.delta is not None:
        layout = layouts[id(step.incoming.plan)]
        arriving, deltas = _pieces(step.incoming, layout), _split(step.delta, layout)
    how = step.first.dtype, step.stays
    parts = zip(leaving, arriving, deltas, scales, strict=True)
    return [(old, new, delta, scale, *how) for old, new, delta, scale in parts if old or new]


def _by_weight(plan: EntryPlan, step: SwitchStep, grid: Mapping[str, int], tile: int) -> Layout:
    """Where a plan's entries are, each weight in tiles."""
    at, unit = plan.at(step.live, step.weights.version)
    shape = (-1,) if unit == 1 else (-1, unit)
    bits = bits_dtype(step.first.dtype)
    weights = [step.live[name].detach() for name in plan.names]
    flat = [weight.view(-1) if weight.is_contiguous() else flat_view(weight) for weight in weights]
    memory = {name: own.view(bits).view(shape) for name, own in zip(plan.names, flat, strict=True)}
    nothing = torch.empty(0, dtype=bits, device=step.first.device)
    memories = [own for name, count in grid.items() for own in [memory.get(name, nothing)] * count]
    return at, memories, plan.starts(grid, tile).diff().tolist(), unit


def _is_ranged(step: SwitchStep) -> bool:
    """Whether weights are taken together, as one range of addresses: those of a CPU with few entries each."""
    few = step.first.is_cpu and all([plan.bounds[-1] < _SMALL * len(plan.names) for plan in step.plans])
    return few and all([_spans(plan, step) for plan in step.plans])


def _spans(plan: EntryPlan, step: SwitchStep) -> bool:
    return plan.once("spans", lambda: spans(step.of(plan)), step.weights.version)


def _in_range(plan: EntryPlan, step: SwitchStep, firsts: Sequence[str]) -> Layout:
    """Where a plan's entries are in the range of its weights: one tile of whole weights per thread."""
    start, length, at = plan.once(
        "range", lambda: positions(step.of(plan), plan.sizes, plan.indices), step.weights.version
    )
    cuts = [0, *[plan.bounds[bisect_left(plan.names, first)] for first in firsts], plan.bounds[-1]]
    return at, [memory_at(start, length, step.first.dtype)] * (len(cuts) - 1), np.diff(cuts).tolist(), 1


def _shares(step: SwitchStep) -> list[str]:
    """The first weight of each thread's share of about as many entries, but for the first thread's."""
    threads = threads_for(step.entries)
    if threads == 1:
        return []
    counts: dict[str, int] = {}
    for plan in step.plans:
        for name, size in zip(plan.names, plan.sizes, strict=True):
            counts[name] = counts.get(name, 0) + size
    names = sorted(counts)
    ends = list(accumulate([counts[name] for name in names]))
    return sorted({names[bisect_left(ends, ends[-1] * k / threads)] for k in range(1, threads)})


def _pieces(saved: SavedEntries, layout: Layout) -> list[Piece | None]:
    """What of saved entries is in each tile; None where that is nothing."""
    at, memories, sizes, unit = layout
    places = at.split([size // unit for size in sizes])
    bits = [_split(bits_of(values), layout) for values in (saved.base, saved.written)]
    pieces = zip(memories, writers_of(memories), places, *bits, strict=True)
    return [piece if size else None for piece, size in zip(pieces, sizes, strict=True)]


def _split(values: Tensor, layout: Layout) -> Sequence[Tensor]:
    """Split values ``(n,)`` by tile, each ``(m,)`` or ``(m / unit, unit)``."""
    sizes, unit = layout[2:]
    return values.split(sizes) if unit == 1 else values.view(-1, unit).split([size // unit for size in sizes])


# ---------------------------------------------------------------- CPU memory by address


def memory_at(start: int, length: int, dtype: torch.dtype) -> Tensor:
    """``length`` bytes of CPU memory from an address on as integers of a dtype's size; nothing keeps them alive."""
    return torch.frombuffer((ctypes.c_char * length).from_address(start), dtype=bits_dtype(dtype))


def spans(weights: Sequence[Tensor]) -> bool:
    """Whether weights (any shape) can be taken as one range: of one dtype, in CPU memory, aligned with each other."""
    dtype, start = weights[0].dtype, weights[0].data_ptr()
    return all(w.is_cpu and w.dtype == dtype and (w.data_ptr() - start) % dtype.itemsize == 0 for w in weights)


def positions(weights: Sequence[Tensor], sizes: Sequence[int], indices: Tensor) -> tuple[int, int, Tensor]:
    """Find entries in the range of addresses that holds weights; what lies between these is never touched.

    Args:
        weights: of any shape, for which ``spans`` is true.
        sizes: how many entries each has.
        indices: int32 or int64 ``(n,)``, row-major in each weight.

    Returns:
        The address of the range, its length in bytes (whole entries), and the places in it, int64 ``(n,)``.
    """
    size = weights[0].dtype.itemsize
    held = [weight for weight in weights if weight.numel()] or weights  # the others have no address
    start = min(weight.data_ptr() for weight in held)
    last = max(held, key=lambda weight: weight.data_ptr())
    length = last.data_ptr() - start + last.untyped_storage().nbytes()
    at = torch.empty(indices.numel(), dtype=torch.int64, device="cpu")
    for weight, own, out in zip(weights, indices.split(list(sizes)), at.split(list(sizes)), strict=True):
        torch.add(storage_indices(own, weight), (weight.data_ptr() - start) // size, out=out)
    return start, length - length % size, at


def access(weights: Sequence[Tensor], sizes: Sequence[int], indices: Tensor) -> Access:
    """What reads and overwrites entries of many weights as one, as long as the weights lie where they are.

    Args:
        weights: of any shape; kept alive. CPU weights of one dtype cost one index kernel, others one each.
        sizes: how many entries each has.
        indices: int32 or int64 ``(n,)`` on the weights' device, row-major in each weight.
    """
    if not spans(weights):
        return _access_one_by_one(weights, list(sizes), indices)
    start, length, at = positions(weights, sizes, indices)

    def memory() -> Tensor:
        return memory_at(start, length, weights[0].dtype)

    def read() -> Tensor:
        return memory().index_select(0, at).view(weights[0].dtype)

    def write(values: Tensor) -> None:
        writers_of([memory()])[0](0, at, bits_of(values))

    return read, write


def _access_one_by_one(weights: Sequence[Tensor], sizes: list[int], indices: Tensor) -> Access:
    held = weights
    if not all(weight.is_contiguous() for weight in weights):  # strides are looked at once
        parts = zip(weights, indices.split(sizes), strict=True)
        indices = torch.cat([storage_indices(own, weight).to(indices.dtype) for weight, own in parts])
        held = [flat_view(weight.detach()) for weight in weights]

    def read() -> Tensor:
        return torch.cat([gather(own, at) for own, at in zip(held, indices.split(sizes), strict=True)])

    def write(values: Tensor) -> None:
        places = indices.long()  # kernels want int64: one cast for all weights, kept for this write only
        for own, at, part in zip(held, places.split(sizes), values.split(sizes), strict=True):
            overwrite(own, at, cast(part, own))

    return read, write


class BufferPool:
    """Buffers in a CPU's memory that are free again; mapping fresh ones would cost up to half the time of a switch.

    GPUs need none: torch keeps their memory by itself. A copy or a pickle of this is empty. Not safe to use from
    several threads.
    """

    def __init__(self) -> None:
        self._free: list[torch.UntypedStorage] = []

    def __reduce__(self) -> tuple[type["BufferPool"], tuple[()]]:
        return BufferPool, ()

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(storage.nbytes() for storage in self._free)

    def take(self, count: int, like: Tensor) -> Tensor:
        """Uninitialized memory ``(count,)``, of the dtype and on the device of ``like`` (any shape)."""
        needed = count * like.dtype.itemsize
        if not like.is_cpu or needed < _LONG:
            return torch.empty(count, dtype=like.dtype, device=like.device)
        for k, storage in enumerate(self._free):
            if needed <= storage.nbytes() <= 2 * needed:
                del self._free[k]
                return torch.empty(0, dtype=like.dtype, device="cpu").set_(storage)[:count]
        room = count + count // 16  # the next mask may be a little larger
        return torch.empty(room, dtype=like.dtype, device="cpu")[:count]

    def keep(self, tensors: Iterable[Tensor], still_used: Iterable[Tensor] = ()) -> None:
        """Take back tensors (any shape) that are no longer referenced, except those that are ``still_used``."""
        used = [tensor.untyped_storage().data_ptr() for tensor in still_used]
        free = [t.untyped_storage() for t in tensors if t.is_cpu and t.nbytes >= _LONG]
        self._free = [*[own for own in free if own.data_ptr() not in used], *self._free][:_KEPT]

    def clear(self) -> None:
        """Give the memory back."""
        self._free = []
