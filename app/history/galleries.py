"""Decide who sees which pictures: one history for all, or one per visitor."""

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

from app.history.history import MOST, History, Kept, is_kept
from app.settings.picture import Picture

MAX_BYTES = 2_000_000_000  # of all pictures of all visitors
CHECKED_EVERY = 20  # pictures: looking at all files takes longer than writing one
REMEMBERED = 500  # histories; one that is not is made anew from its folder


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks.

    Args:
        visit: a page, or a client; visits take turns, and each can stop what it asked for.
        owner: whose history the pictures go to; empty is everybody's.
    """

    visit: str
    owner: str = ""


class Galleries:
    """The histories in a folder: everybody's, and one for each owner in a folder of its own.

    Args:
        folder: of everybody's pictures; those of owners lie in ``of`` in it, under names that do not reveal them.
        most: pictures of each history; beyond that its oldest goes.
        max_bytes: of all histories together; beyond that the oldest picture goes, whoever drew it, favourites last.
        shared: whether owners count for nothing and everybody sees all.
    """

    def __init__(self, folder: Path, *, most: int = MOST, max_bytes: int = MAX_BYTES, shared: bool = True) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self.most, self.shared = most, shared
        self._histories: dict[str, History] = {}
        self._changing = threading.Lock()
        self._added = 0

    def of(self, visitor: Visitor) -> History:
        """What a visitor sees."""
        owner = "" if self.shared else visitor.owner
        folder = self._folder / "of" / hashlib.sha256(owner.encode()).hexdigest()[:32] if owner else self._folder
        with self._changing:
            history = self._histories.pop(owner, None) or History(folder, self.most)
            self._histories[owner] = history  # the last used at the end
            if len(self._histories) > REMEMBERED:
                del self._histories[next(iter(self._histories))]
            return history

    def add(self, visitor: Visitor, picture: Picture) -> Kept:
        """Keep a picture where its visitor finds it. Raises OSError: it cannot be written."""
        kept = self.of(visitor).add(picture)
        with self._changing:
            self._added += 1
            if self._added % CHECKED_EVERY == 0:
                self._make_room()
        return kept

    def _make_room(self) -> None:
        files = [path for pattern in ("*.png", "of/*/*.png") for path in self._folder.glob(pattern)]
        sizes = {path: _size(path) for path in files if is_kept(path.name)}
        total = sum(sizes.values())
        kept = [Kept(path.name, path) for path in sizes]
        for old in sorted(kept, key=lambda each: (each.favourite, each.name)):  # names sort by time
            if total <= self._max_bytes:
                return
            old.remove()
            total -= sizes[old.path]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # its visitor has deleted it meanwhile
        return 0
