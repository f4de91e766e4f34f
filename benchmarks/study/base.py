"""The study base: the demo model's UNet at nearly ten times the size, to say whether figures change. Not shipped.

Autoencoder and text encoder are the shipped ones and stay as they are: a text encoder from scratch is what takes
longest (after 2,400 steps of batch 256 such a base named 2 % of concepts).
"""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from benchmarks.study.world import World
from examples.emoji.model import IMAGE_SIZE, WIDTH, Parts, save_pipeline
from examples.emoji.train_base import LatentSet, latent_set, train_base

RATE = 3e-4  # 5e-4 gave NaN after 3,400 steps


def build_large_unet(toy: bool) -> UNet2DConditionModel:
    """As `examples.emoji.model.build_unet`, three times as wide: 121 M parameters."""
    channels, heads = ((32, 32, 32), (1, 1, 1)) if toy else ((288, 480, 576), (9, 15, 18))
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        attention_head_dim=heads,  # diffusers reads these as numbers of heads
        cross_attention_dim=WIDTH,
    )


def make_base(world: World, folder: Path, work: Path, seconds: float, *, toy: bool) -> None:
    """Train a UNet on the shipped autoencoder's latents and text encoder, and write the pipeline, or leave it.

    A base that is being trained goes on from `work / "base.pt"`.
    """
    if folder.exists():
        return
    torch.manual_seed(0)
    unet = build_large_unet(toy).to(memory_format=torch.channels_last)  # for convolutions in bf16
    parts = Parts(world.parts.tokenizer, world.parts.text_encoder, unet, world.parts.vae)
    count, batch = (40, 4) if toy else (60_000, 128)
    kept = work / "latents.pt"
    if not kept.exists():
        work.mkdir(parents=True, exist_ok=True)
        made = latent_set(world.parts.vae, parts.tokenizer, world.renderer, count, seed=3, chunk=min(1000, count))
        torch.save((made.latents, made.tokens, made.empty), kept)
    data = LatentSet(*torch.load(kept, map_location=world.device))
    train_base(parts, data, seconds, work / "base.pt", batch=batch, rate=RATE)
    unet.to(memory_format=torch.contiguous_format)
    save_pipeline(parts, folder)
