"""Entries of CUDA weights, read or overwritten by one Triton launch over a table of the weights' addresses.

Triton comes with the CUDA builds of torch; ``available`` says whether it is there. ``sites`` chooses.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from shira_diffusers.weights.scatter import bits_of, physical

_BLOCK = 1024  # entries a program moves


@cache
def available() -> bool:
    """Whether Triton can be imported and there is a CUDA device for it."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


class Table(NamedTuple):
    """Where entries lie, on the weights' device.

    Args:
        addresses: int64 ``[weights]``.
        blocks: int32 ``[k, 3]``: of each program the weight, its first entry and the end of its entries in ``[n]``.
        at: int32 or int64 ``[n]``, places of the entries in each weight's memory.
    """

    addresses: Tensor
    blocks: Tensor
    at: Tensor


@dataclass(frozen=True, slots=True)
class Launch:
    """``Sites`` of CUDA weights of one dtype and device; ``weights`` are kept alive, being reached by address."""

    weights: Sequence[Tensor]
    table: Table

    def read(self) -> Tensor:
        """As ``Sites.read``."""
        first = self.weights[0]
        values = torch.empty(self.table.at.numel(), dtype=first.dtype, device=first.device)
        self._move(values, write=False)
        return values

    def write(self, values: Tensor) -> None:
        """As ``Sites.write``."""
        self._move(values.contiguous(), write=True)

    def _move(self, values: Tensor, *, write: bool) -> None:
        addresses, blocks, at = self.table
        if not len(blocks):
            return
        from shira_diffusers.weights.triton_kernels import move  # Triton is there only where CUDA is

        with torch.cuda.device(values.device):
            move[(len(blocks),)](addresses, blocks, at, bits_of(values), WRITE=write, BLOCK=_BLOCK, num_warps=4)


def launches(weights: Sequence[Tensor]) -> bool:
    """Whether a ``Launch`` can hold these weights: on one CUDA device, of one dtype, with Triton there."""
    first = weights[0]
    return first.is_cuda and available() and all(w.device == first.device and w.dtype == first.dtype for w in weights)


def table(weights: Sequence[Tensor], sizes: Sequence[int], indices: Tensor) -> Table:
    """Find row-major indices, ``[n]``, ``sizes`` of them in each weight, in the weights' memory."""
    device = weights[0].device
    at = indices.to(device)
    if not all(weight.is_contiguous() for weight in weights):
        parts = zip(weights, at.split(list(sizes)), strict=True)
        at = torch.cat([physical(own, weight).to(at.dtype) for weight, own in parts])
    counts = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    ends = counts.cumsum(0)
    programs = (counts + _BLOCK - 1) // _BLOCK
    owner = torch.arange(len(sizes), device="cpu").repeat_interleave(programs)
    # of the program in its weight
    number = torch.arange(len(owner), device="cpu") - (programs.cumsum(0) - programs)[owner]
    first = (ends - counts)[owner] + number * _BLOCK
    blocks = torch.stack([owner, first, torch.minimum(first + _BLOCK, ends[owner])], dim=1).to(torch.int32)
    addresses = torch.tensor([weight.data_ptr() for weight in weights], dtype=torch.int64, device="cpu")
    return Table(addresses.to(device), blocks.contiguous().to(device), at)
