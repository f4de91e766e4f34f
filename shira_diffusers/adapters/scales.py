"""Check strengths as users give them, and compute the one number that each parameter gets from them."""

from collections.abc import Iterable, Mapping, Sequence, ValuesView
from typing import Any

from shira_diffusers.errors import ShiraError, counted, listing

LayerScales = float | Sequence[float]
BlockScales = Mapping[str, LayerScales | Mapping[str, LayerScales]]
Scale = float | Mapping[str, float | BlockScales]
"""A float, ``{component: float}`` or ``{component: {"down" | "mid" | "up": ...}}``; what is left out is 1.0.

A section of a UNet takes a float, a list of one float per layer (of each of its blocks), or ``{"block_0": ...}`` with
either of these; a list of one float counts for all layers. diffusers' ``set_adapters`` takes the same forms.
"""

Weights = Scale | Sequence[Scale | None] | None
"""One scale for all adapters, or one each; None is 1.0."""

Blocks = Mapping[str, Sequence[int]]
"""The sections of a UNet, with the number of layers of each block: ``{"down": (2, 2), "mid": (1,), "up": (3, 3)}``."""

_FLOAT32_MAX = 3.4028234663852886e38  # mixes are computed in float32
_LONGEST = 80  # characters of a wrong value in an error
_SECTIONS = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}
_LAYERS = ("attentions", "resnets")  # a block's layer is one of each, where it has attention


def mix_of(names: str | Iterable[str] | Mapping[str, Scale | None], weights: Weights = None) -> dict[str, Scale]:
    """Return the scale of each adapter, from names and weights or from a mapping that gives both.

    Raises:
        ShiraError: no names, repeated names, another number of weights, or weights beside a mapping.
    """
    if isinstance(names, Mapping) and weights is not None:
        raise ShiraError(
            f"expected strengths once, got {dict(names)!r} and adapter_weights={weights!r}; leave adapter_weights out, "
            "or give names without strengths"
        )
    chosen = name_list(names)
    if len(set(chosen)) != len(chosen):
        raise ShiraError(f"each adapter may be named once, got {chosen}")
    given = list(names.values()) if isinstance(names, Mapping) else each_scale(weights, len(chosen))
    if isinstance(names, set | frozenset) and any(weight != given[0] for weight in given):
        raise ShiraError(f"a set of names has no order, got {names!r} with {given}; give {{name: weight}} or a list")
    if len(given) != len(chosen):
        raise ShiraError(
            f"expected one weight per adapter, got {counted(len(given), 'weight')} for "
            f"{counted(len(chosen), 'adapter')} {chosen}"
        )
    return {name: 1.0 if scale is None else scale for name, scale in zip(chosen, given, strict=True)}


def mix_from(scales: Mapping[str, Scale | None]) -> dict[str, Scale]:
    """Return a mix as a mapping, None as 1.0.

    Raises:
        ShiraError: no mapping.
    """
    if not isinstance(scales, Mapping):
        raise ShiraError(f"expected the mix as {{name: strength}}, got {scales!r}")
    return {name: 1.0 if scale is None else scale for name, scale in scales.items()}


def name_list(names: str | Iterable[str]) -> list[str]:
    """List adapters' names, given as one, several, or a mapping by name.

    Raises:
        ShiraError: something else.
    """
    chosen: list[object] = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if not all(isinstance(name, str) for name in chosen):
        raise ShiraError(
            f"expected the name of an adapter or a list of names, got {names!r}; {{name: strength}} gives strengths too"
        )
    return [str(name) for name in chosen]


def each_scale(weights: Weights, count: int) -> list[Scale | None]:
    """Return what was given per adapter: one for all, or a list (or array of one dimension) as it is."""
    if getattr(weights, "ndim", 0) == 1:  # of NumPy or torch
        return list(weights)  # type: ignore[arg-type]
    return (
        list(weights)
        if isinstance(weights, Sequence | ValuesView) and not isinstance(weights, str)
        else [weights] * count
    )


def scale_of(scale: Scale, component: str, name: str) -> float:
    """Return the scale of one parameter.

    Args:
        scale: as the user gave it, checked by ``check_scale``.
        component: the parameter's component; empty for a bare module.
        name: the parameter's name in the component.
    """
    part = scale.get(component, 1.0) if isinstance(scale, Mapping) else scale
    return _scale_in(part, name) if isinstance(part, Mapping) else float(part)


