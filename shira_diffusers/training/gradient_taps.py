"""Taps: take the masked gradient of a Linear's weight from its outputs' gradient, with the weight itself frozen.

Autograd then keeps no inputs for the weight and makes no gradient of it; the layer computes what it always does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shira_diffusers.training.columns import Columns
from shira_diffusers.training.gradient_buffer import Arrivals
from shira_diffusers.training.recompute import Inputs, Source


@dataclass(frozen=True, slots=True)
class Tap:
    """Takes the gradient of one weight ``(out, in)``.

    Args:
        arrivals: where it goes to, to slot ``number``.
        inputs: shared by all taps of a model.
        indices: the mask, flat row-major ``[nnz]``.
        columns: how the mask is made, or None: then its gradient is taken from the dense one.
    """

    arrivals: Arrivals
    inputs: Inputs
    number: int
    indices: Tensor
    columns: Columns | None

    def hook(self, layer: nn.Linear, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor | None:
        """A forward hook, with keyword arguments, of the layer."""
        if not torch.is_grad_enabled():
            return None
        source, tensors = self._keep(args[0] if args else kwargs["input"], y.dtype)
        # where the layer's inputs need no gradient, as a text's do, this makes autograd come here all the same
        anchor = None if y.requires_grad else y.new_empty(0, requires_grad=True)
        tapped: Tensor = _Tapped.apply(y, anchor, self, source, tensors)
        return tapped

    def _keep(self, x: Tensor, dtype: torch.dtype) -> tuple[Source | None, tuple[Tensor, ...]]:
        """What to keep of a layer's inputs: what they are made of or, where that is less, what the columns need."""
        source, tensors = self.inputs.find(x, dtype)
        if self.columns is None or not source.kept or not self.columns.few(x.shape[-1]):
            return source, tensors
        chosen, across = self.columns.select(_rows(*tensors))
        return None, (chosen, across.contiguous())

    def take(self, outgoing: Tensor, source: Source | None, tensors: tuple[Tensor, ...]) -> None:
        """Take the gradient that the outputs' gradient, ``(..., out)``, gives the weight."""
        self.inputs.forget()
        outgoing = _rows(outgoing)
        if self.columns is None:
            assert source is not None
            self.arrivals.take(self.number, outgoing.t().mm(_rows(source.value(tensors))), self.indices)
            return
        chosen, across = tensors if source is None else self.columns.select(_rows(source.value(tensors)))
        self.columns.products(outgoing, (chosen, across), self.arrivals.slot(self.number, outgoing.dtype))


class _Tapped(torch.autograd.Function):
    """The layer's outputs as they are; on the way back their gradient, as it is, is shown to the tap."""

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
    """The layers whose weight's only use is the layer's own forward, by the weight's ``id``.

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
    """Whether a layer takes in four times what it gives, as a feed-forward's second does, so that a tap pays off.

    Its inputs are most of what a transformer's layers keep, and a product of two tensors that autograd keeps anyway.
    """
    return layer.in_features >= 4 * layer.out_features
