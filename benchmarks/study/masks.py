"""Which entries a SHiRA of the study trains: scores beyond the library's own families."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.study.flat import Layout
from benchmarks.study.recipes import Recipe
from shira_diffusers import build_masks
from shira_diffusers.seeds import seeded

CALIBRATION_BATCHES = 12


@dataclass(frozen=True)
class Gradients:
    """Sums over a calibration set's batches, each ``[numel]``: of magnitudes, and of gradients as they are."""

    magnitude: Tensor
    signed: Tensor


Score = Callable[[Tensor, Gradients, Gradients], Tensor]
"""``score(weights, gradients of the style, gradients of plain pictures) -> [numel]``, the highest are trained."""


def _ratio(weights: Tensor, style: Gradients, plain: Gradients) -> Tensor:
    return style.magnitude / (plain.magnitude + plain.magnitude.mean())


def _difference(weights: Tensor, style: Gradients, plain: Gradients) -> Tensor:
    return style.magnitude / style.magnitude.mean() - plain.magnitude / plain.magnitude.mean()


SCORES: dict[str, Score] = {
    "grad": lambda weights, style, plain: style.magnitude,
    "wm": lambda weights, style, plain: weights.abs(),
    "small": lambda weights, style, plain: -weights.abs(),  # SaRA, ICLR 2025
    "snip": lambda weights, style, plain: (weights * style.magnitude).abs(),
    "steady": lambda weights, style, plain: style.signed.abs(),  # batches agree on the sign
    "ratio": _ratio,
    "difference": _difference,
    "quiet": lambda weights, style, plain: -plain.magnitude,  # TaLoS, ICLR 2025: least sensitive to neutral data
}


def choose(
    recipe: Recipe,
    layout: Layout,
    unet: nn.Module,
    weights: Tensor,
    style: Gradients,
    plain: Gradients,
    *,
    seed: int,
    blocked: Tensor | None = None,
) -> Tensor:
    """The sorted flat indices, int64 ``[nnz]``, that an adapter of this recipe trains."""
    chosen = layout.chosen(unet, recipe.targets)
    if recipe.mask in ("struct", "struct_rows"):
        return _structured(recipe, layout, unet, seed, chosen)
    if recipe.mask == "rand":
        score = torch.cat([_uniform(seed, name, shape.numel()) for name, shape, _ in layout.spans()]).to(weights.device)
    else:
        score = SCORES[recipe.mask](weights, style, plain)
    if blocked is not None:
        score = score.masked_fill(blocked, -torch.inf)
    return _global(score, recipe, layout, chosen) if recipe.budget == "global" else _each(score, recipe, layout, chosen)


def _uniform(seed: int, name: str, count: int) -> Tensor:
    return torch.rand(count, generator=seeded(seed, name))


def _each(score: Tensor, recipe: Recipe, layout: Layout, chosen: list[bool]) -> Tensor:
    """The same density in each weight; norms and biases whole."""
    found = []
    for (_, shape, start), wanted in zip(layout.spans(), chosen, strict=True):
        if wanted:
            count = shape.numel() if len(shape) == 1 else max(1, round(recipe.density * shape.numel()))
            found.append(score[start : start + shape.numel()].topk(count).indices + start)
    return torch.cat(found).sort().values


def _global(score: Tensor, recipe: Recipe, layout: Layout, chosen: list[bool]) -> Tensor:
    """The highest of all, so that weights that matter get more; scores count as they are."""
    score = score.clone()
    for (_, shape, start), wanted in zip(layout.spans(), chosen, strict=True):
        span = score[start : start + shape.numel()]
        if not wanted:
            span.fill_(-torch.inf)
        elif recipe.cap < 1:
            most = max(1, round(recipe.cap * span.numel()))
            span[span < span.topk(most).values[-1]] = -torch.inf
    targeted = sum(shape.numel() for (_, shape, _), wanted in zip(layout.spans(), chosen, strict=True) if wanted)
    return score.topk(round(recipe.density * targeted)).indices.sort().values


def _structured(recipe: Recipe, layout: Layout, unet: nn.Module, seed: int, chosen: list[bool]) -> Tensor:
    masks = build_masks(unet, recipe.mask, recipe.density, "all", seed=seed)
    starts = {name: start for name, _, start in layout.spans()}
    wanted = [name for name, use in zip(layout.names, chosen, strict=True) if use and name in masks]
    return torch.cat([masks[name] + starts[name] for name in wanted]).sort().values
