"""The masked gradients of one backward, gathered weight by weight and handed over when it ends."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shira_diffusers.scatter import flat_view, physical

_engine: Any = torch.autograd.Variable._execution_engine  # FSDP and DDP end their backward in the same way


class Arrivals:
    """Collects the gradients of trained entries.

    A part is written once, in the dtype in which it comes, straight to its place; at the end of the backward that
    brought them all parts are handed over, as one float32 tensor. What a backward brought before it failed is handed
    over too, when the next one begins, as autograd would leave it in any parameter.

    Args:
        count: of all entries.
        device: of the gradients.
        receive: gets float32 ``[count]``, zero where nothing arrived; the tensor is its own from then on.
    """

    def __init__(self, count: int, device: torch.device, receive: Callable[[Tensor], None]) -> None:
        self._count, self._device, self._receive = count, device, receive
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
            buffer = self._buffers[dtype] = torch.zeros(self._count, dtype=dtype, device=self._device)
        return buffer[start:end]

    @torch.no_grad()
    def take(self, dense: Tensor, indices: Tensor, start: int) -> None:
        """Take a weight's dense gradient at flat row-major ``indices``, ``[n]``, for the entries from ``start`` on."""
        at = indices if dense.is_contiguous() else physical(indices, dense)
        out = self.part(dense.dtype, start, start + indices.numel())
        torch.index_select(flat_view(dense.detach()), 0, at, out=out)

    @torch.no_grad()
    def flush(self) -> None:
        """Hand over what has arrived. Twice is once."""
        arrived = list(self._buffers.values())
        self._buffers.clear()
        self._filled.clear()
        self._backward = -1
        for gradient in arrived:
            self._receive(gradient.float())
