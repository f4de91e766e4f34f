"""Files that are whole or not there: written beside their place, synced, then renamed."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """Give a name for a new file or folder, which becomes ``target`` when the block ends.

    On an error in the block what was written is removed; its files are synced by who writes them.
    """
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    with _named(target, temporary):
        try:
            yield temporary
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
            raise
    _sync_folder(target.parent)


@contextmanager
def made_folders(folder: Path) -> Iterator[None]:
    """Make a folder and those above it for the block; on an error in it, those that were made are removed."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in new:
            with suppress(OSError):  # never made, or in use meanwhile
                each.rmdir()
        raise


@contextmanager
def _named(target: Path, temporary: Path) -> Iterator[None]:
    """Let errors name ``target`` where they name the temporary file or none, as those of a full disk do."""
    try:
        yield
    except OSError as error:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if error.errno not in _FULL and not any(temporary.name in name for name in names):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


def write_atomically(target: Path, content: bytes) -> None:
    """Write ``content`` so that ``target`` is either the old file or the whole new one, even after a crash."""
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    with _named(target, temporary):
        # mkstemp's files are their owner's only, and the umask for a chmod is read by changing it, for all threads
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
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
