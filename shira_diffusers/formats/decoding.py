"""From coded parameters to deltas on a CPU: groups of parameters in one pass each, over several threads.

What is intact is decoded fast; a group that is not is decoded again one by one, the strict way, which says what is
wrong.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shira_diffusers.adapters.delta import VALUE_DTYPES, SparseDelta, index_dtype
from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.gap_codec import GAP_DTYPES, decode_gaps, decode_many

_GROUP = 2**18  # coded elements: what a pass reads and writes stays in a core's cache
_THREADED = 2**20  # entries from which on threads are worth starting
_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}


class Coded(NamedTuple):
    """One parameter as a file holds it: gaps ``[m]``, values ``[nnz]`` and the dense weight's shape."""

    gaps: Tensor
    values: Tensor
    shape: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether it can be decoded in a group: of the right dtypes and dimensions, not empty, indices in int32."""
        return (
            (self.gaps.ndim, self.values.ndim) == (1, 1)
            and self.gaps.dtype in GAP_DTYPES
            and self.values.dtype in VALUE_DTYPES
            and self.gaps.is_cpu
            and self.values.is_cpu
            and self.values.layout == torch.strided
            and 0 < self.values.numel() <= self.gaps.numel()
            and index_dtype(math.prod(self.shape)) == torch.int32
        )


Decoded = dict[str, SparseDelta | AdapterFormatError]


def decode_parts(parts: Mapping[str, Coded], *, copy: bool = False) -> Decoded:
    """Decode parameters: each a delta on the CPU, or the error that says what is wrong with it.

    Args:
        parts: by name. Values are kept as they are, not copied, unless ``copy``.
        copy: copy the values, so that the deltas hold nothing of what they were read from.

    Uses as many threads as torch does. Indices, and copied values of one dtype, are end to end in one piece of memory.
    """
    plain = {name: part for name, part in parts.items() if part.plain}
    decoded: Decoded = {name: strictly(part, copy) for name, part in parts.items() if name not in plain}
    indices = _allocate(plain, torch.int32)
    values = {name: part.values.detach() for name, part in plain.items()}
    for dtype in VALUE_DTYPES if copy else ():
        values |= _allocate({name: part for name, part in plain.items() if part.values.dtype == dtype}, dtype)

    def decode(names: Sequence[str]) -> Decoded:
        group = {name: plain[name] for name in names}
        return _decode_group(group, [indices[name] for name in names], [values[name] for name in names], copy)

    kinds = {name: (part.gaps.dtype, part.values.dtype, part.gaps.numel()) for name, part in plain.items()}
    groups = list(group_names(kinds, _GROUP))
    threads = min(torch.get_num_threads(), len(groups))
    if threads < 2 or sum(part.values.numel() for part in plain.values()) < _THREADED:
        results = [decode(group) for group in groups]
    else:
        with ThreadPoolExecutor(threads, "shira-decode") as pool:
            results = list(pool.map(decode, groups))
    for result in results:
        decoded.update(result)
    return decoded


def group_names(parts: Mapping[str, tuple[Hashable, Hashable, int]], size: int) -> Iterator[list[str]]:
    """Names in their order, in groups of one kind of gaps and of values, up to ``size`` coded elements each.

    Args:
        parts: by name the dtypes of gaps and of values, and how many coded elements there are.
        size: a larger part is a group of its own.
    """
    kinds: dict[tuple[Hashable, Hashable], list[str]] = {}
    for name, (gaps, values, _) in parts.items():
        kinds.setdefault((gaps, values), []).append(name)
    for names in kinds.values():
        group: list[str] = []
        held = 0
        for name in names:
            length = parts[name][2]
            if group and held + length > size:
                yield group
                group, held = [], 0
            group.append(name)
            held += length
        yield group


def _allocate(parts: Mapping[str, Coded], dtype: torch.dtype) -> dict[str, Tensor]:
    """Room for ``[nnz]`` of each of several parameters, end to end in one piece of memory."""
    counts = [part.values.numel() for part in parts.values()]
    whole = np.empty(sum(counts), f"i{dtype.itemsize}")  # one large array: NumPy asks for huge pages
    return dict(zip(parts, torch.from_numpy(whole).view(dtype).split(counts), strict=True))


def _decode_group(
    parts: Mapping[str, Coded], indices: Sequence[Tensor], values: Sequence[Tensor], copy: bool
) -> Decoded:
    """Decode some parameters into ``indices``, and their values into ``values`` where they are copied."""
    counts, numels = [at.numel() for at in indices], [math.prod(part.shape) for part in parts.values()]
    intact = decode_many([part.gaps for part in parts.values()], counts, numels, [at.numpy() for at in indices])
    if not (intact and all(_is_finite(part.values) for part in parts.values())):
        return {name: strictly(part, copy) for name, part in parts.items()}
    decoded: Decoded = {}
    for (name, part), at, held in zip(parts.items(), indices, values, strict=True):
        if copy:
            np.copyto(_bits(held), _bits(part.values))
        decoded[name] = SparseDelta.unchecked(at, held, part.shape)
    return decoded


def strictly(part: Coded, copy: bool = False) -> SparseDelta | AdapterFormatError:
    """One delta, every requirement checked by itself; or the error that names the first that is not met."""
    try:
        indices = decode_gaps(part.gaps.cpu(), math.prod(part.shape))
        return SparseDelta(indices, part.values.clone() if copy else part.values, part.shape)
    except AdapterFormatError as error:
        return error


def _is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, by the greatest of the positive and of the negative bit patterns."""
    infinity, bits = _INFINITY[values.dtype], _bits(values)
    unsigned = bits.view(np.uint16 if values.dtype.itemsize == 2 else np.uint32)
    return bool(bits.max() < infinity and unsigned.max() < infinity + (1 << (8 * values.dtype.itemsize - 1)))


def _bits(values: Tensor) -> NDArray[np.int16] | NDArray[np.int32]:
    """The same memory as integers, for NumPy: torch would start threads of its own from each of ours."""
    return values.detach().view(torch.int16 if values.dtype.itemsize == 2 else torch.int32).numpy()
