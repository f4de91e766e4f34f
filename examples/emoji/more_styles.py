"""Styles that no bundled adapter has: drawn lines, tiles and leaded glass, for studies of how styles mix.

As in `styles`, each takes pictures in [0, 1], (B, 3, H, W), and a generator on their device, and returns pictures of
the same shape. All leave the concept to be seen, and something of a style that the picture had before.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .render import gaussian, luminance, uniform
from .styles import STYLE_FUNCTIONS, Style, edge_strength, smooth_noise

TILE = 8  # pixels
_PANES = 5  # cells of leaded glass along a side


def linework(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Ink lines over a thin wash on cream paper."""
    lines = (3.4 * edge_strength(gaussian(picture, 0.8)) - 0.2).clamp(0, 1)
    paper = _color(picture, 0.97, 0.94, 0.86) * (1 + 0.03 * smooth_noise(picture, 24, generator))
    washed = torch.lerp(paper, picture, 0.3)
    return torch.lerp(washed, _color(picture, 0.07, 0.07, 0.16).expand_as(picture), lines).clamp(0, 1)


def mosaic(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Square tiles, each of its own shade, with shallow joints."""
    side = picture.shape[-1] // TILE
    mean = F.interpolate(F.avg_pool2d(picture, TILE), scale_factor=float(TILE), mode="nearest")
    shade = F.interpolate(uniform((len(picture), 1, side, side), 0.62, 1.2, generator), scale_factor=float(TILE))
    at = torch.arange(picture.shape[-1], device=picture.device) % TILE
    joint = (at == 0).float()
    joints = torch.maximum(joint[:, None], joint[None, :])
    tiles = (torch.lerp(picture, mean, 0.8) + 0.05) * shade
    return (tiles * (1 - 0.25 * joints)).clamp(0, 1)


def stained(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Panes of saturated glass in black leads, lit from behind the middle."""
    soft = gaussian(picture, 1.0)
    glass = (luminance(soft) + 1.5 * (soft - luminance(soft))).clamp(0, 1)
    leads = (_dilate(edge_strength(gaussian(picture, 1.2)), 3) * 3.0 - 0.45).clamp(0, 1)
    leads = torch.maximum(leads, _pane_borders(picture, generator))
    at = torch.linspace(-1, 1, picture.shape[-1], device=picture.device)
    glow = 1.15 - 0.45 * (at[:, None].square() + at[None, :].square())
    return (glass * glow * (1 - gaussian(leads, 0.6))).clamp(0, 1)


def _pane_borders(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Borders of cells around jittered seeds, about 3 pixels wide, (B, 1, H, W)."""
    count, size = len(picture), picture.shape[-1]
    grid = (torch.arange(_PANES, device=picture.device) + 0.5) * size / _PANES
    seeds = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).view(1, -1, 2)
    seeds = seeds + uniform((count, _PANES * _PANES, 2), -0.32, 0.32, generator) * size / _PANES
    at = torch.arange(size, device=picture.device)
    down = (at[None, None, :] - seeds[:, :, :1]).square()  # (B, seeds, H)
    across = (at[None, None, :] - seeds[:, :, 1:]).square()
    distances = (down[:, :, :, None] + across[:, :, None, :]).sqrt()
    nearest = distances.topk(2, dim=1, largest=False).values
    return ((2.2 - (nearest[:, 1:] - nearest[:, :1])) / 1.2).clamp(0, 1)


def _dilate(picture: Tensor, size: int) -> Tensor:
    return F.max_pool2d(picture, size, 1, size // 2)


def _color(like: Tensor, red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue], device=like.device, dtype=like.dtype).view(1, 3, 1, 1)


ALL_STYLES: dict[str, Style] = {**STYLE_FUNCTIONS, "linework": linework, "mosaic": mosaic, "stained": stained}
"""The bundled styles and those of this module."""

MORE_STYLE_CONCEPTS: dict[str, tuple[str, ...]] = {
    "linework": ("owl", "frog", "rose", "banana", "pizza", "bicycle", "tower", "drum", "teapot"),
    "mosaic": ("horse", "octopus", "sunflower", "strawberry", "donut", "steam train", "island", "bell", "globe"),
    "stained": ("eagle", "butterfly", "tree", "pear", "cheese", "airplane", "mosque", "saxophone", "crown"),
}
"""Nine concepts that an adapter of that style is trained on, as `judge_styles.STYLE_CONCEPTS` for the others."""
