"""Strengths as users give them, and the one number each parameter gets from them."""

import math
from collections.abc import Iterable, Mapping

from shira_diffusers.errors import ShiraError, listing

BlockScales = Mapping[str, float]
Scale = float | Mapping[str, float | BlockScales]
"""A float, ``{component: float}`` or ``{component: {"down" | "mid" | "up": float}}``; what is left out is 1.0."""

_BLOCKS = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


def scale_of(scale: Scale, component: str, name: str) -> float:
    """The number for one parameter.

    Args:
        scale: as the user gave it, checked by ``check_scale``.
        component: the parameter's component; empty for a bare module.
        name: the parameter's name in the component.
    """
    part = scale.get(component, 1.0) if isinstance(scale, Mapping) else scale
    if isinstance(part, Mapping):
        return float(part.get(_BLOCKS.get(name.partition(".")[0], ""), 1.0))
    return float(part)


def check_scale(adapter: str, scale: object, components: Iterable[str]) -> None:
    """Require a well-formed scale.

    Raises:
        ShiraError: not a finite number, an unknown component or an unknown block; all offenders at once.
    """
    known = sorted(components)
    wrong = _wrong_parts(scale, known) if isinstance(scale, Mapping) else _wrong_number("", scale)
    if wrong:
        raise ShiraError(
            f"the weight of adapter {adapter!r} must be a finite number, {{component: number}} or "
            f"{{component: {{'down' | 'mid' | 'up': number}}}} with components of {known}; got:{listing(wrong)}"
        )


def _wrong_number(where: str, value: object) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return [f"{where}{': ' if where else ''}{value!r}"]
    return []


def _wrong_parts(scale: Mapping[object, object], known: list[str]) -> list[str]:
    wrong: list[str] = []
    for component, part in scale.items():
        if component not in known:
            wrong.append(f"{component!r}: no such component")
        elif isinstance(part, Mapping):
            for block, value in part.items():
                if block not in _BLOCKS.values():
                    wrong.append(f"{component}.{block!r}: no such block")
                wrong += _wrong_number(f"{component}.{block}", value)
        else:
            wrong += _wrong_number(str(component), part)
    return wrong
