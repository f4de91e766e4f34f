"""The adapters that the app offers: those it was started with, and those uploaded or trained in it."""

import logging
import os
import reprlib
import shutil
import threading
import time
from collections.abc import Container, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.library.cards import Card, Origin, described, glanced, measured, without_folders
from app.library.lora_upload import converted
from app.library.names import free_name, key_of, tidy_name, typed_name
from app.library.peft_upload import with_config
from app.library.uploads import DEFAULT_MAX_MB, UploadError, received, require_header
from app.settings.checks import SettingsError
from shira_diffusers import ShiraAdapter, ShiraError, save_adapter
from shira_diffusers.engine.locks import Held
from shira_diffusers.formats.adapter_file import AdapterFile
from shira_diffusers.formats.inspect import inspect_adapter
from shira_diffusers.formats.paths import SUFFIX
from shira_diffusers.formats.shira_file import safetensors_in
from shira_diffusers.integrations.pipelines import resident_of
from shira_diffusers.library import AdapterLibrary
from shira_diffusers.library.folder import adapters_in

logger = logging.getLogger(__name__)

OPENED_AT_START = 24  # files; the others are opened when they are used or nobody draws
ROOM = 2 * 2**30  # bytes of decoded adapters; a mix may exceed it
MAX_YOURS = 1000  # adapters that visitors may add
KEEP_DELETED = 30 * 24 * 60 * 60  # seconds that a deleted adapter can be brought back
NAMES_BEFORE = 8  # of an adapter that was renamed, by which open pages know it
SHOWN_AT_ONCE = 25  # files that were looked at meanwhile, so that open pages need not show each by itself
UNREADABLE = (ShiraError, OSError, RuntimeError, MemoryError, OverflowError)
"""What reading a file of a stranger may raise."""
_BETWEEN = "~"  # in the trash: time deleted, then the name, in which it never is


