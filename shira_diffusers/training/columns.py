"""Masks of whole columns and a diagonal, as ``struct`` makes them: their gradient needs few of a layer's inputs.

Source: arXiv 2406.13175, section 3.1 (SHiRA-Struct).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST = 4  # at most one column in four: with more the dense gradient costs about as much


@dataclass(frozen=True, slots=True)
class Columns:
    """Where the entries of a mask lie in a weight of shape ``(out, in)``.

    Args:
        columns: int64 ``[k]``, the columns with entries beyond the diagonal.
        diagonal: entries ``(i, (i + shift) % in)`` for i below this may be in the mask; 0 for no diagonal.
        shift: see ``diagonal``.
        order: ``[nnz]``, each entry's place among the ``size`` products.
        size: how many products there are: ``out * k`` of the columns, row by row, and then those of the diagonal.
    """

    columns: Tensor
    diagonal: int
    shift: int
    order: Tensor
    size: int

    def few(self, width: int) -> bool:
        """Whether ``select`` gives at most half of ``width`` inputs."""
        return 2 * (self.columns.numel() + self.diagonal) <= width

    def select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the gradient needs of a layer's inputs ``(tokens, in)``: ``(tokens, k)`` and ``(tokens, diagonal)``."""
        chosen = x.index_select(1, self.columns)
        if self.shift + self.diagonal <= x.shape[1]:
            return chosen, x.narrow(1, self.shift, self.diagonal)
        return chosen, x.roll(-self.shift, 1).narrow(1, 0, self.diagonal)

    def products(self, outgoing: Tensor, selected: tuple[Tensor, Tensor], out: Tensor) -> None:
        """Write the weight's gradient in its columns and on its diagonal, without the dense one.

        Args:
            outgoing: gradient of the layer's outputs, ``(tokens, out)``.
            selected: what ``select`` gave.
            out: ``[size]`` of the same dtype; sums are rounded to it once, as in the dense gradient.
        """
        chosen, across = selected
        whole = self.size - self.diagonal
        if whole:
            torch.mm(outgoing.t(), chosen, out=out[:whole].view(-1, chosen.shape[1]))  # (out, k)
        if self.diagonal:
            out[whole:] = (outgoing.narrow(1, 0, self.diagonal).float() * across).sum(0)


def find_columns(indices: Tensor, shape: Sequence[int]) -> Columns | None:
    """See a mask's columns and diagonal; None if it is not made of them.

    Args:
        indices: int32 or int64 ``[nnz]``, sorted flat row-major indices.
        shape: ``(out, in)`` of the weight.
    """
    height, width = shape
    rows, places = indices.long() // width, indices.long() % width
    # a diagonal meets each column once at most, so more entries than one make a column
    columns = (torch.bincount(places, minlength=width) > 1).nonzero().flatten()
    if indices.numel() == 0 or columns.numel() * _MOST > width:
        return None
    number = torch.full((width,), -1, device=indices.device)
    number[columns] = torch.arange(columns.numel(), device=indices.device)
    order = rows * columns.numel() + number[places]
    alone = number[places] < 0
    shifts, diagonal = (places[alone] - rows[alone]) % width, 0
    if shifts.numel() > 0:
        diagonal = min(height, width)
        if bool((shifts != shifts[0]).any()) or int(rows[alone].max()) >= diagonal:
            return None
        order[alone] = height * columns.numel() + rows[alone]
    shift = int(shifts[0]) if diagonal else 0
    return Columns(columns, diagonal, shift, order.to(indices.dtype), height * columns.numel() + diagonal)
