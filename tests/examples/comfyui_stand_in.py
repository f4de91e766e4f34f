"""The part of ComfyUI's interface that the node in examples/comfyui uses, written anew for tests without ComfyUI.

ComfyUI is no package, and its licence is another one, so nothing of it is here: this follows what its patcher and its
tables of names do (version 0.3.75), for float weights on a CPU. tests/examples/test_comfyui.py runs against the real
one too, where the environment variable COMFYUI names its folder.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tests.original_layout import unet_key


class WeightAdapterBase:
    """What a patch is that computes itself: it also has ``calculate_weight``, see the node's."""

    name: str
    loaded_keys: set[str]
    weights: list[Tensor]


class ModelPatcher:
    """``comfy.model_patcher.ModelPatcher``: patches are kept by key, and computed when the model is loaded."""

    def __init__(self, model: nn.Module, load_device: torch.device, offload_device: torch.device) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.patches: dict[str, list[tuple[Any, ...]]] = {}
        self.backup: dict[str, Tensor] = {}

    def clone(self) -> "ModelPatcher":
        other = ModelPatcher(self.model, self.load_device, self.offload_device)
        other.patches = {key: list(patches) for key, patches in self.patches.items()}
        other.backup = self.backup
        return other

    def add_patches(self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        """Keep patches for keys that the model has; returns those."""
        known, added = self.model.state_dict(), []
        for target, patch in patches.items():
            key, offset, function = target, None, None
            if not isinstance(target, str):
                key, offset, *rest = target
                function = rest[0] if rest else None
            if key in known:
                added.append(target)
                self.patches.setdefault(key, []).append((strength_patch, patch, strength_model, offset, function))
        return added

    def patch_model(self, device_to: torch.device | None = None) -> nn.Module:
        """Overwrite the weights with patched ones: computed in float32, rounded once."""
        parameters = dict(self.model.named_parameters())
        for key, patches in self.patches.items():
            weight = parameters[key].data
            self.backup[key] = weight.clone()
            wide = weight.float()
            for strength, patch, strength_model, offset, function in patches:
                part = wide if offset is None else wide.narrow(*offset)
                part *= strength_model
                same = function or (lambda difference: difference)
                patch.calculate_weight(part, key, strength, strength_model, offset, same, torch.float32, None)
            weight.copy_(wide.to(weight.dtype))
        return self.model

    def unpatch_model(self, device_to: torch.device | None = None) -> None:
        """Put the weights back."""
        parameters = dict(self.model.named_parameters())
        for key, weight in self.backup.items():
            parameters[key].data.copy_(weight)
        self.backup.clear()


def _model_lora_keys_unet(model: nn.Module, key_map: dict[str, Any]) -> dict[str, Any]:
    """``lora_unet_<diffusers' path, underlined>`` -> the key; the test's model has ``diffusers_names``."""
    for name in model.diffusers_names:
        if name.endswith(".weight"):
            path = name.removesuffix(".weight").replace(".", "_")
            key_map[f"lora_unet_{path}"] = f"diffusion_model.{unet_key(name, model.layers_per_block)}"
    return key_map


def _model_lora_keys_clip(model: nn.Module, key_map: dict[str, Any]) -> dict[str, Any]:
    """``text_encoder.text_model.encoder...`` -> the key in CLIP-L, and ``text_encoder_2...`` that in CLIP-G."""
    for key in model.state_dict():
        for kind, component in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
            if key.startswith(f"{kind}.transformer.text_model.encoder.") and key.endswith(".weight"):
                path = key.removeprefix(f"{kind}.transformer.").removesuffix(".weight")
                key_map[f"{component}.{path}"] = key
    return key_map


def modules(models: Path) -> dict[str, ModuleType]:
    """The modules that the node imports, by name."""
    found = {name: ModuleType(name) for name in ("comfy", "comfy.lora", "comfy.weight_adapter", "folder_paths")}
    found["comfy.lora"].model_lora_keys_unet = _model_lora_keys_unet
    found["comfy.lora"].model_lora_keys_clip = _model_lora_keys_clip
    found["comfy.weight_adapter"].WeightAdapterBase = WeightAdapterBase
    found["comfy"].lora, found["comfy"].weight_adapter = found["comfy.lora"], found["comfy.weight_adapter"]
    paths = found["folder_paths"]
    paths.models_dir, paths.folder_names_and_paths = str(models), {}
    paths.get_filename_list = lambda kind: sorted(p.name for p in (models / kind).glob("*.safetensors"))
    paths.get_full_path_or_raise = lambda kind, name: str(models / kind / name)
    return found
