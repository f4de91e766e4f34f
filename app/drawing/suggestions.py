"""Prompts and a mix that the app suggests."""

from collections.abc import Sequence
from pathlib import Path

from app.settings.strengths import Mix
from shira_diffusers.cli.demo import BUNDLED, MIX

FALLBACK_SUGGESTIONS = (
    "a picture of a red apple on a teal background",
    "a picture of a fox on a navy background",
    "a picture of an owl on an orange background",
    "a picture of a sks alien on a cyan background",
    "a picture of a rocket on a black background",
    "a picture of a castle on a pink background",
)


def first_mix(names: Sequence[str]) -> Mix:
    """What the page opens with: of the bundled styles a pair, or else the first style."""
    return MIX if set(names) >= BUNDLED else dict.fromkeys(names[:1], 1.0)


def first_pair(names: Sequence[str]) -> list[str]:
    """What Interference opens with: the pair that the page opens with, or else the first two styles."""
    return list(MIX) if set(names) >= BUNDLED else list(names[:2])


def read_suggestions(*folders: Path) -> tuple[str, ...]:
    """The prompts in the first ``suggestions.txt`` of the folders, one per line; defaults where there is none."""
    for folder in folders:
        file = folder / "suggestions.txt"
        if file.is_file():
            lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
            prompts = tuple(line for line in lines if line)
            if prompts:
                return prompts
    return FALLBACK_SUGGESTIONS
