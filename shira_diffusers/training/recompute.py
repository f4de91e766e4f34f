"""Recompute layers' inputs, for their weights' gradients, from what autograd keeps anyway.

Autograd keeps a trained layer's inputs, mostly results of layer norms and gated activations. Recomputing those, bit for
bit, from what their own backward keeps saves that memory.
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
    """How to recompute an input. Layers that share an input share its source, and compute it once.

    Args:
        dtype: of the layers' outputs, in which they multiplied.
        rebuild: makes the input from the kept tensors.
        kept: the input itself, in ``dtype``, was kept.
    """

    dtype: torch.dtype
    rebuild: Rebuild
    kept: bool
    users: int = 0
    _value: Tensor | None = field(default=None, repr=False)

    def value(self, tensors: Iterable[Tensor]) -> Tensor:
        """Make the input from the kept ``tensors``, any shape; called once per user, the last frees the result."""
        if self.kept:
            return self.rebuild(*tensors)
        value = self.rebuild(*tensors).to(self.dtype) if self._value is None else self._value
        self.users -= 1
        self._value = value if self.users > 0 else None
        return value


@dataclass(slots=True)
class _Seen:
    """The last input, with what to keep of it."""

    x: "weakref.ref[Tensor]"
    source: Source
    tensors: tuple[Tensor, ...]


class ActivationRecompute:
    """Finds out how the inputs of layers were computed."""

    def __init__(self) -> None:
        self._seen: _Seen | None = None
        self._normed: tuple[weakref.ref[Tensor], float] | None = None

    def watch(self, module: nn.Module) -> list[Any]:
        """Remember the results of layer norms, as autograd does not expose their epsilon; return the hooks' handles."""
        return [part.register_forward_hook(self._note) for part in module.modules() if type(part) is nn.LayerNorm]

    def find(self, x: Tensor, dtype: torch.dtype) -> tuple[Source, tuple[Tensor, ...]]:
        """Return how to recompute ``x``, ``(..., in)``, in ``dtype``, and the detached tensors to keep until then."""
        seen = self._seen
        if seen is None or seen.x() is not x or seen.source.dtype != dtype:
            seen = self._seen = self._look(x, dtype)
        seen.source.users += 1
        return seen.source, seen.tensors

    def forget(self) -> None:
        """Drop the last input. Call it as soon as backward begins."""
        self._seen = self._normed = None

    def _note(self, norm: nn.LayerNorm, _: object, result: Tensor) -> None:
        if torch.is_grad_enabled():
            self._normed = weakref.ref(result), norm.eps

    def _look(self, x: Tensor, dtype: torch.dtype) -> _Seen:
        # under hooks (checkpoints, save_on_cpu) saved tensors must not be unpacked, and do not live long
        made = None if x.grad_fn is None or _hooked() else self._made(x, x.grad_fn)
        if made is None:
            return _Seen(weakref.ref(x), Source(dtype, _itself, kept=True), (x.detach().to(dtype),))
        rebuild, tensors = made
        kept = tuple(tensor.detach() for tensor in tensors)
        return _Seen(weakref.ref(x), Source(dtype, rebuild, kept=False), kept)

    def _made(self, x: Tensor, node: Any) -> tuple[Rebuild, tuple[Tensor, ...]] | None:
        """Return the known function that computed ``x`` and its arguments, which autograd keeps; else None."""
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
    """Whether what is saved now goes through hooks; assumed where torch does not say."""
    return _top_hooks is None or _top_hooks(True) is not None
