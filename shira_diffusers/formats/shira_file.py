"""The on-disk format, version 1. No other module knows its keys; docs/format.md describes it for other writers."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from shira_diffusers._version import __version__
from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.delta import VALUE_DTYPES, SparseDelta
from shira_diffusers.atomic_write import write_atomically
from shira_diffusers.errors import AdapterFormatError, counted, listing
from shira_diffusers.formats.checksum import Checksum, digest
from shira_diffusers.formats.decoding import Coded, decode_parts
from shira_diffusers.formats.gap_codec import encode_gaps
from shira_diffusers.formats.paths import OTHER_WEIGHTS, SUFFIX, did_you_mean, shown_in
from shira_diffusers.formats.safetensors_bytes import Bytes, body_at, mapped, open_safetensors
from shira_diffusers.formats.safetensors_bytes import read_safetensors as read_safetensors  # for all who read files

WEIGHTS_NAME = "pytorch_shira_weights.safetensors"
FORMAT = "shira"
FORMAT_VERSION = "1"

_CHECKSUM = "sha256"  # over the tensors
_OF_THE_FILE = ("format", "format_version", _CHECKSUM)  # metadata that is the file's, not the adapter's
_VALUES, _SHAPE, _GAPS, _BASE = ".values", ".shape", ".gaps", ".base"
_DIMENSIONS = 64  # what torch computes with; the product of a million sizes would take hours


def encode(adapter: ShiraAdapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header metadata that a file holds."""
    tensors: dict[str, Tensor] = {}
    for name, delta in adapter.deltas.items():
        tensors[name + _VALUES] = _own(delta.values)
        tensors[name + _GAPS] = encode_gaps(delta.indices)
        tensors[name + _SHAPE] = torch.tensor(delta.shape, dtype=torch.int64, device="cpu")
    for name, probe in adapter.base_probes.items():
        tensors[name + _BASE] = _own(probe.to(torch.float16))
    metadata = {"library_version": __version__, "density": f"{adapter.density:.6g}", **adapter.metadata}
    return tensors, {**metadata, "format": FORMAT, "format_version": FORMAT_VERSION}


def serialize(adapter: ShiraAdapter) -> bytes:
    """The content of a file: the tensors as ``encode`` gives them, a checksum over them, metadata keys sorted.

    Equal adapters with equal metadata give equal bytes. (safetensors writes metadata in random order.)
    """
    content = np.frombuffer(safetensors.torch.save(*encode(adapter)), np.uint8)
    at = body_at(content)
    header, body = json.loads(content[8:at].tobytes()), content[at:]
    metadata = header.pop("__metadata__") | {_CHECKSUM: digest(body)}
    whole = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    return b"".join((len(text).to_bytes(8, "little"), text, body.data))


def _own(tensor: Tensor) -> Tensor:
    """A copy on the CPU: safetensors refuses tensors that share memory."""
    return tensor.to("cpu", copy=True).contiguous()


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, source: str) -> ShiraAdapter:
    """Build an adapter from what a file holds, of which it keeps nothing: what becomes of that changes no adapter.

    Args:
        tensors: by key, as ``encode`` gives them.
        metadata: the header, whose ``format`` and ``format_version`` must fit; None for a state dict, which has none.
        source: what to call it in messages.

    Raises:
        AdapterFormatError: not this format, another version, or damaged; all offenders at once.
    """
    parts, problems = parts_of(tensors, metadata, source)
    deltas: dict[str, SparseDelta] = {}
    for name, delta in decode_parts(parts, copy=True).items():
        if isinstance(delta, AdapterFormatError):
            problems.append(f"{name}: {delta}")
        else:
            deltas[name] = delta
    require_intact(problems, source)
    return ShiraAdapter(deltas, kept_metadata(metadata), probes_of(tensors))


