"""Where the adapters of a service are: a folder that all replicas see, or what fsspec opens, with copies on disk."""

import asyncio
import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from shira_diffusers.atomic_write import made_whole
from shira_diffusers.errors import ShiraError
from shira_diffusers.formats import load_adapter
from shira_diffusers.formats.paths import SUFFIX, did_you_mean
from shira_diffusers.library.folder import adapters_in, weights_file
from shira_diffusers.serving.errors import ServiceError, invalid, not_found, one_line

_UNREACHED = "storage"
FRESH = 10.0  # seconds in which a copy is not compared with the store again
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")  # one part of a path on every system, never hidden
_REMOTE = re.compile(r"[a-z0-9+]+://.+|[a-z0-9]+::.+", re.IGNORECASE)


def open_store(source: str, cache: str | None = None) -> "FolderStore":
    """Open the adapters of a service.

    Args:
        source: a folder; or an address of fsspec, such as ``s3://bucket/adapters`` (needs s3fs) or ``hf://owner/name``.
        cache: the folder for copies of what is not in a local folder; by default one in the temporary folder.

    Raises:
        ShiraError: no such folder, or an address that cannot be opened.
    """
    own = hashlib.sha256(source.encode()).hexdigest()[:16]
    copies = Path(cache or tempfile.gettempdir()).expanduser() / f"shira-adapters-{own}"
    if not _REMOTE.fullmatch(source):
        with suppress(OSError):  # without an index headers are read at each start, as the library says
            copies.parent.mkdir(parents=True, exist_ok=True)
        return FolderStore(Path(source), copies.with_suffix(".index"))
    try:
        files, root = url_to_fs(source)
    except (ImportError, ValueError, OSError) as error:
        raise ShiraError(f"cannot open the adapters at {source}: {error}") from error
    return RemoteStore(files, root, copies)


def require_name(name: str) -> str:
    """A name that an adapter may be stored under.

    Raises:
        ServiceError: 422, another.
    """
    if not _NAME.fullmatch(name) or name.lower().endswith(SUFFIX):
        raise invalid(
            f"{name[:80]!r} cannot be the name of an adapter: expected 1 to 64 letters, digits and '._+-', the first "
            f"a letter or digit, without {SUFFIX} at the end"
        )
    return name


class FolderStore:
    """Adapters in a local folder, or one of a network that every replica has mounted."""

    def __init__(self, folder: Path, index: Path) -> None:
        if not folder.is_dir():
            raise ShiraError(f"no folder of adapters at {folder}; name another with --adapters{did_you_mean(folder)}")
        self.folder = folder
        """What an ``AdapterLibrary`` reads."""
        self.index = index
        """Where it may keep what their headers say; all replicas of a machine share it."""

    def sizes(self) -> dict[str, int]:
        """The bytes of each adapter by name, as they are now."""
        found: dict[str, int] = {}
        for name, path in adapters_in(self.folder):
            with suppress(OSError):  # deleted meanwhile
                found[name] = weights_file(path).stat().st_size
        return found

    def has(self, name: str) -> bool:
        """Whether an adapter is in ``folder``."""
        usual = os.path.basename(name) == name and os.path.isfile(self.folder / f"{name}{SUFFIX}")
        return usual or name in dict(adapters_in(self.folder))

    def fetch(self, names: Iterable[str]) -> None:
        """Bring adapters into ``folder``, as they are now in the store; what is not there is an error at use."""

    async def add(self, name: str, chunks: AsyncIterator[bytes], max_bytes: int, *, replace: bool) -> int:
        """Store an adapter, whole and verified or not at all; its size in bytes.

        Raises:
            ServiceError: a name that cannot be, or that is taken; too large; not an adapter in our format; no room.
        """
        require_name(name)
        await asyncio.to_thread(self._require_free, name, replace=replace)
        try:
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".upload-") as folder:
                file = Path(folder, f"{name}{SUFFIX}")
                size = await _receive(chunks, file, max_bytes)
                await asyncio.to_thread(self._publish, file, name, replace=replace)
        except FileExistsError:
            raise _taken(name) from None
        except OSError as error:
            raise ServiceError("storage", f"cannot store {name!r}: {error.strerror or error}", 507) from error
        return size

    def _require_free(self, name: str, *, replace: bool) -> None:
        """Refuse a name before its file is received."""
        usual = self.folder / f"{name}{SUFFIX}"
        if any(each == name and path != usual for each, path in adapters_in(self.folder)):
            message = f"the adapter {name!r} is a sub-folder, which an upload cannot replace; expected another name"
            raise ServiceError("conflict", message, 409)
        if not replace and name in self.sizes():
            raise _taken(name)

    def _publish(self, file: Path, name: str, *, replace: bool) -> None:
        _require_intact(file, name)
        self._put(file, name, replace=replace)

    def _put(self, file: Path, name: str, *, replace: bool) -> None:
        """Give a file its name. Raises FileExistsError: another upload has it since."""
        target = self.folder / file.name
        os.replace(file, target) if replace else _move_to_new(file, target)

    def remove(self, name: str) -> None:
        """Delete an adapter; what is drawn with it now is finished.

        Raises:
            ServiceError: there is none, it is a sub-folder, or it cannot be deleted.
        """
        require_name(name)
        try:
            self._delete(name)
        except FileNotFoundError:
            raise not_found(name) from None
        except OSError as error:
            raise ServiceError("storage", f"cannot delete {name!r}: {error.strerror or error}", 507) from error

    def _delete(self, name: str) -> None:
        (self.folder / f"{name}{SUFFIX}").unlink()


