"""Read a safetensors file at once: mapped, or into memory of one's own, and all its tensors as parts of that.

The ``safetensors`` library checks the file. Its ``get_tensor`` costs about 15 microseconds a tensor, which for an
adapter's thousand small tensors is more than to read them; so they are cut out of the file's bytes here.
"""

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from torch import Tensor

from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.contents import guess
from shira_diffusers.formats.paths import SUFFIX

Bytes = NDArray[np.uint8]

_ARRAYS: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.int16,  # NumPy has no such; the bits are the same
    "U8": np.uint8,
    "U16": np.uint16,
    "I32": np.int32,
    "I64": np.int64,
}


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header metadata of a safetensors file, on the CPU; mapped, so that only what is used is read.

    Raises:
        OSError: the file cannot be opened.
        AdapterFormatError: the file is truncated, is a pickle, or is otherwise no safetensors file.
    """
    tensors, metadata, _ = open_safetensors(file, mapped)
    return tensors, metadata


def open_safetensors(file: Path, read: Callable[[Path], Bytes]) -> tuple[dict[str, Tensor], dict[str, str], Bytes]:
    """As ``read_safetensors``, and the file's bytes as ``read`` gives them, which the tensors are parts of.

    A file that is replaced meanwhile is read again: never a part of one and a part of the other.
    """
    for last in (False, False, True):
        before = _identity(file)
        try:
            found = _open(file, read)
        except AdapterFormatError:
            if last or _identity(file) == before:
                raise
        else:
            if _identity(file) == before:
                return found
    raise AdapterFormatError(f"{file} changed each time it was read, expected a whole file; wait until it is written")


def _identity(file: Path) -> tuple[int, ...]:
    """Which file a path means now: it is opened several times, and may be replaced in between."""
    told = file.stat()
    return told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns


def _open(file: Path, read: Callable[[Path], Bytes]) -> tuple[dict[str, Tensor], dict[str, str], Bytes]:
    open(file, "rb").close()  # safetensors calls a file that may not be read a missing one
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as opened:
            content = read(file)
            cut_out = cut(content)
            keys = opened.keys()
            tensors = {key: cut_out[key] if key in cut_out else opened.get_tensor(key) for key in keys}
            return tensors, dict(opened.metadata() or {}), content
    except (safetensors.SafetensorError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise unreadable(file, str(error)) from error


def unreadable(file: Path, why: str) -> AdapterFormatError:
    """The error about a file that is no safetensors file: what it seems to be, or else ``why`` it cannot be read."""
    size, found = file.stat().st_size, guess(file)
    looks = f"like {found.kind}" if found else f"damaged or truncated ({why})"
    remedy = found.remedy if found else f"get an intact {SUFFIX} file"
    return AdapterFormatError(
        f"{file} cannot be read: expected a safetensors file, got {size} bytes that look {looks}; {remedy}"
    )


def cut(content: Bytes) -> dict[str, Tensor]:
    """The tensors in the bytes of an intact file, as parts of them, but for those of dtypes that adapters never have.

    A tensor that is not aligned there is copied.
    """
    body = body_at(content)
    header = json.loads(content[8:body].tobytes())
    header.pop("__metadata__", None)
    return {key: _tensor(content, body, entry) for key, entry in header.items() if entry["dtype"] in _ARRAYS}


def body_at(content: Bytes) -> int:
    """Where the header of an intact file ends, and the bytes of its tensors begin."""
    return 8 + int.from_bytes(content[:8].tobytes(), "little")


def mapped(file: Path) -> Bytes:
    """A file's bytes, mapped privately: what is written to them never reaches the file."""
    with open(file, "rb") as raw:
        return np.frombuffer(mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


def _tensor(content: Bytes, body: int, entry: dict[str, Any]) -> Tensor:
    """One tensor, with a storage of its own: what copies or pickles it takes no more than it."""
    start, end = (body + offset for offset in entry["data_offsets"])
    part, array = content[start:end], _ARRAYS[entry["dtype"]]
    if start % np.dtype(array).itemsize:  # the content itself begins with a page
        part = part.copy()
    tensor = torch.from_numpy(part.view(array).reshape(entry["shape"]))
    return tensor.view(torch.bfloat16) if entry["dtype"] == "BF16" else tensor
