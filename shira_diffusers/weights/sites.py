"""Sites: the adapted entries of many weights as one, so that a switch costs a few kernels and not hundreds.

On a CPU the weights of a model are ranges of one address space: ``Span`` reads and writes all their entries with one
index kernel, which uses all cores. On CUDA ``Launch`` does it with one Triton launch. Elsewhere, and without Triton,
``Each`` goes from weight to weight.
"""

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shira_diffusers.weights.launches import Launch, Table, launches, table
from shira_diffusers.weights.scatter import bits_dtype, bits_of, cast, gather, overwrite, physical, put_bits

Key = tuple[tuple[int, tuple[int, ...], torch.dtype, torch.device], ...]
"""Where weights lie and how: positions that were found for one key hold as long as it stays."""


class Sites(Protocol):
    """The entries of some weights, end to end."""

    def read(self) -> Tensor:
        """Copy them: ``[n]``, of the weights' dtype and device, bit for bit."""

    def write(self, values: Tensor) -> None:
        """Overwrite them with ``[n]`` values of the weights' dtype and device, bit for bit; addresses stay."""


@dataclass(frozen=True, slots=True)
class Each:
    """Entries of weights anywhere: ``indices`` are int32 or int64 ``[n]``, ``sizes`` how many are in each weight."""

    weights: Sequence[Tensor]
    sizes: Sequence[int]
    indices: Tensor

    def read(self) -> Tensor:
        """As ``Sites.read``."""
        parts = zip(self.weights, self.indices.split(list(self.sizes)), strict=True)
        return torch.cat([gather(weight, indices) for weight, indices in parts])

    def write(self, values: Tensor) -> None:
        """As ``Sites.write``."""
        sizes = list(self.sizes)
        for weight, indices, part in zip(self.weights, self.indices.split(sizes), values.split(sizes), strict=True):
            overwrite(weight, indices, cast(part, weight))


class Positions(NamedTuple):
    """Where entries lie: ``at``, int64 ``[n]``, are places in the ``length`` bytes from address ``start`` on."""

    start: int
    length: int
    at: Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """Entries of CPU weights of one dtype, by their place in the range of addresses that holds all the weights.

    Args:
        weights: those of the positions; kept alive, since their memory is reached by address.
        positions: what ``positions`` gave for these weights.
    """

    weights: Sequence[Tensor]
    positions: Positions

    def read(self) -> Tensor:
        """As ``Sites.read``."""
        return self._memory().index_select(0, self.positions.at).view(self.weights[0].dtype)

    def write(self, values: Tensor) -> None:
        """As ``Sites.write``."""
        put_bits(self._memory(), self.positions.at, bits_of(values))

    def _memory(self) -> Tensor:
        """The range as integers of the weights' size. Only what belongs to the weights is ever touched."""
        return memory_at(self.positions.start, self.positions.length, self.weights[0].dtype)


def memory_at(start: int, length: int, dtype: torch.dtype) -> Tensor:
    """``length`` bytes of CPU memory from an address on as integers of a dtype's size; nothing keeps them alive."""
    return torch.frombuffer((ctypes.c_char * length).from_address(start), dtype=bits_dtype(dtype))


def spans(weights: Sequence[Tensor]) -> bool:
    """Whether a ``Span`` can hold these weights: of one dtype, in CPU memory, and aligned with each other."""
    dtype, start = weights[0].dtype, weights[0].data_ptr()
    return all(w.is_cpu and w.dtype == dtype and (w.data_ptr() - start) % dtype.itemsize == 0 for w in weights)


def key_of(weights: Iterable[Tensor]) -> Key:
    """Where weights lie now, and how."""
    return tuple((weight.data_ptr(), weight.stride(), weight.dtype, weight.device) for weight in weights)


def extent(weights: Sequence[Tensor]) -> tuple[int, int]:
    """The address and the bytes, whole entries, of the range that holds weights; what lies behind is never touched."""
    start = min(weight.data_ptr() for weight in weights)
    last = max(weights, key=lambda weight: weight.data_ptr())
    length = last.data_ptr() - start + last.untyped_storage().nbytes()
    return start, length - length % last.dtype.itemsize


def positions(weights: Sequence[Tensor], sizes: Sequence[int], indices: Tensor) -> Positions:
    """Find row-major indices, ``[n]``, ``sizes`` of them in each weight, in the range that holds the weights."""
    size = weights[0].dtype.itemsize
    start, length = extent(weights)
    at = torch.empty(indices.numel(), dtype=torch.int64, device="cpu")
    for weight, own, out in zip(weights, indices.split(list(sizes)), at.split(list(sizes)), strict=True):
        torch.add(physical(own, weight), (weight.data_ptr() - start) // size, out=out)
    return Positions(start, length, at)


def find(weights: Sequence[Tensor], sizes: Sequence[int], indices: Tensor) -> Positions | Table | None:
    """Find where entries lie, in the fastest way that there is for these weights; None if only weight by weight."""
    if spans(weights):
        return positions(weights, sizes, indices)
    return table(weights, sizes, indices) if launches(weights) else None


def sites_of(
    weights: Sequence[Tensor], sizes: Sequence[int], indices: Tensor, found: Positions | Table | None
) -> Sites:
    """The entries, given what ``find`` found for these weights; it holds as long as their ``key_of`` stays."""
    if isinstance(found, Positions):
        return Span(weights, found)
    return Launch(weights, found) if isinstance(found, Table) else Each(weights, sizes, indices)
