"""Warn of strengths that a call of a pipeline gives as for LoRAs, since they change no SHiRA adapter."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakSet

from torch import nn

KEYWORDS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
_warned: WeakSet[Any] = WeakSet()


def warn_of_ignored_scale(
    pipe: Any, given: Mapping[str, object], active: Callable[[], Iterable[str]], models: Iterable[nn.Module]
) -> None:
    """Warn once per pipeline of ``cross_attention_kwargs={"scale": 0.5}`` and its kind where it has no effect.

    Args:
        pipe: the pipeline that is called.
        given: the arguments of the call by name.
        active: the adapters that are active.
        models: those of the pipeline; with an active LoRA on one of them the scale is meant for that.
    """
    asked = _scale_in(given)
    if asked is None or pipe in _warned:
        return
    names = list(active())
    if not names or any(_has_active_lora(model) for model in models):
        return
    _warned.add(pipe)
    mix = ", ".join(f"{name!r}: ..." for name in names)
    warnings.warn(
        f"{asked} is for LoRAs, and none is active: {', '.join(map(repr, names))} of SHiRA stay at their strengths; "
        f"use pipe.set_shira({{{mix}}}), or `with pipe.shira({{{mix}}}):` around one generation",
        stacklevel=3,
    )


def _scale_in(given: Mapping[str, object]) -> str | None:
    """The argument that asks for another strength than 1, as it was written."""
    for name in KEYWORDS:
        options = given.get(name)
        if isinstance(options, Mapping) and options.get("scale", 1.0) != 1.0:
            return f"{name}={{'scale': {options['scale']!r}}}"
    scale = given.get("lora_scale")
    return None if scale is None or scale == 1.0 else f"lora_scale={scale!r}"


def _has_active_lora(model: nn.Module) -> bool:
    # PEFT's layers by what they have: PEFT itself may not be installed
    layers: Iterable[Any] = (layer for layer in model.modules() if hasattr(type(layer), "scale_layer"))
    return any(layer.active_adapters and not layer.disable_adapters for layer in layers)
