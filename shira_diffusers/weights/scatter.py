"""Gather and overwrite single entries of a dense weight, whatever its strides, dtype and device."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# No index kernel exists for these: their bits are moved as bytes.
_BYTE_DTYPES = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}


def is_byte_dtype(dtype: torch.dtype) -> bool:
    """Whether a dtype is one of the 8-bit floats, which are moved bitwise."""
    return dtype in _BYTE_DTYPES


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(values: Tensor) -> Tensor:
    """A view as integers of the same size and shape (any shape): every device has kernels to compare and move them."""
    return values.view(_BITS[values.dtype.itemsize])


def bits_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integers that ``bits_of`` gives for a dtype."""
    return _BITS[dtype.itemsize]


def flat_view(weight: Tensor) -> Tensor:
    """A view ``(m,)`` of all of a weight's memory (any shape), in storage order; writes go to the weight itself."""
    if weight.is_contiguous():
        return weight.view(-1)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return weight.as_strided((extent,), (1,), weight.storage_offset())


def storage_indices(indices: Tensor, weight: Tensor) -> Tensor:
    """Map flat row-major positions to positions in ``flat_view``: the same, but for weights such as channels_last.

    Args:
        indices: int32 or int64 ``(nnz,)``, on any device.
        weight: the strided weight, of any shape.

    Returns:
        int64 ``(nnz,)`` on the weight's device.
    """
    left = indices.to(weight.device, torch.int64)
    if weight.is_contiguous():
        return left
    place = torch.zeros_like(left)
    for size, stride in zip(reversed(weight.shape), reversed(weight.stride()), strict=True):
        place += (left % size) * stride
        left = left // size
    return place


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """Copy entries, bit for bit.

    Args:
        weight: of any shape, dtype and device.
        indices: int32 or int64 ``(nnz,)``, flat row-major, in range.

    Returns:
        ``(nnz,)``, of the weight's dtype and device.
    """
    weight = weight.detach()
    flat = flat_view(weight)
    at = storage_indices(indices, weight)
    if is_byte_dtype(weight.dtype):
        return flat.view(torch.uint8).index_select(0, at).view(weight.dtype)
    return flat.index_select(0, at)


Write = Callable[[int, Tensor, Tensor], Tensor]


def writers_of(memories: Iterable[Tensor]) -> list[Write]:
    """What writes bits into each of some memories, as ``write(0, at, bits)``.

    Args:
        memories: integers, as ``bits_of`` gives them: ``(m,)``, or ``(m, run)`` for whole runs. On a CPU ``scatter_``
            writes integers three times as fast as ``index_copy_``, and float16 and bfloat16 many times slower.

    Returns:
        Methods of torch, so that no Python function is called per tile. They take the dimension 0, places (int64
        ``(n,)``, without duplicates) and bits (``(n,)`` or ``(n, run)``).
    """
    return [memory.scatter_ if memory.ndim == 1 else memory.index_copy_ for memory in memories]


def overwrite(weight: Tensor, indices: Tensor, values: Tensor, offset: int = 0) -> None:
    """Write ``values`` into a weight in place at flat row-major ``indices + offset``, bit for bit.

    Args:
        weight: a strided float tensor of any shape, normal or inference; its ``data_ptr`` stays.
        indices: int32 or int64 ``(nnz,)``, in range, without duplicates.
        values: ``(nnz,)``, of the weight's dtype.
        offset: added to each index, for a weight that is a row-major part of a larger one.

    Raises:
        TypeError: values of another dtype than the weight; nothing is written.
    """
    if values.dtype != weight.dtype:
        raise TypeError(f"cannot write {values.dtype} values into a {weight.dtype} weight bit for bit; cast them first")
    with torch.inference_mode():
        weight = weight.detach()
        flat = flat_view(weight)
        at = storage_indices(indices + offset if offset else indices, weight)
        values = values.to(weight.device)
        if is_byte_dtype(weight.dtype):
            flat, values = flat.view(torch.uint8), values.view(torch.uint8)
        flat.index_copy_(0, at, values)


def cast(values: Tensor, like: Tensor) -> Tensor:
    """Values (any shape) in the dtype and on the device of a weight; the same tensor if they are so already."""
    if values.dtype == like.dtype and values.device == like.device:
        return values
    return values.to(like.device, like.dtype)


def is_dense(weight: Tensor) -> bool:
    """Whether no two entries of a strided weight (any shape) share memory; those of an expanded tensor do."""
    steps = sorted((stride, size) for size, stride in zip(weight.shape, weight.stride(), strict=True) if size > 1)
    reach = 1
    for stride, size in steps:
        if stride < reach:
            return False
        reach = stride * (size - 1) + reach
    return math.prod(weight.shape) > 0