class Library:
    """The adapters of a folder that is only read, and of a folder of the app's own; none active.

    Of many files, the first are read in full at the start; of the others the headers, and the rest when they are used
    (``using``, ``adapter``) or nobody draws (``open_next``). An ``AdapterLibrary`` decodes and evicts adapters.

    Safe to use from several threads and beside drawing. On disk each change is one rename, so a crash leaves it done or
    not done.

    Args:
        pipe: the resident pipeline.
        bundled: a folder of adapters, never written to.
        data: the app's folder; uploads and trained adapters go to ``adapters`` in it, deleted ones to ``trash``. None
            keeps the library as it is.
        max_upload_mb: of an uploaded file.
        at_once: how many files are read in full at the start.
        room: bytes that decoded adapters may take, besides those of the mix that is drawn.

    What is damaged, does not fit or has a name that is taken is in ``refused`` with the reason; the rest goes on.
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
        self._paths: dict[str, Path] = {}
        # no copies of files in RAM: the system's page cache has them
        self._adapters = AdapterLibrary(
            lambda: self._paths.items(),
            ram_bytes=0,
            device_bytes=room,
            exceed=True,
            device=pipe.device,
            index=data and data / "headers.sqlite",
        )
        self._changing = threading.RLock()
        self._cards: tuple[Card, ...] = ()
        self.version = 0
        self.adapted: frozenset[str] = frozenset()
        """Names of the weights that adapters change, of those that were read so far."""
        self._folder = data / "adapters" if data else None
        if self._folder:
            trash = self._folder.with_name("trash")
            for folder in (self._folder, trash):
                folder.mkdir(parents=True, exist_ok=True)
            _sweep(self._folder, trash)
        cards = self._read_all("bundled", adapters_in(bundled), ())
        if self._folder:
            found = [(path.stem, path) for path in safetensors_in(self._folder)]  # uploads are files, never folders
            cards += self._read_all("yours", found, cards)
        self._publish(cards)

    # ---------------------------------------------------------------- what is there

    @property
    def entries(self) -> tuple[Card, ...]:
        """All files, by name in each of the two folders: a snapshot."""
        return self._cards

    @property
    def cards(self) -> tuple[Card, ...]:
        """The adapters that fit: a snapshot."""
        return tuple(card for card in self._cards if card.fits)

    @property
    def refused(self) -> tuple[tuple[str, str], ...]:
        """Files that were left out, each with the reason."""
        return tuple((card.name, card.reason) for card in self._cards if not card.fits)

    def entry(self, name: object) -> Card:
        """The file of a name. Raises SettingsError: there is none."""
        if name is None:
            raise SettingsError("no adapter is chosen; add or train one first, if there is none")
        found = next((card for card in self._cards if card.name == name), None)
        if found is None:
            known = ", ".join(repr(card.name) for card in self._cards) or "none"
            raise SettingsError(f"no adapter named {str(name)[:80]!r} in the library; there are {known}")
        return found

    def twin(self, card: Card) -> str:
        """The name of another file of the same content, as far as files were read in full; or nothing."""
        same = (each.name for each in self._cards if card.sha256 and each.sha256 == card.sha256)
        return next((name for name in same if name != card.name), "")

    def inspect(self, name: object) -> AdapterFile:
        """What the file of a name holds, as ``shira inspect`` prints it.

        Raises:
            ShiraError: there is none, or it cannot be read.
        """
        path = self.entry(name).path
        try:
            return inspect_adapter(path)
        except (ShiraError, OSError) as error:
            raise ShiraError(without_folders(error, path)) from error

    # ---------------------------------------------------------------- use

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the adapters that are on the pipeline now; none of them is active."""
        return tuple(resident_of(self._pipe).names)

    def using(self, names: Iterable[str]) -> Held[Any]:
        """Adapters on the pipeline for the body of a ``with``, which draws: nobody else does meanwhile.

        Raises:
            SettingsError: one of them is no longer there, or turns out not to fit.
        """
        wanted = tuple(names)
        for name in wanted:
            self.adapter(name)
        return self._adapters.keep(self._pipe, wanted)

    def adapter(self, name: str) -> ShiraAdapter:
        """The adapter of a name, decoded. Raises as ``using``."""
        with self._changing:
            card = self.entry(name)
            if not card.opened:
                card = self._opened(card)
                self.version += 1
            if not card.fits:
                raise SettingsError(f"{name!r} cannot be used: {card.reason}")
            try:
                return self._adapters.get(name, self._pipe)
            except UNREADABLE as error:
                raise SettingsError(f"{name!r} cannot be read any more: {without_folders(error, card.path)}") from error

    def open_next(self) -> bool:
        """Read a file in full of which only the header was read so far; whether there may be more."""
        with self._changing:
            card = next((each for each in self._cards if not each.opened), None)
            if card is None:
                return False
            self._opened(card)
            left = sum(not each.opened for each in self._cards)
            if left % SHOWN_AT_ONCE == 0:
                self.version += 1
            return left > 0

    def _opened(self, card: Card) -> Card:
        known = self._read(card)
        self._cards = tuple(known if each is card else each for each in self._cards)
        return known

    # ---------------------------------------------------------------- changes

    def add(self, file: Path, name: object = None, config: Path | None = None) -> Card:
        """Take in a copy of a file, and load it if it fits.

        Args:
            file: an adapter of this project or of PEFT's SHiRA tuner.
            config: the ``adapter_config.json`` that PEFT wrote beside it; the two become one file of this project.
            name: as the user calls it, a file's name or anything; it is tidied, and numbered if it is taken.

        Returns:
            Its card; with the reason in it, if it is intact but does not fit the model.

        Raises:
            UploadError: not an adapter, too large, or the library is full; nothing has changed.
        """
        folder = self._require_writable()
        wanted = tidy_name(name or file.name)
        with self._changing, received(file, folder, f"“{wanted}”", self._max_upload) as copy:
            adapter = with_config(self._pipe, copy, config, f"“{wanted}”") if config else None
            if adapter:
                save_adapter(adapter, copy)
            return self._take_in(copy, wanted, folder)

    def convert(self, file: Path, name: object = None, config: Path | None = None) -> Card:
        """Convert a LoRA for this model to an adapter of 2 % of the entries, and take that in.

        Args:
            file: a LoRA of diffusers, kohya or PEFT.
            name: as for ``add``.
            config: the ``adapter_config.json`` that PEFT wrote beside it.

        Returns:
            Its card, whose metadata has the share of the update's energy (``energy_kept``) and of its effect on a few
            pictures (``effect_kept``) that is kept.

        Raises:
            UploadError: not a LoRA, one of another model, too large, or the library is full; nothing has changed.
        """
        folder = self._require_writable()
        wanted = tidy_name(name or file.name)
        with received(file, folder, f"“{wanted}”", self._max_upload, require_header) as copy:
            save_adapter(converted(self._pipe, copy, config, f"“{wanted}”"), copy)
            with self._changing:
                return self._take_in(copy, wanted, folder)

    def _take_in(self, copy: Path, wanted: str, folder: Path) -> Card:
        """Give a file in the folder its name, and load it if it fits. Raises UploadError: the library is full."""
        if sum(card.origin == "yours" for card in self._cards) >= MAX_YOURS:
            raise UploadError(f"the library is full: {MAX_YOURS} adapters at most; delete some first")
        name = free_name(wanted, self._keys())
        path = folder / f"{name}.safetensors"
        copy.chmod(0o644)
        os.replace(copy, path)
        card = self._read(Card(name, path, "yours"))
        self._publish((*self._cards, card))
        return card

    def rename(self, old: object, new: object) -> Card:
        """Give an adapter of the app's own another name, tidied.

        Raises:
            SettingsError: there is none, it is one that is only read, the name is blank or taken; nothing has changed.
        """
        with self._changing:
            card = self._own(old, "renamed")
            if not isinstance(new, str) or not new.strip():
                got = "none" if new is None or isinstance(new, str) else reprlib.repr(new)
                raise SettingsError(f"{card.name!r} needs a name to be renamed to, got {got}")
            name = typed_name(new)
            if name == card.name:
                return card
            if key_of(name) in self._keys() - {key_of(card.name)}:
                raise SettingsError(f"the name {name!r} is taken; choose another")
            path = card.path.with_name(f"{name}.safetensors")
            os.rename(card.path, path)
            self._forget(card)
            self._paths = {**self._paths, name: path}
            was = tuple(each for each in (*card.was, card.name) if each != name)[-NAMES_BEFORE:]
            same = replace(card, name=name, path=path, was=was)
            renamed = same if card.fits else self._read(Card(name, path, "yours"))
            self._publish(renamed if each is card else each for each in self._cards)
            return renamed

    def delete(self, *names: object) -> tuple[str, ...]:
        """Move adapters of the app's own to the trash, all or none. Those whose file is gone leave the library too.

        Returns:
            Names of those that ``undo_all`` brings back: whose file was there.

        Raises:
            SettingsError: there is none of a name, or it is one that is only read.
            OSError: a file that cannot be moved.

        On error nothing has changed.
        """
        trash = self._require_writable().with_name("trash")
        with self._changing:
            leaving = {card.name: card for card in [self._own(name, "deleted") for name in names]}
            now = time.time_ns()
            with ExitStack() as undo:
                to = {name: trash / f"{now}{_BETWEEN}{card.path.stem}{SUFFIX}" for name, card in leaving.items()}
                kept = tuple(name for name, card in leaving.items() if _moved(card.path, to[name], undo))
                undo.callback(setattr, self, "_paths", self._paths)
                for card in leaving.values():
                    self._forget(card)
                undo.pop_all()
            self._publish(each for each in self._cards if each.name not in leaving)
            return kept

    @property
    def deleted(self) -> tuple[str, ...]:
        """Names of the adapters that ``undo`` can bring back, the newest first."""
        return tuple(path.stem.partition(_BETWEEN)[2] for path in self._in_trash())

    @property
    def deleted_last(self) -> tuple[str, ...]:
        """Names of the adapters that were deleted last, together."""
        trash = self._in_trash()
        last = [path for path in trash if _deleted_at(path) == _deleted_at(trash[0])]
        return tuple(sorted(path.stem.partition(_BETWEEN)[2] for path in last))

    def undo_all(self) -> tuple[Card, ...]:
        """Bring back the adapters that were deleted last, together. Raises SettingsError: there are none."""
        return tuple(self.undo(name) for name in self.deleted_last or [None])

    def undo(self, name: str | None = None) -> Card:
        """Bring back the adapter that was deleted last, or the last of a name; numbered, if its name is taken.

        Raises:
            SettingsError: there is none.
        """
        folder = self._require_writable()
        with self._changing:
            found = [path for path in self._in_trash() if name in (None, path.stem.partition(_BETWEEN)[2])]
            if not found:
                one = f"no adapter named {reprlib.repr(name)} was deleted"
                raise SettingsError("there is nothing to bring back" if name is None else one)
            name = free_name(tidy_name(found[0].stem.partition(_BETWEEN)[2]), self._keys())
            path = folder / f"{name}.safetensors"
            os.rename(found[0], path)
            card = self._read(Card(name, path, "yours"))
            self._publish((*self._cards, card))
            return card

    # ---------------------------------------------------------------- how

    def _read_all(
        self, origin: Origin, files: Iterable[tuple[str, Path]], beside: tuple[Card, ...]
    ) -> tuple[Card, ...]:
        cards, taken = list[Card](), {key_of(card.name) for card in beside}
        for stem, path in sorted(files, key=lambda file: tidy_name(file[0]) != file[0]):  # what is tidy keeps its name
            card = Card(tidy_name(stem), path, origin)
            if key_of(card.name) in taken:
                reason = f"the name {card.name!r} is in use by another file; rename one of the two"
                card = measured(replace(card, name=free_name(card.name, taken), reason=reason))
            taken.add(key_of(card.name))
            cards.append(card)
        self._paths = {**self._paths, **{card.name: card.path for card in cards if card.fits}}
        at_once = max(0, self._at_once - len(beside))
        headers = self._adapters.headers() if len(cards) > at_once else {}
        opened = tuple(self._read(card) if card.fits else card for card in cards[:at_once])
        return opened + tuple(glanced(card, headers.get(card.name)) if card.fits else card for card in cards[at_once:])

    def _read(self, card: Card) -> Card:
        """Read a file in full; on failure the card has the reason."""
        self._paths = {**self._paths, card.name: card.path}
        try:
            adapter = self._adapters.get(card.name, self._pipe)
            match = resident_of(self._pipe).check(adapter)
        except UNREADABLE as error:
            logger.warning("left out %s: %s", card.path, error)
            return measured(replace(card, reason=without_folders(error, card.path), opened=True))
        finally:
            self._adapters.clear()  # nobody has asked for it
        self.adapted |= adapter.deltas.keys()
        return described(measured(card), adapter, match)

    def _forget(self, card: Card) -> None:
        """Take an adapter off the pipeline."""
        self._paths = {name: path for name, path in self._paths.items() if name != card.name}
        if card.name in self.loaded:
            resident_of(self._pipe).remove(card.name)

    def _own(self, name: object, what: str) -> Card:
        card = self.entry(name)
        if card.origin != "yours":
            raise SettingsError(f"{card.name!r} came with the app and cannot be {what}; only what was added here can")
        return card

    def _require_writable(self) -> Path:
        if self._folder is None:
            raise SettingsError("this app keeps no folder of its own, so nothing can be added; start it with --data")
        return self._folder

    def _in_trash(self) -> list[Path]:
        if not self._folder:
            return []
        deleted = self._folder.with_name("trash").glob(f"*{_BETWEEN}*.safetensors")
        return sorted(deleted, key=lambda path: (-_deleted_at(path), path.name))

    def _keys(self) -> set[str]:
        return {key_of(card.name) for card in self._cards}

    def _publish(self, cards: Iterable[Card]) -> None:
        order = {"bundled": 0, "yours": 1}
        ordered = sorted(cards, key=lambda card: (order[card.origin], key_of(card.name)))
        taken = {card.name for card in ordered}
        self._cards = tuple(_called(card, taken) for card in ordered)
        self.version += 1


def _called(card: Card, taken: Container[str]) -> Card:
    """The card without the earlier names that another has now."""
    return replace(card, was=tuple(name for name in card.was if name not in taken)) if card.was else card


def _moved(file: Path, target: Path, undo: ExitStack) -> bool:
    """Move a file, unless it is gone; whether it was there. What moves it back is added to ``undo``."""
    try:
        os.replace(file, target)
    except FileNotFoundError:
        if file.exists():  # it is the target's folder that is gone
            raise
        return False
    undo.callback(os.replace, target, file)
    return True


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
