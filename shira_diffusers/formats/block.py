"""Decode and check coded weights laid end to end, as both versions of the file format are read.

NumPy only. What is intact is decoded fast; what is not is decoded again weight by weight, which says what is wrong.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shira_diffusers.errors import AdapterFormatError, counted, listing, verb
from shira_diffusers.formats.gap_codec import Gaps, Indices, decode_gaps, decode_many, run, split_gaps
from shira_diffusers.formats.safetensors_bytes import Raw, as_array, dtype_name

RUN = 32  # entries of an aligned run
INFINITIES = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}
"""The dtypes that values may have, and the bits of infinity in each: greater ones are no numbers."""

_LARGEST = 2**31 - 1  # entries of a weight whose indices are int32
_PIECE = 2**18  # values that are looked at together: they stay in a core's cache
_DIMENSIONS = 64  # what torch computes with; the product of a million sizes would take hours


class Weight(NamedTuple):
    """One adapted weight: the dense weight's name and shape, how many entries are held, and the dtype of their values.

    ``shape`` is None where the file does not store it.
    """

    name: str
    shape: tuple[int, ...] | None
    nnz: int
    dtype: str

    @property
    def numel(self) -> int:
        """Entries of the dense weight, 0 where the shape is not known."""
        return math.prod(self.shape) if self.shape is not None else 0

    @property
    def density(self) -> float | None:
        """Fraction of the weight's entries that are held, 0 to 1; None where the shape is not known."""
        return self.nnz / self.numel if self.numel else None


