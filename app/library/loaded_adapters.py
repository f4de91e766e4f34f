"""Which adapters lie in the pipeline: opened when they are asked for, and the least used put back beyond a limit."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_diffusers import ShiraAdapter
from shira_diffusers.formats import open_adapter
from shira_diffusers.integrations.pipelines import resident_of
from shira_diffusers.library.folder import weights_file

OPENED_AT_START = 24  # files; what more there is, is opened when it is used or nobody draws
ROOM = 1_000_000_000  # bytes of files that may be open at once; in memory they take two or three times that


@dataclass(frozen=True, slots=True)
class Glance:
    """What the head of a file tells, unproved: nothing else of it has been read."""

    metadata: Mapping[str, str]
    components: tuple[str, ...]


def glance(path: Path) -> Glance:
    """Look at the head of an adapter's file.

    Raises:
        ShiraError: it is none.
        OSError: it cannot be read.
    """
    opened = open_adapter(path)
    return Glance(opened.metadata, tuple(opened.components))


class LoadedAdapters:
    """The open adapters of a library. Not safe by itself: the library's lock guards all but ``pinned``.

    Args:
        pipe: the resident pipeline.
        room: bytes of files that may be open at once; those of the mix being drawn always may.
    """

    def __init__(self, pipe: Any, room: int = ROOM) -> None:
        self._pipe, self._room = pipe, room
        self._open: OrderedDict[str, int] = OrderedDict()  # bytes, the least used first
        self._pins: Counter[str] = Counter()
        self._pinning = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that are open."""
        return tuple(self._open)

    def open(self, name: str, path: Path) -> ShiraAdapter:
        """The adapter of a name, from the file if need be.

        Raises:
            ShiraError, OSError, RuntimeError, MemoryError, OverflowError: as ``load_shira``; nothing has changed.
        """
        resident = resident_of(self._pipe)
        if name not in self._open:
            self._pipe.load_shira(path, name, activate=False)
            self._open[name] = weights_file(path).stat().st_size
        self._open.move_to_end(name)
        return resident.adapter(name)

    def close(self, name: str) -> None:
        """Put an adapter back, if it is open."""
        if self._open.pop(name, None) is not None:
            self._pipe.delete_shira(name)

    def rename(self, old: str, new: str) -> None:
        """Call an open adapter by another name."""
        if old not in self._open:
            return
        resident = resident_of(self._pipe)
        with resident.writing():
            adapter = resident.adapter(old)
            resident.remove(old)
            resident.add(adapter, new)
        self._open[new] = self._open.pop(old)

    def tidy(self) -> None:
        """Put back the least used ones until the rest has room; those that are pinned stay."""
        for name in list(self._open)[:-1]:
            if sum(self._open.values()) <= self._room:
                return
            with self._pinning:
                if self._pins[name]:
                    continue
            self.close(name)

    @contextmanager
    def pinned(self, names: Iterable[str]) -> Iterator[None]:
        """Keep adapters open for as long as the body runs."""
        kept = tuple(names)
        with self._pinning:
            self._pins.update(kept)
        try:
            yield
        finally:
            with self._pinning:
                self._pins.subtract(kept)
