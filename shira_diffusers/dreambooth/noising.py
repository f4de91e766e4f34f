"""What a denoiser learns: latents with noise, and the error of its prediction, by diffusion or by flow matching."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor

from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.data_parallel import Share
from shira_diffusers.dreambooth.families import Pipe, family_of
from shira_diffusers.errors import ShiraError

# a DDPMScheduler, or one of flow matching: diffusers' classes are typed in part only
Schedule = Any


class Draws:
    """Random numbers of a batch: drawn for the whole batch, even if a process computes a share of it."""

    def __init__(self, generator: torch.Generator, share: Share, groups: int) -> None:
        self._generator, self._share, self._groups = generator, share, groups

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal float32 numbers of the shape of ``like``, ``(n, ...)``; n is the batch."""
        shape = (self._share.whole(len(like), self._groups), *like.shape[1:])
        return self._mine(torch.randn(shape, generator=self._generator, device=like.device))

    def integers(self, limit: int, like: Tensor) -> Tensor:
        """An integer below ``limit`` for each example, int64 ``(n,)``."""
        count = self._share.whole(len(like), self._groups)
        return self._mine(torch.randint(limit, (count,), generator=self._generator, device=like.device))

    def places(self, config: TrainingConfig, levels: int, like: Tensor) -> Tensor:
        """A noise level's number for each example by the weighting scheme, int64 ``(n,)`` below ``levels``."""
        share = compute_density_for_timestep_sampling(
            config.weighting_scheme or "none",
            self._share.whole(len(like), self._groups),
            config.logit_mean,
            config.logit_std,
            config.mode_scale,
            like.device,
            self._generator,
        )
        return self._mine((share * levels).long().clamp_(0, levels - 1))  # rounding may give 1, a large scale more

    def _mine(self, drawn: Tensor) -> Tensor:
        return self._share.of(drawn, self._groups)


@dataclass(frozen=True, slots=True)
class Noised:
    """Latents with noise, and what is to be predicted from them.

    Args:
        latents: float32 ``(n, c, h, w)``, the denoiser's input.
        timesteps: ``(n,)``.
        target: what the denoiser, or the clean latents that its velocity implies, should equal, ``(n, c, h, w)``.
        weights: of the errors, ``(n,)``.
        sigmas: ``(n, 1, 1, 1)``, the noise's share, where clean latents are compared; else None.
    """

    latents: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor
    sigmas: Tensor | None = None

    def errors(self, predicted: Tensor) -> Tensor:
        """Compute the weighted mean squared error of each prediction: ``(n, c, h, w) -> (n,)``."""
        if self.sigmas is not None:
            predicted = predicted * -self.sigmas + self.latents
        return F.mse_loss(predicted, self.target, reduction="none").flatten(1).mean(1) * self.weights


def noising_of(pipe: Pipe, config: TrainingConfig) -> "Diffusion | FlowMatching":
    """Return the noising that a base is trained with, from its own scheduler's configuration.

    Args:
        config: complete, see ``base_model.complete``.

    Raises:
        ShiraError: a scheduler that the base's denoiser cannot be trained with.
    """
    return FlowMatching(pipe, config) if family_of(pipe).flow else Diffusion(pipe, config)


class Diffusion:
    """Denoising diffusion at uniformly drawn timesteps: the noise or the velocity is predicted."""

    def __init__(self, pipe: Pipe, config: TrainingConfig) -> None:
        self._schedule, self._gamma = training_schedule(pipe), config.snr_gamma

    def mix(self, latents: Tensor, noise: Tensor, draws: Draws) -> Noised:
        """Mix latents and noise, float32 ``(n, c, h, w)``, with weights by ``snr_gamma``."""
        timesteps = draws.integers(self._schedule.config.num_train_timesteps, latents)
        noisy = self._schedule.add_noise(latents, noise, timesteps)
        predicts_noise = self._schedule.config.prediction_type == "epsilon"
        target = noise if predicts_noise else self._schedule.get_velocity(latents, noise, timesteps)
        if self._gamma is None:
            return Noised(noisy, timesteps, target, torch.ones_like(timesteps, dtype=noisy.dtype))
        return Noised(noisy, timesteps, target, snr_weights(self._schedule, timesteps, self._gamma))


def training_schedule(pipe: Pipe) -> Schedule:
    """Make the noise schedule that the base was trained with, from its own scheduler's configuration.

    Raises:
        ShiraError: a prediction type other than epsilon and v_prediction, or a schedule of EDM's noise levels.
    """
    if "sigma_data" in pipe.scheduler.config:
        raise ShiraError(
            f"the base's scheduler is a {type(pipe.scheduler).__name__}, expected one of diffusion timesteps; bases "
            "of the EDM formulation cannot be trained here"
        )
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ShiraError(
            f"the base predicts {schedule.config.prediction_type!r}, expected 'epsilon' or 'v_prediction'; "
            "check prediction_type in its scheduler_config.json"
        )
    return schedule


def snr_weights(schedule: Schedule, timesteps: Tensor, gamma: float) -> Tensor:
    """Compute min-SNR weights ``(n,)`` of the loss at ``timesteps``, ``(n,)`` (arXiv 2303.09556, section 3.4)."""
    snr = compute_snr(schedule, timesteps)
    clipped = snr.clamp(max=gamma)
    if schedule.config.prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return torch.where(snr > 0, clipped / snr, 1.0)  # the limit, where a schedule ends in pure noise


class FlowMatching:
    """Flow matching: latents and noise on a straight line, whose velocity is predicted (arXiv 2403.03206, section 3.1).

    The same as diffusers' ``train_dreambooth_lora_sd3.py`` and ``train_dreambooth_lora_flux.py``.
    """

    def __init__(self, pipe: Pipe, config: TrainingConfig) -> None:
        self._schedule, self._config = flow_schedule(pipe), config

    def mix(self, latents: Tensor, noise: Tensor, draws: Draws) -> Noised:
        """Mix latents and noise, float32 ``(n, c, h, w)``, at timesteps drawn and weighted by the weighting scheme."""
        indices = draws.places(self._config, len(self._schedule.timesteps), latents)
        timesteps, levels = (
            values.to(latents.device)[indices] for values in (self._schedule.timesteps, self._schedule.sigmas)
        )
        sigmas = levels.view(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        weights = compute_loss_weighting_for_sd3(self._config.weighting_scheme or "none", levels)
        if self._config.precondition_outputs:
            return Noised(noisy, timesteps, latents, weights, sigmas)
        return Noised(noisy, timesteps, noise - latents, weights)


def flow_schedule(pipe: Pipe) -> Schedule:
    """Make the noise levels that the base was trained with, from its own scheduler's configuration.

    Raises:
        ShiraError: a scheduler of another kind than flow matching's.
    """
    if not type(pipe.scheduler).__name__.startswith("FlowMatch"):
        raise ShiraError(
            f"the base's scheduler is a {type(pipe.scheduler).__name__}, expected one of flow matching, such as "
            "FlowMatchEulerDiscreteScheduler; check the base's scheduler_config.json"
        )
    return FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
