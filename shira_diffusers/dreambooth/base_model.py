"""The base model of a run: loaded once in float32, never written to."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.families import Family, Pipe, denoiser_of, family_of, find_family
from shira_diffusers.errors import ShiraError
from shira_diffusers.formats.paths import did_you_mean
from shira_diffusers.weights.targets import Targets, select


def family_of_base(config: TrainingConfig) -> Family:
    """Find the family of a run's base, from its ``model_index.json`` alone.

    Raises:
        ShiraError: no such folder or Hub id, another kind of pipeline, or one that lacks components.
    """
    name, index = config.pretrained_model_name_or_path, _read_index(config)
    family = find_family(str(index.get("_class_name")), name)
    missing = [part for part in family.needed if (index.get(part) or [None])[0] is None]
    if missing:
        raise ShiraError(f"the base {name!r} has no {', '.join(missing)}; expected a whole pipeline, take another base")
    return family


def _read_index(config: TrainingConfig) -> dict[str, Any]:
    """The ``model_index.json``: the pipeline's class, and library and class of each component."""
    name = config.pretrained_model_name_or_path
    try:
        return DiffusionPipeline.load_config(name, revision=config.revision)
    except (OSError, ValueError) as error:  # diffusers raises either for what is not there
        raise _not_found("base model", name, "model_index.json", error) from error


def complete(config: TrainingConfig) -> TrainingConfig:
    """Fill in the defaults of the base's family where none is given, and reset what has no effect on it. Idempotent.

    Raises:
        ShiraError: as ``family_of_base``.
    """
    family = family_of_base(config)
    filled = {name: value for name, value in family.defaults.items() if getattr(config, name) is None}
    config = replace(config, **filled, **{name: getattr(TrainingConfig, name) for name in family.idle})
    return replace(
        config, mask_budget=config.mask_budget or ("global" if config.mask_type == "grad_mean" else "weight")
    )


def idle_settings(config: TrainingConfig) -> list[str]:
    """List the settings that are given but have no effect on a base of this family, each with the reason.

    Raises:
        ShiraError: as ``family_of_base``.
    """
    family = family_of_base(config)
    given = [name for name in family.idle if getattr(config, name) != getattr(TrainingConfig, name)]
    reason = "a base that is trained by flow matching" if family.flow else "a base of this kind"
    return [f"--{name} has no effect on {reason}" for name in given]


def load_base(config: TrainingConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> Pipe:
    """Load the base: frozen, in evaluation mode (so without dropout), on ``device``.

    Args:
        config: names the base, its autoencoder where that is another one, and the resolution.
        dtype: of all components but the autoencoder, which is always in float32: SDXL's overflows in float16.

    Raises:
        ShiraError: as ``family_of_base``, no such autoencoder, or a resolution that it cannot encode.
    """
    config = complete(config)
    name = config.pretrained_model_name_or_path
    options: dict[str, Any] = {"revision": config.revision, "variant": config.variant}
    if config.pretrained_vae_model_name_or_path:
        options["vae"] = _load_autoencoder(config.pretrained_vae_model_name_or_path)
    index = _read_index(config)
    if "safety_checker" in index:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    options |= {part: None for part in family_of_base(config).optional if (index.get(part) or [None])[0] is None}
    try:
        dtypes = {"default": dtype, "vae": torch.float32}
        pipe: Pipe = DiffusionPipeline.from_pretrained(name, dtype=dtypes, **options)
    except (OSError, ValueError) as error:
        raise _not_found("base model", name, "model_index.json", error) from error
    if config.resolution % (factor := side_factor(pipe)):
        raise ShiraError(f"resolution must be a multiple of {factor}, got {config.resolution}")
    for part in _modules(pipe).values():
        part.requires_grad_(False).eval()
    cast(pipe, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def side_factor(pipe: Pipe) -> int:
    """Return what pictures' sides, in pixels, must be multiples of."""
    return int(pipe.vae_scale_factor) * family_of(pipe).patch


def _load_autoencoder(name: str) -> nn.Module:
    """A folder or Hub id with an autoencoder, or with a pipeline that has one in ``vae``."""
    failures = []
    for place in ({}, {"subfolder": "vae"}):
        try:
            return AutoencoderKL.from_pretrained(name, **place)
        except (OSError, ValueError) as error:
            failures.append(error)
    raise _not_found("autoencoder", name, "the config.json of an AutoencoderKL", failures[0]) from failures[0]


def _not_found(what: str, name: str, file: str, error: Exception) -> ShiraError:
    return ShiraError(
        f"cannot load the {what} {name!r}, expected a folder that holds {file}, or a Hub id that can be reached: "
        f"{error}{'' if os.path.exists(name) else did_you_mean(Path(name))}"
    )


def _modules(pipe: Pipe) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def cast(pipe: Pipe, dtype: torch.dtype) -> None:
    """Cast all components to ``dtype``, but keep the autoencoder in float32."""
    for name, part in _modules(pipe).items():
        wanted = torch.float32 if name == "vae" else dtype
        if next(part.parameters()).dtype != wanted:  # the first: transformers keeps some of T5's in float32
            part.to(dtype=wanted)


def adapted_models(pipe: Pipe, config: TrainingConfig) -> dict[str, nn.Module]:
    """Return the components that are trained, by name, with gradient checkpointing if asked for."""
    denoiser = denoiser_of(pipe)
    models: dict[str, nn.Module] = {family_of(pipe).denoiser: denoiser}
    if config.train_text_encoder:
        models |= {name: getattr(pipe, name) for name in family_of(pipe).text_encoders}
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if config.gradient_checkpointing and config.train_text_encoder:
        for name in family_of(pipe).text_encoders:
            encoder = getattr(pipe, name).train()  # transformers checkpoints in training mode only
            enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
            enable()
    return models


def adapted_targets(pipe: Pipe, models: Mapping[str, nn.Module], config: TrainingConfig) -> Targets:
    """Return the trained weights of the models as ``build_masks`` takes them: the settings' ones that can learn."""
    unread = {part: pattern for part, pattern in family_of(pipe).unread.items() if part in models}
    if not unread and not config.include_conv:
        return config.targets
    names = list(select(models, config.targets))
    if config.include_conv:
        names += [name for name, weight in select(models, "all").items() if weight.ndim == 4 and name not in names]
    last = {part: _layers(getattr(pipe, part)) - 1 for part in unread}
    patterns = [rf"{part}\.{pattern.format(last=last[part])}" for part, pattern in unread.items()]
    dead = re.compile("|".join(patterns) or "(?!)")
    return re.compile("|".join(re.escape(name) for name in names if not dead.fullmatch(name)))


def _layers(model: Any) -> int:
    return int(getattr(model.config, "num_hidden_layers", None) or model.config.num_layers)
