"""Memory that what has left a model gives to what comes next."""

from collections.abc import Iterable

import torch
from torch import Tensor

_LONG = 2**17  # bytes from which on a CPU's memory is mapped and cleared page by page, anew each time
_KEPT = 2  # the saved and the written bits of one mix


class Spares:
    """Buffers in a CPU's memory that are free again; mapping fresh ones would cost up to half the time of a switch.

    GPUs need none: torch keeps their memory by itself. A copy or a pickle of this is empty. Not safe to use from
    several threads.
    """

    def __init__(self) -> None:
        self._free: list[torch.UntypedStorage] = []

    def __reduce__(self) -> tuple[type["Spares"], tuple[()]]:
        return Spares, ()

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(storage.nbytes() for storage in self._free)

    def take(self, count: int, like: Tensor) -> Tensor:
        """``[count]`` of any content, of the dtype and on the device of ``like``."""
        needed = count * like.dtype.itemsize
        if not like.is_cpu or needed < _LONG:
            return torch.empty(count, dtype=like.dtype, device=like.device)
        for k, storage in enumerate(self._free):
            if needed <= storage.nbytes() <= 2 * needed:
                del self._free[k]
                return torch.empty(0, dtype=like.dtype, device="cpu").set_(storage)[:count]
        room = count + count // 16  # the next mask may be a little larger
        return torch.empty(room, dtype=like.dtype, device="cpu")[:count]

    def keep(self, tensors: Iterable[Tensor], still_used: Iterable[Tensor] = ()) -> None:
        """Take back what nobody holds any more; those that are ``still_used`` are passed over."""
        used = {tensor.untyped_storage().data_ptr() for tensor in still_used}
        free = [t.untyped_storage() for t in tensors if t.is_cpu and t.nbytes >= _LONG]
        self._free = [*(own for own in free if own.data_ptr() not in used), *self._free][:_KEPT]

    def clear(self) -> None:
        """Give the memory back."""
        self._free = []
