"""Describe what a switch does to weights: where entries lie, the bits saved of them, and the step to the next mix.

In: names, positions and values, whatever they mean. Out: the data that ``sweep_cpu`` and ``sweep_triton`` carry out.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from shira_diffusers.weights.finder import WeightMap
from shira_diffusers.weights.scatter import gather, storage_indices
from shira_diffusers.weights.tiles import BLOCK_SIZE, find_starts, tile_for

T = TypeVar("T")
Kind = tuple[torch.device, torch.dtype]

_IN_RUNS = 4
"""How many times longer tiles are where entries are in runs, which cost less per entry (measured)."""


@dataclass(frozen=True, slots=True, eq=False)
class EntryPlan:
    """Where the entries of one mix lie in weights of one device and dtype: the union of its members, end to end.

    Args:
        names: the weights, sorted.
        numels: how many entries each weight has in all.
        bounds: ``names[k]`` has the entries ``bounds[k]`` to ``bounds[k + 1]``.
        indices: int32 or int64 ``(n,)``, sorted flat row-major positions in each weight.
        sources: the members, in the order in which they are added.
        members: for each member the weights it has, in the order of its values.
        values: of each member ``(nnz,)``, in its own dtype.
        places: for each member int64 ``(nnz,)``, where its values go in ``(n,)``; None when they are all of it.
        runs: whether all entries come in aligned runs of ``BLOCK_SIZE``.
        found: what was computed once and is used again, see ``once``.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    bounds: tuple[int, ...]
    indices: Tensor
    sources: tuple[Any, ...] = ()
    members: tuple[tuple[str, ...], ...] = ()
    values: tuple[Tensor, ...] = ()
    places: tuple[Tensor | None, ...] = ()
    runs: bool = False
    found: dict[Hashable, tuple[Hashable, Any]] = field(default_factory=dict, repr=False)

    def __reduce__(self) -> tuple[type["EntryPlan"], tuple[Any, ...]]:
        """What was found holds addresses of this process and versions of its weights: copies begin without."""
        return EntryPlan, tuple(getattr(self, one.name) for one in fields(self) if one.name != "found")

    def once(self, key: Hashable, make: Callable[[], T], version: Hashable = 0) -> T:
        """The result of ``make``, cached for the last version of what it depends on, as a rule of the weights."""
        known = self.found.get(key)
        if known is None or known[0] != version:
            known = self.found[key] = version, make()
        return known[1]

    @property
    def sizes(self) -> list[int]:
        """How many entries each weight has here."""
        return self.once("sizes", lambda: [end - start for start, end in pairwise(self.bounds)])

    def kinds(self, live: Mapping[str, Tensor], version: int) -> list[Kind]:
        """The devices and dtypes that the weights (any shape) have now; one, unless only some were cast or moved."""
        held = self.names
        return self.once("kinds", lambda: list(dict.fromkeys((live[n].device, live[n].dtype) for n in held)), version)

    def at(self, live: Mapping[str, Tensor], version: int) -> tuple[Tensor, int]:
        """Where the entries lie in the memory of each weight (any shape), and in which unit: entries, or whole blocks.

        Returns:
            int32 or int64 ``(n,)`` and 1, or ``(n / BLOCK_SIZE,)`` and ``BLOCK_SIZE``.
        """
        strides = self.once("strides", lambda: _strides(live[name] for name in self.names), version)
        if strides:
            return self.once(("at", strides), lambda: self._strided(live)), 1
        if not self.runs:
            return self.indices, 1
        return self.once("runs", lambda: (self.indices[::BLOCK_SIZE] // BLOCK_SIZE).contiguous()), BLOCK_SIZE

    def _strided(self, live: Mapping[str, Tensor]) -> Tensor:
        parts = zip(self.names, self.indices.split(self.sizes), strict=True)
        return torch.cat([storage_indices(own, live[name]) for name, own in parts]).to(self.indices.dtype)

    def starts(self, grid: Mapping[str, int], tile: int) -> Tensor:
        """Where each tile's entries begin, int32 ``(tiles + 1,)``; see ``tiles.find_starts``."""
        key = ("starts", () if len(grid) == len(self.names) else tuple(grid), tile)
        return self.once(key, lambda: find_starts(grid, tile, self.names, self.bounds, self.indices))

    def read(self, live: Mapping[str, Tensor]) -> Tensor:
        """The values at the entries now, ``(n,)``, from the live weights, each of any shape."""
        parts = zip(self.names, self.indices.split(self.sizes), strict=True)
        return torch.cat([gather(live[name], own) for name, own in parts])

    def moved(self, device: torch.device) -> "EntryPlan":
        """The same on another device."""
        values = tuple(value.to(device) for value in self.values)
        places = tuple(None if place is None else place.to(device) for place in self.places)
        return replace(self, indices=self.indices.to(device), values=values, places=places, found={})

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, but for views of the deltas of its sources: with one source most are."""
        found = [value for _, value in list(self.found.values()) if isinstance(value, Tensor)]
        places = [place for place in self.places if place is not None]
        lent = self.once("lent", self._lent)
        own = {id(t): t for t in (self.indices, *self.values, *places, *found) if _memory_of(t) not in lent}
        return sum(tensor.nbytes for tensor in own.values())

    def _lent(self) -> set[int]:
        deltas = [delta for source in self.sources for delta in source.deltas.values()]
        return {_memory_of(part) for delta in deltas for part in (delta.indices, delta.values)}


def _memory_of(tensor: Tensor) -> int:
    """Where the storage of a tensor (any shape) begins."""
    return tensor.untyped_storage().data_ptr()


def _strides(weights: Iterator[Tensor]) -> tuple[tuple[int, ...], ...]:
    """The strides of weights; nothing where all are contiguous."""
    held = list(weights)
    return () if all(weight.is_contiguous() for weight in held) else tuple(weight.stride() for weight in held)


@dataclass(frozen=True, slots=True, eq=False)
class SavedEntries:
    """The overwritten entries of a plan.

    Args:
        plan: where they are.
        base: ``(n,)``, of the weights' dtype: the bits that were there.
        written: ``(n,)``, likewise: the bits that are there now, unless modified outside shira_diffusers.
    """

    plan: EntryPlan
    base: Tensor
    written: Tensor

    def parts(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """The name of each weight, and its indices, base and written bits as views ``(m,)``."""
        tensors = (self.plan.indices, self.base, self.written)
        return zip(self.plan.names, *(tensor.split(self.plan.sizes) for tensor in tensors), strict=True)


@dataclass(frozen=True, eq=False)
class SwitchStep:
    """What a switch does to the weights of one dtype on one device.

    Args:
        weights: where they are.
        live: the weights themselves; holding them keeps their memory in place.
        outgoing, incoming: what is restored and what is overwritten next; either may be None. With one plan for both
            ``incoming.base`` is the saved base already, else it is filled, as ``incoming.written`` is.
        delta: of what arrives, float32, float16 or bfloat16 ``(n,)``.
        scales: by weight, or one for all.
    """

    weights: WeightMap
    live: Mapping[str, Tensor]
    outgoing: SavedEntries | None
    incoming: SavedEntries | None
    delta: Tensor | None = None
    scales: Mapping[str, float] | float = 1.0

    @cached_property
    def plans(self) -> list[EntryPlan]:
        """Those of what leaves and of what arrives."""
        return [saved.plan for saved in (self.outgoing, self.incoming) if saved is not None]

    @cached_property
    def first(self) -> Tensor:
        """One of the weights, for their device and dtype."""
        return self.live[self.plans[0].names[0]]

    def of(self, plan: EntryPlan) -> list[Tensor]:
        """The weights of one of the plans."""
        return [self.live[name] for name in plan.names]

    @cached_property
    def stays(self) -> bool:
        """Whether the same entries leave and arrive: a strength was changed."""
        plans = self.plans
        return len(plans) == 2 and plans[0] is plans[1]

    @cached_property
    def entries(self) -> int:
        """How many entries are touched."""
        return sum([plan.bounds[-1] for plan in self.plans])

    def grid(self, entries: int | None) -> tuple[dict[str, int], int]:
        """Cut the weights into tiles.

        Args:
            entries: about so many per tile; None for one tile per weight.

        Returns:
            How many tiles each weight has, by sorted name, and how many positions per tile.
        """
        first, last = self.plans[0], self.plans[-1]
        cut = partial(_cut, first, last, entries)
        return last.once(("grid", entries), cut, (first.names, first.numels, first.bounds[-1], first.runs))

    def scale(self, names: Mapping[str, int]) -> list[float]:
        """The scale of each of the weights."""
        scales = self.scales
        if isinstance(scales, int | float):
            return [float(scales)] * len(names)
        return [scales.get(name, 0.0) for name in names]


def _cut(first: EntryPlan, last: EntryPlan, entries: int | None) -> tuple[dict[str, int], int]:
    """As ``SwitchStep.grid``, for the plans of what leaves and of what arrives."""
    numels = dict(zip(first.names, first.numels, strict=True))
    if first.names != last.names:
        numels = dict(sorted({**numels, **dict(zip(last.names, last.numels, strict=True))}.items()))
    if entries is None:
        tile = max(1, *numels.values())
    else:
        longest = _IN_RUNS if first.runs and last.runs else 1
        density = max(first.bounds[-1], last.bounds[-1]) / sum(numels.values())
        tile = tile_for(longest * entries, density)
    return {name: -(-numel // tile) for name, numel in numels.items()}, tile
