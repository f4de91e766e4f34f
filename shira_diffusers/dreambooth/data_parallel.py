"""Data parallelism: each process computes a share of every batch, and the processes exchange the sparse gradient."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Share:
    """Which examples of a batch a process computes: numbers ``start`` to ``end`` (excluded) of ``total``.

    Args:
        weight: of the share's mean loss; the weighted losses of all processes add up to the loss of the batch.
        total: None where the share is the batch.
    """

    start: int = 0
    end: int | None = None
    total: int | None = None
    weight: float = 1.0

    def whole(self, count: int, groups: int) -> int:
        """Count the rows of the whole batch if this share has ``count``, both in ``groups`` groups."""
        return count if self.total is None else self.total * groups

    def of(self, rows: Tensor, groups: int) -> Tensor:
        """Select this share of the whole batch's ``rows``, ``(groups * total, ...)``."""
        if self.total is None:
            return rows
        return rows.unflatten(0, (groups, self.total))[:, self.start : self.end].flatten(0, 1)


WHOLE = Share()


def share_of(total: int, size: int, process: int, processes: int) -> Share:
    """Return one process's share of a batch of ``total`` examples, at most ``size`` for each process.

    A process that is left without examples, as the last batch of a pass may be small, computes the batch's first one
    with weight 0: it has to take part in the exchange.
    """
    if processes == 1:
        return WHOLE
    start, end = process * size, min((process + 1) * size, total)
    if start >= total:
        return Share(0, 1, total, weight=0.0)
    return Share(start, end, total, weight=(end - start) / total)


class Parts(Sampler[list[T]]):
    """One process's shares of batches, as a batch sampler.

    Args:
        batches: the whole ones, each a list of at most ``size`` examples for each process.
    """

    def __init__(self, batches: Iterable[Sequence[T]], size: int, process: int, processes: int) -> None:
        self._batches, self._size = batches, size
        self._process, self._processes = process, processes

    def __iter__(self) -> Iterator[list[T]]:
        for batch in self._batches:
            share = share_of(len(batch), self._size, self._process, self._processes)
            yield list(batch[share.start : share.end])


def add_up(deltas: nn.Parameter, figures: Tensor) -> None:
    """Sum the gradients and the figures over all processes, in place; each then has the same bits.

    Args:
        deltas: their gradient is summed, float32 ``(nnz,)``.
        figures: float32 ``(2,)``: the weighted loss, and 1 from each process that was asked to stop, as all stop after
            the same step. With the gradient this is all that a step exchanges.
    """
    if deltas.grad is None:
        deltas.grad = torch.zeros_like(deltas)
    torch.distributed.all_reduce(deltas.grad)
    torch.distributed.all_reduce(figures)
