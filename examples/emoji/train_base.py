"""Stage 3: the UNet and the text encoder, together, on latents encoded once."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .captions import LOOKS, random_caption
from .concepts import BACKGROUND_NAMES, CONCEPTS
from .data import Renderer
from .model import Parts, build_scheduler
from .train_vae import encode
from .training import Run

PEAK_RATE = 1e-3
CAPTIONS_EACH = 3
DROPPED_CAPTIONS = 0.1


@dataclass(frozen=True)
class LatentSet:
    """Scaled latents (N, 4, 16, 16) in bf16, token ids of their captions (N, 3, 32), and those of no caption (32,)."""

    latents: Tensor
    tokens: Tensor
    empty: Tensor


@torch.no_grad()
def latent_set(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, renderer: Renderer, count: int, *, seed: int, chunk: int = 1000
) -> LatentSet:
    """Render, caption and encode `count` pictures."""
    rng = random.Random(seed)
    latents, captions = [], []
    for _ in range(max(1, count // chunk)):
        batch = renderer.base(chunk)
        latents.append((encode(vae, batch.pictures) * vae.config.scaling_factor).bfloat16())
        labels = torch.stack([batch.concept, batch.shown, batch.look], 1).tolist()
        for concept, background, look in labels:
            words = (CONCEPTS[concept], BACKGROUND_NAMES[background], LOOKS[look])
            captions += [random_caption(rng, *words) for _ in range(CAPTIONS_EACH)]
    tokens = tokenize(tokenizer, captions).view(-1, CAPTIONS_EACH, tokenizer.model_max_length)
    device = renderer.device
    return LatentSet(torch.cat(latents), tokens.to(device), tokenize(tokenizer, [""])[0].to(device))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids, (N, 32), padded and cut as in the pipeline."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


class Denoiser(nn.Module):
    """The text encoder and the UNet as one trainable module."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.text_encoder, self.unet = parts.text_encoder, parts.unet

    def forward(self, noisy: Tensor, steps: Tensor, tokens: Tensor) -> Tensor:
        """Noisy latents (B, 4, 16, 16), timesteps (B,), token ids (B, 32) -> v, (B, 4, 16, 16)."""
        words = self.text_encoder(tokens).last_hidden_state
        return self.unet(noisy, steps, words).sample


def denoising_loss(denoiser: Denoiser, data: LatentSet, scheduler: DDIMScheduler, batch: int) -> Tensor:
    """Mean squared error of v over a random batch, one caption in ten left out."""
    device = data.latents.device
    chosen = torch.randint(len(data.latents), (batch,), device=device)
    latents = data.latents[chosen].float()
    tokens = data.tokens[chosen, torch.randint(CAPTIONS_EACH, (batch,), device=device)]
    tokens = torch.where(torch.rand((batch, 1), device=device) < DROPPED_CAPTIONS, data.empty, tokens)
    steps = torch.randint(scheduler.config.num_train_timesteps, (batch,), device=device)
    noise = torch.randn_like(latents)
    noisy = scheduler.add_noise(latents, noise, steps)
    target = scheduler.get_velocity(latents, noise, steps)
    with torch.autocast(device.type, torch.bfloat16):
        output = denoiser(noisy, steps, tokens)
    return F.mse_loss(output.float(), target)


def train_base(
    parts: Parts, data: LatentSet, seconds: float, file: Path, *, batch: int, rate: float = PEAK_RATE
) -> Run:
    """Train UNet and text encoder in place for `seconds`; the result is the weights' moving average."""
    device = data.latents.device
    parts.unet.to(device).train()
    parts.text_encoder.to(device).train()
    denoiser = Denoiser(parts)
    run = Run.start(denoiser, rate, seconds, file, decay=0.9995)
    scheduler = build_scheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    while run.clock.progress < 1:
        run.update(lambda: denoising_loss(denoiser, data, scheduler, batch), rate, graphed=device.type == "cuda")
    run.save()
    run.average.copy_to(denoiser)
    denoiser.eval().requires_grad_(False)
    return run
