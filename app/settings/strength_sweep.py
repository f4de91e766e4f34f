"""One or two adapters over a range of strengths, all else equal."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from app.settings.checks import SettingsError, number
from app.settings.settings import Settings
from app.settings.strengths import MAX_STRENGTH, MIN_STRENGTH

MAX_PICTURES = 49


@dataclass(frozen=True, slots=True)
class Axis:
    """An adapter and the strengths that it is to have."""

    adapter: str
    strengths: tuple[float, ...]

    @classmethod
    def checked(cls, adapter: Any, strengths: Any) -> Self:
        """An axis from untrusted values. Raises SettingsError: no adapter, or no list of strengths from -1 to 2."""
        if not isinstance(adapter, str) or not adapter:
            raise SettingsError(f"a sweep needs the name of a style, got {reprlib.repr(adapter)}")
        if not isinstance(strengths, Sequence) or isinstance(strengths, str) or not strengths:
            raise SettingsError(f"a sweep needs a list of strengths, like [0, 0.5, 1], got {reprlib.repr(strengths)}")
        if len(strengths) > MAX_PICTURES:
            raise SettingsError(f"a sweep has {MAX_PICTURES} pictures at most, got {len(strengths)} strengths")
        what = f"the strength of {reprlib.repr(adapter)}"
        return cls(adapter, tuple(number(what, each, MIN_STRENGTH, MAX_STRENGTH) for each in strengths))

    @classmethod
    def between(cls, adapter: Any, low: Any, high: Any, count: Any) -> Self:
        """``count`` strengths from ``low`` to ``high``, evenly spaced, both included.

        Raises:
            SettingsError: as ``checked``; or a count below 2.
        """
        first = number("the first strength", low, MIN_STRENGTH, MAX_STRENGTH)
        last = number("the last strength", high, MIN_STRENGTH, MAX_STRENGTH)
        parts = int(number("the number of pictures", count, 2, MAX_PICTURES)) - 1
        return cls.checked(adapter, [round(first + (last - first) * k / parts, 4) for k in range(parts + 1)])


def sweep_of(settings: Settings, across: Axis, down: Axis | None = None) -> tuple[tuple[str, Settings], ...]:
    """What a sweep draws, row by row, with labels; the rest of the settings' mix stays as it is.

    Raises:
        SettingsError: the same adapter twice, or more than 49 pictures.
    """
    if down is None:
        return tuple((f"{across.adapter} {s:g}", _with(settings, {across.adapter: s})) for s in across.strengths)
    if down.adapter == across.adapter:
        raise SettingsError(f"a grid needs two different styles, got {across.adapter!r} twice")
    count = len(across.strengths) * len(down.strengths)
    if count > MAX_PICTURES:
        raise SettingsError(f"a sweep has {MAX_PICTURES} pictures at most, got {count}; choose fewer strengths")
    return tuple(
        (f"{across.adapter} {x:g}, {down.adapter} {y:g}", _with(settings, {across.adapter: x, down.adapter: y}))
        for y in down.strengths
        for x in across.strengths
    )


def _with(settings: Settings, strengths: dict[str, float]) -> Settings:
    mix = {**settings.mix, **strengths}
    return replace(settings, mix={name: mix[name] for name in sorted(mix)})
