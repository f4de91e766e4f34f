"""The adapters that the app offers: those it was started with, and those uploaded or trained in it."""

import logging
import os
import reprlib
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.library.cards import Card, Entry, Origin
from app.library.entries import UNREADABLE, entry_of, glanced, loaded, without_folders
from app.library.loaded_adapters import OPENED_AT_START, ROOM, LoadedAdapters
from app.library.names import free_name, key_of, tidy_name
from app.library.peft_upload import with_config
from app.library.uploads import DEFAULT_MAX_MB, UploadError, received
from app.settings.settings import SettingsError
from shira_diffusers import ShiraAdapter, ShiraError, save_adapter
from shira_diffusers.formats.inspect import Inspection, inspect_adapter
from shira_diffusers.formats.paths import SUFFIX
from shira_diffusers.formats.shira_file import safetensors_in
from shira_diffusers.integrations.pipelines import resident_of
from shira_diffusers.library.folder import adapters_in

logger = logging.getLogger(__name__)

MAX_YOURS = 1000  # adapters that visitors may add
KEEP_DELETED = 30 * 24 * 60 * 60  # seconds that a deleted adapter can be brought back
TOLD_AT_ONCE = 25  # files that were looked at meanwhile, so that open pages need not show each by itself
_BETWEEN = "~"  # in the trash: time deleted, then the name, in which it never is


