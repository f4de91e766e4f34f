"""The adapted weights of one module as they lie now, and the steps that a switch takes over them."""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from shira_diffusers.engine.state import Layout, Overwritten
from shira_diffusers.weights.finder import Located
from shira_diffusers.weights.scatter import bits_of, cast, gather, overwrite, physical
from shira_diffusers.weights.sites import extent, key_of, memory_at, positions, spans
from shira_diffusers.weights.spares import Spares
from shira_diffusers.weights.sweep_cpu import Side, Step, threads_for
from shira_diffusers.weights.sweep_triton import usable
from shira_diffusers.weights.tiles import RUN, Grid, find_starts, tile_for

Kind = tuple[torch.device, torch.dtype]

_ENTRIES = {"cpu": 2**16, "cuda": 160}
"""Entries a tile: what stays in a core's cache, and what one program of a kernel moves (measured)."""
_IN_RUNS = 4
"""Tiles are so many times longer where entries are in runs, which cost less each."""
_SMALL = 2**12
"""With fewer entries a weight than this, to go from weight to weight costs more than the entries."""


@dataclass(frozen=True, slots=True)
class Change:
    """What arrives on weights of one kind.

    Args:
        layout: where.
        delta: ``[n]``, float32, float16 or bfloat16.
        scales: by weight, or one for all.
    """

    layout: Layout
    delta: Tensor
    scales: Mapping[str, float] | float


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights by name; made anew for each operation, since offloading moves tensors.

    Args:
        spares: memory for what will be overwritten.
    """

    located: dict[str, Located]
    spares: Spares = field(default_factory=Spares)

    def kind(self, name: str) -> Kind:
        """The device and dtype of a weight."""
        weight = self.located[name].weight
        return weight.device, weight.dtype

    def as_now(self, group: Overwritten) -> list[Overwritten]:
        """Saved bits as the weights are now: they may have been cast or moved since, and not all in the same way."""
        kinds = {name: self.kind(name) for name in group.layout.names}
        different = list(dict.fromkeys(kinds.values()))
        if len(different) == 1:
            weight, layout = self.located[group.layout.names[0]].weight, group.layout
            if layout.indices.device != weight.device:  # offloading moves weights, but not what we keep
                layout = layout.moved(layout.indices.to(weight.device))
            return [Overwritten(layout, cast(group.base, weight), cast(group.written, weight))]
        return [_part(group, {n for n in kinds if kinds[n] == kind}, kind) for kind in different]

    def now(self, layout: Layout) -> Tensor:
        """The values at a layout's entries, ``[n]``."""
        parts = zip(layout.names, layout.indices.split(layout.sizes), strict=True)
        return torch.cat([gather(self.located[name].weight, indices) for name, indices in parts])

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, leaving: Overwritten | None, change: Change | None) -> tuple[Step, Overwritten | None]:
        """Prepare a step over weights of one kind; nothing is written.

        Args:
            leaving: as ``as_now`` gives it.
            change: what arrives.

        Returns:
            The step, and what will be overwritten when it is done.
        """
        fresh = self._room_for(leaving, change)
        layouts = [group.layout for group in (leaving, fresh) if group is not None]
        ground = self._ground(layouts, 1.0 if change is None else change.scales)
        old = None if leaving is None else ground.side(leaving)
        new = None if fresh is None else ground.side(fresh)
        if old is not None and new is not None and leaving is not None and leaving.layout is layouts[-1]:
            new = replace(new, at=old.at)
        delta = None if change is None else change.delta
        return Step(ground.weights, ground.tiles, old, new, delta, ground.scales), fresh

    def _room_for(self, leaving: Overwritten | None, change: Change | None) -> Overwritten | None:
        if change is None:
            return None
        weight = self.located[change.layout.names[0]].weight
        count = change.layout.indices.numel()
        stays = leaving is not None and leaving.layout is change.layout
        base = leaving.base if leaving is not None and stays else self.spares.take(count, weight)
        return Overwritten(change.layout, base, self.spares.take(count, weight))

    def _ground(self, layouts: Sequence[Layout], scales: Mapping[str, float] | float) -> "_Tiled | _Range":
        same = all(layout.names == layouts[0].names for layout in layouts)
        names = layouts[0].names if same else tuple(sorted({name for layout in layouts for name in layout.names}))
        weights = {name: self.located[name].weight for name in names}
        entries = max(layout.indices.numel() for layout in layouts)
        if isinstance(scales, int | float) and entries < _SMALL * len(names) and spans(list(weights.values())):
            return _Range(weights, layouts, float(scales))
        return _Tiled(weights, _grid(weights, layouts), scales)

    def write_copies(self, layout: Layout, values: Tensor) -> None:
        """Write ``[n]`` values to all that holds the weights too: fused copies, offloaded originals."""
        if any(len(self.located[name].holders) > 1 for name in layout.names):
            sizes = layout.sizes
            parts = zip(layout.names, layout.indices.split(sizes), values.split(sizes), strict=True)
            for name, indices, bits in parts:
                for holder in self.located[name].holders[1:]:
                    overwrite(holder.tensor, indices, cast(bits, holder.tensor), holder.offset)


