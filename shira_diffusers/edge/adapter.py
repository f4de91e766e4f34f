"""Read an adapter file into NumPy arrays: what ``formats.load_adapter`` gives, without torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.format_1 import Sparse
from shira_diffusers.formats.header import read_header, without_shapes
from shira_diffusers.formats.safetensors_bytes import Raw


@dataclass(frozen=True, slots=True)
class ArrayAdapter:
    """An adapter as NumPy arrays.

    Args:
        deltas: by parameter name, which begins with the component.
        metadata: as in the file's header.
        base_probes: the base's values at the first entries of a few deltas, ``(k,)``.
    """

    deltas: Mapping[str, Sparse]
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
    probes = {name: Raw(probe.dtype, probe.array.copy()) for name, probe in file.reader.probes.items()}
    return ArrayAdapter(file.arrays(), file.metadata, probes)
