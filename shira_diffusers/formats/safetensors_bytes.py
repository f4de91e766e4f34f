"""Read a safetensors file at once: mapped, or into memory of one's own, and all its tensors as parts of that.

In: a path. Out: the tensors as NumPy arrays, the header's strings, the file's bytes. The ``safetensors`` library checks
the file. Its ``get_tensor`` costs about 15 microseconds per tensor, so tensors are cut out of the bytes here. Nothing
in this module, nor in what it imports, needs torch.
"""

import json
import mmap
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from numpy.typing import NDArray

from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.contents import guess
from shira_diffusers.formats.paths import SUFFIX

Bytes = NDArray[np.uint8]
Identity = tuple[int, ...]

_ARRAYS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.int16,  # NumPy has no such dtype: the bits
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": np.uint8,  # as BF16
    "F8_E5M2": np.uint8,
}
# what the library, and our own look at the header, raise for a damaged file
_UNREADABLE = (safetensors.SafetensorError, ValueError, KeyError, AttributeError, TypeError, RuntimeError)
_TICK = 50_000_000  # nanoseconds
_LONG_NAMES = {"B": "bfloat", "F": "float", "I": "int", "U": "uint"}


class Raw(NamedTuple):
    """A tensor: its dtype as safetensors names it, and an array of its shape; of a dtype that NumPy lacks the bits."""

    dtype: str
    array: NDArray[Any]

    def to_float32(self) -> NDArray[np.float32]:
        """A copy in float32, which holds all values of float32, float16 and bfloat16 exactly."""
        if self.dtype == "BF16":  # the upper half of a float32
            return (self.array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32)


class Opened(NamedTuple):
    """An intact safetensors file: tensors by key, which are parts of ``content``, and the header's strings.

    ``identity`` is which file the bytes were read from, see ``identity_of``; None where another may have the same.
    """

    tensors: dict[str, Raw]
    metadata: dict[str, str]
    content: Bytes
    identity: Identity | None = None


class Span(NamedTuple):
    """Where a tensor is in a file: its dtype as safetensors names it, its shape, and its bytes ``[start, end)``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def spans_of(file: Path) -> dict[str, Span]:
    """Where each tensor of a safetensors file is, by key; only the header is read.

    Raises:
        OSError: the file cannot be opened.
        AdapterFormatError: no intact safetensors file.
    """
    with open(file, "rb") as raw:
        try:
            with safetensors.safe_open(os.fspath(file), framework="numpy"):
                size = int.from_bytes(raw.read(8), "little")
                header = json.loads(raw.read(size))
        except _UNREADABLE as error:
            raise unreadable(file, str(error)) from error
    header.pop("__metadata__", None)
    spans = {key: [8 + size + offset for offset in entry["data_offsets"]] for key, entry in header.items()}
    return {key: Span(entry["dtype"], tuple(entry["shape"]), *spans[key]) for key, entry in header.items()}


def dtype_name(dtype: str) -> str:
    """A dtype as torch names it: ``float16`` for ``F16``."""
    digits = dtype.lstrip("BFIU")
    return _LONG_NAMES[dtype[0]] + digits if digits.isdigit() else dtype.lower()


def as_array(dtype: str) -> Any:
    """The NumPy dtype that holds a safetensors dtype; bytes for those unknown here."""
    return _ARRAYS.get(dtype, np.uint8)


def mapped(file: Path) -> Bytes:
    """A file's bytes, mapped privately: what is written to them never reaches the file."""
    with open(file, "rb") as raw:
        return np.frombuffer(mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


def open_safetensors(file: Path, read: Callable[[Path], Bytes] = mapped) -> Opened:
    """Read a safetensors file; mapped, so that only what is used is read, unless ``read`` says otherwise.

    A file that is replaced meanwhile is read again: never a part of one and a part of the other.

    Raises:
        OSError: the file cannot be opened.
        AdapterFormatError: the file is truncated, is a pickle, or is otherwise no safetensors file.
    """
    for last in (False, False, True):
        before = identity_of(file)
        settled = _is_settled(before)
        try:
            found = _open(file, read)
        except AdapterFormatError:
            if last or identity_of(file) == before:
                raise
        else:
            if identity_of(file) == before:
                return found._replace(identity=before if settled else None)
    raise AdapterFormatError(f"{file} changed each time it was read, expected a whole file; wait until it is written")


def identity_of(file: Path) -> Identity:
    """Which file a path means now, and its last change: each write, rename and ``utime`` sets ``st_ctime`` to now."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _is_settled(identity: Identity) -> bool:
    """Whether a write from now on gives another identity: clocks of file systems tick every few milliseconds."""
    return os.name == "posix" and time.time_ns() - identity[-1] > _TICK  # elsewhere that is when it was created


def _open(file: Path, read: Callable[[Path], Bytes]) -> Opened:
    open(file, "rb").close()  # safetensors calls a file that may not be read a missing one
    try:
        with safetensors.safe_open(os.fspath(file), framework="numpy"):
            return cut(read(file))
    except _UNREADABLE as error:
        raise unreadable(file, str(error)) from error


def unreadable(file: Path, why: str) -> AdapterFormatError:
    """The error about a file that is no safetensors file: what it seems to be, or else ``why`` it cannot be read."""
    size, found = file.stat().st_size, guess(file)
    looks = f"like {found.kind}" if found else f"damaged or truncated ({why})"
    remedy = found.remedy if found else f"get an intact {SUFFIX} file"
    return AdapterFormatError(
        f"{file} cannot be read: expected a safetensors file, got {size} bytes that look {looks}; {remedy}"
    )


def cut(content: Bytes) -> Opened:
    """The tensors in the bytes of an intact file, as parts of them; one that is not aligned there is copied."""
    body = len(content) - len(body_of(content))
    header = json.loads(content[8:body].tobytes())
    metadata = header.pop("__metadata__", None) or {}
    return Opened({key: _tensor(content, body, entry) for key, entry in header.items()}, metadata, content)


def body_of(content: Bytes) -> Bytes:
    """What comes after the header in the bytes of an intact file: those of its tensors."""
    return content[8 + int.from_bytes(content[:8].tobytes(), "little") :]


def _tensor(content: Bytes, body: int, entry: dict[str, Any]) -> Raw:
    start, end = (body + offset for offset in entry["data_offsets"])
    part, array = content[start:end], as_array(entry["dtype"])
    if start % np.dtype(array).itemsize:  # the content itself begins with a page
        part = part.copy()
    return Raw(entry["dtype"], part.view(array).reshape(entry["shape"] if entry["dtype"] in _ARRAYS else -1))


def to_bytes(tensors: Mapping[str, Raw], metadata: Mapping[str, str]) -> bytes:
    """The content of a file: tensors in this order, metadata sorted by key, so that equal input gives equal bytes.

    Args:
        tensors: from wide dtypes to narrow ones, so that each is aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for key, (dtype, array) in tensors.items():
        header[key] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    parts = [np.ascontiguousarray(raw.array).data for raw in tensors.values()]
    return b"".join((len(text).to_bytes(8, "little"), text, *parts))
