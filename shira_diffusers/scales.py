"""Strengths as users give them, and the one number each parameter gets from them."""

from collections.abc import Iterable, Mapping
from typing import Any

from shira_diffusers.errors import ShiraError, listing

BlockScales = Mapping[str, float]
Scale = float | Mapping[str, float | BlockScales]
"""A float, ``{component: float}`` or ``{component: {"down" | "mid" | "up": float}}``; what is left out is 1.0."""

_FLOAT32_MAX = 3.4028234663852886e38  # mixes are computed in float32
_LONGEST = 80
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


def check_scale(adapter: str, scale: object, components: Iterable[str]) -> Scale:
    """Require a well-formed scale.

    Returns:
        The scale in plain Python: numbers of NumPy and torch as int or float, mappings copied, so that nothing the
        user does to theirs later changes a mix.

    Raises:
        ShiraError: not a number that is finite in float32, an unknown component or block; all offenders at once.
    """
    known = sorted(components)
    plain = _plain(scale)
    wrong = _wrong_parts(plain, known) if isinstance(plain, dict) else _wrong_number("", plain)
    if wrong:
        raise ShiraError(
            f"the weight of adapter {adapter!r} must be a finite number, {{component: number}} or "
            f"{{component: {{'down' | 'mid' | 'up': number}}}} with components of {known}; got:{listing(wrong)}"
        )
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def _wrong_number(where: str, value: object) -> list[str]:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _FLOAT32_MAX
    return [] if good else [f"{where}{': ' if where else ''}{_short(value)}"]


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python converts
        text = "a number without end"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _wrong_parts(scale: Mapping[object, object], known: list[str]) -> list[str]:
    wrong: list[str] = []
    for component, part in scale.items():
        if component not in known:
            wrong.append(f"{component!r}: no such component")
        elif isinstance(part, dict):
            for block, value in part.items():
                if block not in _BLOCKS.values():
                    wrong.append(f"{component}.{block!r}: no such block")
                wrong += _wrong_number(f"{component}.{block}", value)
        else:
            wrong += _wrong_number(str(component), part)
    return wrong
