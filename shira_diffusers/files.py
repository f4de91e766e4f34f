"""The on-disk format, version 1. No other module knows its keys; docs/format.md describes it for other writers."""

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from shira_diffusers._version import __version__
from shira_diffusers.adapter import ShiraAdapter
from shira_diffusers.delta import VALUE_DTYPES, SparseDelta
from shira_diffusers.errors import AdapterFormatError, listing

WEIGHTS_NAME = "pytorch_shira_weights.safetensors"
FORMAT = "shira"
FORMAT_VERSION = "1"

_VALUES, _SHAPE, _GAPS, _BASE = ".values", ".shape", ".gaps", ".base"
_ESCAPED = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


def encode_gaps(indices: Tensor) -> Tensor:
    """Code sorted flat indices as gaps ``g_j = i_j - i_(j-1) - 1``, ``i_(-1) = -1``, in the smallest of three dtypes.

    Args:
        indices: int32 or int64 ``[nnz]``, strictly increasing.

    Returns:
        uint8 or uint16, each gap as ``g // max`` elements of the dtype's maximum and then ``g % max``; or int32,
        each gap itself.
    """
    flat: NDArray[np.int64] = indices.cpu().numpy().astype(np.int64)
    gaps = flat - np.concatenate([np.full(1, -1), flat])[:-1] - 1
    options = [_escape(gaps, np.dtype(np.uint8)), _escape(gaps, np.dtype(np.uint16))]
    if gaps.max(initial=0) < 2**31:
        options.append(gaps.astype(np.int32))
    return torch.from_numpy(min(options, key=lambda coded: coded.nbytes))


