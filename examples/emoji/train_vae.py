"""Stage 1: the autoencoder, trained on everything a style may bring."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .captions import STYLES
from .data import Renderer, join
from .training import Run

PEAK_RATE = 1e-3


class AutoencoderLoss(nn.Module):
    """Encode, sample, decode, and compare: absolute and squared error, gradients at three scales, a little KL."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> the mean loss."""
        target = 2 * pictures - 1
        posterior = self.vae.encode(target).latent_dist
        output = self.vae.decode(posterior.sample()).sample.float()
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        error = output - target
        return error.abs().mean() + error.square().mean() + gradient_error(error) + 1e-4 * kl


def gradient_error(error: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference between neighbouring errors, summed over halved sizes: blurred edges cost most."""
    total = error.new_zeros(())
    for _ in range(scales):
        total = total + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        error = nn.functional.avg_pool2d(error, 2)
    return total


def vae_batch(renderer: Renderer, count: int) -> Tensor:
    """Half plain pictures and looks, a sixth the styles, a third anything: (B, 3, 128, 128)."""
    styled = [renderer.styled(max(1, count // 18), style) for style in STYLES]
    drawn = join([*styled, renderer.wild(count // 3)]).pictures
    return torch.cat([drawn, renderer.any_pair(count - len(drawn), plain_share=0.6).pictures])


def train_vae(vae: AutoencoderKL, renderer: Renderer, seconds: float, file: Path, *, batch: int, compiled: bool) -> Run:
    """Train in place for `seconds`, in bf16 on a GPU; leaves the weights' moving average and its scaling factor."""
    device = renderer.device
    vae.to(device, memory_format=torch.channels_last).train()
    run = Run.start(AutoencoderLoss(vae), PEAK_RATE, seconds, file)
    loss_of = torch.compile(run.module) if compiled else run.module
    while run.clock.progress < 1:
        pictures = vae_batch(renderer, batch).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(pictures)
        run.update(loss, PEAK_RATE)
    run.save()
    run.average.copy_to(run.module)
    vae.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    with torch.no_grad():
        latents = encode(vae, renderer.base(256).pictures)
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    return run


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] -> the latents' means, unscaled, float32."""
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=pictures.is_cuda):
        return vae.encode(2 * pictures - 1).latent_dist.mean.float()


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode and decode: pictures in [0, 1] to the same."""
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=pictures.is_cuda):
        decoded = vae.decode(encode(vae, pictures)).sample
    return (decoded.float() / 2 + 0.5).clamp(0, 1)
