"""Cache the adapters of a folder in two tiers: packed bytes in host memory, decoded ones on the weights' device.

A tier holds items by key within a budget of bytes. Eviction is by frequency and recency: GreedyDual-Size with frequency
(Cherkasova, 1998), where a load takes a time in proportion to its bytes, as was measured (benchmarks: library_scale).

Of models it knows only what its callers pass: which adapters may be evicted.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.engine.bookkeeping import Entered, Guard
from shira_diffusers.errors import AdapterFormatError, ShiraError
from shira_diffusers.formats.gpu_decoder import DeviceDecoder
from shira_diffusers.formats.opened_adapter import OpenedAdapter, open_adapter
from shira_diffusers.formats.safetensors_bytes import Bytes, mapped
from shira_diffusers.library.folder import Version
from shira_diffusers.library.packed_adapter import HostMemory, PackedAdapter, pack
from shira_diffusers.weights.targets import named_weights


class NoRoomError(ShiraError):
    """An adapter that there is no room for beside those in use, within the budget of the device."""


Item = TypeVar("Item")
Models = Mapping[str, nn.Module]


@dataclass(frozen=True, slots=True)
class TierStats:
    """What a tier holds and has done.

    Args:
        adapters: how many it holds.
        nbytes: bytes that they take, with those reserved for what is being loaded; never more than ``budget``, unless
            what is in use may exceed it.
        budget: bytes it may take.
        hits, misses: how often what was looked for was there, or was not.
        evictions: how many were evicted to make room.
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
    priority: int
    expected: int = 0  # until so many evictions
    uses: int = 0
    pins: int = 0


