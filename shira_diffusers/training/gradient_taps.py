"""Taps: the masked gradient of a Linear's weight from the gradient of its outputs, with the weight itself frozen.

Autograd then keeps no inputs for the weight and computes no gradient of it; the layer's outputs stay the same. Masks of
whole columns and a diagonal (``struct``, arXiv 2406.13175, section 3.1) need only a few of the layer's inputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shira_diffusers.training.gradient_buffer import GradientBuffer
from shira_diffusers.training.recompute import ActivationRecompute, Source

_MOST = 4  # at most one column in four: with more the dense gradient costs about as much (measured)


@dataclass(frozen=True, slots=True)
class Columns:
    """Where the entries of a mask lie in a weight of shape ``(out, in)``.

    Args:
        columns: int64 ``(k,)``, the columns with entries beyond the diagonal.
        diagonal: entries ``(i, (i + shift) % in)`` for i below this may be in the mask; 0 for no diagonal.
        shift: see ``diagonal``.
        order: int32 or int64 ``(nnz,)``, each entry's position among the products.
        size: number of products: ``out * k`` of the columns, row by row, then those of the diagonal.
    """

    columns: Tensor
    diagonal: int
    shift: int
    order: Tensor
    size: int

    def few(self, width: int) -> bool:
        """Whether ``select`` gives at most half of ``width`` inputs; above that a copy saves too little memory."""
        return 2 * (self.columns.numel() + self.diagonal) <= width

    def select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Select what the gradient needs of inputs ``(tokens, in)``: ``(tokens, k)`` and ``(tokens, diagonal)``."""
        chosen = x.index_select(1, self.columns)
        if self.shift + self.diagonal <= x.shape[1]:
            return chosen, x.narrow(1, self.shift, self.diagonal)
        return chosen, x.roll(-self.shift, 1).narrow(1, 0, self.diagonal)

    def products(self, outgoing: Tensor, selected: tuple[Tensor, Tensor], out: Tensor) -> None:
        """Write the weight's gradient in its columns and on its diagonal, without the dense one.

        Args:
            outgoing: gradient of the layer's outputs, ``(tokens, out)``.
            selected: from ``select``, ``(tokens, k)`` and ``(tokens, diagonal)``.
            out: ``(size,)`` of the same dtype; sums are rounded to it once, as in the dense gradient.
        """
        chosen, across = selected
        whole = self.size - self.diagonal
        if whole:
            torch.mm(outgoing.t(), chosen, out=out[:whole].view(-1, chosen.shape[1]))  # (out, k)
        if self.diagonal:
            out[whole:] = (outgoing.narrow(1, 0, self.diagonal).float() * across).sum(0)


def find_columns(indices: Tensor, shape: Sequence[int]) -> Columns | None:
    """Find a mask's columns and diagonal; None if it is not made of them.

    Args:
        indices: int32 or int64 ``(nnz,)``, sorted flat row-major indices.
        shape: ``(out, in)`` of the weight.
    """
    height, width = shape
    rows, places = indices.long() // width, indices.long() % width
    # a diagonal crosses each column at most once, so two entries make a column
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


@dataclass(frozen=True, slots=True)
class Tap:
    """Takes the gradient of one weight ``(out, in)``.

    Args:
        buffer: receives it, in slot ``number``.
        inputs: shared by all taps of a model.
        indices: the mask, flat row-major ``(nnz,)``.
        columns: the mask's columns; None gathers the mask from the dense gradient.
    """

    buffer: GradientBuffer
    inputs: ActivationRecompute
    number: int
    indices: Tensor
    columns: Columns | None

    def hook(self, layer: nn.Linear, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor | None:
        """Watch the outputs ``y``, ``(..., out)``: a forward hook of the layer, with keyword arguments."""
        if not torch.is_grad_enabled():
            return None
        source, tensors = self._keep(args[0] if args else kwargs["input"], y.dtype)
        # makes autograd call backward here even if the layer's inputs need no gradient, as those of text
        anchor = None if y.requires_grad else y.new_empty(0, requires_grad=True)
        return _Tapped.apply(y, anchor, self, source, tensors)

    def _keep(self, x: Tensor, dtype: torch.dtype) -> tuple[Source | None, tuple[Tensor, ...]]:
        """Choose what to keep of a layer's inputs: what they are made of or, if that is less, what the columns need."""
        source, tensors = self.inputs.find(x, dtype)
        if self.columns is None or not source.kept or not self.columns.few(x.shape[-1]):
            return source, tensors
        chosen, across = self.columns.select(_rows(*tensors))
        return None, (chosen, across.contiguous())

    def take(self, outgoing: Tensor, source: Source | None, tensors: tuple[Tensor, ...]) -> None:
        """Write the weight's masked gradient into the buffer.

        Args:
            outgoing: gradient of the outputs, ``(..., out)``.
            source, tensors: from ``ActivationRecompute.find``, any shape; or None and what the columns need.
        """
        self.inputs.forget()
        outgoing = _rows(outgoing)
        if self.columns is None:
            assert source is not None
            self.buffer.take(self.number, outgoing.t().mm(_rows(source.value(tensors))), self.indices)
            return
        chosen, across = tensors if source is None else self.columns.select(_rows(source.value(tensors)))
        self.columns.products(outgoing, (chosen, across), self.buffer.slot(self.number, outgoing.dtype))


class _Tapped(torch.autograd.Function):
    """Identity; on the way back it shows the gradient to the tap."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, anchor: Tensor | None, tap: Tap, source: Source | None, tensors: tuple[Tensor, ...]
    ) -> Tensor:
        ctx.tap, ctx.source = tap, source
        ctx.save_for_backward(*tensors)
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outgoing: Tensor) -> tuple[Tensor | None, ...]:
        ctx.tap.take(outgoing, ctx.source, ctx.saved_tensors)
        return outgoing if ctx.needs_input_grad[0] else None, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    """``(..., n) -> (tokens, n)``."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def tappable(modules: Iterable[nn.Module]) -> dict[int, nn.Linear]:
    """Find the layers whose weight's only use is the layer's own forward, by the weight's ``id``.

    Subclasses of ``nn.Linear`` may use the weight in another way, and compiled modules would run the tap's Python in
    each of their calls.
    """
    holders: dict[int, list[nn.Module]] = {}
    for module in modules:
        if any(getattr(part, "_compiled_call_impl", None) for part in module.modules()):
            continue
        for part in module.modules():
            for parameter in part.parameters(recurse=False):
                holders.setdefault(id(parameter), []).append(part)
    return {key: own[0] for key, own in holders.items() if len(own) == 1 and type(own[0]) is nn.Linear}


def narrows(layer: nn.Linear) -> bool:
    """Whether a layer has at least four inputs per output, as a feed-forward's second, so that a tap pays off.

    Its inputs are most of what a transformer's layers keep, and a product of two tensors that autograd keeps anyway:
    a step of SDXL at batch 1 on an H100 peaked at 13.2 GB with taps there, at 14.0 without, in the same time.
    """
    return layer.in_features >= 4 * layer.out_features
