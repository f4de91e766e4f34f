"""A tier of memory: items by key within a budget of bytes, the least recently used out."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class TierStats:
    """What a tier holds and has done.

    Args:
        adapters: how many it holds.
        nbytes: bytes that they take, with those reserved for what is being loaded; never more than ``budget``.
        budget: bytes it may take.
        hits, misses: how often what was looked for was there, or was not.
        evictions: how many were put out to make room.
    """

    adapters: int
    nbytes: int
    budget: int
    hits: int
    misses: int
    evictions: int


@dataclass(slots=True)
class _Slot(Generic[Item]):
    item: Item
    nbytes: int
    pins: int = 0


class Tier(Generic[Key, Item]):
    """Room is reserved before an item is made, so that items and those being made never exceed the budget.

    Not safe for several threads by itself: the library's lock is held around each call.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._slots: OrderedDict[Key, _Slot[Item]] = OrderedDict()
        self._reserved: dict[Key, int] = {}
        self._used = self._hits = self._misses = self._evictions = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._slots

    def __iter__(self) -> Iterator[tuple[Key, Item]]:
        """Keys and items, the least recently used first: a snapshot."""
        return iter([(key, slot.item) for key, slot in self._slots.items()])

    @property
    def arriving(self) -> list[Key]:
        """Keys for which room is reserved."""
        return list(self._reserved)

    def note(self, hit: bool) -> None:
        """Count a hit or a miss."""
        self._hits, self._misses = self._hits + hit, self._misses + (not hit)

    def find(self, key: Key) -> Item | None:
        """The item, which becomes the most recently used; None if it is not there."""
        slot = self._slots.get(key)
        if slot is None:
            return None
        self._slots.move_to_end(key)
        return slot.item

    def size(self, key: Key) -> int:
        """Bytes of an item that is there."""
        return self._slots[key].nbytes

    def pin(self, key: Key) -> None:
        """Keep an item that is there from leaving, until it is unpinned as often."""
        self._slots[key].pins += 1

    def unpin(self, key: Key) -> None:
        """Take back one ``pin``."""
        self._slots[key].pins -= 1

    def pinned(self, key: Key) -> bool:
        """Whether an item that is there is pinned."""
        return self._slots[key].pins > 0

    def reserve(self, key: Key, nbytes: int, may_leave: Callable[[Key, Item], bool]) -> list[tuple[Key, Item]] | None:
        """Reserve room for an item, putting out what is needed for it.

        Args:
            key: not there, nothing reserved for it.
            nbytes: how much.
            may_leave: which of the items that are not pinned may be put out.

        Returns:
            The keys and items that left; None if there is no way to make room, then nothing has changed.
        """
        leaving: list[tuple[Key, Item]] = []
        free = self.budget - self._used
        for candidate, slot in self._slots.items():
            if free >= nbytes or nbytes > self.budget:
                break
            if not slot.pins and may_leave(candidate, slot.item):
                leaving.append((candidate, slot.item))
                free += slot.nbytes
        if free < nbytes:
            return None
        for candidate, _ in leaving:
            self.drop(candidate)
        self._evictions += len(leaving)
        self._reserved[key] = nbytes
        self._used += nbytes
        return leaving

    def release(self, key: Key) -> None:
        """Give back what was reserved for an item, if anything was."""
        self._used -= self._reserved.pop(key, 0)

    def put(self, key: Key, item: Item, nbytes: int) -> bool:
        """Put an item into the room reserved for it; whether it fits there."""
        reserved = self._reserved.get(key, 0)
        self.release(key)
        if nbytes > reserved:
            return False
        self._slots[key] = _Slot(item, nbytes)
        self._used += nbytes
        return True

    def drop(self, key: Key) -> None:
        """Forget an item that is there."""
        self._used -= self._slots.pop(key).nbytes

    def stats(self) -> TierStats:
        """What it holds and has done."""
        return TierStats(len(self._slots), self._used, self.budget, self._hits, self._misses, self._evictions)
