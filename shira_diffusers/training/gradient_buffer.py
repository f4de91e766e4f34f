"""A buffer for the masked gradients of one backward: filled weight by weight, handed over when it ends."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shira_diffusers.weights.scatter import flat_view, storage_indices

_engine: Any = torch.autograd.Variable._execution_engine  # FSDP and DDP end their backward in the same way
_running: Callable[[], int] = torch._C._current_graph_task_id


class GradientBuffer:
    """Collects the gradients of trained entries.

    Each weight has a slot in one buffer, to which its gradient is written at once, in its own dtype. When the backward
    ends, all slots are handed over as one float32 tensor. What a failed backward left is handed over when the next one
    begins, as autograd would leave it in any parameter.

    Args:
        sizes: entries per slot.
        order: int32 or int64 ``(nnz,)`` on ``device``, each entry's position in the buffer; None if they are in order.
        device: of the gradients.
        receive: takes float32 ``(nnz,)``, zero where nothing arrived, and owns it from then on.
    """

    def __init__(
        self, sizes: Sequence[int], order: Tensor | None, device: torch.device, receive: Callable[[Tensor], None]
    ) -> None:
        self._sizes, self._order, self._device, self._receive = list(sizes), order, device, receive
        self._buffers: dict[torch.dtype, tuple[Tensor, Sequence[Tensor]]] = {}
        self._filled = bytearray(len(sizes))
        self._backward = -1

    def slot(self, number: int, dtype: torch.dtype) -> Tensor:
        """Return the slot of one weight, to be overwritten whole. Call it during a backward only."""
        backward = _running()
        # a nested backward, as in reentrant checkpointing, or a weight that is used twice
        if backward != self._backward or self._filled[number]:
            self.flush()
            self._backward = backward
            _engine.queue_callback(self.flush)
        self._filled[number] = 1
        held = self._buffers.get(dtype)
        if held is None:
            buffer = torch.zeros(sum(self._sizes), dtype=dtype, device=self._device)
            held = self._buffers[dtype] = buffer, buffer.split(self._sizes)
        return held[1][number]

    def take(self, number: int, dense: Tensor, indices: Tensor) -> None:
        """Gather ``dense``, ``(out, ...)``, at flat row-major ``indices``, ``(n,)``; ``n`` is the slot's size."""
        # runs per weight and step on the thread that launches kernels: few calls
        if dense.requires_grad:
            dense = dense.detach()
        if dense.is_contiguous():
            torch.index_select(dense.view(-1), 0, indices, out=self.slot(number, dense.dtype))
        else:
            places = storage_indices(indices, dense)
            torch.index_select(flat_view(dense), 0, places, out=self.slot(number, dense.dtype))

    def flush(self) -> None:
        """Hand over what has arrived. Idempotent."""
        arrived = [buffer for buffer, _ in self._buffers.values()]
        self._buffers.clear()
        self._filled = bytearray(len(self._sizes))
        self._backward = -1
        for buffer in arrived:
            self._receive((buffer if self._order is None else buffer.index_select(0, self._order)).float())
