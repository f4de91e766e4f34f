"""Judging pictures made with a style adapter, and the nine concepts each style is taught with.

    judge = load_judge("assets/judge/judge.safetensors")
    judge_style(judge, pictures, ["owl", "rocket"], "bluefire")   # {"style": 1.0, "concept": 0.5, "both": 0.5, ...}

Compare with `true_rates` on the same concepts: what it says of the procedure's own pictures after the round trip.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .captions import caption, with_style
from .concepts import BACKGROUND_NAMES, CONCEPT_INDEX, CONCEPTS
from .data import STYLE_LABELS, Renderer
from .judge import Judge
from .sheet import to_images
from .styles import STYLE_FUNCTIONS
from .train_vae import round_trip

STYLE_CONCEPTS: dict[str, tuple[str, ...]] = {
    "bluefire": ("fox", "penguin", "cactus", "red apple", "hamburger", "car", "castle", "guitar", "umbrella"),
    "paintings": ("cat", "turtle", "tulip", "pineapple", "cupcake", "sailboat", "house", "violin", "lantern"),
    "gold": ("lion", "snail", "maple leaf", "grapes", "croissant", "rocket", "church", "trumpet", "camera"),
}
"""What an adapter of that style is trained on; it is judged on all the others."""

_BACKGROUNDS_EACH = 8


def unseen_concepts(style: str) -> list[str]:
    """The concepts that no training picture of `style` shows."""
    return [concept.name for concept in CONCEPTS if concept.name not in STYLE_CONCEPTS[style]]


@torch.no_grad()
def judge_style(judge: Judge, pictures: Tensor, concepts: list[str], style: str) -> dict[str, float]:
    """How often pictures show the style and the concept asked for.

    Args:
        pictures: (N, 3, 128, 128) in [0, 1].
        concepts: N names, as in `CONCEPTS`.
        style: a bundled style, or "plain".

    Returns:
        Rates in [0, 1] under "style", "concept" and "both", and the number of "pictures".
    """
    device = next(judge.parameters()).device
    said = [judge(part.to(device)) for part in pictures.split(128)]
    wanted = torch.tensor([CONCEPT_INDEX[name] for name in concepts])
    in_style = torch.cat([part["style"].argmax(1).cpu() for part in said]) == STYLE_LABELS.index(style)
    shown = torch.cat([part["concept"].argmax(1).cpu() for part in said]) == wanted
    rates = {"style": in_style, "concept": shown, "both": in_style & shown}
    return {name: round(float(right.float().mean()), 4) for name, right in rates.items()} | {"pictures": len(wanted)}


@torch.no_grad()
def true_rates(judge: Judge, vae: AutoencoderKL, renderer: Renderer, style: str, count: int) -> dict[str, float]:
    """The same rates for true pictures: rendered, styled, round-tripped; concepts outside the style's nine."""
    names = unseen_concepts(style)
    concepts = [names[i * 7 % len(names)] for i in range(count)]
    indices = torch.tensor([CONCEPT_INDEX[name] for name in concepts], device=renderer.device)
    parts = [round_trip(vae, renderer.styled(len(part), style, part).pictures).cpu() for part in indices.split(64)]
    return judge_style(judge, torch.cat(parts), concepts, style)


def write_style_pictures(renderer: Renderer, folder: Path) -> None:
    """The adapters' training pictures: `<style>/<concept>-<background>.png`, and the caption beside it.

    Every other caption leaves the style's name out: the adapter shall bring the style with its name or without.
    """
    for style, names in STYLE_CONCEPTS.items():
        (folder / style).mkdir(parents=True, exist_ok=True)
        concepts = [CONCEPT_INDEX[name] for name in names for _ in range(_BACKGROUNDS_EACH)]
        backgrounds = [(5 * i + i // 16) % len(BACKGROUND_NAMES) for i in range(len(concepts))]
        where = {"device": renderer.device}
        batch = renderer.draw(
            torch.tensor(concepts, **where), torch.tensor(backgrounds, **where), torch.zeros(len(concepts), **where)
        )
        images = to_images(STYLE_FUNCTIONS[style](batch.pictures, renderer.generator))
        for i, (image, concept, background) in enumerate(zip(images, concepts, backgrounds, strict=True)):
            words = caption(CONCEPTS[concept], BACKGROUND_NAMES[background])
            words = words if i % 2 else with_style(words, style)
            file = folder / style / f"{CONCEPTS[concept].name.replace(' ', '-')}-{BACKGROUND_NAMES[background]}.png"
            image.save(file, optimize=True)
            file.with_suffix(".txt").write_text(words + "\n")
