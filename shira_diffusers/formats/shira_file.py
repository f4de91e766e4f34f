"""Read and write adapter files of our own format. docs/format.md specifies both versions.

In: a path, or a state dict. Out: a ``ShiraAdapter`` on the CPU, or one ``AdapterFormatError``.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import shira_diffusers.formats.format_1 as format_1
import shira_diffusers.formats.format_2 as format_2
from shira_diffusers._version import __version__
from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.delta import SparseDelta
from shira_diffusers.atomic_write import made_folders, write_atomically
from shira_diffusers.errors import AdapterFormatError, counted, listing
from shira_diffusers.formats.adapter_file import AdapterFile, digest
from shira_diffusers.formats.block import Block
from shira_diffusers.formats.find import WEIGHTS_NAME, file_to_write, find_file, safetensors_in
from shira_diffusers.formats.format_1 import Sparse
from shira_diffusers.formats.gap_codec import Indices, Sums
from shira_diffusers.formats.header import (
    CHECKSUM,
    FORMAT,
    FORMAT_VERSION,
    ours,
    read_header,
    reader_of,
    without_shapes,
)
from shira_diffusers.formats.paths import OTHER_WEIGHTS
from shira_diffusers.formats.safetensors_bytes import Opened, Raw, open_safetensors, to_bytes

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "WEIGHTS_NAME",
    "decode",
    "encode",
    "file_to_write",
    "find_file",
    "load_adapter",
    "read_safetensors",
    "require_tensors",
    "safetensors_in",
    "save_adapter",
    "serialize",
]

_FROM_BITS = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # NumPy has none
_CODES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.int64: "I64",
}


def raw_of(tensor: Tensor) -> Raw:
    """A tensor (any shape) as files have it; a contiguous one on the CPU shares its memory."""
    held = tensor.detach().cpu().contiguous()
    code = _CODES.get(held.dtype, str(held.dtype).removeprefix("torch."))
    bits = {"BF16": torch.int16}.get(code, torch.uint8 if "float8" in code else held.dtype)  # NumPy lacks these dtypes
    return Raw(code, held.view(bits).numpy())


def tensor_of(raw: Raw) -> Tensor:
    """A file's tensor, which shares its memory."""
    tensor = torch.from_numpy(raw.array)
    return tensor.view(_FROM_BITS[raw.dtype]) if raw.dtype in _FROM_BITS else tensor


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header's strings of a safetensors file, on the CPU. Raises: as ``open_safetensors``."""
    opened = open_safetensors(file)
    return {key: tensor_of(raw) for key, raw in opened.tensors.items()}, opened.metadata


