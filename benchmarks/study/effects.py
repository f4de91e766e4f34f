"""What styles do to pictures, without any adapter: how far two push the latents apart, and whether they commute."""

import itertools
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.world import World
from examples.emoji.more_styles import ALL_STYLES
from examples.emoji.train_vae import encode


@torch.no_grad()
def style_effects(world: World, count: int = 48) -> list[dict[str, Any]]:
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
        row = {
            "cosine": torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0),
            "distance": (a - b).square().mean().sqrt(),
            "opposing": (-a * b).clamp(min=0).mean(),
            "order": (orders[0] - orders[1]).square().mean().sqrt(),
        }
        rows.append({"mix": f"{first}+{second}", **{name: round(float(value), 4) for name, value in row.items()}})
    return rows


def _latents(world: World, pictures: Tensor) -> Tensor:
    return torch.cat([encode(world.parts.vae, part) for part in pictures.split(24)]) * world.scaling
