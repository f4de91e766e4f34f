"""What an adapter file holds, told without a model: ``shira inspect``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.formats.hub import find_adapter
from shira_diffusers.formats.peft import PEFT_WEIGHTS, is_peft_folder, is_peft_state_dict, peft_values, read_peft_folder
from shira_diffusers.formats.shira_file import FORMAT_VERSION, checksum_in, decode, find_file, reading


@dataclass(frozen=True, slots=True)
class Parameter:
    """One adapted parameter; ``shape`` is None where the file does not tell it."""

    name: str
    shape: tuple[int, ...] | None
    nnz: int
    dtype: torch.dtype

    @property
    def density(self) -> float | None:
        """Fraction of the parameter's entries that are held, 0 to 1; None where the shape is not known."""
        numel = 0 if self.shape is None else math.prod(self.shape)
        return self.nnz / numel if numel else None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a file holds.

    Args:
        path: the file that was read.
        kind: "SHiRA adapter" or "PEFT SHiRA adapter".
        format_version: of our own format; None for PEFT.
        metadata: all strings of the header, or what PEFT's config tells.
        parameters: by name.
        size: bytes of the file.
        tells_base: whether it holds base values, by which another base is recognised.
        sha256: the checksum over its tensors, which they match; None if it has none, as PEFT's and those written
            before there were checksums.
    """

    path: Path
    kind: str
    format_version: str | None
    metadata: Mapping[str, str]
    parameters: tuple[Parameter, ...]
    size: int
    tells_base: bool
    sha256: str | None = None

    @property
    def nnz(self) -> int:
        """Entries held, over all parameters."""
        return sum(parameter.nnz for parameter in self.parameters)

    @property
    def numel(self) -> int | None:
        """Entries of all adapted parameters, held or not; None where a shape is not known."""
        shapes = [parameter.shape for parameter in self.parameters]
        return sum(math.prod(shape) for shape in shapes if shape is not None) if None not in shapes else None

    @property
    def density(self) -> float | None:
        """Fraction of the adapted parameters' entries that are held; None where it is not known."""
        return self.nnz / self.numel if self.numel else None

    @property
    def bytes_per_entry(self) -> float | None:
        """Bytes of the file for each entry held; None of an adapter without entries."""
        return self.size / self.nnz if self.nnz else None

    @property
    def dtypes(self) -> list[str]:
        """The dtypes of the values, sorted."""
        return sorted({dtype_name(parameter.dtype) for parameter in self.parameters})

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON; what is not known is None."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "format_version": self.format_version,
            "base_model": self.metadata.get("base_model"),
            "mask": self.metadata.get("mask"),
            "density": self.density,
            "nnz": self.nnz,
            "numel": self.numel,
            "dtypes": self.dtypes,
            "bytes": self.size,
            "bytes_per_entry": self.bytes_per_entry,
            "tells_base": self.tells_base,
            "sha256": self.sha256,
            "metadata": dict(self.metadata),
            "parameters": [
                {
                    "name": p.name,
                    "shape": None if p.shape is None else list(p.shape),
                    "nnz": p.nnz,
                    "density": p.density,
                    "dtype": dtype_name(p.dtype),
                }
                for p in self.parameters
            ],
        }


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without ``torch.``"""
    return str(dtype).removeprefix("torch.")


def locate_adapter(path: Path) -> Path:
    """The adapter file, or the PEFT folder, that a local path means; nothing is looked up on the Hub.

    Raises:
        FileNotFoundError: there is none.
    """
    return find_adapter(path, {}) if path.exists() else find_file(path)


def inspect_adapter(path: Path) -> Inspection:
    """Read a file, or the one in a folder; PEFT's SHiRA adapters too, as far as they tell without a model.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFormatError: anything else than an intact adapter.
    """
    found = locate_adapter(path)
    if is_peft_folder(found):
        tensors, metadata = read_peft_folder(found)
        return _of_peft(found / PEFT_WEIGHTS, tensors, metadata)
    with reading(found) as (tensors, metadata):
        if is_peft_state_dict(tensors):
            return _of_peft(found, tensors, {"source": "peft"})
        return _of_adapter(found, decode(tensors, metadata, str(found)), checksum_in(metadata))


def _of_adapter(file: Path, adapter: ShiraAdapter, sha256: str | None) -> Inspection:
    parameters = tuple(Parameter(n, d.shape, d.nnz, d.values.dtype) for n, d in adapter.deltas.items())
    tells_base, size = bool(adapter.base_probes), file.stat().st_size
    return Inspection(file, "SHiRA adapter", FORMAT_VERSION, adapter.metadata, parameters, size, tells_base, sha256)


def _of_peft(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Inspection:
    values = sorted(peft_values(tensors).items())
    parameters = tuple(Parameter(name, None, value.numel(), value.dtype) for name, value in values)
    return Inspection(file, "PEFT SHiRA adapter", None, metadata, parameters, file.stat().st_size, False)
