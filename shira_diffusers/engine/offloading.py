"""Detect whether accelerate is offloading a model, and whether it has begun to since the last switch.

accelerate fills the map of an offloaded model from ``state_dict()``: what the map holds is what the model computes with
from then on, so that such a call needs the weights as they are, where one that saves needs the base.
"""

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


def note_offload(module: nn.Module) -> None:
    """Remember that the weights of an unwrapped module hold what they should, wherever accelerate keeps them now."""
    hook = _offload_of(module)
    if hook is not None:
        _noted.add(hook)


def is_offloaded_anew(module: nn.Module) -> bool:
    """Whether accelerate has begun to offload an unwrapped module since ``note_offload``."""
    hook = _offload_of(module)
    return hook is not None and hook not in _noted


def _offload_of(module: nn.Module) -> Any:
    """What identifies an offload: the hook that accelerate puts on the top layer; None without an offload.

    ``enable_model_cpu_offload`` does not count, since it moves the parameters themselves, and renews its hook after
    each generation.
    """
    hook = module.__dict__.get("_hf_hook")
    return None if type(hook).__name__ == "CpuOffload" else hook
