"""Strengths of adapters as visitors give them: a number, or one for each component, or for each part of a UNet."""

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from app.settings.checks import SettingsError, number

MIN_STRENGTH, MAX_STRENGTH = -1.0, 2.0
PARTS = ("down", "mid", "up")

Strength = float | Mapping[str, Any]
"""A number, ``{component: number}`` or ``{component: {"down" | "mid" | "up": number}}``; what is left out is 1.0."""
Mix = Mapping[str, Strength]


def checked_mix(mix: object) -> dict[str, Strength]:
    """A mix from untrusted values, in the order of names.

    Raises:
        SettingsError: names what is wrong, what was expected and what came.
    """
    if not isinstance(mix, Mapping):
        raise SettingsError(
            f'the mix must map each style to its strength, like {{"name": 1.0}}, got {reprlib.repr(mix)}'
        )
    _require_text("the mix must name each style by text", mix)
    return {name: _strength(f"the strength of {reprlib.repr(name)}", mix[name]) for name in sorted(mix)}


def require_components(mix: Mix, changed: Mapping[str, Collection[str]]) -> None:
    """Require that strengths by component name components that their adapter changes.

    Args:
        changed: the components of each adapter.

    Raises:
        SettingsError: names the first that is not.
    """
    for adapter, strength in mix.items():
        if not isinstance(strength, Mapping) or adapter not in changed:  # the latter is refused by its name
            continue
        unknown = [part for part in strength if part not in changed[adapter]]
        if unknown:
            raise SettingsError(
                f"the strength of {reprlib.repr(adapter)} names no component that it changes: "
                f"{reprlib.repr(unknown[0])}; it changes {', '.join(map(repr, sorted(changed[adapter])))}"
            )


def is_on(strength: Strength) -> bool:
    """Whether an adapter is switched on: a strength of 0 is the base."""
    return isinstance(strength, Mapping) or strength != 0


def is_by_part(strength: Strength) -> bool:
    """Whether a strength differs between the parts of a UNet."""
    return isinstance(strength, Mapping) and any(isinstance(value, Mapping) for value in strength.values())


def strength_text(strength: Strength) -> str:
    """A strength in a few letters: nothing for 1, the number, or each component's."""
    if not isinstance(strength, Mapping):
        return "" if strength == 1 else f"{strength:g}"
    return ", ".join(f"{part} {_part_text(value)}" for part, value in strength.items())


def _part_text(value: Any) -> str:
    return "/".join(f"{each:g}" for each in value.values()) if isinstance(value, Mapping) else f"{value:g}"


def _strength(what: str, value: object) -> Strength:
    if not isinstance(value, Mapping):
        return number(what, value, MIN_STRENGTH, MAX_STRENGTH)
    if not value:
        raise SettingsError(f"{what} must be a number, or a number for each component, got {{}}")
    _require_text(f"{what} must name each component by text", value)
    return {part: _part(f"{what} in {reprlib.repr(part)}", value[part]) for part in sorted(value)}


def _part(what: str, value: object) -> float | dict[str, float]:
    if not isinstance(value, Mapping):
        return number(what, value, MIN_STRENGTH, MAX_STRENGTH)
    unknown = [key for key in value if key not in PARTS]
    if unknown or not value:
        got = reprlib.repr(unknown[0]) if unknown else "{}"
        raise SettingsError(f"{what} must be a number, or one for each of {', '.join(PARTS)}, got {got}")
    return {key: number(f"{what}, {key}", value[key], MIN_STRENGTH, MAX_STRENGTH) for key in PARTS if key in value}


def _require_text(what: str, names: Mapping[Any, Any]) -> None:
    nameless = [name for name in names if not isinstance(name, str)]
    if nameless:
        raise SettingsError(f"{what}, got {reprlib.repr(nameless[0])}")