class Tier(Generic[Item]):
    """Room is reserved before an item is made, so that items and those being made never exceed the budget.

    Not safe for several threads by itself: the library's lock is held around each call.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._slots: OrderedDict[Version, _Slot[Item]] = OrderedDict()
        self._named: defaultdict[str, dict[Version, None]] = defaultdict(dict)
        self._reserved: dict[Version, int] = {}
        self._age = 0  # the priority of what was evicted last: what is used from now on is above it
        self._used = self._hits = self._misses = self._evictions = 0

    def __contains__(self, key: Version) -> bool:
        return key in self._slots

    def __iter__(self) -> Iterator[tuple[Version, Item]]:
        """Keys and items in the order in which they are evicted: a snapshot."""
        return iter([(key, slot.item) for key, slot in self._ordered()])

    def _ordered(self) -> list[tuple[Version, _Slot[Item]]]:
        def order(pair: tuple[Version, _Slot[Item]]) -> tuple[bool, int]:
            return self.expects(pair[0]), pair[1].priority

        return sorted(self._slots.items(), key=order)  # stable: of equals the least recently used first

    def named(self, names: Iterable[str]) -> Iterator[tuple[Version, Item]]:
        """Keys and items of some names, in time that depends on how many those are: a snapshot."""
        keys = [key for name in names for key in self._named.get(name, ())]
        return iter([(key, self._slots[key].item) for key in keys])

    @property
    def arriving(self) -> list[Version]:
        """Keys for which room is reserved."""
        return list(self._reserved)

    def note(self, hit: bool) -> None:
        """Count a hit or a miss."""
        self._hits, self._misses = self._hits + hit, self._misses + (not hit)

    def find(self, key: Version) -> Item | None:
        """The item, which has been used once more; None if it is not there."""
        slot = self._slots.get(key)
        if slot is None:
            return None
        slot.uses, slot.expected = slot.uses + 1, 0
        slot.priority = self._age + slot.uses
        self._slots.move_to_end(key)
        return slot.item

    def expect(self, key: Version) -> bool:
        """Whether an item is there; it is then evicted after all others, for as many evictions as there are items.

        This keeps what is prefetched from being evicted for the next before it is used; ``find`` ends it.
        """
        if key not in self._slots:
            return False
        self._slots[key].expected = self._evictions + len(self._slots)
        self._slots.move_to_end(key)
        return True

    def expects(self, key: Version) -> bool:
        """Whether an item that is there is expected to be used."""
        return self._slots[key].expected > self._evictions

    def size(self, key: Version) -> int:
        """Bytes of an item that is there."""
        return self._slots[key].nbytes

    def pin(self, key: Version) -> None:
        """Keep an item from eviction until it is unpinned as often as it was pinned."""
        self._slots[key].pins += 1

    def unpin(self, key: Version) -> None:
        """Take back one ``pin``."""
        self._slots[key].pins -= 1

    def pinned(self, key: Version) -> bool:
        """Whether an item that is there is pinned."""
        return self._slots[key].pins > 0

    def reserve(
        self,
        key: Version,
        nbytes: int,
        may_leave: Callable[[Version, Item], bool],
        leaving: Callable[[Version, Item], None] | None = None,
        *,
        exceed: bool = False,
    ) -> list[tuple[Version, Item]] | None:
        """Reserve room for an item, evicting what is needed for it.

        Args:
            key: not there, nothing reserved for it.
            nbytes: how much.
            may_leave: which of the items that are not pinned may be evicted.
            leaving: called with each before it is; where it raises, that one and the next stay, nothing is reserved.
            exceed: reserve it even beyond the budget, when all that may be evicted has been.

        Returns:
            The keys and items that were evicted; None if there is no way to make room, then nothing has changed.
        """
        left: list[tuple[Version, Item]] = []
        free = self.budget - self._used
        for candidate, slot in self._ordered() if free < nbytes else ():
            if free >= nbytes or (nbytes > self.budget and not exceed):
                break
            if not slot.pins and may_leave(candidate, slot.item):
                left.append((candidate, slot.item))
                free += slot.nbytes
        if free < nbytes and not exceed:
            return None
        for candidate, item in left:
            if leaving is not None:
                leaving(candidate, item)
            self._age = max(self._age, self._slots[candidate].priority)
            self.drop(candidate)
            self._evictions += 1
        self._reserved[key] = nbytes
        self._used += nbytes
        return left

    def release(self, key: Version) -> None:
        """Give back what was reserved for an item, if anything was."""
        self._used -= self._reserved.pop(key, 0)

    def put(self, key: Version, item: Item, nbytes: int) -> bool:
        """Put an item into the room reserved for it, as one that is expected; whether it fits there."""
        reserved = self._reserved.get(key, 0)
        self.release(key)
        if nbytes > reserved:
            return False
        self._slots[key] = _Slot(item, nbytes, self._age)
        self._named[key.name][key] = None
        self._used += nbytes
        return self.expect(key)

    def drop(self, key: Version) -> None:
        """Forget an item that is there."""
        self._used -= self._slots.pop(key).nbytes
        del self._named[key.name][key]
        if not self._named[key.name]:
            del self._named[key.name]

    def stats(self) -> TierStats:
        """What it holds and has done."""
        return TierStats(len(self._slots), self._used, self.budget, self._hits, self._misses, self._evictions)


class Decoded(NamedTuple):
    """A decoded adapter, and the tensors that its deltas are views of, where a device has decoded it."""

    adapter: ShiraAdapter
    held: tuple[Tensor, ...]


T = TypeVar("T")
MayLeave = Callable[[Version, Decoded], bool]
Leaving = Callable[[Version, Decoded], None]


class _CrowdedError(Exception):
    """The room is reserved for adapters that are being decoded for others, and that can be evicted after that."""

    def __init__(self, arriving: list[Future[None]]) -> None:
        super().__init__()
        self.arriving = arriving


class Store:
    """Loads each version once, whoever asks and however many at a time. Safe to use from several threads.

    Args:
        ram_bytes: for packed adapters, each as large as its file.
        device_bytes: for decoded ones.
        device: where these are.
        exceed: let what is acquired take more than ``device_bytes``, when all that may be evicted has been.
    """

    def __init__(self, ram_bytes: int, device_bytes: int, device: torch.device, *, exceed: bool = False) -> None:
        self._exceed = exceed
        self.lock = Guard()
        self.ram: Tier[PackedAdapter] = Tier(ram_bytes)
        self.device: Tier[Decoded] = Tier(device_bytes)
        self.refused: dict[str, tuple[Version, bool, AdapterFormatError]] = {}  # whether it is no longer being written
        self._decoder = None if device.type == "cpu" else DeviceDecoder(device)
        self._pin_for = device if device.type == "cuda" else None
        self._peft: dict[str, Version] = {}
        self._intact: dict[str, Version] = {}  # compared with their checksums; to read one again costs no more hashing
        self._kinds: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._loading: dict[Version, Future[None]] = {}
        self._wanted: Counter[Version] = Counter()

    # ---------------------------------------------------------------- decoded

    def fitted(self, version: Version, models: Models | None) -> Version:
        """The version as it is for these models, which differs for PEFT's, as far as it is known to be PEFT's."""
        with self.lock:
            is_peft = self._peft.get(version.name) == version
        if models is None or version.model or not (is_peft or version.path.is_dir()):
            return version
        kinds = tuple((component, self._kind_of(model)) for component, model in models.items())
        return version._replace(model=hash(kinds) or 1)

    def _kind_of(self, model: nn.Module) -> int:
        """A number that models have in common whose weights have the same names and shapes, found once per model."""
        with self.lock:
            if model not in self._kinds:
                shapes = tuple((name, tuple(weight.shape)) for name, weight in named_weights(model).items())
                self._kinds[model] = hash(shapes)
            return self._kinds[model]

    def acquire(
        self, version: Version, models: Models, may_leave: MayLeave, leaving: Leaving
    ) -> tuple[Version, Decoded]:
        """The decoded adapter, pinned, and its version as ``fitted``: ``release`` that when it may be evicted again.

        Args:
            version: which.
            models: by component, for PEFT's adapters, which do not store the weights' shapes.
            may_leave: which of the adapters that are not pinned may be evicted to make room.
            leaving: called with each that is.

        Raises:
            AdapterFormatError: the file is damaged.
            NoRoomError: there is no room for it on the device.
            OSError: the file cannot be read.
        """
        while True:
            version = self.fitted(version, models)
            with self.lock:
                found = self.device.find(version)
                if found is not None:
                    self.device.pin(version)
                    return version, found
            try:
                loaded = self._load(version, models, may_leave, leaving)
            except _CrowdedError as crowded:
                wait(crowded.arriving, return_when=FIRST_COMPLETED)  # not while this one counts as arriving
                continue
            if loaded is not None:
                return version, loaded

    def release(self, version: Version) -> None:
        """Allow an acquired adapter to be evicted when room is needed."""
        with self.lock:
            self.device.unpin(version)

    def warm(self, version: Version, models: Models | None, may_leave: MayLeave) -> Version:
        """Load it as far as there is room without evicting what waiting clients want; its version as ``fitted``."""

        def unwanted(other: Version, decoded: Decoded) -> bool:
            return not self._wanted[other] and may_leave(other, decoded)

        for _ in range(2):  # once more where a file has turned out to be PEFT's
            version = self.fitted(version, models)
            with self.lock:
                if self.device.expect(version):
                    break
            self._load(version, models, unwanted, None)
            if self.fitted(version, models) == version:
                break
        return version

    def wanting(self, versions: list[Version]) -> Entered[None]:
        """While a client waits for these, no other client's warming evicts them. Counts hits and misses."""

        def enter(ends: ExitStack) -> None:
            with self.lock:
                for version in versions:
                    self.device.note(version in self.device)
                self._wanted.update(versions)
            ends.callback(self._want_no_more, versions)

        return Entered(enter)

    def _want_no_more(self, versions: list[Version]) -> None:
        with self.lock:
            self._wanted.subtract(versions)
            self._wanted = +self._wanted

    def forget_older(self, version: Version, may_leave: MayLeave) -> None:
        """Drop what is kept of earlier versions of a name, unless it is in use."""
        with self.lock:
            _drop(self.ram, lambda key, _: key.is_older_than(version), [version.name])
            _drop(self.device, lambda key, item: key.is_older_than(version) and may_leave(key, item), [version.name])

    def clear(self, may_leave: MayLeave, *, packed: bool) -> None:
        """Drop all that is not in use: decoded adapters, and with ``packed`` the packed ones too."""
        with self.lock:
            _drop(self.ram, lambda *_: packed)
            _drop(self.device, may_leave)

    # ---------------------------------------------------------------- loading

    def _load(
        self, version: Version, models: Models | None, may_leave: MayLeave, leaving: Leaving | None
    ) -> Decoded | None:
        """Load one version into the device's tier, or wait for the thread that does.

        Returns:
            It, pinned, if this thread has loaded it and ``leaving`` is given; else None.
        """
        with self.lock:
            self._require_not_refused(version)
            running = self._loading.get(version)
            mine: Future[None] = Future()
            if running is None:
                self._loading[version] = mine
        if running is not None:
            wait([running])  # what that thread could not do, a caller that insists tries again by itself
            return None
        try:
            return self._decode(version, models, may_leave, leaving)
        except AdapterFormatError as error:
            with self.lock:
                self.refused[version.name] = version, version.is_settled(), error
            raise
        finally:
            with self.lock:
                del self._loading[version]
            mine.set_result(None)

    def _require_not_refused(self, version: Version) -> None:
        refused, settled, error = self.refused.get(version.name, (None, False, None))
        if settled and refused == version:
            raise AdapterFormatError(str(error))
        self.refused.pop(version.name, None)

    def _decode(
        self, version: Version, models: Models | None, may_leave: MayLeave, leaving: Leaving | None
    ) -> Decoded | None:
        with self._packed(version, models) as (source, was_there):
            if source is None or not self._make_room(version, source.opened.decoded_nbytes, may_leave, leaving):
                return None
            if was_there:
                with self.lock:
                    self.ram.note(True)
            try:
                decoded = Decoded(*source.unpack(self._decoder))
                if not was_there:
                    _require_unchanged(version)
            except BaseException:
                with self.lock:
                    self.device.release(version)
                    if not was_there and version in self.ram:
                        self.ram.drop(version)
                raise
            with self.lock:
                self._intact[version.name] = version
                self.device.put(version, decoded, source.opened.decoded_nbytes)
                if leaving is not None:
                    self.device.find(version)
                    self.device.pin(version)
            return decoded if leaving is not None else None

    def _make_room(self, version: Version, nbytes: int, may_leave: MayLeave, leaving: Leaving | None) -> bool:
        with self.lock:
            exceed = self._exceed and leaving is not None
            left = self.device.reserve(version, nbytes, may_leave, leaving, exceed=exceed)
            if left is None and leaving is not None:
                if arriving := [self._loading[key] for key in self.device.arriving if key in self._loading]:
                    raise _CrowdedError(arriving)
                used = [key.name for key, item in self.device if self.device.pinned(key) or not may_leave(key, item)]
                raise NoRoomError(
                    f"no room for adapter {version.name!r}, which takes {nbytes:,} bytes decoded: device_bytes is "
                    f"{self.device.budget:,}, and in use, or on a model that is, are "
                    f"{', '.join(map(repr, used)) or 'none'}; "
                    "raise device_bytes, or make fewer adapters active at a time"
                )
            return left is not None

    @contextmanager
    def _packed(self, version: Version, models: Models | None) -> Iterator[tuple[PackedAdapter | None, bool]]:
        """The packed adapter, pinned meanwhile, and whether it was in memory before.

        None where PEFT's needs a model that is not given.
        """
        with self.lock:
            found = there = self.ram.find(version)
            if there is None:
                self.ram.note(False)
            else:
                self.ram.pin(version)
        if there is None:
            found = self._read(version, models)
        try:
            yield found, there is not None
        finally:
            with self.lock:
                if version in self.ram:
                    self.ram.unpin(version)

    def _read(self, version: Version, models: Models | None) -> PackedAdapter | None:
        """Read a file into the tier of packed adapters, pinned; or map it, where there is no room for its bytes."""
        has_room = not version.path.is_dir() and self._reserve_ram(version, version.size)
        try:
            memory: list[HostMemory] = []

            def read(file: Path) -> Bytes:
                memory[:] = [HostMemory(version.size, self._pin_for)]
                return memory[0].fill(file)

            opened = open_adapter(version.path, read if has_room else mapped)
            if opened.is_peft:
                with self.lock:
                    self.ram.release(version)
                    self._peft[version.name] = version._replace(model=0)
                if not version.model:
                    return None  # nothing to keep: the version is another for each model
                return self._keep(version, opened, models)
            compare = self._intact.get(version.name) != version
            found = PackedAdapter(opened, memory[0] if memory else None, compare)
        except BaseException:
            with self.lock:
                self.ram.release(version)
            raise
        with self.lock:
            if has_room and self.ram.put(version, found, found.nbytes):
                self.ram.find(version)
                self.ram.pin(version)
        return found

    def _keep(self, version: Version, opened: OpenedAdapter, models: Models | None) -> PackedAdapter | None:
        """Pack one of PEFT's as one of ours for the models, and keep it, pinned, if there is room."""
        if models is None:
            return None
        found = pack(opened.decode(models=models), opened.path)
        if self._reserve_ram(version, found.nbytes):
            with self.lock:
                self.ram.put(version, found, found.nbytes)
                self.ram.find(version)
                self.ram.pin(version)
        return found

    def _reserve_ram(self, version: Version, nbytes: int) -> bool:
        """Reserve room for packed bytes; the memory of what is evicted is freed when this returns."""
        with self.lock:
            left = self.ram.reserve(version, nbytes, lambda *_: True)
        return left is not None  # not before the lock is free: unpinning memory may wait for the GPU


def _require_unchanged(version: Version) -> None:
    """Refuse a file that was written to while it was read: its bytes may be of two versions."""
    if not version.is_on_disk():
        raise AdapterFormatError(f"{version.path} changed while it was read; use it again once it is written")


def _drop(tier: Tier[T], leaves: Callable[[Version, T], bool], names: Iterable[str] | None = None) -> None:
    for key, item in tier if names is None else tier.named(names):
        if not tier.pinned(key) and leaves(key, item):
            tier.drop(key)
