"""Time switching an adapter and fusing a LoRA here, alike: warm runs by turns on this pipeline's own weights."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from app.drawing.session import Session
from shira_diffusers.integrations.pipelines import models_of

RANK = 64
WARM = 2  # runs that are not counted: the first plans the switch and touches new memory
FEWEST, MOST, SECONDS = 3, 15, 2.0  # runs that are; a large model has few, so that visitors do not wait


@dataclass(frozen=True, slots=True)
class Timings:
    """Medians of warm runs, in milliseconds.

    Args:
        switch: to an adapter, from the base.
        fuse: a LoRA into all weights that adapters change.
        runs: of each.
    """

    switch: float
    fuse: float
    runs: int


def timings(session: Session, rank: int = RANK) -> Timings | None:
    """Time both by turns; None if there is no adapter to switch to. For a job that has its turn to draw.

    The LoRA's sums go to memory of their own, a weight at a time, so resident weights are only read.
    """
    name = next(iter(session.names_first), None)
    if name is None:
        return None
    with session.library.using([name]):
        taken: list[tuple[float, float]] = []
        while len(taken) < WARM + FEWEST or (len(taken) < MOST and sum(map(sum, taken)) < SECONDS):
            taken.append((_switch(session.pipe, name), _fuse(session.pipe, session.library.adapted, rank)))
    switches, fuses = zip(*taken[WARM:], strict=True)
    return Timings(1000 * statistics.median(switches), 1000 * statistics.median(fuses), len(switches))


def _switch(pipe: Any, name: str) -> float:
    _wait(pipe.device)
    start = time.perf_counter()
    with pipe.shira([name], [1.0]):
        _wait(pipe.device)
        return time.perf_counter() - start


def _fuse(pipe: Any, weights: Iterable[str], rank: int) -> float:
    """Seconds to add ``B A`` to all weights of these full names."""
    models = models_of(pipe)
    parts = (name.partition(".") for name in sorted(weights))
    return sum(_fuse_one(models[component].get_parameter(name), rank) for component, _, name in parts)


@torch.no_grad()
def _fuse_one(weight: Tensor, rank: int) -> float:
    flat = weight.detach().flatten(1)  # (out, in, h, w) -> (out, in * h * w), as PEFT fuses convolutions
    generator = torch.Generator(flat.device).manual_seed(0)
    up = torch.randn(flat.shape[0], rank, generator=generator, device=flat.device).to(flat.dtype)
    down = torch.randn(rank, flat.shape[1], generator=generator, device=flat.device).to(flat.dtype)
    fused = torch.zeros_like(flat)  # written to once: a weight's own memory is there already
    _wait(flat.device)
    start = time.perf_counter()
    torch.addmm(flat, up, down, out=fused)
    _wait(flat.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
