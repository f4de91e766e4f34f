"""Overwrite the weights of one exported model with a mix of adapters, and put every bit back.

The numbers are those of ``engine``: in float32 ``acc = 0; acc += scale * delta`` in the order of names, and
``round(base + acc)``, rounded once to the weights' dtype.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shira_diffusers.adapters.scales import Scale, scale_of
from shira_diffusers.edge.exported import ExportedWeights
from shira_diffusers.errors import ResidentStateError, ShiraError, counted, listing, verb
from shira_diffusers.formats.gap_codec import Indices
from shira_diffusers.formats.safetensors_bytes import Raw

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Entries:
    """What an adapter changes in one model.

    Args:
        positions: int32 or int64 ``(n,)``, sorted, in the memory of all weights.
        values: ``(n,)``, as in the file.
        names: the weights, in the order of their entries.
        counts: how many entries each of them has.
    """

    positions: Indices
    values: Raw
    names: tuple[str, ...]
    counts: tuple[int, ...]

    def scaled(self, component: str, scale: Scale) -> Floats:
        """``scale * delta``, ``(n,)``."""
        if isinstance(scale, int | float):
            factor: Any = np.float32(scale)
        else:
            by_weight = [scale_of(scale, component, name) for name in self.names]
            factor = np.repeat(np.array(by_weight, np.float32), self.counts)
        return self.values.to_float32() * factor


@dataclass(frozen=True, slots=True)
class Saved:
    """Overwritten entries: where, ``(n,)``, the bits that were there and those that were written."""

    positions: Indices
    base: NDArray[Any]
    written: NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Union:
    """Where the entries of several adapters lie: sorted positions ``(n,)``, and each adapter's places among them."""

    names: tuple[str, ...]
    positions: Indices
    places: Sequence[Indices]


class SwitchedWeights:
    """One exported model, its adapters and what is overwritten.

    Args:
        component: its name.
        weights: of the model.
    """

    def __init__(self, component: str, weights: ExportedWeights) -> None:
        self.component, self.weights = component, weights
        self.adapters: dict[str, Entries] = {}
        self.saved: Saved | None = None
        self._union: _Union | None = None  # of the last mix of several, so that a new strength plans nothing

    def switch(self, mix: Mapping[str, Scale], undo: ExitStack) -> None:
        """Restore what is overwritten, and overwrite the entries of a mix of this model's adapters.

        Args:
            mix: the scale of each.
            undo: what puts back every bit is added to it, at once, so that it holds after an error too.

        Raises:
            ResidentStateError: weights that were modified since; nothing was written.
            ShiraError: sums out of the range of the weights' dtype; ``undo`` is due.
        """
        old, memory = self.saved, self.weights.memory
        if old is not None:
            self._require_written(old)
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, with the names
            found = self._mixed(mix)
        stays = old is not None and found is not None and found[0] is old.positions
        if old is not None and not stays:
            undo.callback(_put, memory, old.positions, old.written)
            memory[old.positions] = old.base
        undo.callback(setattr, self, "saved", old)
        self.saved = None if found is None else self._overwrite(*found, old if stays else None, undo)

    def _mixed(self, mix: Mapping[str, Scale]) -> tuple[Indices, Floats] | None:
        """The positions of a mix's entries, sorted, and the sum of ``scale * delta`` at each, ``(n,)``."""
        names = tuple(sorted(mix))
        if not names:
            return None
        parts = [self.adapters[name].scaled(self.component, mix[name]) for name in names]
        if len(names) == 1:
            return self.adapters[names[0]].positions, parts[0] + np.float32(0)  # as a sum that begins at zero: no -0
        if self._union is None or self._union.names != names:
            self._union = _union(names, [self.adapters[name].positions for name in names])
        total = np.zeros(len(self._union.positions), np.float32)
        for places, part in zip(self._union.places, parts, strict=True):
            total[places] += part
        return self._union.positions, total

    def _overwrite(self, positions: Indices, total: Floats, stays: Saved | None, undo: ExitStack) -> Saved:
        memory = self.weights.memory
        base = stays.base if stays else _read(memory, positions)
        with np.errstate(over="ignore", invalid="ignore"):
            written = (base.astype(np.float32) + total).astype(base.dtype)
        self._require_in_range(positions, base, written)
        undo.callback(_put, memory, positions, stays.written if stays else base)
        memory[positions] = written
        return Saved(positions, base, written)

    def _require_in_range(self, positions: Indices, base: NDArray[Any], written: NDArray[Any]) -> None:
        wide = np.isfinite(base) & ~np.isfinite(written)
        if wide.any():
            names = self._full_names(positions[wide])
            raise ShiraError(
                f"{counted(len(names), 'weight')} would become infinite or NaN, expected sums in the range of "
                f"{base.dtype}; nothing has changed. Use smaller scales, or export the model as fp32:{listing(names)}"
            )

    def _require_written(self, saved: Saved) -> None:
        now = _read(self.weights.memory, saved.positions)
        foreign = _bits(now) != _bits(saved.written)
        if foreign.any():
            names = self._full_names(saved.positions[foreign])
            raise ResidentStateError(
                f"{counted(len(names), 'weight')} {verb(len(names), 'was', 'were')} modified outside shira_diffusers "
                "while an adapter was active, expected the bits that it wrote: restoring would mix two bases; build "
                f"the sessions anew:{listing(names)}"
            )

    def _full_names(self, positions: Indices) -> list[str]:
        return [f"{self.component}.{name}" for name in self.weights.names_at(positions)]

    def forget(self, name: str) -> None:
        """Forget an adapter that is in no mix."""
        self.adapters.pop(name, None)
        if self._union is not None and name in self._union.names:
            self._union = None

    def base_at(self, positions: Indices) -> NDArray[Any]:
        """The unadapted values at ``positions`` ``(n,)``, whatever is active."""
        values, saved = _read(self.weights.memory, positions), self.saved
        if saved is not None and len(saved.positions):
            place = np.searchsorted(saved.positions, positions).clip(max=len(saved.positions) - 1)
            values = np.where(saved.positions[place] == positions, saved.base[place], values)
        return values


def _union(names: tuple[str, ...], positions: Sequence[Indices]) -> _Union:
    merged, places = np.unique(np.concatenate(positions), return_inverse=True)
    ends = np.cumsum([len(own) for own in positions])[:-1]
    return _Union(names, merged, np.split(places, ends))


def _read(memory: NDArray[Any], positions: Indices) -> NDArray[Any]:
    """``memory[positions]``, in a third of the time: positions are in range, so clipping spares NumPy its check."""
    return memory.take(positions, mode="clip")


def _put(memory: NDArray[Any], positions: Indices, values: NDArray[Any]) -> None:
    memory[positions] = values


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    return values.view(f"i{values.itemsize}")