def _part(group: Overwritten, names: Collection[str], kind: Kind) -> Overwritten:
    """The entries of some of a group's weights, as these are now."""
    held = [(name, entry) for name, entry in group.entries() if name in names]
    indices, base, written = (torch.cat([entry[field] for _, entry in held]) for field in range(3))
    bounds = tuple(accumulate((entry.indices.numel() for _, entry in held), initial=0))
    layout = Layout(tuple(name for name, _ in held), bounds, indices.to(kind[0]), (), (), (), ())
    return Overwritten(layout, base.to(*kind), written.to(*kind))


def _grid(weights: Mapping[str, Tensor], layouts: Sequence[Layout]) -> Grid:
    names, numels = tuple(weights), tuple(weight.numel() for weight in weights.values())
    first = weights[names[0]]
    wanted = _ENTRIES["cpu"] if first.is_cpu else _ENTRIES["cuda"] if usable(first.device, first.dtype) else None
    if wanted is None:
        return Grid(names, numels, max(numels))
    if all(layout.runs for layout in layouts):
        wanted *= _IN_RUNS
    density = max(layout.indices.numel() for layout in layouts) / sum(numels)
    return Grid(names, numels, tile_for(wanted, density))


class _Tiled:
    """Weights one by one, each in tiles."""

    def __init__(self, weights: Mapping[str, Tensor], grid: Grid, scales: Mapping[str, float] | float) -> None:
        self._by_name, self._grid = weights, grid
        self.weights, self.tiles = list(weights.values()), grid.tiles
        if isinstance(scales, int | float):
            scales = dict.fromkeys(weights, float(scales))
        self.scales = [scales.get(name, 0.0) for name in weights]

    def side(self, group: Overwritten) -> Side:
        layout = group.layout
        at, runs = _places(layout, [self._by_name[name] for name in layout.names])
        return Side(at, runs, _starts(layout, self._grid), bits_of(group.base), bits_of(group.written))


class _Range:
    """CPU weights with few entries each: the addresses that hold them all, a tile of whole weights for each thread."""

    def __init__(self, weights: Mapping[str, Tensor], layouts: Sequence[Layout], scale: float) -> None:
        self._by_name, self._firsts = weights, _shares(tuple(weights), layouts)
        held = list(weights.values())
        self._start, length = extent(held)
        self.weights = [memory_at(self._start, length, held[0].dtype).view(held[0].dtype)]
        self.tiles, self.scales = (1 + len(self._firsts),), [scale]

    def side(self, group: Overwritten) -> Side:
        names, bounds = group.layout.names, group.layout.bounds
        inner = (bounds[bisect_left(names, first)] for first in self._firsts)
        starts = torch.tensor([0, *inner, bounds[-1]], dtype=torch.int32, device="cpu")
        return Side(self._places(group.layout), False, starts, bits_of(group.base), bits_of(group.written))

    def _places(self, layout: Layout) -> Tensor:
        """Where a layout's entries lie in the range, as found last: nearly always the same weights are in it."""
        own = [self._by_name[name] for name in layout.names]
        key = ("range", self._start, key_of(own))
        if key not in layout.found:
            for old in [key for key in layout.found if key[0] == "range"]:
                del layout.found[old]
            found = positions(own, layout.sizes, layout.indices)
            layout.found[key] = found.at + (found.start - self._start) // self.weights[0].dtype.itemsize
        return layout.found[key]


def _shares(names: Sequence[str], layouts: Sequence[Layout]) -> list[str]:
    """The first weight of each thread's share of about as many entries, but for the first thread's."""
    counts = dict.fromkeys(names, 0)
    for layout in layouts:
        for name, size in zip(layout.names, layout.sizes, strict=True):
            counts[name] += size
    ends = list(accumulate(counts.values()))
    threads = threads_for(ends[-1])
    return sorted({names[bisect_left(ends, ends[-1] * k / threads)] for k in range(1, threads)})


def _starts(layout: Layout, grid: Grid) -> Tensor:
    key = ("starts", grid.names if grid.names != layout.names else (), grid.tile)
    if key not in layout.found:
        layout.found[key] = find_starts(grid, layout.names, layout.bounds, layout.indices)
    return layout.found[key]


def _places(layout: Layout, weights: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Where a layout's entries lie in its weights' memory, and whether that counts runs."""
    if all(weight.is_contiguous() for weight in weights):
        if not layout.runs:
            return layout.indices, False
        if ("runs",) not in layout.found:
            layout.found[("runs",)] = (layout.indices[::RUN] // RUN).contiguous()
        return layout.found[("runs",)], True
    key = ("places", tuple(weight.stride() for weight in weights))
    if key not in layout.found:
        parts = zip(weights, layout.indices.split(layout.sizes), strict=True)
        layout.found[key] = torch.cat([physical(own, weight) for weight, own in parts]).to(layout.indices.dtype)
    return layout.found[key], False
