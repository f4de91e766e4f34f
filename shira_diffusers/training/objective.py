"""The diffusion loss of a batch of pictures and prompts."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr
from torch import Tensor

from shira_diffusers.training.base import Pipe, Schedule, training_schedule
from shira_diffusers.training.config import TrainingConfig
from shira_diffusers.training.data import Batch


class Objective:
    """Mean squared error of the predicted noise or velocity, at uniformly drawn timesteps.

    Args:
        pipe: the base; its weights may change between calls.
        config: ``snr_gamma``, ``with_prior_preservation`` and ``prior_loss_weight`` are used.
        embeddings: ``prompt -> (tokens, width)`` of all prompts, where the text encoder is not trained.
        cached: batches hold moments of latents, as ``encode`` gives them, in place of pixels.
    """

    def __init__(
        self,
        pipe: Pipe,
        config: TrainingConfig,
        embeddings: Mapping[str, Tensor] | None,
        cached: bool,
    ) -> None:
        self._pipe = pipe
        self._config = config
        self._embeddings = embeddings
        self._cached = cached
        self._schedule = training_schedule(pipe)

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The loss as a scalar that can be back-propagated.

        Args:
            batch: pixels or moments, and prompts.
            generator: of the pipeline's device, the only source of randomness.
        """
        latents = self._latents(batch.tensors, generator)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        steps = self._schedule.config.num_train_timesteps
        timesteps = torch.randint(steps, (len(latents),), generator=generator, device=latents.device)
        noisy = self._schedule.add_noise(latents, noise, timesteps)
        predicted = self._pipe.unet(noisy, timesteps, self._embed(batch.prompts), return_dict=False)[0]
        target = noise if self._predicts_noise else self._schedule.get_velocity(latents, noise, timesteps)
        errors = F.mse_loss(predicted.float(), target, reduction="none").flatten(1).mean(1)  # (n, c, h, w) -> (n,)
        if self._config.snr_gamma is not None:
            errors = errors * snr_weights(self._schedule, timesteps, self._config.snr_gamma)
        if not self._config.with_prior_preservation:
            return errors.mean()
        instances, classes = errors.chunk(2)
        return instances.mean() + self._config.prior_loss_weight * classes.mean()

    @property
    def device(self) -> torch.device:
        """Where losses are computed."""
        device: torch.device = self._pipe.unet.device
        return device

    @property
    def _predicts_noise(self) -> bool:
        return bool(self._schedule.config.prediction_type == "epsilon")

    def _latents(self, tensors: Tensor, generator: torch.Generator) -> Tensor:
        """Sample latents: pixels ``(n, 3, 8h, 8w)`` or moments ``(n, 2c, h, w)`` -> float32 ``(n, c, h, w)``."""
        vae = self._pipe.vae
        moments = tensors.to(vae.device) if self._cached else encode(self._pipe, tensors)
        latents = DiagonalGaussianDistribution(moments).sample(generator)
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as ``(n, tokens, width)``."""
        if self._embeddings is None:
            return embed(self._pipe, prompts)
        return torch.stack([self._embeddings[prompt] for prompt in prompts])


@torch.no_grad()
def encode(pipe: Pipe, pixels: Tensor) -> Tensor:
    """Pixels ``(n, 3, 8h, 8w)`` in [-1, 1] as moments of latents, float32 ``(n, 2c, h, w)``."""
    moments: Tensor = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.parameters
    return moments.float()


def embed(pipe: Pipe, prompts: Sequence[str]) -> Tensor:
    """Prompts as ``(n, tokens, width)``, as the pipeline itself encodes them."""
    embeddings: Tensor = pipe.encode_prompt(list(prompts), pipe.unet.device, 1, do_classifier_free_guidance=False)[0]
    return embeddings


def snr_weights(schedule: Schedule, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights ``(n,)`` of the loss at ``timesteps`` (arXiv 2303.09556, section 3.4)."""
    snr = compute_snr(schedule, timesteps)
    clipped = snr.clamp(max=gamma)
    if schedule.config.prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return torch.where(snr > 0, clipped / snr, 1.0)  # the limit, where a schedule ends in pure noise
