"""The node "Load SHiRA": an adapter file as patches of ComfyUI's model and text encoders, applied by its own patcher.

ComfyUI's table of LoRA names says where diffusers' weights are in its models. A patch holds the adapter's entries
alone; the dense difference exists for one weight at a time, while ComfyUI computes that weight.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import comfy.lora
import folder_paths
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from shira_diffusers import AdapterMismatchError, SparseDelta, load_adapter

FOLDER = "shira"  # ComfyUI/models/shira
_STRENGTH = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}

folder_paths.folder_names_and_paths.setdefault(
    FOLDER, ([os.path.join(folder_paths.models_dir, FOLDER)], {".safetensors"})
)

Target = str | tuple[Any, ...]
"""A key of the model's state dict; for a part of a joint weight ``(key, (dim, start, length))``, and a permutation."""


class SparseDifference(WeightAdapterBase):
    """A patch: flat row-major indices and values, ``(nnz,)`` each, of one weight or of a part of a joint one."""

    name = "shira"

    def __init__(self, loaded_keys: set[str], weights: list[Tensor]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: object,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: object = None,
    ) -> Tensor:
        """Add the difference to a weight (any shape) in place, in its dtype, which is float32 where memory allows."""
        indices, values = (tensor.to(weight.device) for tensor in self.weights)
        difference = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        difference.view(-1)[indices.long()] = strength * values.to(weight.dtype)
        weight += function(difference)
        return weight


class LoadShira:
    """Patches a model, and the text encoders if they are connected."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "loaders"
    DESCRIPTION = "Applies a SHiRA adapter of models/shira: it changes 1 to 2 % of the weights' entries."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node takes, as ComfyUI asks for it."""
        return {
            "required": {
                "model": ("MODEL",),
                "adapter": (folder_paths.get_filename_list(FOLDER),),
                "strength_model": ("FLOAT", _STRENGTH),
                "strength_clip": ("FLOAT", _STRENGTH),
            },
            "optional": {"clip": ("CLIP",)},
        }

    def load(
        self, model: Any, adapter: str, strength_model: float, strength_clip: float, clip: Any = None
    ) -> tuple[Any, Any]:
        """Patch clones of the model and the text encoders.

        Raises:
            AdapterMismatchError: the adapter does not fit, wholly or in part; nothing is patched.
            AdapterFormatError: no adapter, or a damaged one.
        """
        held = load_adapter(folder_paths.get_full_path_or_raise(FOLDER, adapter))
        of_model = comfy.lora.model_lora_keys_unet(model.model, {})
        of_clip = {} if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
        targets = {name: target_of(name, of_model, of_clip) for name in held.deltas}
        encoders = {name for name in targets if name.startswith("text_encoder")}
        shapes = {key: tuple(weight.shape) for key, weight in model.model.state_dict().items()}
        if clip is not None:
            shapes |= {key: tuple(weight.shape) for key, weight in clip.cond_stage_model.state_dict().items()}
        _require_fit(held.deltas, targets, shapes, encoders if clip is None else set())
        patches = {name: SparseDifference({name}, [delta.indices, delta.values]) for name, delta in held.deltas.items()}
        patched = model.clone()
        patched.add_patches({targets[n]: p for n, p in patches.items() if n not in encoders}, strength_model)
        if clip is not None:
            clip = clip.clone()
            clip.add_patches({targets[n]: p for n, p in patches.items() if n in encoders}, strength_clip)
        return patched, clip


def target_of(name: str, of_model: Mapping[str, Target], of_clip: Mapping[str, Target]) -> Target | None:
    """Where ComfyUI keeps a weight; None if it is not known.

    Args:
        name: ``component.dotted.name.weight``, as in adapter files.
        of_model, of_clip: ComfyUI's tables for the names of LoRAs.
    """
    component, _, path = name.removesuffix(".weight").partition(".")
    if component == "unet":
        return of_model.get(f"lora_unet_{path.replace('.', '_')}")
    if component.startswith("text_encoder"):
        return of_clip.get(f"{component}.text_model.{path.removeprefix('text_model.')}")
    return of_model.get(f"{component}.{path}")  # a transformer


def _require_fit(
    deltas: Mapping[str, SparseDelta],
    targets: Mapping[str, Target | None],
    shapes: Mapping[str, tuple[int, ...]],
    unconnected: set[str],
) -> None:
    if unconnected:
        raise AdapterMismatchError(
            f"the adapter changes text encoders too, {len(unconnected)} of {len(deltas)} weights: connect clip"
        )
    found = {name: _shape_at(target, shapes) for name, target in targets.items()}
    wrong = [f"{name}: not in this model" for name, shape in found.items() if shape is None]
    wrong += [
        f"{name}: expected {shape}, got {deltas[name].shape}"
        for name, shape in found.items()
        if shape not in (None, deltas[name].shape)
    ]
    if wrong:
        raise AdapterMismatchError(
            f"the adapter does not fit: {len(wrong)} of {len(deltas)} weights differ; use it with the model it was "
            f"trained for: {'; '.join(wrong[:8])}"
        )


def _shape_at(target: Target | None, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    key, *part = (target,) if target is None or isinstance(target, str) else target
    shape = shapes.get(key)
    if shape is None or not part:
        return shape
    dim, _, length = part[0]
    return (*shape[:dim], length, *shape[dim + 1 :])


NODE_CLASS_MAPPINGS = {"LoadShira": LoadShira}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadShira": "Load SHiRA"}
