"""What the app shows of an adapter: plain data."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from shira_diffusers.cli.terminal import printable
from shira_diffusers.library.folder import weights_file

Origin = Literal["bundled", "yours"]
"""Of the folder that the app was started with, which it never writes to; or uploaded or trained in the app."""

SHOWN_VALUE = 2000  # characters of a metadata value
SHOWN_PAIRS = 100


@dataclass(frozen=True, slots=True)
class Card:
    """What is known about a loaded adapter.

    Args:
        density: fraction of the adapted weights' entries that it holds, 0 to 1.
        entries: how many those are.
        megabytes: of its file.
        trigger: the words that it was trained with, if its file tells.
        mask: the mask family, if its file tells.
        note: what the user should know before use, such as that it was trained on another model; mostly empty.
        metadata: all that its file tells, control characters escaped, long values cut.
        sha256: of its file, in hexadecimal.
        origin: whether it came with the app or was added in it.
        components: the models that it changes, such as "unet".
        opened: whether all of its file was read and fits the model; before, entries and note are not known, and the
            rest is what its file claims.
    """

    name: str
    density: float
    entries: int
    megabytes: float
    trigger: str
    mask: str
    note: str
    metadata: Mapping[str, str]
    sha256: str = ""
    origin: Origin = "bundled"
    components: tuple[str, ...] = ()
    opened: bool = True

    @property
    def base(self) -> str:
        """The model that it was trained on, if its file tells."""
        return self.metadata.get("base_model", "")

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return {**asdict(self), "components": list(self.components)}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the library: loaded, with its card, or left out, with the reason in one sentence."""

    name: str
    path: Path
    origin: Origin
    megabytes: float
    sha256: str
    card: Card | None = None
    reason: str = ""

    @property
    def file(self) -> Path:
        """The file that holds the values: ``path``, or in a folder that PEFT saved."""
        return weights_file(self.path)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; no path, which visitors need not know."""
        shared = {"name": self.name, "origin": self.origin, "megabytes": self.megabytes, "sha256": self.sha256}
        return {**shared, "fits": self.card is not None, "reason": self.reason} | (
            self.card.as_dict() if self.card else {}
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