def parts_of(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, source: str
) -> tuple[dict[str, Coded], list[str]]:
    """The parameters that tensors hold, by name, not decoded yet; and what is wrong with others.

    Args and Raises: as ``decode``; what is wrong with single parameters is returned, not raised.
    """
    _require_format(tensors, metadata, source)
    kinds: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        name, dot, kind = key.rpartition(".")
        if dot + kind not in (_VALUES, _SHAPE, _GAPS, _BASE) or not name:
            problems.append(f"{key}: unknown key, expected <parameter>.values, .gaps, .shape or .base")
        else:
            kinds.setdefault(name, {})[dot + kind] = tensor
    parts: dict[str, Coded] = {}
    for name, kind_tensors in kinds.items():
        try:
            parts[name] = _coded(kind_tensors)
        except AdapterFormatError as error:
            problems.append(f"{name}: {error}")
    return parts, problems


def require_intact(problems: Sequence[str], source: str) -> None:
    """Raise AdapterFormatError with all problems, if there are any."""
    if problems:
        raise AdapterFormatError(
            f"{source} is not a valid SHiRA adapter; get an intact copy or write it again with save_adapter:"
            f"{listing(problems)}"
        )


def probes_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the base's values that tensors hold, by parameter."""
    return {key.removesuffix(_BASE): tensor.clone() for key, tensor in tensors.items() if key.endswith(_BASE)}


def kept_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """A header's strings as an adapter keeps them."""
    return {key: value for key, value in (metadata or {}).items() if key not in _OF_THE_FILE}


def checksum_of(content: Bytes, metadata: Mapping[str, str], source: str) -> Checksum:
    """Start to compare a file's tensors with the checksum in its header.

    Args:
        content: the whole file, uint8 ``[n]``.
        metadata: its header. Files of other formats, and those of older versions, have no checksum of ours.
        source: what to call it in messages.
    """
    return Checksum([content[body_at(content) :]], checksum_in(metadata), source)


def checksum_in(metadata: Mapping[str, str]) -> str | None:
    """The checksum that the header of a file of ours holds, unproved; None if there is none."""
    ours = (metadata.get("format"), metadata.get("format_version")) == (FORMAT, FORMAT_VERSION)
    return metadata.get(_CHECKSUM) if ours else None


@contextmanager
def reading(file: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """Tensors and metadata as ``read_safetensors``, and their checksum compared while the body decodes them.

    Raises:
        OSError, AdapterFormatError: as ``read_safetensors``; at the end of the body also AdapterFormatError, if the
            tensors are not those that were written. Nothing that the body made may be used then.
    """
    tensors, metadata, content = open_safetensors(file, mapped)
    checksum = checksum_of(content, metadata, str(file))
    yield tensors, metadata
    checksum.require()


def _require_format(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, source: str) -> None:
    if not tensors:
        raise AdapterFormatError(f"{source} holds no tensors, expected a SHiRA adapter")
    if metadata is None:
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION} if _looks_like_ours(tensors) else {}
    found = metadata.get("format")
    if found != FORMAT:
        hint = "it looks like a LoRA, load it with load_lora_weights" if _looks_like_lora(tensors) else "check the path"
        raise AdapterFormatError(
            f"{source} is not a SHiRA adapter: header format is {found!r}, expected {FORMAT!r}; {hint} "
            f"(first key: {next(iter(tensors))})"
        )
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterFormatError(
            f"{source} has format version {version!r}, expected {FORMAT_VERSION!r}; "
            "it was written by another version of shira_diffusers: upgrade it to read this file"
        )


def _looks_like_ours(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.endswith(_GAPS) for key in tensors)


def _looks_like_lora(tensors: Mapping[str, Tensor]) -> bool:
    return any("lora_A" in key or "lora_down" in key or "lora.down" in key for key in tensors)


