"""The pictures that were drawn, as PNG files that carry their settings."""

import os
import re
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.history.png_metadata import read_settings, write_png
from app.settings.checks import SettingsError
from app.settings.picture import Picture

PAGE = 24
MOST = 2000  # pictures of a history
_NAME = re.compile(r"\d{8}-\d{6}-\d{9}\.png")  # date, time, nanoseconds


@dataclass(frozen=True, slots=True)
class Kept:
    """A picture of the history.

    Args:
        name: of its file, which has the time of drawing; names sort by time.
    """

    name: str
    path: Path

    @property
    def settings(self) -> dict[str, Any]:
        """All that is needed to draw it again, from its metadata.

        Raises:
            SettingsError: its file was replaced by another or removed.
        """
        return read_settings(self.path)


def is_kept(name: str) -> bool:
    """Whether a file bears a name as the history gives them."""
    return bool(_NAME.fullmatch(name))


class History:
    """The pictures in a folder, the newest first. Safe to use from several threads; a restart changes nothing.

    Args:
        folder: made with the first picture; files in it that are not of the history are left alone and never shown.
        most: pictures that are kept; beyond that the oldest goes.
    """

    def __init__(self, folder: Path, most: int = MOST) -> None:
        self.folder = folder
        self._most = most
        self._adding = threading.Lock()
        self._last = 0
        for left in folder.glob(".*.tmp"):  # by a crash
            left.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._names())

    def add(self, picture: Picture) -> Kept:
        """Keep a picture; its file appears whole or not at all. Raises OSError: it cannot be written."""
        with self._adding:
            self._last = max(time.time_ns(), self._last + 1)
            stamp = self._last
        seconds, rest = divmod(stamp, 1_000_000_000)
        name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(seconds))}-{rest:09}.png"
        path = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(".tmp", ".", self.folder)
        os.close(handle)
        try:
            write_png(picture, Path(temporary))
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        for old in self._names()[self._most :]:
            (self.folder / old).unlink(missing_ok=True)
        return Kept(name, path)

    def page(self, number: int = 1, size: int = PAGE) -> tuple[Kept, ...]:
        """The pictures of a page, counted from 1; empty beyond the last."""
        first = (number - 1) * size
        return tuple(Kept(name, self.folder / name) for name in self._names()[first : first + size])

    def pages(self, size: int = PAGE) -> int:
        """How many pages there are, at least 1."""
        return max(1, -(-len(self) // size))

    def get(self, name: object) -> Kept:
        """The picture of a name. Raises SettingsError: there is none."""
        if not isinstance(name, str) or name not in self._names():
            raise SettingsError(f"no picture named {str(name)[:80]!r} in the history")
        return Kept(name, self.folder / name)

    def among(self, names: object) -> tuple[Kept, ...]:
        """The pictures of a list of names that are still here, in its order."""
        here = set(self._names())
        wanted = names if isinstance(names, list) else []
        return tuple(Kept(name, self.folder / name) for name in wanted if isinstance(name, str) and name in here)

    def delete(self, name: object) -> None:
        """Remove a picture for good. Raises SettingsError: there is none."""
        self.get(name).path.unlink(missing_ok=True)

    def _names(self) -> list[str]:
        try:
            return sorted(filter(is_kept, os.listdir(self.folder)), reverse=True)
        except FileNotFoundError:
            return []
