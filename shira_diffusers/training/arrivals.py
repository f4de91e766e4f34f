"""The masked gradients of one backward, gathered weight by weight and added to the flat parameter when it ends."""

from typing import Any

import torch
from torch import Tensor, nn

from shira_diffusers.scatter import flat_view, physical

_engine: Any = torch.autograd.Variable._execution_engine  # FSDP and DDP end their backward in the same way


class Arrivals:
    """Collects gradients for one flat parameter.

    A part is written once, in the dtype in which it comes, straight to its place; all parts become float32 and are
    added to ``flat.grad`` by one kernel at the end of the backward that brought them. What a backward brought before
    it failed is added too, when the next one begins, as autograd does for any parameter.

    Args:
        flat: float32 ``[n]``, all trained values.
    """

    def __init__(self, flat: nn.Parameter) -> None:
        self._flat = flat
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._filled: set[int] = set()
        self._backward = -1

    @torch.no_grad()
    def part(self, dtype: torch.dtype, start: int, end: int) -> Tensor:
        """Where a gradient of ``[end - start]`` entries is to be written, whole. Call it during a backward only."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward or start in self._filled:  # reentrant checkpointing: backward inside backward
            self.flush()
            self._backward = backward
            _engine.queue_callback(self.flush)
        self._filled.add(start)
        buffer = self._buffers.get(dtype)
        if buffer is None:
            buffer = self._buffers[dtype] = torch.zeros_like(self._flat, dtype=dtype)
        return buffer[start:end]

    @torch.no_grad()
    def take(self, dense: Tensor, indices: Tensor, start: int) -> None:
        """Take a weight's dense gradient at flat row-major ``indices``, ``[n]``, for the entries from ``start`` on."""
        at = indices if dense.is_contiguous() else physical(indices, dense)
        out = self.part(dense.dtype, start, start + indices.numel())
        torch.index_select(flat_view(dense.detach()), 0, at, out=out)

    @torch.no_grad()
    def flush(self) -> None:
        """Add what has arrived to ``flat.grad``. Twice is once."""
        for buffer in self._buffers.values():
            if self._flat.grad is None:
                self._flat.grad = buffer.to(self._flat.dtype)
            else:
                self._flat.grad += buffer
        self._buffers.clear()
        self._filled.clear()
        self._backward = -1
