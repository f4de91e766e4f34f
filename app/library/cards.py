"""Describe each file of the library: what the app knows of it, from its header or from opening it."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from shira_diffusers import ShiraAdapter, ShiraError
from shira_diffusers.adapters.base_probes import BaseMatch
from shira_diffusers.cli.terminal import printable
from shira_diffusers.formats.header import LORA_HINT
from shira_diffusers.formats.opened_adapter import open_adapter
from shira_diffusers.library.folder import weights_file
from shira_diffusers.library.header_index import AdapterHeader

Origin = Literal["bundled", "yours"]
"""Of the folder that the app was started with, which it never writes to; or uploaded or trained in the app."""

SHOWN_VALUE = 2000  # characters of a metadata value
SHOWN_PAIRS = 100
NO_CONFIG = (
    "Its adapter_config.json did not come with it, so its base and mask are unknown; upload both files "
    "together. Strength 1 is what it was trained for either way."
)


@dataclass(frozen=True, slots=True)
class Card:
    """A file of the library and what is known about it.

    Args:
        path: the file, or the folder that PEFT saved it in.
        origin: whether it came with the app or was added in it.
        megabytes: of the file that holds the values.
        sha256: of that file, in hexadecimal; empty while only its header was read.
        reason: why it is left out, in one sentence; empty if it fits.
        density: fraction of the adapted weights' entries that it holds, 0 to 1.
        entries: how many those are.
        note: what the user should know before use, such as that it was trained on another model; mostly empty.
        metadata: all of its file's metadata, control characters escaped, long values cut.
        components: the models that it changes, such as "unet".
        opened: whether all of its file was read and fits the model; before, its note is unknown, and the rest is what
            its header claims.
        was: names that it had before it was renamed, since the app was started; no file has them now.
    """

    name: str
    path: Path
    origin: Origin
    megabytes: float = 0.0
    sha256: str = ""
    reason: str = ""
    density: float = 0.0
    entries: int = 0
    note: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    components: tuple[str, ...] = ()
    opened: bool = True
    was: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it can be mixed, as far as is known."""
        return not self.reason

    @property
    def lora(self) -> bool:
        """Whether it is left out as a LoRA, which can be converted."""
        return LORA_HINT in self.reason

    @property
    def file(self) -> Path:
        """The file that holds the values: ``path``, or in a folder that PEFT saved."""
        return weights_file(self.path)

    @property
    def base(self) -> str:
        """The model that it was trained on, if known."""
        return self.metadata.get("base_model", "")

    @property
    def trigger(self) -> str:
        """The words that it was trained with, if known."""
        return self.metadata.get("instance_prompt", "")

    @property
    def mask(self) -> str:
        """The mask family, if known."""
        return self.metadata.get("mask", "")

    def as_dict(self) -> dict[str, Any]:
        """For JSON; no path, which visitors need not know."""
        known = asdict(self) | {"components": list(self.components), "trigger": self.trigger, "mask": self.mask}
        del known["path"], known["was"]
        shown = known if self.fits else {name: known[name] for name in ("name", "origin", "megabytes", "sha256")}
        return {**shown, "fits": self.fits, "reason": self.reason}


def measured(card: Card) -> Card:
    """The card with the size and the hash of its file; with a reason, if that cannot be read."""
    try:
        return replace(card, megabytes=card.file.stat().st_size / 1e6, sha256=sha256_of(card.file))
    except OSError as error:
        return replace(card, reason=card.reason or without_folders(error, card.path))


def glanced(card: Card, header: AdapterHeader | None = None) -> Card:
    """The card by the header of its file alone, which is cheap to read and may lie; read here if it is not given."""
    try:
        header = header or AdapterHeader.of(open_adapter(card.path))
    except (ShiraError, OSError) as error:
        return measured(replace(card, reason=without_folders(error, card.path)))
    return replace(
        card,
        megabytes=header.size / 1e6,
        density=header.density or 0.0,
        entries=header.nnz,
        metadata=shown_metadata(header.metadata),
        components=tuple(header.components),
        opened=False,
    )


def described(card: Card, adapter: ShiraAdapter, match: BaseMatch | None) -> Card:
    """The card of an adapter that fits.

    Args:
        match: whether this is the base that it was trained on, as ``Resident.check`` says.
    """
    metadata = shown_metadata(adapter.metadata)
    notes = []
    if match == "other":
        base = f" ({metadata['base_model']})" if metadata.get("base_model") else ""
        notes.append(f"It fits by shape but was trained on another model{base}: expect poor pictures")
    if metadata.get("source") == "peft" and "mask" not in metadata:
        notes.append(NO_CONFIG)
    return replace(
        card,
        density=adapter.density,
        entries=adapter.nnz,
        note=". ".join(notes),
        metadata=metadata,
        components=tuple(sorted({name.partition(".")[0] for name in adapter.deltas})),
        opened=True,
    )


def shown_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a file that a stranger wrote, fit to be shown."""
    pairs = sorted(metadata.items())[:SHOWN_PAIRS]
    shown = {printable(key[:100]): printable(value[:SHOWN_VALUE]) for key, value in pairs}
    return {f"{key}_" if key == "path" else key: value for key, value in shown.items()}  # clients fetch a "path"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_sentence(error: Exception) -> str:
    """An error's first line, without the listing that may follow."""
    return (str(error).partition("\n")[0] or type(error).__name__).rstrip(" :")


def without_folders(error: Exception, path: Path) -> str:
    """An error in one sentence that names the file, but no folder: visitors need none."""
    return one_sentence(error).replace(str(path), path.name)
