"""Inputs of layers, for their weights' gradients, from what autograd keeps anyway.

A frozen layer's inputs are not kept, a trained one's are: the results of layer norms and of gated activations, mostly.
Those are computed again from what their own backward keeps, bit for bit, so that they need no memory in between.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Rebuild = Callable[..., Tensor]

_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in every version of torch


@dataclass(slots=True)
class Source:
    """How an input is had again. Layers that share an input share its source, and compute it once.

    Args:
        dtype: that of the layers' outputs, in which they multiplied.
        rebuild: makes the input of the tensors that were kept.
        kept: whether it is the input itself, in ``dtype``, that was kept.
    """

    dtype: torch.dtype
    rebuild: Rebuild
    kept: bool
    users: int = 0
    _value: Tensor | None = field(default=None, repr=False)

    def value(self, tensors: Iterable[Tensor]) -> Tensor:
        """The input; each user calls once in a backward, and the last one frees what was computed."""
        if self.kept:
            return self.rebuild(*tensors)
        value = self.rebuild(*tensors).to(self.dtype) if self._value is None else self._value
        self.users -= 1
        self._value = value if self.users > 0 else None
        return value


@dataclass(slots=True)
class _Seen:
    """The input that was seen last, with what is to be kept of it."""

    x: "weakref.ref[Tensor]"
    source: Source
    tensors: tuple[Tensor, ...]


class ActivationRecompute:
    """Finds out how the inputs of layers were made."""

    def __init__(self) -> None:
        self._seen: _Seen | None = None
        self._normed: tuple[weakref.ref[Tensor], float] | None = None

    def watch(self, module: nn.Module) -> list[Any]:
        """Take note of what layer norms give, since autograd does not tell their epsilon.

        Returns:
            The handles of the hooks.
        """
        return [part.register_forward_hook(self._note) for part in module.modules() if type(part) is nn.LayerNorm]

    def find(self, x: Tensor, dtype: torch.dtype) -> tuple[Source, tuple[Tensor, ...]]:
        """How to have ``x`` in ``dtype`` again, and the detached tensors to keep for it until then."""
        seen = self._seen
        if seen is None or seen.x() is not x or seen.source.dtype != dtype:
            seen = self._seen = self._look(x, dtype)
        seen.source.users += 1
        return seen.source, seen.tensors

    def forget(self) -> None:
        """Keep nothing of the last input. Call it as soon as backward begins."""
        self._seen = self._normed = None

    def _note(self, norm: nn.LayerNorm, _: object, result: Tensor) -> None:
        if torch.is_grad_enabled():
            self._normed = weakref.ref(result), norm.eps

    def _look(self, x: Tensor, dtype: torch.dtype) -> _Seen:
        # under hooks (checkpoints, save_on_cpu) what autograd keeps must not be looked at, and is not kept for long
        made = None if x.grad_fn is None or _hooked() else self._made(x, x.grad_fn)
        if made is None:
            return _Seen(weakref.ref(x), Source(dtype, _itself, kept=True), (x.detach().to(dtype),))
        rebuild, tensors = made
        kept = tuple(tensor.detach() for tensor in tensors)
        return _Seen(weakref.ref(x), Source(dtype, rebuild, kept=False), kept)

    def _made(self, x: Tensor, node: Any) -> tuple[Rebuild, tuple[Tensor, ...]] | None:
        """A function and its tensors, which autograd keeps, that made ``x``; None if it is none of those known."""
        kind = node.name()
        if kind == "NativeLayerNormBackward0" and self._normed is not None and self._normed[0]() is x:
            own = (node._saved_input, node._saved_weight, node._saved_bias)
            rebuild = partial(_layer_norm, tuple(node._saved_normalized_shape), self._normed[1])
            return None if any(tensor is None for tensor in own) else (rebuild, own)
        if kind == "MulBackward0":
            factors = (node._saved_self, node._saved_other)
            return (torch.mul, factors) if all(f is not None and f.shape == x.shape for f in factors) else None
        if kind == "GeluBackward0":
            return partial(functional.gelu, approximate=node._saved_approximate), (node._saved_self,)
        return None


def _itself(x: Tensor) -> Tensor:
    return x


def _layer_norm(shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, shape, weight, bias, eps)


def _hooked() -> bool:
    """Whether what is saved now goes through hooks; where that cannot be told, it is taken to."""
    return _top_hooks is None or _top_hooks(True) is not None