class RemoteStore(FolderStore):
    """Adapters in an object store, read through copies in a local folder."""

    def __init__(self, files: fsspec.AbstractFileSystem, root: str, copies: Path) -> None:
        copies.mkdir(parents=True, exist_ok=True)
        super().__init__(copies, copies.with_suffix(".index"))
        self._files, self._root = files, root.rstrip("/")
        self._seen: dict[str, tuple[Any, float]] = {}  # of each copy: which version it is, when that was looked up
        self._locks = [threading.Lock() for _ in range(64)]  # by hash of the name

    def sizes(self) -> dict[str, int]:
        """See ``FolderStore.sizes``.

        Raises:
            ServiceError: the store cannot be reached, or refuses.
        """
        with self._reached(absent=()):
            self._files.invalidate_cache()
            found = self._files.find(self._root, maxdepth=1, detail=True)  # nothing where there is no such folder yet
        names = {path.rsplit("/", 1)[-1]: each["size"] for path, each in found.items()}
        return {name.removesuffix(SUFFIX): size for name, size in sorted(names.items()) if name.endswith(SUFFIX)}

    def fetch(self, names: Iterable[str]) -> None:
        """See ``FolderStore.fetch``. Where the store cannot be reached, a copy that is here is used.

        Raises:
            ServiceError: it cannot be reached and there is no copy; or an adapter that arrives damaged.
        """
        for name in filter(_NAME.fullmatch, names):
            with self._locked(name):
                version, when = self._seen.get(name, (None, -FRESH))
                if time.monotonic() - when >= FRESH:
                    self._fetch(name, self.folder / f"{name}{SUFFIX}", version)

    def _fetch(self, name: str, copy: Path, version: Any) -> None:
        try:
            with self._reached():
                self._files.invalidate_cache()
                now = self._files.ukey(self._path(name))
                if now != version or not copy.exists():
                    with made_whole(copy) as whole:
                        self._files.get_file(self._path(name), str(whole))
                        _require_intact(whole, name)
        except FileNotFoundError:
            copy.unlink(missing_ok=True)
            self._seen.pop(name, None)
        except ServiceError as error:
            if error.type != _UNREACHED or not copy.exists():
                raise
        else:
            self._seen[name] = now, time.monotonic()

    @contextmanager
    def _reached(self, absent: type[Exception] | tuple[()] = FileNotFoundError) -> Iterator[None]:
        """Turn what the store's library raises, which has no common type, into one error, but for ``absent``."""
        try:
            yield
        except ServiceError:
            raise
        except absent:
            raise
        except Exception as error:
            told = f"{one_line(error)} ({type(error).__name__})"
            message = f"cannot use the adapters at {self._root}: {told}; expected an address, credentials and a network"
            raise ServiceError(_UNREACHED, message, 503, 5) from error

    def _locked(self, name: str) -> threading.Lock:
        return self._locks[hash(name) % len(self._locks)]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}{SUFFIX}"

    def _put(self, file: Path, name: str, *, replace: bool) -> None:
        """See ``FolderStore._put``. Only uploads to this process: few stores create without replacing."""
        with self._locked(name), self._reached(absent=FileExistsError):
            self._files.invalidate_cache()
            if not replace and self._files.exists(self._path(name)):
                raise FileExistsError
            self._files.put_file(str(file), self._path(name))
        self._seen.pop(name, None)

    def _delete(self, name: str) -> None:
        with self._reached():
            self._files.rm_file(self._path(name))
        self._seen.pop(name, None)


def _taken(name: str) -> ServiceError:
    return ServiceError("conflict", f"there is an adapter {name!r}: delete it first, or add ?replace=true", 409)


def _move_to_new(file: Path, target: Path) -> None:
    """Rename a file to one that is not there. Raises FileExistsError: it is."""
    try:
        os.link(file, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, such as FAT: an empty file takes the name first
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        try:
            os.replace(file, target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def _require_intact(file: Path, name: str) -> None:
    try:
        load_adapter(file)  # every byte is checked
    except ShiraError as error:
        raise ServiceError("invalid_adapter", str(error).replace(str(file), name), 422) from error


async def _receive(chunks: AsyncIterator[bytes], file: Path, max_bytes: int) -> int:
    size = 0
    with file.open("wb") as target:
        async for chunk in chunks:
            size += len(chunk)
            if size > max_bytes:
                raise ServiceError("too_large", f"an adapter may have {max_bytes:,} bytes", 413)
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    return size
