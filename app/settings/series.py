"""Several prompts, each drawn several times, with seeds that are fixed, counted up or random."""

import reprlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from app.settings.checks import SettingsError, whole
from app.settings.settings import MAX_SEED, Settings, checked_seed
from app.settings.sheets import MAX_PICTURES, Sheet

SEEDS = ("fixed", "next", "random")
"""The same seeds for each prompt; the next one for each picture; as next, from a seed that is drawn."""


def prompt_series(settings: Settings, prompts: Any, count: Any = 1, seeds: Any = "next") -> Sheet:
    """A row per prompt, each with ``count`` pictures; all else as in the settings, whose seed is the first.

    Args:
        settings: its prompt is not used.
        prompts: a list, or text with one per line.
        count: pictures of each prompt.
        seeds: one of ``SEEDS``. What ``random`` has drawn is drawn again with ``next`` and the first picture's seed.

    Raises:
        SettingsError: no prompt, more than 100 pictures, no such seeds, or a prompt that cannot be.
    """
    lines = prompts_of(prompts)
    each = whole("the number of pictures", count, 1, MAX_PICTURES)
    if each * len(lines) > MAX_PICTURES:
        raise SettingsError(f"a series has {MAX_PICTURES} pictures at most, got {len(lines)} prompts x {each}")
    if seeds not in SEEDS:
        raise SettingsError(f"seeds must be one of {', '.join(SEEDS)}, got {reprlib.repr(seeds)}")
    first = checked_seed(None) if seeds == "random" else settings.seed
    drawn = [
        replace(
            Settings.checked(**{**settings.as_dict(), "prompt": line}),
            seed=(first + column + (0 if seeds == "fixed" else row * each)) % (MAX_SEED + 1),
        )
        for row, line in enumerate(lines)
        for column in range(each)
    ]
    captions = tuple(f"seed {each.seed}" for each in drawn)
    cells = tuple((f"{each.prompt} · seed {each.seed}", each) for each in drawn)
    return Sheet(("",) * each, tuple(lines), ("",), cells, captions=captions)


def prompts_of(given: Any) -> list[str]:
    """The prompts of a list, or of text with one per line; blank ones are left out. Raises SettingsError: none."""
    lines = given.splitlines() if isinstance(given, str) else given
    if not isinstance(lines, Sequence) or not all(isinstance(line, str) for line in lines):
        raise SettingsError(f"prompts must be a list of texts, or text with one per line, got {reprlib.repr(given)}")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise SettingsError("no prompt: write one per line")
    return prompts
