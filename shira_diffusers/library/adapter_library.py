"""AdapterLibrary: hundreds of adapters for resident models and many clients, within budgets of bytes."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.scales import Scale, mix_from, name_list
from shira_diffusers.engine.bookkeeping import Ends, Entered
from shira_diffusers.engine.locks import Held, Hold, hold_free
from shira_diffusers.engine.resident import Resident, names_in_use
from shira_diffusers.engine.state import ShiraState, state_of
from shira_diffusers.errors import AdapterFormatError, ShiraError
from shira_diffusers.formats.gpu_decoder import record_stream
from shira_diffusers.library.folder import Catalog, Listing, Version
from shira_diffusers.library.header_index import AdapterHeader, HeaderIndex
from shira_diffusers.library.two_tier_cache import Decoded, MayLeave, NoRoomError, Store, TierStats
from shira_diffusers.weights.finder import unwrap
from shira_diffusers.weights.targets import models_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

RAM_BYTES = 4 * 2**30
DEVICE_BYTES = 2**30

_open: "WeakValueDictionary[int, AdapterLibrary]" = WeakValueDictionary()  # by their id
_made: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # the values that any library has decoded, by their id


@dataclass(frozen=True, slots=True)
class LibraryStats:
    """What a library holds and has done.

    Args:
        device: decoded adapters; a hit is a use that found its adapter decoded.
        ram: packed ones; a hit is a decoding that found the file's bytes in memory, a miss one that read the file.
    """

    device: TierStats
    ram: TierStats


class AdapterLibrary:
    """The adapters of a folder, or of several, loaded when they are used.

    In the host's memory they are kept as in their files, byte for byte, within ``ram_bytes``; decoded, on the device,
    within ``device_bytes``; what is used often is evicted last. All methods are safe to call from several threads: an
    adapter that several clients want is read and decoded once. Files that change on disk are read again at their next
    use.

    Args:
        folder: files ``NAME.safetensors``, and sub-folders ``NAME`` with ``pytorch_shira_weights.safetensors`` or with
            what PEFT's SHiRA tuner wrote. Several folders, in which each name may be once; or a function that gives
            names and paths of such files and sub-folders, called again when a name is not where it was.
        ram_bytes: for packed adapters. 0 keeps none: files are mapped each time they are decoded.
        device_bytes: for decoded adapters: at least those that are active at a time.
        exceed: let adapters in use take more than ``device_bytes``, after all others were evicted; else that is an
            error.
        device: where decoded ones are, best that of the models' weights; None is the current CUDA device, or the CPU
            where there is none. On CUDA the host's memory is pinned and adapters are decoded by the GPU.
        threads: that prefetch.
        index: an SQLite file that keeps ``headers`` between starts, made where there is none. Processes may share it; a
            damaged one is built anew. None, and one that cannot be written, keeps them in memory only.

    Raises:
        FileNotFoundError: there is no such folder.
        ShiraError: a budget below 0.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Listing,
        *,
        ram_bytes: int = RAM_BYTES,
        device_bytes: int = DEVICE_BYTES,
        exceed: bool = False,
        device: str | torch.device | None = None,
        threads: int = 2,
        index: str | os.PathLike[str] | None = None,
    ) -> None:
        if ram_bytes < 0 or device_bytes < 0:
            raise ShiraError(f"budgets must be 0 bytes or more, got ram_bytes={ram_bytes}, device_bytes={device_bytes}")
        self.device = _device(device)
        folders = [folder] if isinstance(folder, str | os.PathLike) else folder
        self._catalog = Catalog(folders if callable(folders) else map(Path, folders))
        self._index = HeaderIndex(None if index is None else Path(index))
        self._store = Store(ram_bytes, device_bytes, self.device, exceed=exceed)
        self._served: WeakSet[nn.Module] = WeakSet()
        self._made: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._pool = ThreadPoolExecutor(threads, "shira-library")
        self._closed = False
        _open[id(self)] = self

    # ---------------------------------------------------------------- what is there

    @property
    def names(self) -> list[str]:
        """All adapters in the folder as it is now, sorted; broken ones too."""
        return list(self._catalog.scan())

    @property
    def broken(self) -> dict[str, str]:
        """Names that cannot be used, with the reason: those that clash, and files found damaged that are still so."""
        paths = self._catalog.scan()
        with self._store.lock:
            refused = [(version, str(error)) for version, _, error in self._store.refused.values()]
        damaged = {v.name: why for v, why in refused if paths.get(v.name) == [v.path] and v.is_on_disk()}
        return {**damaged, **self._catalog.clashes()}

    def headers(self) -> dict[str, AdapterHeader]:
        """What the headers of all adapters in the folder say, by name, but for those that cannot be read.

        Each version of a file is read once, whatever is decoded, active or evicted.
        """
        return self._index.headers(self._catalog.versions())

    def stats(self) -> LibraryStats:
        """Hits, misses, evictions and bytes of both tiers."""
        with self._store.lock:
            return LibraryStats(self._store.device.stats(), self._store.ram.stats())

    def prefetch(self, names: str | Iterable[str]) -> None:
        """Load adapters in the background, as far as the budgets allow; returns at once.

        What is active, what waiting clients want, and what was prefetched before and is not used yet is not evicted for
        them. Errors are raised at use. (PEFT's adapters need a model and are loaded at their first use.)

        Raises:
            ShiraError: the library is closed.
        """
        try:
            for name in name_list(names):
                self._pool.submit(self._prefetch, name).add_done_callback(_log_failure)
        except RuntimeError as error:
            raise ShiraError("the library is closed: make a new one") from error

    def _prefetch(self, name: str) -> None:
        try:
            self._store.warm(self._find(name), None, self._is_spare)
        except (ShiraError, OSError):
            return  # raised at use

    # ---------------------------------------------------------------- use

    def use(self, target: Any, scales: Mapping[str, Scale | None], method: str = "sum") -> Held[Any]:
        """``with library.use(pipe, {"bluefire": 0.8}) as pipe: ...``: a mix for a while; the one before returns after.

        In coroutines ``async with library.use(...): image = await asyncio.to_thread(pipe, prompt)``: files are read in
        a worker thread, and waiting for the model does not block the event loop.

        Args:
            target: a pipeline, a ``Resident``, or what ``Resident`` takes.
            scales: by name, as ``Resident.set`` takes them; None is 1.0. Empty is the base.
            method: how several adapters are merged.

        Holds the model, as ``pipe.shira`` does: other clients load meanwhile, and then wait. Adapters of the mix
        and of the one before are not evicted, whatever others load.

        Raises:
            ShiraError: an unknown name, two adapters of that name, another adapter of that name that is not the
                library's on the model, or no room for the mix within ``device_bytes``.
            AdapterFormatError: a damaged file.
            AdapterMismatchError: see ``Resident.add``.
            ResidentStateError: see ``Resident.add`` and ``Resident.using``.
            OSError: a file that cannot be read.

        On error the mix and all bits are what they were.
        """
        user, mix = _User(target), mix_from(scales)

        def enter(versions: list[Version], ends: ExitStack) -> Any:
            with self._register(user, versions, ends) as undo:
                ends.enter_context(user.resident.using(mix, method))
                undo.pop_all()
            return target

        def inside(_: Hold, versions: list[Version]) -> Entered[Any]:
            return Entered(partial(enter, versions))

        return Held(user.modules, write=True, inside=inside, before=lambda: self._loaded(user, mix))

    def set(self, target: Any, scales: Mapping[str, Scale | None], method: str = "sum") -> None:
        """Make exactly these adapters active until the next ``set``. Args, Raises: as ``use``.

        What is active is never evicted, so it counts against ``device_bytes`` until then.
        """
        user, mix = _User(target), mix_from(scales)
        with (
            self._loaded(user, mix) as versions,
            user.resident.writing(),
            ExitStack() as ends,
            self._register(user, versions, ends) as undo,
        ):
            user.resident.set(mix, method)
            undo.pop_all()

    def keep(self, target: Any, names: str | Iterable[str]) -> Held[Any]:
        """``with library.keep(pipe, ["bluefire"]) as pipe: ...``: adapters on a model for a while, none made active.

        What the body does with them, such as ``pipe.shira``, reads no files. Args, Raises: as ``use``.
        """
        user, wanted = _User(target), name_list(names)

        def enter(versions: list[Version], ends: ExitStack) -> Any:
            self._register(user, versions, ends)
            return target

        def inside(_: Hold, versions: list[Version]) -> Entered[Any]:
            return Entered(partial(enter, versions))

        return Held(user.modules, write=True, inside=inside, before=lambda: self._loaded(user, wanted))

    def get(self, name: str, target: Any = None) -> ShiraAdapter:
        """An adapter by itself, on the library's device.

        Args:
            target: the model that it is for, as of ``use``; PEFT's need one. Nothing on it changes.

        What the caller keeps of it is not counted once it has left the library.

        Raises as ``use``.
        """
        with self.pinned(name, target) as adapter:
            return adapter

    @contextmanager
    def pinned(self, name: str, target: Any = None) -> Iterator[ShiraAdapter]:
        """``with library.pinned("bluefire", pipe) as adapter: ...``: an adapter by itself, not evicted meanwhile.

        It is the same object as long as the file is unchanged and it is pinned by any caller. Args, Raises: as ``get``.
        """
        models = {} if target is None else _User(target).models
        version = self._store.fitted(self._find(name), models)
        with self._store.wanting([version]):
            version, decoded = self._newest(
                version, models, lambda v: self._store.acquire(v, models, self._is_free, lambda *_: None)
            )
        with Ends() as ends:
            ends.callback(self._store.release, version)
            record_stream(decoded.held)
            yield decoded.adapter

    def clear(self, *, packed: bool = True) -> None:
        """Give back the memory of all that is on no model; ``packed=False`` keeps the bytes of files in RAM."""
        self._store.clear(self._is_free, packed=packed)

    def close(self) -> None:
        """Stop prefetching, take what is not active off the models, and give back the memory. Waits for no model.

        What is active stays so, until another library or the user replaces it; on a model that is in use so does all
        else, but for a use of this library, which takes it off at its end. A closed library is of no more use.
        """
        self._closed = True
        _open.pop(id(self), None)
        self._pool.shutdown(cancel_futures=True)
        with self._store.lock:
            served = list(self._served)
        with hold_free(served) as free:
            for module in free:
                self._trim(_User(module))
        self.clear()

    def __enter__(self) -> "AdapterLibrary":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- how

    def _find(self, name: str) -> Version:
        if self._closed:
            raise ShiraError(f"the library of {self._catalog.where} is closed: make a new one")
        return self._catalog.find(name)

    def _loaded(self, user: "_User", names: Iterable[str]) -> Entered[list[Version]]:
        """Load adapters, before the model is waited for; their versions, which newer ones may take the place of."""

        def enter(ends: ExitStack) -> list[Version]:
            found = [self._store.fitted(self._find(name), user.models) for name in names]
            ends.enter_context(self._store.wanting(found))
            versions = [
                self._newest(version, user.models, lambda v: self._store.warm(v, user.models, self._is_free))
                for version in found
            ]
            ends.push(partial(self._forget_older, versions))
            return versions

        return Entered(enter)

    def _forget_older(self, versions: list[Version], failed: type[BaseException] | None, *_: object) -> None:
        for version in versions if failed is None else ():
            self._store.forget_older(version, self._is_free)

    def _register(self, user: "_User", versions: list[Version], ends: ExitStack) -> ExitStack:
        """Register loaded adapters on the model, which is held; what brings older versions of them back.

        That is to be closed if the switch fails.
        """
        ends.callback(self._trim, user)
        with ExitStack() as undo:
            self._keep_active(user, ends)
            versions[:] = [self._register_one(user, version, ends, undo) for version in versions]
            return undo.pop_all()

    def _newest(self, version: Version, models: Mapping[str, nn.Module], load: Callable[[Version], T]) -> T:
        """Load a version, or the one that has taken its place on disk meanwhile."""
        while True:
            try:
                return load(version)
            except (AdapterFormatError, OSError):
                before, version = version, self._store.fitted(self._find(version.name), models)
                if version == before:
                    raise

    def _keep_active(self, user: "_User", pins: ExitStack) -> None:
        """Pin what is active on a model, which becomes one of those served."""
        with self._store.lock:
            self._served.update(user.modules)
            active = {name for module in user.modules if (state := state_of(module)) for name in names_in_use(state)}
            for version, decoded in self._store.device.named(active):
                if any(version.name in names_in_use(state) for state in user.holding(version, decoded)):
                    self._store.device.pin(version)
                    pins.callback(self._store.release, version)

    def _register_one(self, user: "_User", version: Version, pins: ExitStack, undo: ExitStack) -> Version:
        """Load an adapter, pinned, and add it to the model, in place of an older version; which one it is."""
        version, decoded = self._newest(version, user.models, lambda v: self._acquire(v, user))
        pins.callback(self._store.release, version)
        record_stream(decoded.held)
        held = sum(len(state.adapters[version.name].deltas) for state in user.holding(version, decoded))
        if held == len(decoded.adapter.deltas):  # all of it: some of the modules may be others than last time
            return version
        values = {id(delta.values): delta.values for delta in decoded.adapter.deltas.values()}
        with self._store.lock:
            self._made.update(values)
        _made.update(values)
        if version.name not in user.resident.names:
            user.resident.add(decoded.adapter, version.name)
            return version
        older = user.resident.adapter(version.name)
        if not self._may_replace(older):
            raise ShiraError(
                f"the model has an adapter {version.name!r} that is not the library's; delete that one first, or "
                "rename one of the two"
            )
        undo.callback(user.resident.restorer())
        user.resident.replace(decoded.adapter, version.name)
        undo.callback(user.resident.replace, older, version.name)
        return version

    def _acquire(self, version: Version, user: "_User") -> tuple[Version, Decoded]:
        """Make room on the model, which is held, and if that is not enough on others that nobody uses now."""
        try:
            return self._acquire_from(version, user, [user])
        except NoRoomError:
            with self._store.lock:
                others = [module for module in self._served if module not in user.modules]
            with hold_free(others) as free:
                return self._acquire_from(version, user, [user, *map(_User, free)])

    def _acquire_from(self, version: Version, user: "_User", held: Sequence["_User"]) -> tuple[Version, Decoded]:
        def leave(other: Version, decoded: Decoded) -> None:
            for one in held:
                if one.holding(other, decoded):
                    one.resident.remove(other.name)

        return self._store.acquire(version, user.models, self._may_leave(*held), leave)

    def _may_replace(self, adapter: ShiraAdapter) -> bool:
        """Whether it is this library's, or of one that was closed or dropped."""

        def has(made: Mapping[int, Tensor]) -> bool:
            return any(made.get(id(delta.values)) is delta.values for delta in adapter.deltas.values())

        others = (other() for other in _open.valuerefs())  # a copy, which others that open libraries do not change
        return has(self._made) or (has(_made) and not any(has(other._made) for other in others if other is not None))

    def _trim(self, user: "_User") -> None:
        """Take what is not active off a model, until all that is so on any is at most half of what the device may hold.

        It stays decoded, but may now be evicted while the model is busy: there is room to prefetch. Of a closed library
        all of it leaves.
        """
        with self._store.lock:
            tier, may_leave = self._store.device, self._may_leave(user)
            known = {name for module in self._served if (state := state_of(module)) for name in state.adapters}
            idle = {
                version: tier.size(version)
                for version, decoded in tier.named(known)
                if not tier.pinned(version) and self._is_idle(version, decoded)
            }
            excess = sum(idle.values()) - (0 if self._closed else tier.budget // 2)
            for version, decoded in tier if excess > 0 else ():
                if excess <= 0:
                    break
                if version in idle and user.holding(version, decoded):
                    is_last = may_leave(version, decoded)
                    user.resident.remove(version.name)
                    excess -= idle[version] if is_last else 0  # another model takes it off in its turn

    def _is_idle(self, version: Version, decoded: Decoded) -> bool:
        """Whether models have it, and it is active on none."""
        states = [state for module in self._served if (state := _holds(module, version, decoded))]
        return bool(states) and not any(version.name in names_in_use(state) for state in states)

    def _is_free(self, version: Version, decoded: Decoded) -> bool:
        """Whether no model has it."""
        return not any(_holds(module, version, decoded) for module in self._served)

    def _is_spare(self, version: Version, decoded: Decoded) -> bool:
        """Whether it is free, and not prefetched for a use to come."""
        return not self._store.device.expects(version) and self._is_free(version, decoded)

    def _may_leave(self, *held: "_User") -> MayLeave:
        """What is active nowhere, and on no other models."""
        modules = [module for user in held for module in user.modules]

        def may_leave(version: Version, decoded: Decoded) -> bool:
            found = [(module, state) for module in self._served if (state := _holds(module, version, decoded))]
            return all(module in modules and version.name not in names_in_use(state) for module, state in found)

        return may_leave


class _User:
    """A model that adapters are for: the resident engine over it, and its modules out of their wrappers."""

    def __init__(self, target: Any) -> None:
        if isinstance(target, Resident):
            self.resident = target
        elif isinstance(target, nn.Module | Mapping) or models_of(target):
            self.resident = Resident(target)
        else:
            raise ShiraError(
                f"expected a pipeline, a Resident, a module or {{component: module}}, got {type(target).__name__}"
            )
        self.models = self.resident.models
        self.modules = [unwrap(model) for model in self.models.values()]

    def holding(self, version: Version, decoded: Decoded) -> list[ShiraState]:
        """The states of those of its modules that have an adapter."""
        return [state for module in self.modules if (state := _holds(module, version, decoded))]


def _holds(module: nn.Module, version: Version, decoded: Decoded) -> ShiraState | None:
    """The state of a module that has this very adapter: models keep its deltas, so they are the same objects."""
    state = state_of(module)
    theirs = state.adapters.get(version.name) if state else None
    first = next(iter(theirs.deltas.values()), None) if theirs else None
    return state if first is not None and any(first is delta for delta in decoded.adapter.deltas.values()) else None


def _log_failure(done: Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.error("prefetching failed", exc_info=error)


def _device(device: str | torch.device | None) -> torch.device:
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found
