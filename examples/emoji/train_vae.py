"""Stage 1: the autoencoder, trained on everything a style may bring."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .captions import STYLES
from .data import Renderer, join
from .training import Run

PEAK_RATE = 8e-4


class AutoencoderLoss(nn.Module):
    """Encode, sample, decode, and compare: squared and absolute error, gradients at three scales, a little KL."""

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
        return 4 * error.square().mean() + error.abs().mean() + 0.5 * gradient_error(error) + 1e-4 * kl


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


def vae_pool(renderer: Renderer, count: int, chunk: int = 500) -> Tensor:
    """About `count` pictures as uint8, rendered once: drawing them anew costs more than a training step."""
    chunks = [vae_batch(renderer, chunk) for _ in range(max(1, count // chunk))]
    return torch.cat([(pictures * 255).round().to(torch.uint8) for pictures in chunks])


def train_vae(vae: AutoencoderKL, pool: Tensor, seconds: float, file: Path, *, batch: int) -> Run:
    """Train in place for `seconds`, in bf16 on a GPU; leaves the weights' moving average."""
    device = pool.device
    vae.to(device).train()
    run = Run.start(AutoencoderLoss(vae), PEAK_RATE, seconds, file)

    def loss_of() -> Tensor:
        pictures = pool[torch.randint(len(pool), (batch,), device=device)].float() / 255
        with torch.autocast(device.type, torch.bfloat16):
            return run.module(pictures)

    while run.clock.progress < 1:
        run.update(loss_of, PEAK_RATE, graphed=device.type == "cuda")
    run.save()
    run.average.copy_to(run.module)
    vae.eval().requires_grad_(False)
    return run


def set_scaling_factor(vae: AutoencoderKL, renderer: Renderer) -> None:
    """Give the latents of the base's pictures unit variance."""
    latents = encode(vae, renderer.base(256).pictures)
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))


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
