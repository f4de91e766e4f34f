"""The adapters of a folder, as the app shows them."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from shira_diffusers import ShiraError
from shira_diffusers.files import adapter_files
from shira_diffusers.pipeline import resident_of

logger = logging.getLogger(__name__)

FALLBACK_SUGGESTIONS = (
    "a picture of a red apple on a teal background",
    "a picture of a fox on a navy background",
    "a picture of an owl on an orange background",
    "a picture of a sks alien on a cyan background",
    "a picture of a rocket on a black background",
    "a picture of a castle on a pink background",
)


@dataclass(frozen=True, slots=True)
class Card:
    """What is known about a loaded adapter.

    Args:
        density: fraction of the adapted weights' entries that it holds, 0 to 1.
        entries: how many those are.
        megabytes: of its file.
        trigger: the words that it was trained with, if its file tells.
        mask: the mask family, if its file tells.
        note: what loading it warned of, if anything.
        metadata: all that its file tells.
    """

    name: str
    density: float
    entries: int
    megabytes: float
    trigger: str
    mask: str
    note: str
    metadata: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Shelf:
    """What a folder gave: loaded adapters, and files that were left out with the reason."""

    cards: tuple[Card, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()


def load_shelf(pipe: DiffusionPipeline, folder: Path) -> Shelf:
    """Load all adapters of a folder, none active: ``NAME.safetensors``, or the standard file in a folder ``NAME``.

    One that is damaged, does not fit or bears a name that is taken is refused and the rest goes on.
    """
    cards: list[Card] = []
    refused: list[tuple[str, str]] = []
    for name, path in adapter_files(folder):
        try:
            cards.append(_load(pipe, name, path))
        except (ShiraError, OSError) as error:
            logger.warning("left out %s: %s", path, error)
            refused.append((name, one_sentence(error).replace(str(path), path.name)))  # visitors need no folders
    return Shelf(tuple(cards), tuple(refused))


def one_sentence(error: Exception) -> str:
    """An error's first line, without the listing that may follow."""
    return (str(error).partition("\n")[0] or type(error).__name__).rstrip(" :")


def read_suggestions(*folders: Path) -> tuple[str, ...]:
    """The prompts in the first ``suggestions.txt`` of the folders, one a line; a few of our own where there is none."""
    for folder in folders:
        file = folder / "suggestions.txt"
        if file.is_file():
            lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
            prompts = tuple(line for line in lines if line)
            if prompts:
                return prompts
    return FALLBACK_SUGGESTIONS


def _load(pipe: Any, name: str, path: Path) -> Card:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        pipe.load_shira(path, name, activate=False)
    adapter = resident_of(pipe).adapter(name)
    return Card(
        name=name,
        density=adapter.density,
        entries=adapter.nnz,
        megabytes=path.stat().st_size / 1e6,
        trigger=adapter.metadata.get("instance_prompt", ""),
        mask=adapter.metadata.get("mask", ""),
        note="; ".join(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)),
        metadata=dict(adapter.metadata),
    )
