"""Read an adapter file into NumPy arrays: what ``formats.load_adapter`` gives, without torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.block import Block
from shira_diffusers.formats.gap_codec import Indices
from shira_diffusers.formats.header import read_header, without_shapes
from shira_diffusers.formats.safetensors_bytes import Raw

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter changes in one weight.

    Args:
        indices: int32 or int64 ``(nnz,)``, sorted, flat row-major in the dense weight.
        values: ``(nnz,)``, as in the file.
        shape: of the dense weight.
    """

    indices: Indices
    values: Raw
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ArrayAdapter:
    """An adapter as NumPy arrays.

    Args:
        deltas: by parameter name, which begins with the component.
        metadata: as in the file's header.
        base_probes: the base's values at the first entries of a few deltas, ``(k,)``.
    """

    deltas: Mapping[str, Delta]
    metadata: Mapping[str, str]
    base_probes: Mapping[str, Raw]


def read_adapter(path: str | os.PathLike[str]) -> ArrayAdapter:
    """Read a file of ours, of either version, or a folder that holds one; every byte is checked.

    Raises:
        FileNotFoundError: there is none.
        AdapterFormatError: damaged, or PEFT's, which does not store shapes.
    """
    file = read_header(Path(path))
    if file.reader is None:
        raise AdapterFormatError(without_shapes(file.path))
    with file.compared():
        found = file.decode_blocks(lambda block: block.decode())
    deltas = {name: delta for block, indices in found for name, delta in _deltas(block, indices).items()}
    probes = {name: _copy(probe) for name, probe in file.reader.probes.items()}
    return ArrayAdapter(dict(sorted(deltas.items())), file.metadata, probes)


def _deltas(block: Block, indices: list[Indices]) -> dict[str, Delta]:
    """The deltas of a block; nothing of the file is kept."""
    dtype, values = _copy(block.values)
    ends = list(accumulate(map(len, indices)))
    return {
        weight.name: Delta(own, Raw(dtype, values[end - len(own) : end]), weight.shape or ())
        for weight, own, end in zip(block.weights, indices, ends, strict=True)
    }


def _copy(raw: Raw) -> Raw:
    return Raw(raw.dtype, raw.array.copy())


def as_float32(dtype: str, array: NDArray[Any]) -> Floats:
    """A tensor of a file in float32, a copy, which holds all of its values exactly: float32, float16, bfloat16 bits."""
    if dtype == "BF16":
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
