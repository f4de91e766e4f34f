"""The adapters in a folder by name, as they are on disk now; nothing is read but names, sizes and times."""

import stat
import threading
from pathlib import Path
from typing import NamedTuple

from shira_diffusers.errors import ShiraError
from shira_diffusers.files import WEIGHTS_NAME
from shira_diffusers.interop import PEFT_CONFIG, PEFT_WEIGHTS, is_peft_folder

_SHOWN = 20


class Version(NamedTuple):
    """An adapter as it is on disk: another time, size or file is another version.

    PEFT's, which tell no shapes, are one for each kind of ``model`` too: a hash of its component's name and its shapes.
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


class Catalog:
    """Names of adapters: files ``NAME.safetensors``, and sub-folders ``NAME`` with the standard file or PEFT's files.

    Hidden files and folders are left out. Safe to use from several threads.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder at {folder}: expected one of adapters")
        self.folder = folder
        self._lock = threading.Lock()
        self._paths: dict[str, list[Path]] = {}
        self.scan()

    def scan(self) -> dict[str, list[Path]]:
        """Look at the folder again: the path of each name, or several where they clash."""
        found: dict[str, list[Path]] = {}
        for entry in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if not entry.name.startswith(".") and (adapter := _adapter_at(entry)) is not None:
                name, path = adapter
                found.setdefault(name, []).append(path)
        with self._lock:
            self._paths = dict(sorted(found.items()))
            return self._paths

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
        if version is None:
            raise ShiraError(self._clash(name, paths) if paths else self._unknown(name))
        return version

    def clashes(self) -> dict[str, str]:
        """Names that two adapters have, and what is wrong."""
        with self._lock:
            return {name: self._clash(name, paths) for name, paths in self._paths.items() if len(paths) > 1}

    def _clash(self, name: str, paths: list[Path]) -> str:
        each = " and ".join(str(path.relative_to(self.folder)) for path in paths)
        return f"the name {name!r} is that of two adapters in {self.folder}: {each}; rename one of them"

    def _unknown(self, name: str) -> str:
        names = list(self._paths)
        known = ", ".join(map(repr, names[:_SHOWN])) or "none"
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return f"no adapter named {name!r} in {self.folder}; there are {known}{more}"


def _adapter_at(entry: Path) -> tuple[str, Path] | None:
    """The name and the path of the adapter that an entry of the folder is, if it is one."""
    try:
        if entry.suffix == ".safetensors" and entry.is_file():
            return entry.stem, entry
        if (entry / WEIGHTS_NAME).is_file():
            return entry.name, entry / WEIGHTS_NAME
        return (entry.name, entry) if is_peft_folder(entry) else None
    except PermissionError:  # a folder that is not ours, such as lost+found
        return None


def _version(name: str, path: Path) -> Version | None:
    """What is on disk now; None for what is gone, or is no file any more: to open a pipe could take for ever."""
    try:
        file = path
        if path.is_dir():  # PEFT's; one without weights is told at use what it lacks
            file = path / (PEFT_WEIGHTS if (path / PEFT_WEIGHTS).is_file() else PEFT_CONFIG)
        told = file.stat()
    except OSError:
        return None
    if not stat.S_ISREG(told.st_mode):
        return None
    return Version(name, path, told.st_size, told.st_mtime_ns, told.st_ino)