def _escape(gaps: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[Any]:
    top = _ESCAPED[dtype]
    ends = np.cumsum(gaps // top + 1) - 1
    coded = np.full(int(ends[-1]) + 1 if len(ends) else 0, top, dtype)
    coded[ends] = gaps % top
    return coded


def decode_gaps(coded: Tensor, numel: int) -> Tensor:
    """Decode ``encode_gaps``: flat indices, int64 ``[nnz]``, for a weight of ``numel`` entries.

    Raises:
        AdapterFormatError: another dtype, an unfinished escape, negative gaps (unsorted or duplicate indices) or an
            index out of range.
    """
    if coded.ndim != 1 or coded.dtype not in (torch.uint8, torch.uint16, torch.int32):
        raise AdapterFormatError(
            f"gaps are {coded.dtype} {tuple(coded.shape)}, expected uint8, uint16 or int32 of one dimension"
        )
    raw = coded.numpy()
    steps = raw.astype(np.int64)
    if raw.dtype in _ESCAPED:
        top = _ESCAPED[raw.dtype]
        if len(raw) and raw[-1] == top:
            raise AdapterFormatError("the last gap is unfinished: an escape without a remainder; the file is damaged")
        ends = np.flatnonzero(raw != top)
        sums = np.cumsum(steps)[ends]
    else:
        if (steps < 0).any():
            at = int(np.flatnonzero(steps < 0)[0])
            raise AdapterFormatError(
                f"gap {at} is {steps[at]}: indices are unsorted or duplicate, expected gaps of 0 or more"
            )
        sums = np.cumsum(steps)
    indices = sums + np.arange(len(sums))
    if len(indices) and indices[-1] >= numel:
        raise AdapterFormatError(f"indices are out of range: up to {indices[-1]}, expected at most {numel - 1}")
    return torch.from_numpy(indices)


def encode(adapter: ShiraAdapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header metadata that a file holds."""
    tensors: dict[str, Tensor] = {}
    for name, delta in adapter.deltas.items():
        tensors[name + _VALUES] = _own(delta.values)
        tensors[name + _GAPS] = encode_gaps(delta.indices)
        tensors[name + _SHAPE] = torch.tensor(delta.shape, dtype=torch.int64)
    for name, probe in adapter.base_probes.items():
        tensors[name + _BASE] = _own(probe.to(torch.float16))
    metadata = {"library_version": __version__, "density": f"{adapter.density:.6g}", **adapter.metadata}
    return tensors, {**metadata, "format": FORMAT, "format_version": FORMAT_VERSION}


def _own(tensor: Tensor) -> Tensor:
    """A copy on the CPU: safetensors refuses tensors that share memory."""
    return tensor.to("cpu", copy=True).contiguous()


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, source: str) -> ShiraAdapter:
    """Build an adapter from what a file holds.

    Args:
        tensors: by key, as ``encode`` gives them.
        metadata: the header, whose ``format`` and ``format_version`` must fit; None for a state dict, which has none.
        source: what to call it in messages.

    Raises:
        AdapterFormatError: not this format, another version, or damaged; all offenders at once.
    """
    _require_format(tensors, metadata, source)
    parts: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        name, dot, kind = key.rpartition(".")
        if dot + kind not in (_VALUES, _SHAPE, _GAPS, _BASE) or not name:
            problems.append(f"{key}: unknown key, expected <parameter>.values, .gaps, .shape or .base")
        else:
            parts.setdefault(name, {})[dot + kind] = tensor
    deltas: dict[str, SparseDelta] = {}
    for name, part in parts.items():
        try:
            deltas[name] = _decode_one(part)
        except AdapterFormatError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise AdapterFormatError(
            f"{source} is not a valid SHiRA adapter; get an intact copy or write it again with save_adapter:"
            f"{listing(problems)}"
        )
    probes = {name: part[_BASE] for name, part in parts.items() if _BASE in part}
    known = {k: v for k, v in (metadata or {}).items() if k not in ("format", "format_version")}
    return ShiraAdapter(deltas, known, probes)


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


def _decode_one(part: Mapping[str, Tensor]) -> SparseDelta:
    missing = [kind for kind in (_VALUES, _GAPS, _SHAPE) if kind not in part]
    if missing:
        raise AdapterFormatError(f"{', '.join(missing)} missing, expected .values, .gaps and .shape")
    shape = part[_SHAPE]
    if shape.ndim != 1 or shape.dtype != torch.int64 or bool((shape < 0).any()):
        raise AdapterFormatError(f"shape is {shape.dtype} {shape.tolist()}, expected int64 sizes")
    sizes = tuple(shape.tolist())
    numel = math.prod(sizes)
    if numel >= 2**63:
        raise AdapterFormatError(f"shape {sizes} has more entries than any tensor can hold")
    probe = part.get(_BASE)
    if probe is not None and (probe.ndim != 1 or probe.dtype not in VALUE_DTYPES):
        raise AdapterFormatError(f"base is {probe.dtype} {tuple(probe.shape)}, expected float16 [k]")
    if probe is not None and probe.numel() > part[_VALUES].numel():
        raise AdapterFormatError(f"{probe.numel()} base values for {part[_VALUES].numel()} entries")
    return SparseDelta(decode_gaps(part[_GAPS].cpu(), numel), part[_VALUES], sizes)


def save_adapter(adapter: ShiraAdapter, path: str | os.PathLike[str]) -> Path:
    """Write an adapter to one ``.safetensors`` file, atomically: temporary file, fsync, rename.

    Args:
        adapter: values keep their dtype (``adapter.astype(torch.float16)`` halves float32 ones).
        path: a file ending in ``.safetensors``, or a folder, made if needed, in which the default name is used.

    Returns:
        The file written. On any error an earlier file of that name is intact.

    Raises:
        AdapterFormatError: an adapter without deltas.
        OSError: the file cannot be written.
    """
    if not adapter.deltas:
        raise AdapterFormatError("the adapter holds no deltas, expected at least one; nothing was written")
    target = Path(path)
    if target.suffix != ".safetensors":
        target = target / WEIGHTS_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors, metadata = encode(adapter)
    write_atomically(target, safetensors.torch.save(tensors, metadata))
    return target


def write_atomically(target: Path, content: bytes) -> None:
    """Write ``content`` so that ``target`` is either the old file or the whole new one, even after a crash."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder to sync it
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def adapter_files(folder: Path) -> list[tuple[str, Path]]:
    """Adapters in a folder by name, sorted: files ``NAME.safetensors``, and folders ``NAME`` with the standard file.

    A name may come twice, once for each kind.
    """
    found = [(path.stem, path) for path in folder.glob("*.safetensors")]
    found += [(path.parent.name, path) for path in folder.glob(f"*/{WEIGHTS_NAME}")]
    return sorted(found)


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
    tensors, metadata = read_safetensors(file)
    return decode(tensors, metadata, str(file))


def find_file(path: Path) -> Path:
    """The adapter file that ``path`` means: itself, or the one in a folder."""
    if not path.exists():
        raise FileNotFoundError(f"no adapter at {path}: expected a .safetensors file or a folder that holds one")
    if path.is_file():
        return path
    if (path / WEIGHTS_NAME).is_file():
        return path / WEIGHTS_NAME
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    names = ", ".join(file.name for file in files) or "none"
    raise FileNotFoundError(
        f"folder {path} has no {WEIGHTS_NAME}; expected it or a single .safetensors file, got {names}; name the file"
    )


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header metadata of a safetensors file, on the CPU.

    Raises:
        OSError: the file cannot be opened.
        AdapterFormatError: the file is truncated, is a pickle, or is otherwise no safetensors file.
    """
    with open(file, "rb") as raw:  # safetensors calls a file that may not be read a missing one
        start = raw.read(2)
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return tensors, dict(opened.metadata() or {})
    except (safetensors.SafetensorError, ValueError, KeyError, AttributeError) as error:
        kind = "like a pickle, which is never loaded" if _starts_pickle(start) else "damaged or truncated"
        raise AdapterFormatError(
            f"{file} cannot be read: expected a safetensors file, got {file.stat().st_size} bytes that look {kind} "
            f"({error}); get an intact .safetensors file"
        ) from error


def _starts_pickle(start: bytes) -> bool:
    """Whether a file begins as what ``torch.save`` or ``pickle`` write: a zip archive, or protocol 2 to 5."""
    return start == b"PK" or (start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"))


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
