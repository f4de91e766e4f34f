"""Version 2 of the file format: one tensor of values, one of gaps, and a table of weights in the header.

This module and ``format_1`` know the keys on disk, no other does. In: tensors by key and the header's strings. Out:
coded weights, and back.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from shira_diffusers.errors import AdapterFormatError, counted
from shira_diffusers.formats.block import (
    INFINITIES,
    RUN,
    Block,
    Weight,
    check_shape,
    end_to_end,
    require_intact,
)
from shira_diffusers.formats.format_1 import Sparse
from shira_diffusers.formats.gap_codec import Indices, encode_many
from shira_diffusers.formats.safetensors_bytes import Bytes, Raw, dtype_name

VERSION = "2"
TABLE, RUNS = "weights", "run"
_VALUES, _GAPS, _BASE = "values", "gaps", "base"
_GAP_DTYPES = {"U8": "uint8", "U16": "uint16", "I32": "int32"}
_ROW, _TYPES = "[name, shape, nnz, probes]", [str, list, int, int]


class Reader:
    """The weights that tensors and the header's table hold.

    Args:
        tensors: by key.
        metadata: the header's strings.
        source: what to call them in messages.

    Raises:
        AdapterFormatError: a table that cannot be read, unknown or missing keys, other dtypes or dimensions, numbers
            that do not add up.
    """

    version = VERSION

    def __init__(self, tensors: Mapping[str, Raw], metadata: Mapping[str, str], source: str) -> None:
        self._source = source
        strangers = [key for key in tensors if key not in (_VALUES, _GAPS, _BASE)]
        self._refuse([f"{key}: unknown key, expected {_VALUES}, {_GAPS} or {_BASE}" for key in strangers])
        self._refuse(
            [f"{key}: missing, expected {_VALUES} and {_GAPS}" for key in (_VALUES, _GAPS) if key not in tensors]
        )
        self._refuse(_misshapen(tensors))
        values, gaps = tensors[_VALUES], tensors[_GAPS]
        rows = self._rows(metadata)
        self.weights = tuple(Weight(name, shape, nnz, values.dtype) for name, shape, nnz, _ in rows)
        if metadata.get(RUNS) not in ("1", str(RUN)):
            self._refuse([f"{RUNS}: expected '1' or '{RUN}', got {metadata.get(RUNS)!r}"])
        run = int(metadata[RUNS])
        self._refuse(
            [f"{w.name}: {counted(w.nnz, 'entry')}, expected runs of {run}" for w in self.weights if w.nnz % run]
        )
        self._block = Block(self.weights, values, gaps.array, run)
        numbers = [probes for *_, probes in rows]
        base = tensors.get(_BASE, Raw("F16", np.empty(0, np.float16)))
        self._refuse(_sums({_VALUES: (values, [w.nnz for w in self.weights]), _BASE: (base, numbers)}))
        ends = list(accumulate(numbers))
        self.probes = {
            weight.name: Raw(base.dtype, base.array[end - count : end])
            for weight, count, end in zip(self.weights, numbers, ends, strict=True)
            if count
        }

    def _rows(self, metadata: Mapping[str, str]) -> list[tuple[str, tuple[int, ...], int, int]]:
        try:
            table = json.loads(metadata[TABLE])
        except (KeyError, ValueError, RecursionError):
            table = None
        if not isinstance(table, list) or not table:
            self._refuse([f"{TABLE}: expected a JSON list of {_ROW} in the header, got {metadata.get(TABLE)!r:.60}"])
        rows, problems = [], []
        for row in table:
            try:
                rows.append(_row(row))
            except AdapterFormatError as error:
                problems.append(str(error))
        self._refuse(problems)
        names = [name for name, *_ in rows]
        self._refuse([f"{b}: not after {a} in the table" for a, b in pairwise(names) if a >= b])
        return rows

    def _refuse(self, problems: Sequence[str]) -> None:
        require_intact(problems, self._source)

    def blocks(self) -> list[Block]:
        """All weights in one block, which is a part of the tensors."""
        return [self._block]


def _misshapen(tensors: Mapping[str, Raw]) -> list[str]:
    kinds = {_VALUES: tuple(INFINITIES), _GAPS: tuple(_GAP_DTYPES), _BASE: tuple(INFINITIES)}
    return [
        f"{key} are {dtype_name(raw.dtype)} {raw.array.shape}, expected one dimension of "
        f"{', '.join(map(dtype_name, kinds[key]))}"
        for key, raw in tensors.items()
        if raw.array.ndim != 1 or raw.dtype not in kinds[key]
    ]


def _row(row: Any) -> tuple[str, tuple[int, ...], int, int]:
    if type(row) is not list or list(map(type, row)) != _TYPES or not is_text(row[0]):
        raise AdapterFormatError(f"{TABLE}: expected {_ROW}, got {row!r:.100}")
    name, shape, nnz, probes = row
    try:
        weight = Weight(name, check_shape(shape), nnz, "")
        if not 0 <= probes <= nnz <= weight.numel:
            raise AdapterFormatError(
                f"{counted(nnz, 'entry')} of {weight.numel:,} and {counted(probes, 'base value')} in the table, "
                "expected no more than there can be"
            )
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{name}: {error}") from None
    return name, weight.shape or (), nnz, probes


def is_text(name: str) -> bool:
    """Whether a name can be written again: not empty, and no half of a surrogate pair, which JSON can spell."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _sums(parts: Mapping[str, tuple[Raw, Sequence[int]]]) -> list[str]:
    return [
        f"{key}: {len(raw.array):,} in the file, {sum(counts):,} in the table of weights, expected the same number"
        for key, (raw, counts) in parts.items()
        if len(raw.array) != sum(counts)
    ]


