"""The masked gradients of one backward, gathered weight by weight and handed over when it ends."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shira_diffusers.weights.scatter import flat_view, physical

_engine: Any = torch.autograd.Variable._execution_engine  # FSDP and DDP end their backward in the same way
_running: Callable[[], int] = torch._C._current_graph_task_id


class GradientBuffer:
    """Collects the gradients of trained entries.

    Each weight has a slot in one buffer, to which its gradient is written at once, in the dtype in which it comes. At
    the end of the backward that brought them all slots are handed over, as one float32 tensor. What a backward brought
    before it failed is handed over too, when the next one begins, as autograd would leave it in any parameter.

    Args:
        sizes: of the slots.
        order: int32 or int64 ``[nnz]``, on the gradients' device: where in the buffer each entry's gradient is; None
            where the buffer is as the entries are.
        device: of the gradients.
        receive: gets float32 ``[nnz]``, zero where nothing arrived; the tensor is its own from then on.
    """

    def __init__(
        self, sizes: Sequence[int], order: Tensor | None, device: torch.device, receive: Callable[[Tensor], None]
    ) -> None:
        self._sizes, self._order, self._device, self._receive = list(sizes), order, device, receive
        self._buffers: dict[torch.dtype, tuple[Tensor, Sequence[Tensor]]] = {}
        self._filled = bytearray(len(sizes))
        self._backward = -1

    def slot(self, number: int, dtype: torch.dtype) -> Tensor:
        """Where the gradient of one weight is to be written, whole. Call it during a backward only."""
        backward = _running()
        # backward inside backward, as reentrant checkpointing has it, or a weight that is used twice
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
        """Take a weight's dense gradient at flat row-major ``indices``, ``[n]``; ``n`` is the slot's size."""
        # once a weight and step, on the thread that launches kernels: as few calls as can be
        if dense.requires_grad:
            dense = dense.detach()
        if dense.is_contiguous():
            torch.index_select(dense.view(-1), 0, indices, out=self.slot(number, dense.dtype))
        else:
            places = physical(indices, dense)
            torch.index_select(flat_view(dense), 0, places, out=self.slot(number, dense.dtype))

    def flush(self) -> None:
        """Hand over what has arrived. Twice is once."""
        arrived = [buffer for buffer, _ in self._buffers.values()]
        self._buffers.clear()
        self._filled = bytearray(len(self._sizes))
        self._backward = -1
        for buffer in arrived:
            self._receive((buffer if self._order is None else buffer.index_select(0, self._order)).float())
