"""The loss of a batch of pictures and prompts."""

from collections.abc import Mapping, Sequence

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.data import Batch
from shira_diffusers.dreambooth.data_parallel import WHOLE, Share
from shira_diffusers.dreambooth.families import Conditions, Pipe, denoiser_of, family_of
from shira_diffusers.dreambooth.noising import Draws, noising_of


class Objective:
    """Mean squared error of what the denoiser predicts, at timesteps that are drawn.

    Args:
        pipe: the base; its weights may change between calls.
        config: complete, see ``base_model.complete``; what concerns noise, weights and prompts is used.
        embeddings: conditions of all prompts, without the first dimension, where no text encoder is trained.
        cached: batches hold moments of latents, as ``encode`` gives them, in place of pixels.
    """

    def __init__(
        self,
        pipe: Pipe,
        config: TrainingConfig,
        embeddings: Mapping[str, Conditions] | None,
        cached: bool,
    ) -> None:
        self._pipe = pipe
        self._family = family_of(pipe)
        self._config = config
        self._embeddings = embeddings
        self._cached = cached
        self._noising = noising_of(pipe, config)

    def loss(self, batch: Batch, generator: torch.Generator, share: Share = WHOLE) -> Tensor:
        """Compute the loss, a scalar to be back-propagated.

        Args:
            batch: pixels or moments, prompts and time ids.
            generator: of the pipeline's device, the only source of randomness.
            share: the part of a larger batch; it draws the same numbers as within that batch.
        """
        draws = Draws(generator, share, groups=2 if self._config.with_prior_preservation else 1)
        latents = self._latents(batch.tensors, draws)
        noise = draws.normal(latents)
        if self._config.noise_offset:  # https://www.crosslabs.org/blog/diffusion-with-offset-noise
            noise = noise + self._config.noise_offset * draws.normal(latents[:, :, :1, :1])
        noised = self._noising.mix(latents, noise, draws)
        predicted = self._family.denoise(
            self._pipe,
            noised.latents,
            noised.timesteps,
            self._embed(batch.prompts),
            batch.time_ids.to(latents.device),
            self._config.guidance_scale,
        )
        errors = noised.errors(predicted.float())
        if not self._config.with_prior_preservation:
            return errors.mean()
        instances, classes = errors.chunk(2)
        return instances.mean() + self._config.prior_loss_weight * classes.mean()

    @property
    def device(self) -> torch.device:
        """Where losses are computed."""
        return denoiser_of(self._pipe).device

    def _latents(self, tensors: Tensor, draws: Draws) -> Tensor:
        """Sample latents: pixels ``(n, 3, 8h, 8w)`` or moments ``(n, 2c, h, w)`` -> float32 ``(n, c, h, w)``."""
        vae = self._pipe.vae
        moments = tensors.to(vae.device) if self._cached else encode(self._pipe, tensors)
        distribution = DiagonalGaussianDistribution(moments)
        latents = distribution.mean + distribution.std * draws.normal(distribution.mean)
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def _embed(self, prompts: Sequence[str]) -> Conditions:
        """What the denoiser is given for the prompts of a batch."""
        if self._embeddings is None:
            return self._family.embed(self._pipe, prompts, self._config.max_sequence_length)
        known = [self._embeddings[prompt] for prompt in prompts]
        return {name: torch.stack([one[name] for one in known]) for name in known[0]}


@torch.no_grad()
def encode(pipe: Pipe, pixels: Tensor) -> Tensor:
    """Encode pixels ``(n, 3, 8h, 8w)`` in [-1, 1] as moments, float32 ``(n, 2c, h, w)``, without autocast."""
    with torch.autocast(pipe.vae.device.type, enabled=False):
        moments: Tensor = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.parameters
    return moments.float()