def checked_bytes(tensors: Mapping[str, Raw]) -> list[Bytes]:
    """What the checksum is over, in this order."""
    return [tensors[key].array.view(np.uint8) for key in (_VALUES, _GAPS, _BASE) if key in tensors]


def is_version_2(tensors: Mapping[str, Raw]) -> bool:
    """Whether keys are those of this version."""
    return tensors.keys() in ({_VALUES, _GAPS}, {_VALUES, _GAPS, _BASE})


def write(weights: Mapping[str, Sparse], probes: Mapping[str, Raw]) -> tuple[dict[str, Raw], dict[str, str]]:
    """The tensors, those of wide dtypes first, and the header's strings that hold weights.

    Args:
        weights: by name; values of one dtype.
        probes: float16 values of the base at some of their entries.
    """
    names = sorted(weights)
    run = RUN if _are_runs([weights[name].indices for name in names]) else 1
    gaps = encode_many([weights[name].indices[::run] // run for name in names])
    code = {name: code for code, name in _GAP_DTYPES.items()}[gaps.dtype.name]
    tensors = {_VALUES: end_to_end([weights[name].values for name in names]), _GAPS: Raw(code, gaps)}
    if probes:
        tensors[_BASE] = end_to_end([probes[name] for name in names if name in probes], "F16")
    counts = {name: len(probes[name].array) if name in probes else 0 for name in names}
    table = [[name, list(weights[name].shape), len(weights[name].indices), counts[name]] for name in names]
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False)
    wide_first = dict(sorted(tensors.items(), key=lambda item: -item[1].array.itemsize))
    return wide_first, {TABLE: text, RUNS: str(run)}


def _are_runs(indices: Sequence[Indices]) -> bool:
    """Whether all entries, of which there are some, come in aligned runs."""
    if not any(map(len, indices)) or any(len(each) % RUN for each in indices):
        return False
    runs = [each.reshape(-1, RUN) for each in indices]
    return all(not (r[:, 0] % RUN).any() and (r == r[:, :1] + np.arange(RUN)).all() for r in runs)
