"""LoadedAdapters: adapters on a model while pictures are drawn with them, whatever becomes of their files."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.engine.resident import Resident
from shira_diffusers.library import AdapterLibrary, NoRoomError


@dataclass(slots=True)
class _Loaded:
    adapter: ShiraAdapter
    pin: ExitStack
    users: int = 0


class _Alias(str):
    """An adapter's name on the model, which messages show as that of its file; ``str`` gives it whole."""

    __slots__ = ("_file",)
    _file: str

    def __new__(cls, name: str, serial: int) -> "_Alias":
        """Make a name that is unique, and sorts as the file's does: nothing sorts before NUL."""
        alias = super().__new__(cls, f"{name}\0{serial}")
        alias._file = name
        return alias

    def __repr__(self) -> str:
        return repr(self._file)

    def __format__(self, spec: str) -> str:
        return format(self._file, spec)


class LoadedAdapters:
    """Adapters of a library on a model that the caller holds; on leaving, the mix and the adapters of before.

    Each version of a file has a name of its own on the model, so that a picture that was begun with one is finished
    with it. These names sort as those of the files do, so that sums have the same bits.

    Args:
        resident: of the pipeline's models.
        library: the adapters.
        pipe: whom they are for.
    """

    def __init__(self, resident: Resident, library: AdapterLibrary, pipe: Any) -> None:
        self._resident, self._library, self._pipe = resident, library, pipe
        self._loaded: dict[str, _Loaded] = {}  # those of least recent use first
        # unused ones stay, as adding one again costs as much as a switch, but leave room to prefetch others
        self._unused_bytes = library.stats().device.budget // 2
        self._active: dict[str, float] | None = None
        self._serial = count()
        self._restore = resident.restorer()

    def __enter__(self) -> "LoadedAdapters":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._restore()
        finally:
            self._unused_bytes = 0  # also for those that are still in use, after an error
            self._drop_unused(0)

    @contextmanager
    def loaded(self, mix: Mapping[str, float]) -> Iterator[dict[str, float]]:
        """Keep the adapters of a mix on the model; the mix by their names there.

        Raises:
            NoRoomError: no room beside those in use.
            ShiraError, OSError: see ``AdapterLibrary.use``; nothing has changed then.
        """
        with ExitStack() as stack:
            yield {stack.enter_context(self._using(name)): strength for name, strength in mix.items()}

    def activate(self, mix: dict[str, float]) -> bool:
        """Make a mix that ``loaded`` gave active; whether it was not. Raises as ``Resident.set``."""
        switches = mix != self._active
        if switches:
            self._resident.set(mix)
            self._active = mix
        self._resident.refresh()  # pipelines that offload their models do so at the end of a call
        return switches

    @contextmanager
    def _using(self, name: str) -> Iterator[str]:
        known = self._find(name)
        loaded = self._loaded[known] = self._loaded.pop(known)
        loaded.users += 1
        try:
            yield known
        finally:
            loaded.users -= 1
            self._drop_unused(self._unused_bytes)

    def _find(self, name: str) -> str:
        """The name on the model of an adapter as its file is now, added if it is not there."""
        with ExitStack() as pin:
            adapter = self._pinned(name, pin)
            known = next((alias for alias, loaded in self._loaded.items() if loaded.adapter is adapter), None)
            if known is not None:
                return known
            alias = _Alias(name, next(self._serial))
            self._resident.add(adapter, alias)
            self._loaded[alias] = _Loaded(adapter, pin.pop_all())
            return alias

    def _pinned(self, name: str, pin: ExitStack) -> ShiraAdapter:
        try:
            return pin.enter_context(self._library.pinned(name, self._pipe))
        except NoRoomError:
            self._drop_unused(0)
            return pin.enter_context(self._library.pinned(name, self._pipe))

    def _drop_unused(self, most: int) -> None:
        """Take adapters that nobody uses off the model, until all that are left take a number of bytes at most."""
        unused = {alias: loaded.adapter.nbytes for alias, loaded in self._loaded.items() if not loaded.users}
        excess = sum(unused.values()) - most
        for alias, nbytes in unused.items():
            if excess <= 0 < most:
                break
            excess -= nbytes
            if self._active and alias in self._active:
                self._active = None
            self._resident.remove(alias)
            self._loaded.pop(alias).pin.close()
