"""List the adapters in a folder by name, as they are on disk now; only names, sizes and times are read."""

import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from shira_diffusers.errors import ShiraError
from shira_diffusers.formats.find import PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS_NAME, is_peft_folder, safetensors_among
from shira_diffusers.formats.paths import did_you_mean, shown_in

_SHOWN = 20
_SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system

Listing = Callable[[], Iterable[tuple[str, Path]]]
"""Gives names and paths as ``adapters_in`` does; called again whenever a name is not where it was."""


class Version(NamedTuple):
    """An adapter as it is on disk: another time, size or file is another version.

    PEFT's, which store no shapes, differ per kind of ``model`` too: a hash of its component's name and its shapes.
    """

    name: str
    path: Path
    size: int
    modified_ns: int
    inode: int
    model: int = 0

    def is_older_than(self, other: "Version") -> bool:
        """Whether it is the same adapter as it was on disk before, for whatever model."""
        return self.name == other.name and self._replace(model=0) != other._replace(model=0)

    def is_on_disk(self) -> bool:
        """Whether the file is still this version."""
        return self._replace(model=0) == _version(self.name, self.path)

    def is_settled(self) -> bool:
        """Whether the file was old enough that it cannot have changed since without another time."""
        return time.time_ns() - self.modified_ns > _SETTLED_NS


def adapters_in(folder: Path) -> list[tuple[str, Path]]:
    """All adapters in a folder: names and paths, sorted. The one list that the library, the app and the demo take.

    An adapter ``NAME`` is a file ``NAME.safetensors`` (see ``find.safetensors_in``), or a sub-folder ``NAME`` with the
    standard file, whose path is then this file's, or with what PEFT saves, whose path is the folder. Hidden files and
    folders, such as ``._NAME.safetensors``, are none. A file and a sub-folder may have one name. Nothing is read.
    """
    shown = shown_in(folder)
    files = safetensors_among(shown)
    found = [(path.stem, path) for path in files]
    others = set(shown).difference(files)
    return sorted(found + [(inner.name, path) for inner in others if (path := _adapter_of(inner))])


def _adapter_of(folder: Path) -> Path | None:
    try:
        if (folder / WEIGHTS_NAME).is_file():
            return folder / WEIGHTS_NAME
        return folder if is_peft_folder(folder) else None
    except PermissionError:  # a folder that is not ours, such as lost+found
        return None


def weights_file(path: Path) -> Path:
    """The file that holds an adapter's values, of a path as ``adapters_in`` gives it."""
    return path / PEFT_WEIGHTS if path.is_dir() else path


class Catalog:
    """The adapters of folders by name, as ``adapters_in`` finds them. Safe to use from several threads.

    Args:
        source: the folders, or what lists the adapters in their place.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, source: Iterable[Path] | Listing) -> None:
        self._folders = [] if callable(source) else list(source)
        for folder in self._folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"no folder at {folder}: expected one of adapters{did_you_mean(folder)}")
        self.where = " and ".join(map(str, self._folders)) or "the list of adapters"
        self._list: Listing = source if callable(source) else self._in_folders
        self._lock = threading.Lock()
        self._paths: dict[str, list[Path]] = {}
        self.scan()

    def scan(self) -> dict[str, list[Path]]:
        """Look at the disk again: the path of each name, or several where they clash."""
        found: dict[str, list[Path]] = {}
        for name, path in self._list():
            found.setdefault(name, []).append(path)
        with self._lock:
            self._paths = found
            return self._paths

    def _in_folders(self) -> Iterable[tuple[str, Path]]:
        return (found for folder in self._folders for found in adapters_in(folder))

    def find(self, name: str) -> Version:
        """The version of a name that is on disk now.

        Raises:
            ShiraError: there is none, it has vanished, or two have that name.
        """
        with self._lock:
            paths = self._paths.get(name, [])
        version = _version(name, paths[0]) if len(paths) == 1 else None
        if version is None:  # new, gone, or moved: look again
            paths = self.scan().get(name, [])
            version = _version(name, paths[0]) if len(paths) == 1 else None
        if version is None and len(paths) == 1:
            raise ShiraError(f"the file of adapter {name!r} is gone: {paths[0]}")
        if version is None:
            raise ShiraError(self._clash(name, paths) if paths else self._unknown(name))
        return version

    def versions(self) -> list[Version]:
        """What is on disk now, but for names that clash."""
        alone = [(name, paths[0]) for name, paths in self.scan().items() if len(paths) == 1]
        return [version for name, path in alone if (version := _version(name, path)) is not None]

    def clashes(self) -> dict[str, str]:
        """Names that two adapters have, and what is wrong."""
        with self._lock:
            return {name: self._clash(name, paths) for name, paths in self._paths.items() if len(paths) > 1}

    def _clash(self, name: str, paths: list[Path]) -> str:
        shown = (path.relative_to(self._folders[0]) if len(self._folders) == 1 else path for path in paths)
        each = " and ".join(map(str, shown))
        return f"the name {name!r} is that of two adapters in {self.where}: {each}; rename one of them"

    def _unknown(self, name: str) -> str:
        names = list(self._paths)
        known = ", ".join(map(repr, names[:_SHOWN])) or "none"
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return f"no adapter named {name!r} in {self.where}; there are {known}{more}"


def _version(name: str, path: Path) -> Version | None:
    """What is on disk now; None for what is gone, or is no file any more: opening a pipe could block."""
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):  # PEFT's; one without weights is refused at use
            found = (path / (PEFT_WEIGHTS if (path / PEFT_WEIGHTS).is_file() else PEFT_CONFIG)).stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return Version(name, path, found.st_size, found.st_mtime_ns, found.st_ino)
