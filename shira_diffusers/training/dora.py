"""SHiRA-DoRA: masked entries of a weight that is trained as directions and magnitudes, without a low rank.

Sources: DoRA, arXiv 2402.09353, section 4; its use with SHiRA masks, arXiv 2406.13175.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Identity:
    """SHiRA itself: the trained values, float32 ``(nnz,)``, are the deltas."""

    count = 0
    """Trained values beyond one per entry."""

    def deltas(self, trained: Tensor) -> Tensor:
        """Return ``trained``, ``(nnz,)``, as it is."""
        return trained

    def gradient(self, trained: Tensor, of_entries: Tensor) -> Tensor:
        """Return ``of_entries``, ``(nnz,)``, as it is."""
        return of_entries


class Dora:
    """Trained directions and magnitudes of many weights, of which only masked entries ever change.

    For a weight W, ``(out, ...)``, with trained values S at the masked entries (zero elsewhere) and a trained
    magnitude m for each of its ``out`` rows, the weight is ``m * (W + S) / ||W + S||`` at the masked entries and W at
    all others. The norm is that of a whole row, masked entries and others. m begins as ``||W||``, so the weight begins
    as W; what is trained is ``m - ||W||``, so that weight decay pulls magnitudes, too, to the base's. As in DoRA,
    section 4.3, the norm counts as a constant in backward.

    ``trained`` is float32 ``(nnz + rows,)``: S of all weights, then ``m - ||W||`` of all rows of all weights.

    Args:
        base: float32 ``(nnz,)``, the base's values at the masked entries of all weights.
        weights: the weights, as the base has them; not kept.
        indices: for each weight its masked entries, sorted flat row-major.
    """

    def __init__(self, base: Tensor, weights: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
        self._base = base
        pairs = list(zip(weights, indices, strict=True))
        self._lengths = torch.cat([_entries_in_rows(weight, own) for weight, own in pairs])  # (rows,)
        self._outside = torch.cat([_squares_outside(weight, own) for weight, own in pairs])  # (rows,)
        numbers = torch.arange(self._lengths.numel(), dtype=torch.int32, device=base.device)
        self._rows = numbers.repeat_interleave(self._lengths)  # (nnz,)
        self._magnitudes = self._norms(base)

    @property
    def count(self) -> int:
        """Magnitudes: one per row of each weight."""
        return self._lengths.numel()

    def deltas(self, trained: Tensor) -> Tensor:
        """Make deltas ``(nnz,)`` of ``trained``, float32 ``(nnz + rows,)``; exactly zero where all of that is zero."""
        directions, offsets = trained.split([self._base.numel(), self.count])
        ratios = self._ratios(self._norms(self._base + directions), offsets)
        return (ratios - 1) * self._base + ratios * directions

    def gradient(self, trained: Tensor, of_entries: Tensor) -> Tensor:
        """Make the gradient of ``trained``, ``(nnz + rows,)``, of that of the weights' entries, ``(nnz,)``."""
        directions, offsets = trained.split([self._base.numel(), self.count])
        moved = self._base + directions
        norms = self._norms(moved)
        of_magnitudes = self._sum_rows(of_entries * moved) / _nonzero(norms)
        return torch.cat([of_entries * self._ratios(norms, offsets), of_magnitudes])

    def _ratios(self, norms: Tensor, offsets: Tensor) -> Tensor:
        """``m / ||W + S||`` for each entry, ``(nnz,)``; 1 in rows of zeros."""
        ratios = torch.where(norms > 0, (self._magnitudes + offsets) / _nonzero(norms), 1.0)
        return ratios.index_select(0, self._rows)

    def _norms(self, entries: Tensor) -> Tensor:
        """Norms of the rows, ``(rows,)``, for values ``(nnz,)`` at the masked entries."""
        return (self._outside + self._sum_rows(entries.square())).sqrt()

    def _sum_rows(self, entries: Tensor) -> Tensor:
        """Sums over the masked entries of each row, ``(nnz,) -> (rows,)``, in the same order each time."""
        return torch.segment_reduce(entries, "sum", lengths=self._lengths, unsafe=True, initial=0)


def _nonzero(norms: Tensor) -> Tensor:
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


def _entries_in_rows(weight: Tensor, indices: Tensor) -> Tensor:
    """How many masked entries each row has, int64 ``(out,)``."""
    return torch.bincount(indices.long() // weight[0].numel(), minlength=weight.shape[0])


def _squares_outside(weight: Tensor, indices: Tensor) -> Tensor:
    """Sum of the squares of each row's other entries, float32 ``(out,)``."""
    squares = weight.detach().float().square().flatten()
    squares[indices.long()] = 0
    return squares.view(weight.shape[0], -1).sum(1)
