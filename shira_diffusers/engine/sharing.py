"""Find names that share memory: in one model, in two, or in a part of one beside the whole. Nothing is written here.

Two owners of one entry would each save the other's value as the base. Weights that are tied under several names of one
model are no conflict: they have one owner, which writes them once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shira_diffusers.weights.finder import identity
from shira_diffusers.weights.scatter import storage_indices


class Claim(NamedTuple):
    """Memory that an adapter writes, and for whom.

    Args:
        device, start, end: the bytes.
        tensor, offset: the tensor there, and where the weight begins in it: a fused copy holds others too.
        weight: equal for names that may share, since they are one weight of one owner.
        name: what to call it in a message.
    """

    device: str
    start: int
    end: int
    tensor: Tensor
    offset: int
    numel: int
    weight: tuple[Any, ...]
    name: str

    @property
    def is_block(self) -> bool:
        """Whether all bytes belong to the weight, as nearly always."""
        return self.end - self.start == self.numel * self.tensor.dtype.itemsize

    def addresses(self) -> Tensor:
        """The address of each entry, int64 ``(numel,)``."""
        entries = torch.arange(self.offset, self.offset + self.numel, device="cpu")
        return storage_indices(entries, self.tensor).cpu() * self.tensor.dtype.itemsize + self.tensor.data_ptr()


def claims(held: Mapping[str, Sequence[tuple[Tensor, int]]], owner: object = None) -> Iterator[Claim]:
    """The memory of weights, each with its fused and offloaded copies.

    Args:
        held: by what to call each weight, the tensors (any shape) that hold it, as ``WeightMap.holders`` gives them.
        owner: whose they are; its tied weights may share.
    """
    for name, holders in held.items():
        weight = holders[0][0]
        numel, one = weight.numel(), (id(owner), *identity(weight))
        for tensor, offset in holders if numel else ():
            size = tensor.dtype.itemsize
            start = tensor.data_ptr() + offset * size
            end = start + size * (numel if tensor.is_contiguous() else 1 + _last(tensor))
            yield Claim(str(tensor.device), start, end, tensor, offset, numel, one, name)


def _last(tensor: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def conflicts(held: Iterable[Claim]) -> Iterator[tuple[Claim, Claim]]:
    """Pairs of claims to the same entries that are not one weight of one owner."""
    open_claims: list[Claim] = []
    for claim in sorted(held, key=lambda claim: claim[:3]):
        open_claims = [one for one in open_claims if one.device == claim.device and one.end > claim.start]
        yield from ((one, claim) for one in open_claims if one.weight != claim.weight and _share_entries(one, claim))
        open_claims.append(claim)


def _share_entries(one: Claim, other: Claim) -> bool:
    """Of claims whose bytes overlap; columns of one matrix may lie between each other's."""
    if one.is_block and other.is_block:
        return True
    return bool(torch.isin(one.addresses(), other.addresses()).any())