def _coded(part: Mapping[str, Tensor]) -> Coded:
    missing = [kind for kind in (_VALUES, _GAPS, _SHAPE) if kind not in part]
    if missing:
        raise AdapterFormatError(f"{', '.join(missing)} missing, expected .values, .gaps and .shape")
    shape = part[_SHAPE]
    if shape.numel() > _DIMENSIONS:
        raise AdapterFormatError(f"shape has {counted(shape.numel(), 'dimension')}, expected at most {_DIMENSIONS}")
    sizes = tuple(shape.tolist()) if shape.ndim == 1 and shape.dtype == torch.int64 else (-1,)
    if any(size < 0 for size in sizes):
        raise AdapterFormatError(f"shape is {shape.dtype} {shape.tolist()}, expected int64 sizes")
    if math.prod(sizes) >= 2**63:
        raise AdapterFormatError(f"shape {sizes} has more entries than any tensor can hold")
    probe = part.get(_BASE)
    if probe is not None and (probe.ndim != 1 or probe.dtype not in VALUE_DTYPES):
        raise AdapterFormatError(f"base is {probe.dtype} {tuple(probe.shape)}, expected float16 [k]")
    if probe is not None and probe.numel() > part[_VALUES].numel():
        raise AdapterFormatError(
            f"{counted(probe.numel(), 'base value')} for {counted(part[_VALUES].numel(), 'entry')}"
        )
    return Coded(part[_GAPS], part[_VALUES], sizes)


def save_adapter(adapter: ShiraAdapter, path: str | os.PathLike[str]) -> Path:
    """Write an adapter to one ``.safetensors`` file, atomically: temporary file, fsync, rename.

    Args:
        adapter: values keep their dtype (``adapter.astype(torch.float16)`` halves float32 ones).
        path: a file ending in ``.safetensors``, or a folder, made if needed, in which the default name is used.

    Returns:
        The file written. On any error an earlier file of that name is intact.

    Raises:
        AdapterFormatError: an adapter without deltas, or a file of another format, such as ``.bin``.
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
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, content)
    return target


def file_to_write(target: Path) -> Path:
    """The file that a name for an adapter means: itself, or the default one in a folder of that name."""
    return target if target.suffix.lower() == SUFFIX else target / WEIGHTS_NAME


def safetensors_in(folder: Path) -> list[Path]:
    """The ``.safetensors`` files that a folder shows, sorted; none where there is no such folder.

    Hidden ones are left out, such as the side files ``._NAME.safetensors`` that macOS makes. The suffix counts in any
    case, but beside ``NAME.safetensors`` another spelling of it does not.
    """
    files = [path for path in shown_in(folder) if path.suffix.lower() == SUFFIX and os.path.isfile(path)]
    usual = {path.stem for path in files if path.suffix == SUFFIX}
    return [path for path in files if path.suffix == SUFFIX or path.stem not in usual]


def load_adapter(path: str | os.PathLike[str]) -> ShiraAdapter:
    """Read an adapter from a file, or from a folder that holds one.

    Args:
        path: a ``.safetensors`` file of this format, or a folder with ``pytorch_shira_weights.safetensors`` or with
            a single ``.safetensors`` file. (A PEFT SHiRA folder lacks the weights' shapes, which only a model can
            give: see ``interop.load_peft_adapter`` and ``pipe.load_shira``.)

    Returns:
        The adapter, on the CPU, indices int32, values as stored.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFormatError: anything else than an intact file of format version 1.
    """
    file = find_file(Path(path))
    with reading(file) as (tensors, metadata):
        return decode(tensors, metadata, str(file))


def find_file(path: Path) -> Path:
    """The adapter file that ``path`` means: itself, or the one in a folder."""
    if not path.exists():
        raise FileNotFoundError(
            f"no adapter at {path}: expected a .safetensors file or a folder that holds one{did_you_mean(path)}"
        )
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a file nor a folder, expected one of them; name an adapter file")
    if (path / WEIGHTS_NAME).is_file():
        return path / WEIGHTS_NAME
    files = safetensors_in(path)
    if len(files) == 1:
        return files[0]
    names = ", ".join(file.name for file in files) or "none"
    raise FileNotFoundError(
        f"folder {path} has no {WEIGHTS_NAME}; expected it or a single .safetensors file, got {names}; name the file"
    )


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