class Library:
    """The adapters of a folder that is only read, and of a folder of the app's own; none active.

    Of many files, the first are loaded at once; of the others the heads are read, and the rest when they are used
    (``using``, ``adapter``) or nobody draws (``open_next``).

    Safe to use from several threads and beside drawing: what changes the pipeline's adapters waits until the picture in
    progress is done. On disk each change is one rename, so a crash leaves it done or not done.

    Args:
        pipe: the resident pipeline.
        bundled: a folder of adapters, never written to.
        data: the app's folder; uploads and trained adapters go to ``adapters`` in it, deleted ones to ``trash``. None
            keeps the library as it is.
        max_upload_mb: of an uploaded file.
        at_once: how many files are loaded at the start.
        room: bytes of files that may be loaded at once.

    What is damaged, does not fit or bears a name that is taken is in ``refused`` with the reason; the rest goes on.
    """

    def __init__(
        self,
        pipe: Any,
        bundled: Path,
        data: Path | None = None,
        *,
        max_upload_mb: float = DEFAULT_MAX_MB,
        at_once: int = OPENED_AT_START,
        room: int = ROOM,
    ) -> None:
        self._pipe, self._max_upload, self._at_once = pipe, int(max_upload_mb * 1e6), at_once
        self._loaded = LoadedAdapters(pipe, room)
        self._changing = threading.RLock()
        self._entries: tuple[Entry, ...] = ()
        self.version = 0
        self._folder = data / "adapters" if data else None
        entries = self._load_all("bundled", adapters_in(bundled), ())
        if self._folder:
            trash = self._folder.with_name("trash")
            for folder in (self._folder, trash):
                folder.mkdir(parents=True, exist_ok=True)
            _sweep(self._folder, trash)
            found = [(path.stem, path) for path in safetensors_in(self._folder)]  # uploads are files, never folders
            entries += self._load_all("yours", found, entries)
        self._publish(entries)

    # ---------------------------------------------------------------- what is there

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All files, by name in each of the two folders: a snapshot."""
        return self._entries

    @property
    def cards(self) -> tuple[Card, ...]:
        """The loaded adapters: a snapshot."""
        return tuple(entry.card for entry in self._entries if entry.card)

    @property
    def refused(self) -> tuple[tuple[str, str], ...]:
        """Files that were left out, each with the reason."""
        return tuple((entry.name, entry.reason) for entry in self._entries if not entry.card)

    @property
    def writable(self) -> bool:
        """Whether adapters can be added."""
        return self._folder is not None

    def entry(self, name: object) -> Entry:
        """The file of a name. Raises SettingsError: there is none."""
        if name is None:
            raise SettingsError("no adapter is chosen; add or train one first, if there is none")
        found = next((entry for entry in self._entries if entry.name == name), None)
        if found is None:
            known = ", ".join(repr(entry.name) for entry in self._entries) or "none"
            raise SettingsError(f"no adapter named {str(name)[:80]!r} in the library; there are {known}")
        return found

    def inspect(self, name: object) -> Inspection:
        """What the file of a name holds, as ``shira inspect`` tells it.

        Raises:
            ShiraError: there is none, or it cannot be read.
        """
        entry = self.entry(name)
        try:
            return inspect_adapter(entry.path)
        except (ShiraError, OSError) as error:
            raise ShiraError(without_folders(error, entry.path)) from error

    # ---------------------------------------------------------------- what is loaded

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the adapters that are in the pipeline now."""
        return self._loaded.names

    @contextmanager
    def using(self, names: Iterable[str]) -> Iterator[None]:
        """Load adapters, if they are not, and keep them for as long as the body runs.

        Raises:
            SettingsError: one of them is no longer there, or turns out not to fit.
        """
        wanted = tuple(names)
        with self._loaded.pinned(wanted):
            for name in wanted:
                self.adapter(name)
            yield

    def adapter(self, name: str) -> ShiraAdapter:
        """The adapter of a name, loaded if it is not. Raises as ``using``."""
        with self._changing:
            entry = self.entry(name)
            if entry.card and not entry.card.opened:
                entry = self._opened(entry)
                self.version += 1
            if not entry.card:
                raise SettingsError(f"{name!r} cannot be used: {entry.reason}")
            try:
                adapter = self._loaded.open(name, entry.path)
            except UNREADABLE as error:
                raise SettingsError(
                    f"{name!r} cannot be read any more: {without_folders(error, entry.path)}"
                ) from error
            self._loaded.tidy()
            return adapter

    def open_next(self) -> bool:
        """Look at a file of which only the head was read so far, in full; whether there may be more."""
        with self._changing:
            entry = next((each for each in self._entries if each.card and not each.card.opened), None)
            if entry is None:
                return False
            self._opened(entry)
            self._loaded.close(entry.name)  # nobody has asked for it
            left = sum(1 for each in self._entries if each.card and not each.card.opened)
            if left % TOLD_AT_ONCE == 0:
                self.version += 1
            return left > 0

    def _opened(self, entry: Entry) -> Entry:
        known = self._load(entry.origin, entry.name, entry.path)
        self._entries = tuple(known if each is entry else each for each in self._entries)
        return known

    # ---------------------------------------------------------------- changes

    def add(self, file: Path, name: object = None, config: Path | None = None) -> Entry:
        """Take in a copy of a file, and load it if it fits.

        Args:
            file: an adapter of this project or of PEFT's SHiRA tuner.
            config: the ``adapter_config.json`` that PEFT wrote beside it; the two become one file of this project.
            name: as the user calls it, a file's name or anything; it is tidied, and numbered if it is taken.

        Returns:
            Its entry; with the reason in it, if it is intact but does not fit the model.

        Raises:
            UploadError: not an adapter, too large, or the library is full; nothing has changed.
        """
        folder = self._require_writable()
        wanted = tidy_name(name or file.name)
        with self._changing, received(file, folder, f"“{wanted}”", self._max_upload) as copy:
            if sum(entry.origin == "yours" for entry in self._entries) >= MAX_YOURS:
                raise UploadError(f"the library is full: {MAX_YOURS} adapters at most; delete some first")
            name = free_name(wanted, self._keys())
            path = folder / f"{name}.safetensors"
            adapter = with_config(self._pipe, copy, config, f"“{wanted}”") if config else None
            if adapter:
                save_adapter(adapter, copy)
            copy.chmod(0o644)
            os.replace(copy, path)
            entry = self._load("yours", name, path)
            self._publish((*self._entries, entry))
            return entry

    def rename(self, old: object, new: object) -> Entry:
        """Give an adapter of the app's own another name, tidied.

        Raises:
            SettingsError: there is none, it is one that is only read, the name is blank or taken; nothing has changed.
        """
        with self._changing:
            entry = self._own(old, "renamed")
            if not isinstance(new, str) or not new.strip():
                got = "none" if new is None or isinstance(new, str) else reprlib.repr(new)
                raise SettingsError(f"{entry.name!r} needs a name to be renamed to, got {got}")
            name = tidy_name(new)
            if name == entry.name:
                return entry
            if key_of(name) in self._keys() - {key_of(entry.name)}:
                raise SettingsError(f"the name {name!r} is taken; choose another")
            path = entry.path.with_name(f"{name}.safetensors")
            os.rename(entry.path, path)
            renamed = self._reload(entry, name, path)
            self._publish(renamed if each is entry else each for each in self._entries)
            return renamed

    def delete(self, *names: object) -> None:
        """Move adapters of the app's own to the trash, all or none.

        Raises:
            SettingsError: there is none of a name, or it is one that is only read; nothing has changed.
        """
        trash = self._require_writable().with_name("trash")
        with self._changing:
            leaving = {entry.name: entry for entry in [self._own(name, "deleted") for name in names]}
            for entry in leaving.values():
                self._loaded.close(entry.name)
                os.replace(entry.path, trash / f"{time.time_ns()}{_BETWEEN}{entry.path.stem}{SUFFIX}")
                self._publish(each for each in self._entries if each is not entry)

    @property
    def deleted(self) -> tuple[str, ...]:
        """Names of the adapters that ``undo`` can bring back, the newest first."""
        return tuple(path.stem.partition(_BETWEEN)[2] for path in self._in_trash())

    def undo(self, name: str | None = None) -> Entry:
        """Bring back the adapter that was deleted last, or the last of a name; numbered, if its name is taken by now.

        Raises:
            SettingsError: there is none.
        """
        folder = self._require_writable()
        with self._changing:
            found = [path for path in self._in_trash() if name in (None, path.stem.partition(_BETWEEN)[2])]
            if not found:
                told = (
                    "there is nothing to bring back"
                    if name is None
                    else f"no adapter named {reprlib.repr(name)} was deleted"
                )
                raise SettingsError(told)
            name = free_name(tidy_name(found[0].stem.partition(_BETWEEN)[2]), self._keys())
            path = folder / f"{name}.safetensors"
            os.rename(found[0], path)
            entry = self._load("yours", name, path)
            self._publish((*self._entries, entry))
            return entry

    # ---------------------------------------------------------------- how

    def _load_all(
        self, origin: Origin, files: Iterable[tuple[str, Path]], beside: tuple[Entry, ...]
    ) -> tuple[Entry, ...]:
        entries = beside
        for stem, path in sorted(files, key=lambda file: tidy_name(file[0]) != file[0]):  # what is tidy keeps its name
            taken = {key_of(entry.name) for entry in entries}
            name = tidy_name(stem)
            if key_of(name) in taken:
                reason = f"the name {name!r} is in use by another file; rename one of the two"
                free = free_name(name, taken)
                entries += (entry_of(origin, free, path, reason),)
            elif len(entries) < self._at_once:
                entries += (self._load(origin, name, path),)
            else:
                entries += (glanced(origin, name, path),)
        return entries[len(beside) :]

    def _load(self, origin: Origin, name: str, path: Path) -> Entry:
        """Load a file; on failure the entry tells the reason."""
        try:
            adapter = self._loaded.open(name, path)
        except UNREADABLE as error:
            logger.warning("left out %s: %s", path, error)
            return entry_of(origin, name, path, without_folders(error, path))
        return loaded(entry_of(origin, name, path), adapter, resident_of(self._pipe))

    def _reload(self, entry: Entry, name: str, path: Path) -> Entry:
        if not entry.card:
            return self._load("yours", name, path)
        self._loaded.rename(entry.name, name)
        return replace(entry, name=name, path=path, card=replace(entry.card, name=name))

    def _own(self, name: object, what: str) -> Entry:
        entry = self.entry(name)
        if entry.origin != "yours":
            raise SettingsError(f"{entry.name!r} came with the app and cannot be {what}; only what was added here can")
        return entry

    def _require_writable(self) -> Path:
        if self._folder is None:
            raise SettingsError("this app keeps no folder of its own, so nothing can be added; start it with --data")
        return self._folder

    def _in_trash(self) -> list[Path]:
        if not self._folder:
            return []
        deleted = self._folder.with_name("trash").glob(f"*{_BETWEEN}*.safetensors")
        return sorted(deleted, key=_deleted_at, reverse=True)

    def _keys(self) -> set[str]:
        return {key_of(entry.name) for entry in self._entries}

    def _publish(self, entries: Iterable[Entry]) -> None:
        order = {"bundled": 0, "yours": 1}
        self._entries = tuple(sorted(entries, key=lambda entry: (order[entry.origin], key_of(entry.name))))
        self._loaded.tidy()
        self.version += 1


def _deleted_at(path: Path) -> int:
    stamp = path.name.partition(_BETWEEN)[0]
    return int(stamp) if stamp.isdigit() else 0


def _sweep(folder: Path, trash: Path) -> None:
    """Remove what a crash in the middle of an upload left, and what was deleted long ago."""
    old = [path for path in trash.glob("*") if _deleted_at(path) < time.time_ns() - KEEP_DELETED * 1e9]
    for path in [*folder.glob(".upload-*"), *old]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
