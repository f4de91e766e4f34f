"""What changes from picture to picture of a sheet: any setting over any values, in up to three directions."""

import csv
import re
import reprlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from typing import Any, Self

from app.settings.checks import SettingsError, number, whole
from app.settings.settings import RANDOM_SEED, Settings, checked_seed, size_of
from app.settings.sheets import MAX_PICTURES, Sheet
from app.settings.strengths import MAX_STRENGTH, MIN_STRENGTH

Change = Callable[[Settings], Settings]
KINDS = (
    "strength", "style", "words", "prompt", "negative", "seed", "steps", "guidance", "method", "size", "change",
    "negative_mix",
)  # fmt: skip
"""What an axis can change: the strength of one style; which style, alone; words of the prompt; or a setting."""
NUMBERS = ("strength", "seed", "steps", "guidance", "change", "negative_mix")
MAX_VALUES = 100_000  # characters of text, below the longest field that csv reads
_RANGE = re.compile(r"\s*(-?[\d.]+)\s+to\s+(-?[\d.]+)\s*\(\s*(\d{1,9})\s*\)\s*")


@dataclass(frozen=True, slots=True)
class Axis:
    """A direction of a sheet.

    Args:
        what: changes along it, in a word: a style's name, or the kind.
        points: label and change of each value.
        kind: one of ``KINDS``.
    """

    what: str
    points: tuple[tuple[str, Change], ...]
    kind: str = "strength"

    @classmethod
    def checked(cls, kind: Any, values: Any, style: Any = None) -> Self:
        """An axis from untrusted values.

        Args:
            kind: one of ``KINDS``.
            values: a list; or text: a value per line or between commas, of numbers also ``0 to 1 (5)``, which is five
                from 0 to 1. Of words the first are those in the prompt, in whose place the others come.
            style: whose strength changes.

        Raises:
            SettingsError: no such kind, no values or too many, or one that is not of this kind; those of settings are
                checked by ``sheet_of``.
        """
        if kind not in KINDS:
            raise SettingsError(f"a sheet changes one of {', '.join(KINDS)}, got {reprlib.repr(kind)}")
        given = _values(kind, values)
        if kind == "strength":
            return cls.of_strengths(style, given)
        return cls(kind, tuple(_point(kind, each, given[0]) for each in given), kind)

    @classmethod
    def of_strengths(cls, style: Any, strengths: Any) -> Self:
        """A style at a list of strengths. Raises SettingsError: no style, or no list of strengths from -1 to 2."""
        if not isinstance(style, str) or not style:
            raise SettingsError(f"a sweep needs the name of a style, got {reprlib.repr(style)}")
        if not isinstance(strengths, Sequence) or isinstance(strengths, str) or not strengths:
            raise SettingsError(f"a sweep needs a list of strengths, like [0, 0.5, 1], got {reprlib.repr(strengths)}")
        _require_few(len(strengths))
        what = f"the strength of {reprlib.repr(style)}"
        numbers = [number(what, each, MIN_STRENGTH, MAX_STRENGTH) for each in strengths]
        return cls(style, tuple((f"{each:g}", _with_strength(style, each)) for each in numbers))

    @classmethod
    def between(cls, style: Any, low: Any, high: Any, count: Any) -> Self:
        """``count`` strengths from ``low`` to ``high``, evenly spaced, both included.

        Raises:
            SettingsError: as ``of_strengths``; or a count below 2.
        """
        first = number("the first strength", low, MIN_STRENGTH, MAX_STRENGTH)
        last = number("the last strength", high, MIN_STRENGTH, MAX_STRENGTH)
        return cls.of_strengths(style, _spread(first, last, whole("the number of pictures", count, 2, MAX_PICTURES)))