@dataclass(frozen=True, slots=True)
class Block:
    """Weights end to end, of one dtype of values and one of gaps.

    Args:
        weights: in order.
        values: ``(nnz,)``, of a dtype in ``INFINITIES``.
        gaps: ``(m,)``, uint8, uint16 or int32, each weight starting anew.
        run: 1, or 32 where gaps code the numbers of aligned runs of 32 entries.
    """

    weights: tuple[Weight, ...]
    values: Raw
    gaps: Gaps
    run: int = 1

    @property
    def counts(self) -> list[int]:
        """How many coded positions each weight has: entries, or runs of them."""
        return [weight.nnz // self.run for weight in self.weights]

    @property
    def limits(self) -> list[int]:
        """How many positions each dense weight has: entries, or whole runs."""
        return [weight.numel // self.run for weight in self.weights]

    @property
    def narrow(self) -> bool:
        """Whether all indices fit int32."""
        return all(weight.numel <= _LARGEST for weight in self.weights)

    def decode(self, threads: int = 1, **how: Any) -> list[Indices] | None:
        """The indices of each weight, int32 (int64 from 2^31 entries on) ``(nnz,)``; None where anything is damaged.

        Args:
            threads: how many to use for many elements.
            how: see ``decode_many``.
        """
        if not is_finite(self.values, threads):
            return None
        if not self.narrow:
            return self._decode_each()
        found = decode_many(self.gaps, self.counts, self.limits, threads=threads, **how)
        if found is None:
            return None
        return self.split(spread(found, self.run))

    def split(self, whole: NDArray[Any]) -> list[NDArray[Any]]:
        """The part of each weight of an array ``(nnz,)`` over all of them."""
        edges = accumulate((weight.nnz for weight in self.weights), initial=0)
        return [whole[a:b] for a, b in pairwise(edges)]

    def _decode_each(self) -> list[Indices] | None:
        try:
            parts = split_gaps(self.gaps, self.counts)
            found = [decode_gaps(part, limit) for part, limit in zip(parts, self.limits, strict=True)]
        except AdapterFormatError:
            return None
        wide = [w.numel > _LARGEST for w in self.weights]
        return [spread(at if w else at.astype(np.int32), self.run) for at, w in zip(found, wide, strict=True)]

    def problems(self) -> list[str]:
        """What is wrong, by weight where that is known; empty if all is intact."""
        try:
            parts = split_gaps(self.gaps, self.counts)
        except AdapterFormatError as error:
            return [str(error)]
        values = [Raw(self.values.dtype, own) for own in self.split(self.values.array)]
        found = [problem_of(*each, self.run) for each in zip(self.weights, parts, values, strict=True)]
        return [f"{weight.name}: {what}" for weight, what in zip(self.weights, found, strict=True) if what]


def spread(positions: Indices, run: int) -> Indices:
    """Indices ``(nnz,)`` of the entries in runs ``(nnz / run,)``."""
    if run == 1:
        return positions
    return (positions[:, None] * run + np.arange(run, dtype=positions.dtype)).reshape(-1)


def problem_of(weight: Weight, gaps: Gaps, values: Raw, run: int = 1) -> str | None:
    """What is wrong with one weight, every requirement checked by itself; None if nothing is."""
    try:
        count = len(decode_gaps(gaps, weight.numel // run)) * run
    except AdapterFormatError as error:
        return str(error)
    wrong = None
    if values.dtype not in INFINITIES:
        wrong = f"values are {dtype_name(values.dtype)}, expected float32, float16 or bfloat16"
    elif values.array.shape != (count,):
        wrong = f"{values.array.shape} values for {(count,)} indices, expected one value per index"
    elif bad := int(np.count_nonzero(_magnitude_bits(values) >= INFINITIES[values.dtype])):
        wrong = f"{counted(bad, 'value', of=count)} {verb(bad, 'is', 'are')} NaN or infinite, expected finite values"
    return wrong and f"not a sparse delta of a {weight.shape} weight: {wrong}"


def is_finite(values: Raw, threads: int = 1) -> bool:
    """Whether no value is NaN or infinite, by the greatest of the positive and of the negative bit patterns."""
    infinity, (signed, unsigned) = INFINITIES[values.dtype], _bits(values)
    sign = 1 << (8 * signed.itemsize - 1)

    def finite(at: int) -> bool:
        part = slice(at, at + _PIECE)
        return bool(signed[part].max() < infinity and unsigned[part].max() < infinity + sign)

    return all(run(finite, range(0, len(signed), _PIECE), threads))


def _bits(values: Raw) -> tuple[NDArray[Any], NDArray[Any]]:
    size = values.array.itemsize
    return values.array.view(f"i{size}"), values.array.view(f"u{size}")


def _magnitude_bits(values: Raw) -> NDArray[Any]:
    signed, _ = _bits(values)
    return signed & np.iinfo(signed.dtype).max


def check_shape(shape: Sequence[Any]) -> tuple[int, ...]:
    """The sizes of a dense weight.

    Raises:
        AdapterFormatError: they are not sizes, or more than any tensor can have.
    """
    if len(shape) > _DIMENSIONS:
        raise AdapterFormatError(f"shape has {counted(len(shape), 'dimension')}, expected at most {_DIMENSIONS}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise AdapterFormatError(f"shape is {list(shape)}, expected int64 sizes of 0 or more")
    if max(math.prod(shape), *shape, 0) >= 2**63:
        raise AdapterFormatError(f"shape {tuple(shape)!s:.100} has more entries than any tensor can hold")
    return tuple(shape)


def check_probe(probe: Raw, nnz: int) -> None:
    """Require the base's values to be of a float dtype, no more of them than entries.

    Raises:
        AdapterFormatError: they are not.
    """
    if probe.array.ndim != 1 or probe.dtype not in INFINITIES:
        raise AdapterFormatError(f"base is {dtype_name(probe.dtype)} {probe.array.shape}, expected float16 [k]")
    if len(probe.array) > nnz:
        raise AdapterFormatError(f"{counted(len(probe.array), 'base value')} for {counted(nnz, 'entry')}")


def end_to_end(parts: Sequence[Raw], dtype: str | None = None) -> Raw:
    """Copies of several tensors of one dtype, end to end."""
    dtype = dtype or parts[0].dtype
    return Raw(dtype, np.concatenate([np.empty(0, as_array(dtype)), *(part.array for part in parts)]))


def require_intact(problems: Sequence[str], source: str) -> None:
    """Raise AdapterFormatError with all problems, if there are any."""
    if problems:
        raise AdapterFormatError(
            f"{source} is not a valid SHiRA adapter; get an intact copy or write it again with save_adapter:"
            f"{listing(problems)}"
        )
