"""Read the headers of adapter files: ours of both versions, and those of PEFT's SHiRA tuner.

NumPy only, so that a file can be looked into without loading torch. In: a path, or tensors by key. Out: an
``AdapterFile``: names, shapes, counts and metadata at once, indices and checksum when they are asked for.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import shira_diffusers.formats.format_1 as format_1
import shira_diffusers.formats.format_2 as format_2
from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.adapter_file import AdapterFile, Reader
from shira_diffusers.formats.block import Weight
from shira_diffusers.formats.find import PEFT_CONFIG, PEFT_WEIGHTS, find_local
from shira_diffusers.formats.safetensors_bytes import Bytes, Opened, Raw, mapped, open_safetensors

FORMAT = "shira"
FORMAT_VERSION = format_2.VERSION
CHECKSUM = "sha256"  # over the tensors
OURS, PEFTS = "SHiRA adapter", "PEFT SHiRA adapter"
LORA_HINT = "it looks like a LoRA, load it with load_lora_weights, or convert it with shira convert"
PREFIX, VALUES, INDICES = "base_model.model.", ".shira_weight", ".shira_indices"  # PEFT's keys

_LORA_KEYS = ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down", "lokr_w", "hada_w")
_VERSIONS = (format_1.VERSION, format_2.VERSION)
_OF_THE_FILE = ("format", "format_version", CHECKSUM)  # metadata that is the file's, not the adapter's
_MASKS = {"random": "rand"}  # PEFT's mask types, by our families; a function of the user's own keeps its name


def read_header(path: Path, read: Callable[[Path], Bytes] = mapped) -> AdapterFile:
    """Open an adapter, ours or PEFT's: a file, or a folder that holds one.

    Args:
        path: on this machine.
        read: how the file's bytes are read; mapped, only those that are used are.

    Raises:
        FileNotFoundError: there is none.
        AdapterFormatError: no adapter, another version, or damaged as far as is seen without decoding.
    """
    found = find_local(path)
    if not found.is_dir():
        return header_of(open_safetensors(found, read), found)
    return read_peft_header(found, read)


def read_peft_header(folder: Path, read: Callable[[Path], Bytes] = mapped) -> AdapterFile:
    """Open the folder that PEFT's SHiRA tuner wrote. Args and Raises: as ``read_header``."""
    metadata = _peft_config(folder)
    if not (folder / PEFT_WEIGHTS).is_file():
        raise AdapterFormatError(f"{folder} has no {PEFT_WEIGHTS}; save it with safe_serialization=True")
    return _of_peft(open_safetensors(folder / PEFT_WEIGHTS, read), folder / PEFT_WEIGHTS, metadata)


def header_of(opened: Opened, path: Path) -> AdapterFile:
    """The header of an open file; ``path`` is what to call it. Raises: as ``read_header``."""
    if is_peft_state_dict(opened.tensors):
        return _of_peft(opened, path, {"source": "peft"})
    return ours(reader_of(opened.tensors, opened.metadata, str(path)), opened, path)


def ours(reader: Reader, opened: Opened, path: Path) -> AdapterFile:
    """A file of ours, with what reads it."""
    return AdapterFile(
        path,
        OURS,
        reader.version,
        kept_metadata(opened.metadata),
        reader.weights,
        len(opened.content),
        opened.metadata.get(CHECKSUM),
        opened.tensors,
        opened.content,
        reader,
        opened.identity,
    )


def _of_peft(opened: Opened, path: Path, metadata: Mapping[str, str]) -> AdapterFile:
    values = {key.removesuffix(VALUES): raw for key, raw in opened.tensors.items() if key.endswith(VALUES)}
    weights = [Weight(peft_weight(key), None, raw.array.size, raw.dtype) for key, raw in values.items()]
    size = len(opened.content)
    return AdapterFile(
        path, PEFTS, None, metadata, tuple(sorted(weights)), size, None, opened.tensors, opened.content, None
    )


def peft_weight(layer: str) -> str:
    """The name of the weight of a layer, as PEFT's keys name that."""
    return f"{layer.removeprefix(PREFIX)}.weight"


def is_peft_state_dict(tensors: Mapping[str, Any]) -> bool:
    """Whether tensors have the names of PEFT's SHiRA tuner."""
    return any(key.endswith(VALUES) for key in tensors)


def _peft_config(folder: Path) -> dict[str, str]:
    """The metadata in the config of a PEFT SHiRA folder, by our names.

    Raises:
        AdapterFormatError: another PEFT method, or a damaged config.
    """
    try:
        config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{folder / PEFT_CONFIG} is not JSON ({error}); get an intact copy") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "SHIRA":
        raise AdapterFormatError(
            f"{folder} is a PEFT adapter of type {kind!r}, expected 'SHIRA'; load a LoRA with "
            "load_lora_weights, or convert it with shira convert"
        )
    mask = str(config.get("mask_type", "random"))
    base = config.get("base_model_name_or_path")
    metadata = {"mask": _MASKS.get(mask, mask), "source": "peft"}
    return {**metadata, **({"base_model": str(base)} if base else {})}


def without_shapes(path: Path) -> str:
    """What to say where one of PEFT's adapters is of no use."""
    return (
        f"{path} is a PEFT adapter, which does not store the weights' shapes: load it into its base with "
        "pipe.load_shira, write it with pipe.save_shira, and use that file"
    )


def kept_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """A header's strings as an adapter keeps them."""
    given = metadata or {}
    tables = (format_2.TABLE, format_2.RUNS) if given.get("format_version") == format_2.VERSION else ()
    return {key: value for key, value in given.items() if key not in (*_OF_THE_FILE, *tables)}


def reader_of(tensors: Mapping[str, Raw], metadata: Mapping[str, str] | None, source: str) -> Reader:
    """What reads tensors of ours.

    Args:
        metadata: the header, whose ``format`` and ``format_version`` must fit; None for a state dict, which has none.

    Raises:
        AdapterFormatError: another format or version, or damaged as far as is seen without decoding.
    """
    if not tensors:
        raise AdapterFormatError(f"{source} holds no tensors, expected a SHiRA adapter")
    if metadata is None and format_2.is_version_2(tensors):
        raise AdapterFormatError(
            f"{source} has the tensors of a file of format version {format_2.VERSION}, but not its header, which has "
            "the weights' names and shapes; give the file itself, or a ShiraAdapter from load_adapter"
        )
    if metadata is None:
        metadata = {"format": FORMAT, "format_version": format_1.VERSION} if format_1.is_version_1(tensors) else {}
    found = metadata.get("format")
    if found != FORMAT:
        hint = LORA_HINT if any(map(is_lora_key, tensors)) else "check the path"
        raise AdapterFormatError(
            f"{source} is not a SHiRA adapter: header format is {found!r}, expected {FORMAT!r}; {hint} "
            f"(first key: {next(iter(tensors))})"
        )
    version = metadata.get("format_version")
    if version not in _VERSIONS:
        raise AdapterFormatError(
            f"{source} has format version {version!r}, expected {' or '.join(map(repr, _VERSIONS))}; "
            "it was written by another version of shira_diffusers: upgrade it to read this file"
        )
    return (
        format_1.Reader(tensors, source) if version == format_1.VERSION else format_2.Reader(tensors, metadata, source)
    )


def is_lora_key(key: str) -> bool:
    """Whether a key is one of a LoRA or of its relatives, as diffusers, kohya, LyCORIS and PEFT write it."""
    return any(part in key for part in _LORA_KEYS)
