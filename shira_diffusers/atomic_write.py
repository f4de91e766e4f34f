"""Files that are whole or not there: written beside their place, synced, then renamed."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """Give a name for a new file or folder, which becomes ``target`` when the block ends.

    On an error in the block what was written is removed; its files are synced by who writes them.
    """
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def write_atomically(target: Path, content: bytes) -> None:
    """Write ``content`` so that ``target`` is either the old file or the whole new one, even after a crash."""
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    # mkstemp's files are their owner's only, and the umask for a chmod is read by changing it, for all threads
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:  # of the temporary file, of which nobody knows
        raise OSError(error.errno, error.strerror, str(target)) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder to sync it
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
