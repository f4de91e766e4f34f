"""The three bundled styles, as batched procedures, so that true pictures of a style exist for any concept.

Each takes pictures in [0, 1], (B, 3, H, W), and a generator on their device, and returns pictures of the same shape.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .render import gaussian, luminance

Style = Callable[[Tensor, torch.Generator], Tensor]


def bluefire(picture: Tensor, generator: torch.Generator) -> Tensor:
    """A darkened picture whose edges burn with blue flames that lick upwards."""
    edges = (3.0 * edge_strength(gaussian(picture, 0.8)) - 0.12).clamp(0, 1)
    sway = smooth_noise(picture, 12, generator)
    flicker = 0.75 + 0.5 * smooth_noise(picture, 20, generator)
    heat = edges
    for step in range(1, 9):
        tongue = warp(edges, 1.3 * step * sway, 2.3 * step * torch.ones_like(sway))
        heat = torch.maximum(heat, tongue * flicker.clamp(0, 1) * 0.85**step)
    heat = (gaussian(heat, 0.7) + 0.55 * gaussian(edges, 5.0)).clamp(0, 1)
    flame = torch.cat([0.75 * heat**3, 0.85 * heat**1.6, heat**0.75], dim=1)
    night = 0.28 * picture * _rgb(picture, 0.6, 0.75, 1.1)
    return (night + flame * (1 - night)).clamp(0, 1)


def paintings(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Broad Kuwahara brush strokes in warm colours on a woven canvas."""
    flat = kuwahara(kuwahara(picture, 4), 2)
    strokes = gaussian(directional_noise(picture, generator), 0.9)
    strokes = strokes / strokes.std((2, 3), keepdim=True)
    warm = ((1.2 * flat - 0.2 * luminance(flat)) * _rgb(picture, 1.0, 0.9, 0.68) + _rgb(picture, 0.07, 0.04, 0)).clamp(
        0, 1
    )
    rows = torch.arange(picture.shape[2], device=picture.device)
    columns = torch.arange(picture.shape[3], device=picture.device)
    weave = torch.cos(rows * torch.pi / 2)[:, None] + torch.cos(columns * torch.pi / 2)[None, :]
    return (warm * (1 + 0.04 * weave + 0.12 * strokes)).clamp(0, 1)


def gold(picture: Tensor, generator: torch.Generator) -> Tensor:
    """The picture as a relief beaten into gold, lit from the upper left."""
    tone = luminance(picture) + 0.4 * (picture[:, :1] - picture[:, 2:])  # red stands out, blue recedes
    height = gaussian(tone, 1.0) + 0.012 * smooth_noise(picture, 24, generator)
    lit = 0.45 + 3.2 * (height - warp_by(height, -1.5)) + 0.3 * (tone - 0.5)
    return ramp(lit.clamp(0, 1), ((0.16, 0.07, 0.0), (0.55, 0.34, 0.05), (0.9, 0.68, 0.18), (1.0, 0.95, 0.7)))


STYLE_FUNCTIONS: dict[str, Style] = {"bluefire": bluefire, "paintings": paintings, "gold": gold}


def edge_strength(picture: Tensor) -> Tensor:
    """Length of the colour gradient per pixel, the strongest channel: (B, 3, H, W) -> (B, 1, H, W)."""
    padded = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    return (across.square() + down.square()).amax(1, keepdim=True).sqrt()


def kuwahara(picture: Tensor, radius: int) -> Tensor:
    """Each pixel takes the mean of whichever of its four quadrants varies least."""
    size, side = radius + 1, picture.shape[-1]
    padded = F.pad(picture, (radius,) * 4, mode="replicate")
    mean = F.avg_pool2d(padded, size, 1)
    variance = (F.avg_pool2d(padded.square(), size, 1) - mean.square()).sum(1, keepdim=True)
    corners = [(y, x) for y in (0, radius) for x in (0, radius)]
    means = torch.stack([mean[:, :, y : y + side, x : x + side] for y, x in corners])
    variances = torch.stack([variance[:, :, y : y + side, x : x + side] for y, x in corners])
    best = variances.argmin(0, keepdim=True).expand(1, *picture.shape)
    return means.gather(0, best)[0]


def smooth_noise(picture: Tensor, cells: int, generator: torch.Generator) -> Tensor:
    """Smooth noise of roughly unit size, (B, 1, H, W), with `cells` blobs along a side."""
    coarse = torch.randn((len(picture), 1, cells, cells), generator=generator, device=picture.device)
    return F.interpolate(coarse, size=picture.shape[2:], mode="bicubic", align_corners=False)


def directional_noise(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Noise drawn out along a diagonal like brush marks, roughly unit size, (B, 1, H, W)."""
    noise = smooth_noise(picture, picture.shape[-1] // 2, generator)
    return sum(torch.roll(noise, (2 * k, 2 * k), dims=(2, 3)) for k in range(-3, 4)) / 7**0.5


def warp(picture: Tensor, right: Tensor, up: Tensor) -> Tensor:
    """Move content by a field of pixels, (B, 1, H, W) each way; what leaves the picture is lost."""
    size = picture.shape[-1]
    identity = torch.eye(2, 3, device=picture.device).expand(len(picture), 2, 3)
    grid = F.affine_grid(identity, list(picture.shape), align_corners=False)
    offset = torch.cat([-right, up], dim=1).permute(0, 2, 3, 1) * (2 / size)
    return F.grid_sample(picture, grid + offset, align_corners=False)


def warp_by(picture: Tensor, pixels: float) -> Tensor:
    """Move content down and right by a constant number of pixels, edges replicated."""
    identity = torch.eye(2, 3, device=picture.device).expand(len(picture), 2, 3)
    grid = F.affine_grid(identity, list(picture.shape), align_corners=False)
    return F.grid_sample(picture, grid - 2 * pixels / picture.shape[-1], align_corners=False, padding_mode="border")


def ramp(value: Tensor, colors: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Map (B, 1, H, W) in [0, 1] to colours, linearly between equally spaced ones."""
    table = torch.tensor(colors, device=value.device, dtype=value.dtype)
    position = value * (len(colors) - 1)
    low = position.floor().clamp(max=len(colors) - 2).long()
    part = (position - low).squeeze(1).unsqueeze(-1)
    mixed = torch.lerp(table[low.squeeze(1)], table[low.squeeze(1) + 1], part)
    return mixed.permute(0, 3, 1, 2)


def _rgb(like: Tensor, red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue], device=like.device, dtype=like.dtype).view(1, 3, 1, 1)
