"""SideBranch: the sparse product of one layer, beside a weight that stays as it is."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shira_diffusers.adapters.delta import SparseDelta


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
        return SideBranch, (self._delta,)  # copies of a model: a CSR tensor cannot be copied

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook: the layer's output with the branch added, of its shape and dtype."""
        return self.add(layer, args[0], output)

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
        x = x.to(output.device)  # offloaded layers take inputs from elsewhere
        with torch.autocast(x.device.type, enabled=False):
            if len(self._delta.shape) == 4:
                weight = self._dense(x.device, output.dtype)
                product = layer._conv_forward(x.to(output.dtype), weight, None)  # type: ignore[operator]
            elif x.device.type == "cpu" and torch.backends.mkl.is_available():
                product = self._sparse_product(x)
            else:
                product = F.linear(x.to(output.dtype), self._dense(x.device, output.dtype))
            return torch.add(output, product, alpha=scale).to(output.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # no CSR in graphs
    def _sparse_product(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``, float32."""
        if self._csr is None:
            self._csr = _csr(self._delta)
        rows = x.reshape(-1, x.shape[-1]).float()
        return torch.sparse.mm(self._csr, rows.t()).t().unflatten(0, x.shape[:-1])

    def _dense(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        delta = self._delta
        if delta.values.device != device:
            self._delta = delta = SparseDelta(delta.indices.to(device), delta.values.to(device), delta.shape)
        return delta.to_dense().to(dtype)


def _csr(delta: SparseDelta) -> Tensor:
    """The delta as a float32 CSR matrix with int32 indices, on the CPU."""
    rows, columns = delta.shape
    indices = delta.indices.cpu().long()
    starts = torch.searchsorted(indices, torch.arange(rows + 1, device="cpu") * columns)
    parts = starts.int(), (indices % columns).int(), delta.values.cpu().float()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(*parts, (rows, columns), check_invariants=False, device="cpu")


def branch_of(layer: nn.Module, delta: SparseDelta) -> SideBranch:
    """The branch of a layer for the delta of its weight, as the layer stores it: ``(in, out)`` in GPT-2's Conv1D."""
    return SideBranch(_transposed(delta) if isinstance(layer, Conv1D) else delta)


def _transposed(delta: SparseDelta) -> SparseDelta:
    rows, columns = delta.shape
    indices, order = (delta.indices.long() % columns * rows + delta.indices.long() // columns).sort()
    return SparseDelta(indices, delta.values[order], (columns, rows))
