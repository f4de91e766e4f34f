"""Draw what adapters do alone and in pairs, and measure how far two push a picture in opposite directions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from app.settings.settings import DEFAULT_STEPS, Settings
from shira_diffusers.adapters import interference

STRENGTH, GUIDANCE = 1.0, 2.0  # where pairs of docs/study.md keep most: 64 % (61 % at guidance 3, 53 % at 0.8)
STUDY = ((0.10, "4 below 0.10", "73 to 85 %"), (0.16, "5 up to 0.16", "56 to 88 %"), (9.9, "6 above", "17 to 67 %"))
"""Pairs of the study by how far their styles oppose each other: up to which value, how many, how often both are kept
at these settings, by adapters of the trainer's default recipe.
"""
HINTS = (
    "Likely to mix well.",
    "One of the two may be lost now and then.",
    "One of the two is likely to be lost often.",
)


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
    benchmarks/study measures it, where it correlates -0.79 with how often both are kept, but on one drawn picture.

    Args:
        pictures: as ``pictures_of`` names them.
    """
    plain = _latents(pipe, pictures[()])
    effects = {mix: _latents(pipe, pictures[mix]) - plain for mix in pictures if len(mix) == 1}
    pairs = combinations(effects, 2)
    return {a + b: interference.opposing(effects[a], effects[b]) for a, b in pairs}


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
