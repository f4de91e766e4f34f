"""Compare two adapter files without a model and without torch: ``shira diff``."""

import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.adapter_file import AdapterFile
from shira_diffusers.formats.format_1 import Sparse
from shira_diffusers.formats.header import read_header
from shira_diffusers.formats.safetensors_bytes import Raw

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EntryDifference:
    """How the entries of two adapters differ, on one weight or over several; it adds up.

    Args:
        first, second: entries of each.
        shared: entries that both hold.
        equal: of those, the ones with equal values.
        conflicts: of those, the ones with opposite signs.
        first_square, second_square, square: the squared l2 norms of each, and of their difference.
    """

    first: int = 0
    second: int = 0
    shared: int = 0
    equal: int = 0
    conflicts: int = 0
    first_square: float = 0.0
    second_square: float = 0.0
    square: float = 0.0

    def __add__(self, other: "EntryDifference") -> "EntryDifference":
        return EntryDifference(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def is_none(self) -> bool:
        """Whether both hold the same entries with equal values."""
        return self.first == self.second == self.equal

    def as_dict(self) -> dict[str, Any]:
        """The figures for people and programs.

        ``overlap`` is the fraction of the smaller one's entries that both hold, ``sign_conflict`` that of the shared
        ones with opposite signs, ``norms`` are the l2 norms, and ``distance`` that of the difference.
        """
        smaller = min(self.first, self.second)
        return {
            "entries": [self.first, self.second],
            "shared": self.shared,
            "equal": self.equal,
            "overlap": self.shared / smaller if smaller else 0.0,
            "sign_conflict": self.conflicts / self.shared if self.shared else 0.0,
            "norms": [math.sqrt(self.first_square), math.sqrt(self.second_square)],
            "distance": math.sqrt(self.square),
        }


@dataclass(frozen=True, slots=True)
class AdapterDifference:
    """How two adapter files differ.

    Args:
        files: their paths.
        components: the first parts of each one's names, sorted.
        only: names of the weights that one of them adapts and the other does not.
        shapes: weights that both adapt, with another shape in each.
        metadata: keys whose values differ, with both values; None where there is none.
        weights: of each weight that both adapt with one shape.
        whole: over all entries of both files.
    """

    files: tuple[str, str]
    components: tuple[list[str], list[str]]
    only: tuple[list[str], list[str]]
    shapes: dict[str, tuple[Shape, Shape]]
    metadata: dict[str, tuple[str | None, str | None]]
    weights: dict[str, EntryDifference]
    whole: EntryDifference

    @property
    def same_weights(self) -> bool:
        """Whether both give the same weights, whatever their metadata says."""
        return not any((*self.only, self.shapes)) and self.whole.is_none

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON."""
        return {
            **{key: value for key, value in asdict(self).items() if key not in ("weights", "whole")},
            "same_weights": self.same_weights,
            "whole": self.whole.as_dict(),
            "weights": {name: each.as_dict() for name, each in self.weights.items()},
        }


def compare_adapters(first: Path, second: Path) -> AdapterDifference:
    """Compare two files, or those in two folders.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFormatError: one that is no intact adapter, or PEFT's, which has no shapes.
    """
    files = read_header(first), read_header(second)
    one, other = map(_arrays, files)
    shared = [name for name in one if name in other]
    misshapen = {n: (one[n].shape, other[n].shape) for n in shared if one[n].shape != other[n].shape}
    weights = {name: _compare(one[name], other[name]) for name in shared if name not in misshapen}
    nothing = Sparse(np.empty(0, np.int32), Raw("F32", np.empty(0, np.float32)), ())
    alone = [_compare(delta, nothing) for name, delta in one.items() if name not in weights]
    alone += [_compare(nothing, delta) for name, delta in other.items() if name not in weights]
    return AdapterDifference(
        (str(files[0].path), str(files[1].path)),
        (_components(one), _components(other)),
        ([name for name in one if name not in other], [name for name in other if name not in one]),
        misshapen,
        _metadata(files[0].metadata, files[1].metadata),
        weights,
        sum([*weights.values(), *alone], start=EntryDifference()),
    )


def _arrays(file: AdapterFile) -> dict[str, Sparse]:
    if file.reader is None:
        raise AdapterFormatError(
            f"{file.path} is PEFT's, which stores no shapes to compare: load it into its model with load_shira and "
            "write it with save_shira first"
        )
    return file.arrays()


def _compare(one: Sparse, other: Sparse) -> EntryDifference:
    first, second = (each.values.to_float32().astype(np.float64) for each in (one, other))
    _, mine, theirs = np.intersect1d(one.indices, other.indices, assume_unique=True, return_indices=True)
    a, b = first[mine], second[theirs]
    # entries that only one of them holds are apart by their own value
    apart = a - b, np.delete(first, mine), np.delete(second, theirs)
    return EntryDifference(
        len(one.indices),
        len(other.indices),
        len(mine),
        int(np.count_nonzero(a == b)),
        int(np.count_nonzero(a * b < 0)),
        _square(first),
        _square(second),
        sum(map(_square, apart)),
    )


def _square(values: NDArray[np.float64]) -> float:
    return float(values @ values)


def _components(deltas: Mapping[str, Sparse]) -> list[str]:
    return sorted({name.partition(".")[0] for name in deltas})


def _metadata(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    keys = sorted(one.keys() | other.keys())
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}
