"""Detect whether accelerate is offloading a model, and whether it has begun to since the last picture.

accelerate fills the map of an offloaded model from ``state_dict()``: what the map holds is what the model computes with
from then on, so that such a call needs the weights as they are, where one that saves needs the base.
"""

from collections.abc import Iterable
from typing import Any, Literal
from weakref import WeakSet

from torch import nn

from shira_diffusers.engine.callers import stack_frames


def offload_under_way() -> Literal["memory", "disk"] | None:
    """Where accelerate moves a model's weights to, if one of its offloads is among the callers; else None.

    The stack is searched because the arguments of ``state_dict()`` do not say who calls, and because
    ``from accelerate import cpu_offload`` keeps a function from before any patch.
    """
    offloads = (frame for frame in stack_frames() if frame.f_globals.get("__name__") == "accelerate.big_modeling")
    call = next(offloads, None)
    if call is None:
        return None
    device_map = call.f_locals.get("device_map")
    to_disk = isinstance(device_map, dict) and "disk" in device_map.values()
    return "disk" if to_disk or call.f_code.co_name == "disk_offload" else "memory"


_noted: WeakSet[Any] = WeakSet()


def new_offloads(module: nn.Module) -> list[Any]:
    """The hooks by which accelerate offloads layers of an unwrapped module, but for those of ``note_offloads``.

    Those of ``enable_model_cpu_offload`` do not count, since they move the parameters themselves.
    """
    found, left = [], [module]
    for layer in left:  # not ``modules()``, which takes 3.5 ms of each picture by SDXL
        own = layer.__dict__
        if "_hf_hook" in own and own["_hf_hook"] not in _noted and type(own["_hf_hook"]).__name__ != "CpuOffload":
            found.append(own["_hf_hook"])
        left.extend([child for child in own["_modules"].values() if child is not None])
    return found


def note_offloads(hooks: Iterable[Any]) -> None:
    """Remember hooks whose weights hold what they should."""
    _noted.update(hooks)
