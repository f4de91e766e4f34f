"""The trained entries of many weights, read and written as one float32 tensor."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shira_diffusers.weights.finder import identity
from shira_diffusers.weights.sweep_cpu import Access
from shira_diffusers.weights.sweep_triton import access


class _Group(NamedTuple):
    """Entries of the weights of one dtype; ``places``, int64 ``(n,)``, are theirs among all entries, None for all."""

    dtype: torch.dtype
    places: Tensor | None
    access: Access


class MaskedEntries:
    """Masked entries of weights, end to end; the weights may be cast or moved between two calls.

    Args:
        weights: parameters on one device.
        sizes: entries per weight.
        indices: int32 or int64 ``(nnz,)`` on the device, flat row-major in each weight.
    """

    def __init__(self, weights: Sequence[nn.Parameter], sizes: Sequence[int], indices: Tensor) -> None:
        self._weights, self._sizes, self._indices = weights, list(sizes), indices
        self._key: list[tuple[Any, ...]] = []
        self._groups: list[_Group] = []

    @torch.no_grad()
    def read(self) -> Tensor:
        """Read all entries: float32 ``(nnz,)``, exact for float32, float16 and bfloat16 weights."""
        values = torch.empty(self._indices.numel(), device=self._indices.device)
        for _, places, (read, _) in self._located():
            if places is None:
                return read().float()
            values[places] = read().float()
        return values

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Write ``values``, float32 ``(nnz,)``, rounded to each weight's dtype; one cast per dtype."""
        for dtype, places, (_, write) in self._located():
            write((values if places is None else values[places]).to(dtype))
        torch.autograd.graph.increment_version(self._weights)  # a backward that needs the old values must fail
        torch.clear_autocast_cache()  # an enclosing autocast region holds casts of the old weights

    def _located(self) -> list[_Group]:
        """Locate the entries; again only after a weight was cast or moved."""
        key = [identity(weight) for weight in self._weights]
        if key != self._key:
            self._groups.clear()
            dtypes = list(dict.fromkeys(weight.dtype for weight in self._weights))
            self._groups = [self._group(dtype) for dtype in dtypes] if len(dtypes) > 1 else [self._all(dtypes[0])]
            self._key = key
        return self._groups

    def _all(self, dtype: torch.dtype) -> _Group:
        return _Group(dtype, None, access(self._weights, self._sizes, self._indices))

    def _group(self, dtype: torch.dtype) -> _Group:
        own = [number for number, weight in enumerate(self._weights) if weight.dtype == dtype]
        parts = torch.arange(self._indices.numel(), device=self._indices.device).split(self._sizes)
        places = torch.cat([parts[n] for n in own])
        weights, sizes = [self._weights[n] for n in own], [self._sizes[n] for n in own]
        return _Group(dtype, places, access(weights, sizes, self._indices[places]))
