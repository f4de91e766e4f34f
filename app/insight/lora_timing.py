"""Time what fusing a LoRA takes here: the step that SHiRA's switching replaces, on this pipeline's own weights."""

import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from shira_diffusers.integrations.pipelines import models_of

RANK = 64
ROUNDS = 3  # the first one warms up, and the median leaves it out


def fuse_ms(pipe: Any, weights: Iterable[str], rank: int = RANK) -> float:
    """Milliseconds to fuse a LoRA: ``W + B A`` of all weights that adapters change; the median of a few rounds.

    The sums go to memory of their own, a weight at a time, so resident weights are only read.

    Args:
        pipe: the resident pipeline.
        weights: full names of the weights that adapters change.
        rank: of the LoRA.
    """
    adapted = sorted(weights)
    models = models_of(pipe)
    rounds = []
    for _ in range(ROUNDS):
        rounds.append(0.0)
        for full_name in adapted:
            component, _, name = full_name.partition(".")
            rounds[-1] += _fuse_one(models[component].get_parameter(name), rank)
    return 1000 * statistics.median(rounds)


@torch.no_grad()
def _fuse_one(weight: Tensor, rank: int) -> float:
    flat = weight.detach().flatten(1)  # (out, in, h, w) -> (out, in * h * w), as PEFT fuses convolutions
    generator = torch.Generator(flat.device).manual_seed(0)
    up = torch.randn(flat.shape[0], rank, generator=generator, device=flat.device).to(flat.dtype)
    down = torch.randn(rank, flat.shape[1], generator=generator, device=flat.device).to(flat.dtype)
    fused = torch.empty_like(flat)
    _wait(flat)
    start = time.perf_counter()
    torch.addmm(flat, up, down, out=fused)
    _wait(flat)
    return time.perf_counter() - start


def _wait(tensor: Tensor) -> None:
    if not tensor.is_cpu:
        torch.accelerator.synchronize(tensor.device)