def encode(adapter: ShiraAdapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter as a self-describing state dict: the tensors and the header of a file of format version 1.

    Raises:
        AdapterFormatError: a parameter's name that cannot be read again.
    """
    tensors = format_1.write(*_parts(adapter))
    header = _metadata(adapter) | {"format": FORMAT, "format_version": format_1.VERSION}
    return {key: tensor_of(raw).clone() for key, raw in tensors.items()}, header


def serialize(adapter: ShiraAdapter) -> bytes:
    """The content of a file of format version 2. Equal adapters with equal metadata give equal bytes.

    Values of several dtypes are written in float32, which holds all of them exactly. Raises: as ``encode``.
    """
    dtypes = {delta.values.dtype for delta in adapter.deltas.values()}
    tensors, tables = format_2.write(*_parts(adapter if len(dtypes) < 2 else adapter.astype(torch.float32)))
    header = _metadata(adapter) | tables | {"format": FORMAT, "format_version": format_2.VERSION}
    return to_bytes(tensors, header | {CHECKSUM: digest(*format_2.checked_bytes(tensors))})


def _parts(adapter: ShiraAdapter) -> tuple[dict[str, Sparse], dict[str, Raw]]:
    if unreadable := [repr(name) for name in adapter.deltas if not format_2.is_text(name)]:
        raise AdapterFormatError(
            f"{counted(len(unreadable), 'parameter', of=len(adapter.deltas))} cannot be saved: expected names that are "
            f"not empty, of whole Unicode characters; use adapter.renamed(...):{listing(unreadable)}"
        )
    weights = {
        name: Sparse(delta.indices.cpu().numpy(), raw_of(delta.values), delta.shape)
        for name, delta in adapter.deltas.items()
    }
    return weights, {name: raw_of(probe.to(torch.float16)) for name, probe in adapter.base_probes.items()}


def _metadata(adapter: ShiraAdapter) -> dict[str, str]:
    kept = {_as_text(key): _as_text(value) for key, value in adapter.metadata.items()}
    return {"library_version": __version__, "density": f"{adapter.density:.6g}", **kept}


def _as_text(text: str) -> str:
    """The text, halves of surrogate pairs as escapes: names of files that are not UTF-8 have them, JSON cannot."""
    return text.encode(errors="backslashreplace").decode()


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, source: str) -> ShiraAdapter:
    """Build an adapter from a state dict, of which it keeps nothing: what becomes of that changes no adapter.

    Args:
        tensors: by key, as ``encode`` gives them: values ``(nnz,)``, gaps ``(m,)`` and shapes ``(ndim,)``.
        metadata: the header, whose ``format`` and ``format_version`` must fit; None for a state dict, which has none.
        source: what to call it in messages.

    Raises:
        AdapterFormatError: not this format, another version, or damaged; all offenders at once.
    """
    raws = {key: raw_of(tensor) for key, tensor in tensors.items()}
    reader = reader_of(raws, metadata, source)
    return to_adapter(
        ours(reader, Opened(raws, dict(metadata or {}), np.empty(0, np.uint8)), Path(source)), compare=False
    )


def to_adapter(file: AdapterFile, *, compare: bool = True) -> ShiraAdapter:
    """Decode a file of ours on the CPU, by as many threads as torch uses; nothing of the file is kept.

    Args:
        compare: with its checksum; False where that was done before.

    Raises:
        AdapterFormatError: damaged; all offenders at once.
    """
    threads = torch.get_num_threads()
    with file.compared(compare):
        found = file.decode_blocks(lambda block: block.decode(threads, running_sum=_running_sum))
        deltas = {name: delta for block, indices in found for name, delta in _deltas(block, indices).items()}
    return adapter_of(file, deltas)


def adapter_of(file: AdapterFile, deltas: Mapping[str, SparseDelta]) -> ShiraAdapter:
    """The adapter of a file of ours, with the deltas decoded from it."""
    assert file.reader is not None
    probes = {name: tensor_of(probe).clone() for name, probe in file.reader.probes.items()}
    return ShiraAdapter(deltas, file.metadata, probes)


def _running_sum(sums: Sums) -> None:
    tensor = torch.from_numpy(sums)
    torch.cumsum(tensor, 0, dtype=tensor.dtype, out=tensor)


def _deltas(block: Block, indices: list[Indices]) -> dict[str, SparseDelta]:
    array = block.values.array
    values = tensor_of(Raw(block.values.dtype, array if array.base is None else array.copy()))
    parts = zip(block.weights, _tensors(indices), values.split([weight.nnz for weight in block.weights]), strict=True)
    return {w.name: SparseDelta.unchecked(at, own, w.shape or ()) for w, at, own in parts}


def _tensors(parts: Sequence[Indices]) -> Sequence[Tensor]:
    """Arrays as tensors, of one storage where they make up one array: a plan of all weights then copies nothing."""
    whole, counts = parts[0].base, list(map(len, parts))
    if whole is None or whole.dtype != parts[0].dtype or whole.shape != (sum(counts),):
        return [torch.from_numpy(part) for part in parts]
    return torch.from_numpy(whole).split(counts)


def save_adapter(adapter: ShiraAdapter, path: str | os.PathLike[str]) -> Path:
    """Write an adapter to one ``.safetensors`` file, atomically: temporary file, fsync, rename.

    Args:
        adapter: values keep their dtype (``adapter.astype(torch.float16)`` halves float32 ones); those of several
            dtypes are written in float32.
        path: a file ending in ``.safetensors``, or a folder, made if needed, in which the default name is used.

    Returns:
        The file written. On any error an earlier file of that name is intact, and a folder that was not there is not.

    Raises:
        AdapterFormatError: an adapter without deltas, or a file of another format, such as ``.bin``; or see ``encode``.
        OSError: the file cannot be written.
    """
    if not adapter.deltas:
        raise AdapterFormatError("the adapter holds no deltas, expected at least one; nothing was written")
    target = Path(path)
    if target.suffix.lower() in OTHER_WEIGHTS and not target.is_dir():
        raise AdapterFormatError(
            f"expected a .safetensors file or a folder to write to, got {target}; choose such a name"
        )
    target = file_to_write(target)
    content = serialize(adapter)
    with made_folders(target.parent):
        write_atomically(target, content)
    return target


def load_adapter(path: str | os.PathLike[str]) -> ShiraAdapter:
    """Read an adapter from a file, or from a folder that holds one.

    Args:
        path: a ``.safetensors`` file of format version 1 or 2, or a folder with ``pytorch_shira_weights.safetensors``
            or with a single ``.safetensors`` file. (A PEFT SHiRA folder lacks the weights' shapes, which only a model
            can give: see ``formats.peft.load_peft_adapter`` and ``pipe.load_shira``.)

    Returns:
        The adapter, on the CPU, indices int32, values as stored.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFormatError: anything else than an intact file.
    """
    file = read_header(find_file(Path(path)))
    if file.reader is None:
        raise AdapterFormatError(without_shapes(file.path))
    return to_adapter(file)


def require_tensors(given: Mapping[Any, Any], source: str) -> None:
    """Require that a state dict maps names to tensors that hold values.

    Raises:
        AdapterFormatError: another kind of key or value, or tensors on the meta device; all offenders at once.
    """
    wrong = [f"{key!r}: {_kind(value)}" for key, value in given.items() if not _is_named_tensor(key, value)]
    if wrong:
        raise AdapterFormatError(f"{source} must map names to dense tensors that hold values, got:{listing(wrong)}")


def _is_named_tensor(key: object, value: object) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return isinstance(key, str) and dense


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a tensor of layout {value.layout} on {value.device}"
