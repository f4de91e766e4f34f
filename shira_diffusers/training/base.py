"""The base model of a run: loaded once in float32, never written to."""

from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from torch import nn

from shira_diffusers.errors import ShiraError
from shira_diffusers.training.config import TrainingConfig

# a StableDiffusionPipeline and a DDPMScheduler: diffusers' classes are typed in part only
Pipe = Any
Schedule = Any


def load_base(config: TrainingConfig, device: torch.device) -> Pipe:
    """Load Stable Diffusion 1.x or 2.x: float32, frozen, in evaluation mode (so without dropout), on ``device``.

    Raises:
        ShiraError: no such folder or Hub id, another kind of pipeline, or a resolution that its autoencoder cannot
            encode.
    """
    try:
        loaded = DiffusionPipeline.from_pretrained(
            config.pretrained_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:  # diffusers raises either for what is not there
        raise ShiraError(
            f"cannot load the base model {config.pretrained_model_name_or_path!r}, expected a folder that holds "
            f"model_index.json, or a Hub id that can be reached: {error}"
        ) from error
    if not isinstance(loaded, StableDiffusionPipeline):
        raise ShiraError(
            f"{config.pretrained_model_name_or_path!r} is a {type(loaded).__name__}, "
            "expected a StableDiffusionPipeline (Stable Diffusion 1.x or 2.x, text to image)"
        )
    pipe: Pipe = loaded
    if config.resolution % pipe.vae_scale_factor:
        raise ShiraError(f"resolution must be a multiple of {pipe.vae_scale_factor}, got {config.resolution}")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
        if part.dtype != torch.float32:
            part.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def adapted_models(pipe: Pipe, config: TrainingConfig) -> dict[str, nn.Module]:
    """The components that are trained, by name, with gradient checkpointing where it is wanted."""
    models: dict[str, nn.Module] = {"unet": pipe.unet}
    if config.train_text_encoder:
        models["text_encoder"] = pipe.text_encoder
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if config.gradient_checkpointing and config.train_text_encoder:
        encoder = pipe.text_encoder.train()  # transformers checkpoints in training mode only
        enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
        enable()
    return models


def training_schedule(pipe: Pipe) -> Schedule:
    """The noise schedule that the base was trained with, from its own scheduler's configuration.

    Raises:
        ShiraError: a prediction type other than epsilon and v_prediction.
    """
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ShiraError(
            f"the base predicts {schedule.config.prediction_type!r}, expected 'epsilon' or 'v_prediction'; "
            "check prediction_type in its scheduler_config.json"
        )
    return schedule
