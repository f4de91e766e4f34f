"""Entries of the library out of files: loaded, glanced at, or left out with the reason."""

from dataclasses import replace
from pathlib import Path

from app.library.cards import Card, Entry, Origin, one_sentence, sha256_of, shown_metadata
from app.library.loaded_adapters import glance
from app.library.peft_upload import NO_CONFIG
from shira_diffusers import Resident, ShiraAdapter, ShiraError
from shira_diffusers.library.folder import weights_file

UNREADABLE = (ShiraError, OSError, RuntimeError, MemoryError, OverflowError)
"""What loading a file of a stranger may raise."""


def entry_of(origin: Origin, name: str, path: Path, reason: str = "") -> Entry:
    """An entry without a card."""
    try:
        file = weights_file(path)
        return Entry(name, path, origin, file.stat().st_size / 1e6, sha256_of(file), reason=reason)
    except OSError as error:
        return Entry(name, path, origin, 0.0, "", reason=reason or without_folders(error, path))


def loaded(entry: Entry, adapter: ShiraAdapter, resident: Resident) -> Entry:
    """The entry with the card of its adapter, which is loaded under its name."""
    metadata = shown_metadata(adapter.metadata)
    told = f" ({metadata['base_model']})" if metadata.get("base_model") else ""
    notes = []
    if resident.check(adapter) == "other":
        notes.append(f"It fits by shape but was trained on another model{told}: expect poor pictures")
    if adapter.metadata == {"source": "peft"}:
        notes.append(NO_CONFIG)
    card = Card(
        name=entry.name,
        density=adapter.density,
        entries=adapter.nnz,
        megabytes=entry.megabytes,
        trigger=metadata.get("instance_prompt", ""),
        mask=metadata.get("mask", ""),
        note=". ".join(notes),
        metadata=metadata,
        sha256=entry.sha256,
        origin=entry.origin,
        components=tuple(sorted(resident.components_of(entry.name))),
    )
    return replace(entry, card=card)


def glanced(origin: Origin, name: str, path: Path) -> Entry:
    """An entry by the head of its file alone."""
    try:
        file = weights_file(path)
        head, megabytes = glance(file), file.stat().st_size / 1e6
    except (ShiraError, OSError) as error:
        return entry_of(origin, name, path, without_folders(error, path))
    metadata = shown_metadata(head.metadata)
    card = Card(
        name=name,
        density=_fraction(metadata.get("density", "")),
        entries=0,
        megabytes=megabytes,
        trigger=metadata.get("instance_prompt", ""),
        mask=metadata.get("mask", ""),
        note="",
        metadata=metadata,
        origin=origin,
        components=head.components,
        opened=False,
    )
    return Entry(name, path, origin, megabytes, "", card)


def without_folders(error: Exception, path: Path) -> str:
    """An error in one sentence that names the file, but no folder: visitors need none."""
    return one_sentence(error).replace(str(path), path.name)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 <= value <= 1 else 0.0
