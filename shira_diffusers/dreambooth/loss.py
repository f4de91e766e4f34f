"""The diffusion loss of a batch of pictures and prompts."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr
from torch import Tensor

from shira_diffusers.dreambooth.base_model import Schedule, training_schedule
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.data import Batch
from shira_diffusers.dreambooth.data_parallel import WHOLE, Share
from shira_diffusers.dreambooth.families import Conditions, Pipe, family_of


class Objective:
    """Mean squared error of the predicted noise or velocity, at uniformly drawn timesteps.

    Args:
        pipe: the base; its weights may change between calls.
        config: ``snr_gamma``, ``noise_offset``, ``with_prior_preservation`` and ``prior_loss_weight`` are used.
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
        self._schedule = training_schedule(pipe)

    def loss(self, batch: Batch, generator: torch.Generator, share: Share = WHOLE) -> Tensor:
        """Compute the loss, a scalar to be back-propagated.

        Args:
            batch: pixels or moments, prompts and time ids.
            generator: of the pipeline's device, the only source of randomness.
            share: the part of a larger batch; it draws the same numbers as within that batch.
        """
        draws = _Draws(generator, share, groups=2 if self._config.with_prior_preservation else 1)
        latents = self._latents(batch.tensors, draws)
        noise = draws.normal(latents)
        if self._config.noise_offset:  # https://www.crosslabs.org/blog/diffusion-with-offset-noise
            noise = noise + self._config.noise_offset * draws.normal(latents[:, :, :1, :1])
        timesteps = draws.integers(self._schedule.config.num_train_timesteps, latents)
        noisy = self._schedule.add_noise(latents, noise, timesteps)
        conditions = self._embed(batch.prompts)
        predicted = self._family.denoise(self._pipe, noisy, timesteps, conditions, batch.time_ids.to(latents.device))
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

    def _latents(self, tensors: Tensor, draws: "_Draws") -> Tensor:
        """Sample latents: pixels ``(n, 3, 8h, 8w)`` or moments ``(n, 2c, h, w)`` -> float32 ``(n, c, h, w)``."""
        vae = self._pipe.vae
        moments = tensors.to(vae.device) if self._cached else encode(self._pipe, tensors)
        distribution = DiagonalGaussianDistribution(moments)
        latents = distribution.mean + distribution.std * draws.normal(distribution.mean)
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def _embed(self, prompts: Sequence[str]) -> Conditions:
        """What the denoiser is given for the prompts of a batch."""
        if self._embeddings is None:
            return self._family.embed(self._pipe, prompts)
        known = [self._embeddings[prompt] for prompt in prompts]
        return {name: torch.stack([one[name] for one in known]) for name in known[0]}


class _Draws:
    """Random numbers of a batch: drawn for the whole batch, even if a process computes a share of it."""

    def __init__(self, generator: torch.Generator, share: Share, groups: int) -> None:
        self._generator, self._share, self._groups = generator, share, groups

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal float32 numbers of the shape of ``like``, whose first dimension is the batch."""
        shape = (self._share.whole(len(like), self._groups), *like.shape[1:])
        return self._mine(torch.randn(shape, generator=self._generator, device=like.device))

    def integers(self, limit: int, like: Tensor) -> Tensor:
        """An integer below ``limit`` for each example, int64 ``(n,)``."""
        count = self._share.whole(len(like), self._groups)
        return self._mine(torch.randint(limit, (count,), generator=self._generator, device=like.device))

    def _mine(self, drawn: Tensor) -> Tensor:
        return self._share.of(drawn, self._groups)


@torch.no_grad()
def encode(pipe: Pipe, pixels: Tensor) -> Tensor:
    """Encode pixels ``(n, 3, 8h, 8w)`` in [-1, 1] as moments, float32 ``(n, 2c, h, w)``, without autocast."""
    with torch.autocast(pipe.vae.device.type, enabled=False):
        moments: Tensor = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.parameters
    return moments.float()


def snr_weights(schedule: Schedule, timesteps: Tensor, gamma: float) -> Tensor:
    """Compute min-SNR weights ``(n,)`` of the loss at ``timesteps``, ``(n,)`` (arXiv 2303.09556, section 3.4)."""
    snr = compute_snr(schedule, timesteps)
    clipped = snr.clamp(max=gamma)
    if schedule.config.prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return torch.where(snr > 0, clipped / snr, 1.0)  # the limit, where a schedule ends in pure noise
