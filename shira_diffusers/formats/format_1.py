"""Version 1 of the file format: four tensors per weight. Always readable; written for state dicts only.

This module and ``format_2`` know the keys on disk, no other does. In: tensors by key. Out: coded weights, and back.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.block import (
    INFINITIES,
    Block,
    Weight,
    check_probe,
    check_shape,
    end_to_end,
    problem_of,
    require_intact,
)
from shira_diffusers.formats.gap_codec import ESCAPES, Gaps, Indices, encode_gaps
from shira_diffusers.formats.safetensors_bytes import Raw, dtype_name

VERSION = "1"
_VALUES, _SHAPE, _GAPS, _BASE = ".values", ".shape", ".gaps", ".base"


class Sparse(NamedTuple):
    """One weight, decoded: sorted indices int32 or int64 ``(nnz,)``, values ``(nnz,)``, the dense weight's shape."""

    indices: Indices
    values: Raw
    shape: tuple[int, ...]


class Coded(NamedTuple):
    """One weight as read: gaps ``(m,)`` and values ``(nnz,)``."""

    weight: Weight
    gaps: Gaps
    values: Raw

    @property
    def regular(self) -> bool:
        """Whether dtypes and dimensions are those that a block can hold."""
        plain = (self.gaps.ndim, self.values.array.ndim) == (1, 1)
        return plain and self.gaps.dtype.name in (*ESCAPES, "int32") and self.values.dtype in INFINITIES

    @property
    def complete(self) -> bool:
        """Whether gaps code one index per value, the last one finished, whatever the indices are."""
        top = ESCAPES.get(self.gaps.dtype.name)
        found = len(self.gaps) if top is None else int(np.count_nonzero(self.gaps != top))
        return found == self.weight.nnz and not (len(self.gaps) and self.gaps[-1] == top)


class Reader:
    """The weights that tensors hold.

    Args:
        tensors: by key.
        source: what to call them in messages.

    Raises:
        AdapterFormatError: unknown or missing keys, other dtypes or dimensions; all offenders at once.
    """

    version = VERSION

    def __init__(self, tensors: Mapping[str, Raw], source: str) -> None:
        self._source = source
        kinds: dict[str, dict[str, Raw]] = {}
        problems: list[str] = []
        for key, raw in tensors.items():
            name, dot, kind = key.rpartition(".")
            if dot + kind not in (_VALUES, _SHAPE, _GAPS, _BASE) or not name:
                problems.append(f"{key}: unknown key, expected <parameter>.values, .gaps, .shape or .base")
            else:
                kinds.setdefault(name, {})[dot + kind] = raw
        self._coded: list[Coded] = []
        for name, own in sorted(kinds.items()):
            try:
                self._coded.append(_coded(name, own))
            except AdapterFormatError as error:
                problems.append(f"{name}: {error}")
        if problems or not all(each.regular for each in self._coded):
            self._refuse(problems)
        self.weights = tuple(each.weight for each in self._coded)
        self.probes = {name: own[_BASE] for name, own in kinds.items() if _BASE in own}

    def blocks(self) -> list[Block]:
        """The weights, those of the same dtypes end to end: copies.

        Raises:
            AdapterFormatError: gaps that are unfinished or code another number of indices.
        """
        if not all(each.complete for each in self._coded):
            self._refuse([])
        kinds: dict[tuple[str, str], list[Coded]] = {}
        for each in self._coded:
            kinds.setdefault((each.gaps.dtype.name, each.values.dtype), []).append(each)
        return [
            Block(
                tuple(each.weight for each in own),
                end_to_end([each.values for each in own]),
                np.concatenate([each.gaps for each in own]),
            )
            for own in kinds.values()
        ]

    def _refuse(self, problems: list[str]) -> None:
        found = [(each.weight.name, problem_of(*each)) for each in self._coded]
        require_intact([*problems, *(f"{name}: {what}" for name, what in found if what)], self._source)


def _coded(name: str, own: Mapping[str, Raw]) -> Coded:
    missing = [kind for kind in (_VALUES, _GAPS, _SHAPE) if kind not in own]
    if missing:
        raise AdapterFormatError(f"{', '.join(missing)} missing, expected .values, .gaps and .shape")
    (dtype, sizes), values = own[_SHAPE], own[_VALUES]
    if sizes.ndim != 1 or dtype != "I64":
        raise AdapterFormatError(f"shape is {dtype_name(dtype)} {sizes.tolist()}, expected int64 sizes")
    gaps = own[_GAPS]
    if gaps.array.dtype.name in ESCAPES and gaps.dtype not in (
        "U8",
        "U16",
    ):  # such as float8, which NumPy reads as bytes
        raise AdapterFormatError(f"gaps are {dtype_name(gaps.dtype)}, expected uint8, uint16 or int32")
    shape = check_shape(sizes.tolist())
    if _BASE in own:
        check_probe(own[_BASE], values.array.size)
    return Coded(Weight(name, shape, values.array.size, values.dtype), gaps.array, values)


def is_version_1(tensors: Mapping[str, Raw]) -> bool:
    """Whether keys are those of this version, as of a state dict, which has no header to say so."""
    return any(key.endswith(_GAPS) for key in tensors)


def write(weights: Mapping[str, Sparse], probes: Mapping[str, Raw]) -> dict[str, Raw]:
    """The tensors that hold weights, by name, and the base's values at some of their entries."""
    tensors: dict[str, Raw] = {}
    for name, (indices, values, shape) in weights.items():
        gaps = encode_gaps(indices)
        tensors[name + _VALUES] = values
        tensors[name + _GAPS] = Raw({"uint8": "U8", "uint16": "U16", "int32": "I32"}[gaps.dtype.name], gaps)
        tensors[name + _SHAPE] = Raw("I64", np.array(shape, np.int64))
    return tensors | {name + _BASE: probe for name, probe in probes.items()}
