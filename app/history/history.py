"""The pictures that were drawn, as PNG files that carry their settings."""

import os
import re
import reprlib
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
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

    @property
    def favourite(self) -> bool:
        """Whether it is one: an empty file beside it says so."""
        return _star_of(self.path).exists()

    def remove(self) -> None:
        """Remove it for good."""
        for path in (self.path, _star_of(self.path)):
            path.unlink(missing_ok=True)


def page_of(found: tuple[Kept, ...], number: int, size: int = PAGE) -> tuple[Kept, ...]:
    """The pictures of a page, counted from 1; empty beyond the last."""
    return found[(number - 1) * size : number * size]


def pages_of(found: tuple[Kept, ...], size: int = PAGE) -> int:
    """How many pages there are, at least 1."""
    return max(1, -(-len(found) // size))


def _star_of(path: Path) -> Path:
    return path.with_suffix(".star")


def is_kept(name: str) -> bool:
    """Whether a file bears a name as the history gives them."""
    return bool(_NAME.fullmatch(name))


class History:
    """The pictures in a folder, the newest first. Safe to use from several threads; a restart changes nothing.

    Args:
        folder: made with the first picture; files in it that are not of the history are left alone and never shown.
        most: pictures that are kept; beyond that the oldest goes, favourites last.
    """

    def __init__(self, folder: Path, most: int = MOST) -> None:
        self.folder = folder
        self._most = most
        self._adding = threading.Lock()
        self._last = 0
        self._texts: dict[str, str] = {}  # what a search looks at, by name
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
        if len(names := self._names()) > self._most:
            kept = [Kept(each, self.folder / each) for each in names]
            for old in sorted(kept, key=lambda each: not each.favourite)[self._most :]:
                old.remove()
        return Kept(name, path)

    def find(self, words: str = "", *, favourites: bool = False) -> tuple[Kept, ...]:
        """The pictures whose prompts, styles or seed have all of these words, the newest first.

        Args:
            words: in any case and order; none is all pictures.
            favourites: only those.

        Raises:
            SettingsError: words that are no text.
        """
        if not isinstance(words, str):
            raise SettingsError(f"words must be text, got {reprlib.repr(words)}")
        wanted = words.casefold().split()
        found = (Kept(name, self.folder / name) for name in self._names())
        return tuple(
            each
            for each in found
            if (not favourites or each.favourite) and all(word in self._text(each) for word in wanted)
        )

    def page(self, number: int = 1, size: int = PAGE) -> tuple[Kept, ...]:
        """The pictures of a page, counted from 1; empty beyond the last."""
        return page_of(self.find(), number, size)

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
        self.get(name).remove()

    def star(self, name: object, *, on: bool) -> None:
        """Make a picture a favourite, or none. Raises SettingsError: there is none of that name."""
        star = _star_of(self.get(name).path)
        star.touch() if on else star.unlink(missing_ok=True)

    def _text(self, kept: Kept) -> str:
        if kept.name not in self._texts:
            if len(self._texts) >= self._most:  # with those of pictures that are gone
                self._texts.clear()
            with suppress(SettingsError):  # its file was replaced by another or removed
                settings = kept.settings
                told = (settings.get("prompt"), settings.get("negative"), f"seed {settings.get('seed')}")
                mix = settings.get("mix")
                styles = mix if isinstance(mix, Mapping) else ()
                self._texts[kept.name] = " ".join(str(each) for each in (*told, *styles)).casefold()
        return self._texts.get(kept.name, "")

    def _names(self) -> list[str]:
        try:
            return sorted(filter(is_kept, os.listdir(self.folder)), reverse=True)
        except FileNotFoundError:
            return []
