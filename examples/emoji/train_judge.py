"""Stage 2: the judge, on renderings and on their round trips through the autoencoder, never on generated pictures."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .captions import STYLES
from .data import IGNORED, Batch, Renderer, join
from .judge import HEADS, Judge
from .train_vae import round_trip
from .training import Run

PEAK_RATE = 2e-3

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(pictures, chosen)``: of augmented pictures, (B, 3, 128, 128), and their places in the pool, (B,)."""


@torch.no_grad()
def judge_pool(vae: AutoencoderKL, renderer: Renderer, count: int, chunk: int = 500) -> Batch:
    """About `count` pictures as uint8: plain 35 %, looks 15 %, styles 36 %, anything 14 %; half round-tripped."""
    chunks = []
    for i in range(max(1, count // chunk)):
        styled = [renderer.styled(chunk * 12 // 100, style) for style in STYLES]
        batch = join([renderer.any_pair(chunk // 2, plain_share=0.7), *styled, renderer.wild(chunk * 14 // 100)])
        pictures = round_trip(vae, batch.pictures) if i % 2 else batch.pictures
        chunks.append(replace(batch, pictures=(pictures * 255).round().to(torch.uint8)))
    return join(chunks)


def judge_loss(logits: dict[str, Tensor], labels: Batch) -> Tensor:
    """Cross entropy of the three heads, with some label smoothing."""
    return sum(
        F.cross_entropy(logits[head].float(), getattr(labels, head), ignore_index=IGNORED, label_smoothing=0.05)
        for head in HEADS
    )


def train_judge(judge: Judge, pool: Batch, seconds: float, file: Path, *, batch: int) -> Run:
    """Train in place for `seconds`; the result is the weights' moving average."""

    def loss(pictures: Tensor, chosen: Tensor) -> Tensor:
        labels = Batch(*(getattr(pool, field.name)[chosen] for field in fields(Batch)))
        return judge_loss(judge.logits(pictures), labels)

    return train_on_pool(judge, pool.pictures, loss, seconds, file, batch=batch)


def train_on_pool(judge: nn.Module, pictures: Tensor, loss: Loss, seconds: float, file: Path, *, batch: int) -> Run:
    """Train any judge on uint8 pictures, (N, 3, 128, 128); the result is the weights' moving average."""
    device = pictures.device
    judge.to(device, memory_format=torch.channels_last).train()
    run = Run.start(judge, PEAK_RATE, seconds, file, decay=0.99)

    def loss_of() -> Tensor:
        chosen = torch.randint(len(pictures), (batch,), device=device)
        shown = jitter(pictures[chosen].float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            return loss(shown, chosen)

    while run.clock.progress < 1:
        run.update(loss_of, PEAK_RATE)
    run.save()
    run.average.copy_to(judge)
    judge.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    return run


def jitter(pictures: Tensor) -> Tensor:
    """A little noise and a small shift of the whole batch, so that no exact pixel matters."""
    down, right = (int(n) for n in torch.randint(-4, 5, (2,)))
    shifted = F.pad(pictures, (4, 4, 4, 4), mode="replicate")[:, :, 4 + down : 132 + down, 4 + right : 132 + right]
    return shifted + 0.02 * torch.randn_like(shifted)
