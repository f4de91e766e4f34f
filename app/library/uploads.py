"""Files that strangers send: looked at before anything reads them in full."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from app.library.cards import one_sentence
from shira_diffusers import ShiraError
from shira_diffusers.formats.header import is_lora_key
from shira_diffusers.formats.inspect import inspect_adapter
from shira_diffusers.formats.safetensors_bytes import open_safetensors

DEFAULT_MAX_MB = 512
MAX_HEADER = 32 * 2**20  # bytes; SDXL's, the longest of ours, takes 1 MB
SPARE_DISK = 256 * 2**20  # bytes that an upload leaves free, so that pictures and checkpoints can still be written
_CHUNK = 2**20


class UploadError(ShiraError):
    """A file that is not taken in; nothing has changed."""


@contextmanager
def received(
    file: Path, folder: Path, shown: str, max_bytes: int, check: Callable[[Path, str], None] | None = None
) -> Iterator[Path]:
    """A private copy of an uploaded adapter in ``folder``, checked and on disk; removed afterwards unless moved away.

    Args:
        file: as it came.
        folder: where it is to stay, so that moving it is one rename.
        shown: what the user called it.
        max_bytes: it may have.
        check: of the copy; None is ``require_adapter``.

    Raises:
        UploadError: too large, or as ``check``.
    """
    if shutil.disk_usage(folder).free < SPARE_DISK + file.stat().st_size:
        raise UploadError(f"there is too little room on the app's disk for {shown}; delete what is not needed")
    handle, name = tempfile.mkstemp(dir=folder, prefix=".upload-", suffix=".safetensors")
    copy = Path(name)
    try:
        with os.fdopen(handle, "wb") as target, file.open("rb") as source:
            size = 0
            while chunk := source.read(_CHUNK):
                size += len(chunk)
                if size > max_bytes:
                    raise UploadError(f"{shown} is too large: {max_bytes / 1e6:.0f} MB at most; see --max-upload-mb")
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        (check or require_adapter)(copy, shown)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def require_adapter(file: Path, shown: str) -> None:
    """Require an intact SHiRA adapter, ours or PEFT's. Its header's length is checked before the header is read.

    Raises:
        UploadError: names what is wrong in one sentence.
    """
    require_header(file, shown)
    try:
        inspect_adapter(file)
    except (ShiraError, OSError, MemoryError, OverflowError, RuntimeError) as error:
        raise UploadError(one_sentence(error).replace(str(file), shown)) from error


def is_lora(file: Path) -> bool:
    """Whether a file is a LoRA, by its keys."""
    try:
        require_header(file, file.name)
        return any(map(is_lora_key, open_safetensors(file).tensors))
    except (ShiraError, OSError, MemoryError, OverflowError, RuntimeError):
        return False


def require_header(file: Path, shown: str) -> None:
    """Require that a file's header is no longer than the file is, and not too long. Raises UploadError: it is."""
    size = file.stat().st_size
    with file.open("rb") as raw:
        start = raw.read(9)
    length = int.from_bytes(start[:8], "little")
    if len(start) == 9 and start[8:] == b"{" and not 0 < length <= min(size - 8, MAX_HEADER):
        raise UploadError(
            f"{shown} is damaged: its header claims {length} bytes, expected at most {min(size - 8, MAX_HEADER)}"
        )