def _scale_in(blocks: BlockScales, name: str) -> float:
    section, *path = name.split(".")
    value = blocks.get(_SECTIONS.get(section, ""), 1.0)
    if isinstance(value, Mapping):
        value = value.get(f"block_{path[0]}", 1.0)
    if not isinstance(value, Sequence):
        return float(value)
    if len(value) == 1:
        return float(value[0])
    # <block>.attentions.<layer>; samplers count as layer 0, as in diffusers
    layer = int(path[2]) if len(path) > 2 and path[2].isdecimal() else len(value)
    return float(value[layer]) if layer < len(value) else 1.0


def blocks_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the sections of a UNet (or ControlNet) and their blocks' layers; of other models none."""
    found = {}
    for attribute, section in _SECTIONS.items():
        blocks = getattr(model, attribute, None)
        if blocks is not None:
            found[section] = (1,) if section == "mid" else tuple(map(_layers_of, blocks))
    return found


def _layers_of(block: Any) -> int:
    return max(len(getattr(block, kind, None) or ()) for kind in _LAYERS)


def check_scale(adapter: str, scale: object, components: Mapping[str, Blocks]) -> Scale:
    """Require a well-formed scale.

    Args:
        adapter: its name, for the message.
        scale: as the user gave it.
        components: those that the adapter changes, with their models' blocks.

    Returns:
        The scale in plain Python: numbers of NumPy and torch as int or float, mappings and lists copied, so that later
        changes of the user's objects do not change a mix.

    Raises:
        ShiraError: not a number that is finite in float32, a component or block that does not exist, another number of
            layers; lists all offenders.
    """
    plain = plain_scale(scale)
    wrong = _wrong_parts(plain, components) if isinstance(plain, dict) else _wrong_number("", plain)
    if wrong and isinstance(plain, int | float):
        raise ShiraError(f"the weight of adapter {adapter!r} must be a finite number, got {wrong[0]}")
    if wrong:
        raise ShiraError(
            f"the weight of adapter {adapter!r} must be a finite number, {{component: number}} or "
            f"{{component: {{'down' | 'mid' | 'up': number}}}} with components of {sorted(components)}, those that it "
            "changes; for down, mid and up also a list, one number per layer, or {'block_0': number or list}; got:"
            f"{listing(wrong)}"
        )
    return plain


def plain_scale(value: Any) -> Any:
    """Return a scale in plain Python: numbers and lists of NumPy and torch as such, anything else as it is."""
    if isinstance(value, Mapping):
        return {key: plain_scale(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_scale(part) for part in value]
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and getattr(value, "ndim", None) in (0, 1):
        return value.tolist() if value.ndim else value.item()
    return value


def _wrong_number(where: str, value: object) -> list[str]:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _FLOAT32_MAX
    return [] if good else [f"{where}{': ' if where else ''}{_short(value)}"]


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python converts
        text = "an integer too large to print"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _wrong_parts(scale: Mapping[object, object], components: Mapping[str, Blocks]) -> list[str]:
    wrong: list[str] = []
    for component, part in scale.items():
        if component not in components:
            wrong.append(f"{component!r}: no such component in this adapter")
        elif isinstance(part, dict):
            for section, value in part.items():
                wrong += _wrong_section(str(component), section, value, components[str(component)])
        else:
            wrong += _wrong_number(str(component), part)
    return wrong


def _wrong_section(component: str, section: object, value: object, blocks: Blocks) -> list[str]:
    layers = blocks.get(str(section))
    if layers is None:
        return [f"{component}.{section!r}: no such block, the model has {', '.join(blocks) or 'none'}"]
    if not isinstance(value, dict):
        return _wrong_layers(f"{component}.{section}", value, set(layers))
    numbered = {} if section == "mid" else {f"block_{i}": count for i, count in enumerate(layers)}
    wrong: list[str] = []
    for block, part in value.items():
        if block in numbered:
            wrong += _wrong_layers(f"{component}.{section}.{block}", part, {numbered[str(block)]})
        else:
            has = ", ".join(numbered) or "no numbered blocks"
            wrong.append(f"{component}.{section}.{block!r}: no such block, the model has {has}")
    return wrong


def _wrong_layers(where: str, value: object, counts: set[int]) -> list[str]:
    if not isinstance(value, list):
        return _wrong_number(where, value)
    if len(value) != 1 and counts != {len(value)}:
        layers = " or ".join(map(str, sorted(counts)))
        expected = f"{layers} numbers, one per layer, or a list of one"
        if len(counts) > 1:
            expected = f"a list of one number, or {{'block_0': [...], ...}}, since its blocks have {layers} layers"
        return [f"{where}: expected {expected}, got {len(value)}"]
    return [fault for i, part in enumerate(value) for fault in _wrong_number(f"{where}[{i}]", part)]
