"""Read an adapter file into NumPy arrays: what ``formats.load_adapter`` gives, without torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.block import Block
from shira_diffusers.formats.gap_codec import Indices
from shira_diffusers.formats.header import read_header, without_shapes
from shira_diffusers.formats.safetensors_bytes import Raw


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
        found = file.decode_blocks(Block.decode)
    deltas = {name: delta for block, indices in found for name, delta in _deltas(block, indices).items()}
    probes = {name: _copy(probe) for name, probe in file.reader.probes.items()}
    return ArrayAdapter(dict(sorted(deltas.items())), file.metadata, probes)


def _deltas(block: Block, indices: list[Indices]) -> dict[str, Delta]:
    """The deltas of a block; nothing of the file is kept."""
    dtype, copied = _copy(block.values)
    parts = zip(block.weights, indices, block.split(copied), strict=True)
    return {weight.name: Delta(own, Raw(dtype, values), weight.shape or ()) for weight, own, values in parts}


def _copy(raw: Raw) -> Raw:
    return Raw(raw.dtype, raw.array.copy())