def sheet_of(settings: Settings, axes: Sequence[Axis]) -> Sheet:
    """All combinations of up to three axes; the rest of the settings, such as other styles of the mix, stays.

    Raises:
        SettingsError: the same twice, more than 100 pictures, or a setting out of its range.
    """
    names = [(axis.kind, axis.what) for axis in axes]
    for axis in axes:
        if names.count((axis.kind, axis.what)) > 1 and axis.kind == "strength":
            raise SettingsError(f"a grid needs two different styles, got {axis.what!r} twice")
        if names.count((axis.kind, axis.what)) > 1:
            raise SettingsError(f"each axis must change something else, got {axis.what!r} twice")
    x, y, z = (*axes, *[Axis("", (("", lambda given: given),))] * (3 - len(axes)))
    _require_few(len(x.points) * len(y.points) * len(z.points))
    cells = []
    for points in product(z.points, y.points, x.points):
        drawn = settings
        for _, change in points:
            drawn = change(drawn)
        told = (f"{axis.what} {label}" for axis, (label, _) in zip((x, y, z), reversed(points), strict=True) if label)
        cells.append((", ".join(told), drawn))
    columns, rows, tables = (tuple(label for label, _ in axis.points) for axis in (x, y, z))
    return Sheet(columns, rows, tables, tuple(cells), (x.what, y.what, z.what))


def _require_few(count: int) -> None:
    if count > MAX_PICTURES:
        raise SettingsError(f"a sheet has {MAX_PICTURES} pictures at most, got {count}; choose fewer values")


def _values(kind: str, given: Any) -> list[Any]:
    if isinstance(given, str):
        if len(given) > MAX_VALUES:
            most = f"{MAX_VALUES} characters at most, got {len(given)}"
            raise SettingsError(f"the values of the axis {kind!r} are too long: {most}; choose fewer")
        lines = given.strip().splitlines()
        if len(lines) < 2:  # of csv, which takes no other line than a whole one
            lines = next(csv.reader(lines, skipinitialspace=True), [])
        given = [each for line in lines if line.strip() for each in _expanded(kind, line.strip())]
    if not isinstance(given, Sequence) or not given:
        example = "0 to 1 (5)" if kind in NUMBERS else "fox, owl"
        raise SettingsError(f"the axis {kind!r} needs values, like {example}, got {reprlib.repr(given)}")
    _require_few(len(given))
    nameless = [] if kind in NUMBERS else [each for each in given if not isinstance(each, str)]
    if nameless:
        raise SettingsError(f"a value of the axis {kind!r} must be text, got {reprlib.repr(nameless[0])}")
    return list(given)


def _expanded(kind: str, text: str) -> list[Any]:
    """A value of text, as a number where numbers are wanted; a range is several."""
    if kind not in NUMBERS:
        return [text]
    found = _RANGE.fullmatch(text)
    if not found:
        return [_number(kind, text)]
    count = whole("the number of values", int(found[3]), 2, MAX_PICTURES)
    spread = _spread(_number(kind, found[1]), _number(kind, found[2]), count)
    return [round(each) for each in spread] if kind in ("seed", "steps") else spread


def _number(kind: str, text: str) -> float:
    with suppress(ValueError):
        if isfinite(value := float(text)):
            return value
    expected = "numbers, like 0, 0.5, 1 or 0 to 1 (5)"
    raise SettingsError(f"the axis {kind!r} needs {expected}, got {reprlib.repr(text)}")


def _spread(first: float, last: float, count: int) -> list[float]:
    return [round(first + (last - first) * k / (count - 1), 4) for k in range(count)]


def _point(kind: str, value: Any, first: Any) -> tuple[str, Change]:
    if kind == "seed" and value == RANDOM_SEED:
        value = checked_seed(None)
    if kind == "size":
        width, height = size_of(value)
        return str(value) or "own", _with(width=width, height=height)
    if kind == "style":
        return str(value), lambda given: _with(mix={value: given.mix.get(value, 1.0)})(given)
    if kind == "words":
        return str(value), _instead(first, value)
    return f"{value:.10g}" if isinstance(value, int | float) else str(value), _with(**{kind: value})


def _with(**changed: Any) -> Change:
    return lambda given: Settings.checked(**{**given.as_dict(), **changed})


def _with_strength(style: str, strength: float) -> Change:
    def change(given: Settings) -> Settings:
        mix = {**given.mix, style: strength}
        return replace(given, mix={name: mix[name] for name in sorted(mix)})

    return change


def _instead(words: Any, others: Any) -> Change:
    def change(given: Settings) -> Settings:
        if not isinstance(words, str) or words not in given.prompt:
            raise SettingsError(f"the first words must be in the prompt, got {reprlib.repr(words)}")
        return _with(prompt=given.prompt.replace(words, str(others)))(given)

    return change
