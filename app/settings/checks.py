"""Checks of numbers that come from outside."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from shira_diffusers import ShiraError


class SettingsError(ShiraError):
    """A setting out of its range; nothing has been drawn or changed."""


def number(what: str, value: object, low: float, high: float) -> float:
    """A number in a range, ends included; SettingsError names what is expected and what came."""
    # a comparison with NaN is False
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise SettingsError(f"{what} must be a number from {low:g} to {high:g}, got {reprlib.repr(value)}")
    return float(value)


def whole(what: str, value: object, low: int, high: int, more: str = "") -> int:
    """A whole number in a range, such as 20.0; SettingsError as ``number``, which says ``more`` of what is expected."""
    given = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not low <= given <= high or given != int(given):
        raise SettingsError(f"{what} must be a whole number from {low} to {high}{more}, got {reprlib.repr(value)}")
    return int(given)


def require_mapping(what: str, value: object) -> Mapping[str, Any]:
    """An object of JSON; SettingsError names what came."""
    if not isinstance(value, Mapping):
        raise SettingsError(f"the {what} must be a JSON object, got {reprlib.repr(value)}")
    return value
