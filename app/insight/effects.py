"""Draw what adapters do alone and in pairs, and measure how far two push a picture in opposite directions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from app.settings.settings import DEFAULT_STEPS, Settings

STRENGTH, GUIDANCE = 1.0, 2.0  # where the pairs of benchmarks/study kept most: 62 % (57 % at guidance 3, 32 % at 0.7)
STUDY = (
    (0.10, "4 pairs below 0.10", "52 to 75 %"),
    (0.15, "3 up to 0.15", "35 to 44 %"),
    (9.9, "8 above", "10 to 43 %"),
)
"""Pairs of the study by how far their styles oppose each other: up to which value, how many, how often both stay."""
HINTS = ("Likely to mix well.", "One of the two may be lost now and then.", "One of the two is likely to be lost.")


def suggested(settings: Settings, names: Sequence[str]) -> Settings:
    """The settings with a mix of these adapters as the study suggests."""
    return replace(settings, mix={name: STRENGTH for name in sorted(names)}, guidance=GUIDANCE)


def pictures_of(settings: Settings, names: Sequence[str]) -> dict[tuple[str, ...], Settings]:
    """What to draw, by the names of the mix: the base, each adapter alone and each pair."""
    few = replace(settings, steps=min(settings.steps, DEFAULT_STEPS))
    return {mix: suggested(few, mix) for mix in [(), *((name,) for name in names), *combinations(names, 2)]}


@torch.no_grad()
def opposing(pipe: Any, pictures: Mapping[tuple[str, ...], Image]) -> dict[tuple[str, ...], float]:
    """How far each pair of adapters pushes the same latent in opposite directions: the mean of ``max(0, -a b)``.

    ``a`` and ``b`` are what each changes in the scaled latents of the base's picture. As ``style_effects`` of
    benchmarks/study measures it, but on one picture that each has drawn.

    Args:
        pictures: as ``pictures_of`` names them.
    """
    plain = _latents(pipe, pictures[()])
    effects = {mix: _latents(pipe, pictures[mix]) - plain for mix in pictures if len(mix) == 1}
    pairs = combinations(effects, 2)
    return {a + b: float((-effects[a] * effects[b]).clamp(min=0).mean()) for a, b in pairs}


def _latents(pipe: Any, picture: Image) -> Tensor:
    vae = pipe.vae
    pixels = pipe.image_processor.preprocess(picture).to(vae.device, vae.dtype)  # (1, 3, h, w)
    return vae.encode(pixels).latent_dist.mode().float() * vae.config.scaling_factor


def hint(value: float) -> tuple[str, str]:
    """What the study's data says of a pair that opposes each other so far, and why."""
    which = next(number for number, (most, *_) in enumerate(STUDY) if value < most or most == STUDY[-1][0])
    kept = ", ".join(f"the {pairs} in {share}" for _, pairs, share in STUDY)
    return HINTS[which], (
        f"On these pictures they push the same places in opposite directions by {value:.2f}. Of the 15 pairs of styles "
        f"in the project's study, both styles and the subject were kept: {kept} of pictures. There it was measured on "
        "many pictures of the styles themselves, here on one that each has drawn: a hint, no more."
    )
