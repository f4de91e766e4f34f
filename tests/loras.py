"""Tiny LoRA files as diffusers, PEFT and kohya's trainers write them, with random values."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from tests import tiny

UNET = ["to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj", "proj_in"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def adapted(model: nn.Module, targets: list[str], seed: int = 0, **options: object) -> nn.Module:
    """A model with a random LoRA of PEFT's in its layers; DoRA's magnitudes are scaled."""
    config = LoraConfig(**({"r": 2, "lora_alpha": 5, "target_modules": targets} | options))
    return randomized(inject_adapter_in_model(config, model), seed)


def randomized(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.5 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.normal_(generator=generator)
    return model


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The weights with the LoRA merged by PEFT itself, by their plain names."""
    for layer in list(model.modules()):
        if hasattr(layer, "merge") and hasattr(layer, "lora_A"):
            layer.merge()
    return tiny.weights_of(model)


def of_diffusers(folder: Path, unet: nn.Module, text_encoder: nn.Module | None = None) -> Path:
    """Save as ``pipe.save_lora_weights`` does, with the configuration in the header."""
    options: dict[str, object] = {}
    if text_encoder is not None:
        options["text_encoder_lora_layers"] = get_peft_model_state_dict(text_encoder)
        options["text_encoder_lora_adapter_metadata"] = text_encoder.peft_config["default"].to_dict()
    metadata = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        folder, get_peft_model_state_dict(unet), unet_lora_adapter_metadata=metadata, **options
    )
    return folder


def of_peft(folder: Path, model: nn.Module, targets: list[str], **options: object) -> dict[str, Tensor]:
    """Save as PEFT's ``save_pretrained`` does; returns the weights with the LoRA merged."""
    wrapped = get_peft_model(model, LoraConfig(**({"r": 2, "target_modules": targets} | options)))
    randomized(wrapped, 3)
    wrapped.save_pretrained(folder)
    return tiny.weights_of(wrapped.merge_and_unload())


def kohya_keys(model: nn.Module, prefix: str, alpha: float) -> dict[str, Tensor]:
    """As kohya's trainers and LyCORIS' LoCon name them, with ``alpha``."""
    found = {}
    for key, tensor in get_peft_model_state_dict(model).items():
        path, matrix, _ = key.rsplit(".", 2)
        layer = f"{prefix}_{path.replace('.', '_')}"
        found[f"{layer}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = tensor.contiguous()
        found[f"{layer}.alpha"] = torch.tensor(alpha)
    return found


def of_kohya(file: Path, unet: nn.Module, text_encoder: nn.Module) -> Path:
    save_file(kohya_keys(unet, "lora_unet", 5.0) | kohya_keys(text_encoder, "lora_te_text_model", 5.0), file)
    return file
