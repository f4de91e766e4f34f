"""What styles and adapters do to pictures: how far two push the latents apart, and whether styles commute."""

import itertools
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.training import Draws, Objective
from benchmarks.study.world import Lesson, World
from examples.emoji.more_styles import ALL_STYLES
from examples.emoji.train_vae import encode
from shira_diffusers.adapters.interference import cosine, opposing


@torch.no_grad()
def style_effects(world: World, count: int) -> list[dict[str, Any]]:
    """For each pair of styles, on true pictures; an effect is the change of the scaled latents, ``[n, 4, 16, 16]``.

    "cosine" of the two effects; "distance" between them (root mean square); "opposing": the mean of how far they push
    the same latent in opposite directions, ``max(0, -a b)``; "order": the distance between both compositions.
    """
    own = world.renderer
    pictures = own.any_pair(count).pictures
    styled = {name: style(pictures, own.generator) for name, style in ALL_STYLES.items()}
    plain = _latents(world, pictures)
    effects = {name: _latents(world, picture) - plain for name, picture in styled.items()}
    rows = []
    for first, second in itertools.combinations(effects, 2):
        a, b = effects[first], effects[second]
        orders = [
            _latents(world, ALL_STYLES[second](styled[first], own.generator)),
            _latents(world, ALL_STYLES[first](styled[second], own.generator)),
        ]
        row = _compared(a, b) | {"order": float((orders[0] - orders[1]).square().mean().sqrt())}
        rows.append({"mix": f"{first}+{second}", **{name: round(value, 4) for name, value in row.items()}})
    return rows


@torch.no_grad()
def adapter_effects(
    objective: Objective, plain: Lesson, changes: dict[str, Tensor], draws: Draws
) -> dict[str, dict[str, float]]:
    """The same measures for each pair of adapters, by the name of the mix; needs no picture of any style.

    An effect is the change of the velocity that is predicted for noisy plain pictures; `changes` are those of all
    weights, ``[numel]``, and `draws` the noise.
    """
    effects: dict[str, list[Tensor]] = {name: [] for name in changes}
    for i in range(len(draws.time)):
        draw = draws.at(torch.tensor([i], device=objective.weights.device))
        noisy, _, texts = objective.noised(*draw.of(plain.latents, plain.texts), draw)
        alone = objective.predict(objective.weights, noisy, draw.time, texts)
        for name, change in changes.items():
            effects[name].append(objective.predict(objective.weights + change, noisy, draw.time, texts) - alone)
    whole = {name: torch.cat(parts) for name, parts in effects.items()}
    return {f"{a}+{b}": _compared(whole[a], whole[b]) for a, b in itertools.combinations(whole, 2)}


def _compared(a: Tensor, b: Tensor) -> dict[str, float]:
    """Cosine, root mean square distance, and how far both push the same value in opposite directions."""
    return {
        "cosine": cosine(a, b),
        "distance": float((a - b).square().mean().sqrt()),
        "opposing": opposing(a, b),
    }


def _latents(world: World, pictures: Tensor) -> Tensor:
    return torch.cat([encode(world.parts.vae, part) for part in pictures.split(24)]) * world.scaling
