"""SideBranch: the sparse product of one layer, beside a weight that stays as it is."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.delta import SparseDelta
from shira_diffusers.errors import AdapterMismatchError, counted, listing
from shira_diffusers.weights.finder import WeightMap
from shira_diffusers.weights.targets import weight_shape


class SideBranch:
    """Adds ``scale * x S^T`` to the output of a layer; as a forward hook of the layer, at scale 1.

    Computed on CPU as a float32 CSR product (measured at 2 % density: a third of a dense product in float32, a
    tenth in half precision; an ``index_add_`` of gathered columns is slower than both), elsewhere and for
    convolutions as a product with ``S`` scattered into a dense temporary of the output's dtype. The sum with the
    layer's output is rounded once. Gradients reach ``x``.

    Args:
        delta: of the layer's weight, ``(out, in)`` or ``(out, in, kh, kw)``; follows ``x`` from device to device.
    """

    def __init__(self, delta: SparseDelta) -> None:
        self._delta = delta
        self._csr: Tensor | None = None

    def __reduce__(self) -> tuple[type["SideBranch"], tuple[SparseDelta]]:
        return type(self), (self._delta,)  # copies of a model: a CSR tensor cannot be copied

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Forward hook, with keyword arguments: the layer's ``output`` with the branch added, ``(..., out)``."""
        return self.add(layer, input_of(args, kwargs), output)

    def add(self, layer: nn.Module, x: Tensor, output: Tensor, scale: float = 1.0) -> Tensor:
        """``output + scale * x S^T``, of the output's shape and dtype.

        Args:
            layer: a Linear, or a Conv2d, whose stride and padding are used.
            x: the layer's input, floating point, ``(..., in)`` or ``(n, in, h, w)``.
            output: what the layer made of it, ``(..., out)`` or ``(n, out, h, w)``.
            scale: at 0 the output itself is returned.
        """
        if scale == 0:
            return output
        with torch.autocast(output.device.type, enabled=False):
            return torch.add(output, self._product(layer, x, output), alpha=scale).to(output.dtype)

    def add_to(self, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        """Add ``x S^T`` in place to some rows of a layer's output, for as many rows of its input.

        Args:
            layer: as for ``add``.
            x: a view of the input, floating point, ``(copies, rows, ..., in)`` or ``(copies, rows, in, h, w)``.
            output: a view of the output, ``(copies, rows, ..., out)`` or ``(copies, rows, out, h, w)``.
        """
        with torch.autocast(output.device.type, enabled=False):
            if len(self._delta.shape) == 4 or _has_sparse_kernel(output):
                output += self._product(layer, x, output)
                return
            weight = self._dense(output).t().expand(len(x), -1, -1)  # (copies, in, out)
            rows = x.to(output).reshape(len(x), -1, x.shape[-1])
            output.view(len(x), -1, output.shape[-1]).baddbmm_(rows, weight)  # one kernel: no product, no sum

    def _product(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """``x S^T`` on the output's device (offloaded layers take inputs from elsewhere)."""
        if len(self._delta.shape) == 4:
            pictures = x.to(output).reshape(-1, *x.shape[-3:])
            product: Tensor = layer._conv_forward(pictures, self._dense(output), None)  # type: ignore[operator]
            return product.view(*x.shape[:-3], *product.shape[1:])
        if _has_sparse_kernel(output):
            return self._sparse_product(x.to(output.device))
        return F.linear(x.to(output), self._dense(output))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # no CSR in graphs
    def _sparse_product(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``, float32."""
        if self._csr is None:
            self._csr = _csr(self._delta)
        rows = x.reshape(-1, x.shape[-1]).float()
        return torch.sparse.mm(self._csr, rows.t()).t().unflatten(0, x.shape[:-1])

    def _dense(self, like: Tensor) -> Tensor:
        delta = self._delta
        if delta.values.device != like.device:
            indices, values = delta.indices.to(like.device), delta.values.to(like.device)
            self._delta = delta = SparseDelta.unchecked(indices, values, delta.shape)
        flat = torch.zeros(delta.numel, dtype=like.dtype, device=like.device)
        return flat.index_add_(0, delta.indices, delta.values.to(like.dtype)).view(delta.shape)


def _has_sparse_kernel(like: Tensor) -> bool:
    return like.device.type == "cpu" and torch.backends.mkl.is_available()


def _csr(delta: SparseDelta) -> Tensor:
    """The delta as a float32 CSR matrix with int32 indices, on the CPU."""
    rows, columns = delta.shape
    indices = delta.indices.cpu().long()
    starts = torch.searchsorted(indices, torch.arange(rows + 1, device="cpu") * columns)
    parts = starts.int(), (indices % columns).int(), delta.values.cpu().float()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(*parts, (rows, columns), check_invariants=False, device="cpu")


class ResidentBranch(SideBranch):
    """One of the active mix, beside a quantized weight."""


def hooks_of(root: nn.Module, kind: type[SideBranch]) -> list[tuple[nn.Module, SideBranch]]:
    """The branches of one kind that are forward hooks of a module's layers."""
    hooks = ((module, hook) for module in root.modules() for hook in module._forward_hooks.values())
    return [(module, hook) for module, hook in hooks if type(hook) is kind]


def replace_hooks(root: nn.Module, kind: type[SideBranch], branches: Iterable[tuple[nn.Module, SideBranch]]) -> None:
    """Give layers of a module these branches, replacing all of one kind."""
    for module, branch in hooks_of(root, kind):
        key = next(key for key, hook in module._forward_hooks.items() if hook is branch)
        del module._forward_hooks[key], module._forward_hooks_with_kwargs[key]
    for layer, branch in branches:
        layer.register_forward_hook(branch, with_kwargs=True)


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer is called with: AnimateDiff passes ``input=``."""
    return args[0] if args else kwargs["input"]


def branch_of(layer: nn.Module, delta: SparseDelta, kind: type[SideBranch] = SideBranch) -> SideBranch:
    """The branch of a layer for the delta of its weight, as the layer stores it: ``(in, out)`` in GPT-2's Conv1D."""
    return kind(_transposed(delta) if isinstance(layer, Conv1D) else delta)


def branches_of(
    weights: WeightMap, adapter: ShiraAdapter, kind: type[SideBranch] = SideBranch
) -> list[tuple[nn.Module, SideBranch]]:
    """A branch for each layer that computes with an adapted weight: those of fused projections and tied weights too.

    Raises:
        AdapterMismatchError: parameters that are no weights of Linear, Conv2d or Conv1D layers; all are named.
    """
    places = weights.layers(adapter.deltas)
    wrong = [
        f"{name} of {type(layer).__name__}"
        for name, layers in places.items()
        for layer, _ in layers
        if weight_shape(layer) is None or not name.endswith(".weight")
    ]
    if wrong:
        raise AdapterMismatchError(
            f"{counted(len(wrong), 'parameter', of=len(places))} of the adapter cannot run beside the base, "
            f"expected weights of Linear, Conv2d and Conv1D layers only; use pipe.set_shira for it:{listing(wrong)}"
        )
    return [
        (layer, branch_of(layer, _shifted(adapter.deltas[name], row, layer), kind))
        for name, layers in places.items()
        for layer, row in layers
    ]


def _shifted(delta: SparseDelta, row: int, layer: nn.Module) -> SparseDelta:
    """The delta of a projection as one of the layer that it is fused into, where it begins at a row."""
    shape = weight_shape(layer)
    if shape is None or shape == delta.shape:
        return delta
    return SparseDelta(delta.indices.long() + row * delta.shape[1], delta.values, shape)


def _transposed(delta: SparseDelta) -> SparseDelta:
    rows, columns = delta.shape
    indices, order = (delta.indices.long() % columns * rows + delta.indices.long() // columns).sort()
    return SparseDelta(indices, delta.values[order], (columns, rows))
