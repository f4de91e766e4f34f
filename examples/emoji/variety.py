"""Pictures for the autoencoder and the judge: far more than the base model draws.

An autoencoder that has seen plain emoji only carries no style: all that an adapter may teach must pass through it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .render import Placement, gaussian, luminance, place, uniform
from .styles import directional_noise, edge_strength, kuwahara, ramp, smooth_noise, warp, warp_by


def wild(sprite: Tensor, generator: torch.Generator) -> Tensor:
    """Sprites at any size and place on any ground, then random treatments: (B, 4, S, S) -> (B, 3, 128, 128)."""
    picture = _scene(sprite, generator)
    for treatment, share in _TREATMENTS:
        chosen = torch.rand((len(picture), 1, 1, 1), generator=generator, device=picture.device) < share
        picture = torch.where(chosen, treatment(picture, generator), picture).clamp(0, 1)
    return picture


def _scene(sprite: Tensor, generator: torch.Generator) -> Tensor:
    count = len(sprite)
    ground = uniform((count, 3, 2, 2), 0, 1, generator)
    flat = ground.mean((2, 3), keepdim=True).expand_as(ground)
    plain = torch.rand((count, 1, 1, 1), generator=generator, device=ground.device) < 0.5
    picture = F.interpolate(torch.where(plain, flat, ground), size=(128, 128), mode="bilinear", align_corners=True)
    for shown in (sprite, sprite.roll(1, 0)):
        placement = Placement(
            uniform((count,), 0.3, 1.5, generator),
            uniform((count, 2), -0.6, 0.6, generator),
            uniform((count,), -3.1, 3.1, generator),
        )
        color, alpha = place(shown, placement)
        picture = color + picture * (1 - alpha)
    return picture


def _grade(picture: Tensor, generator: torch.Generator) -> Tensor:
    count = len(picture)
    saturated = torch.lerp(luminance(picture), picture, uniform((count, 1, 1, 1), 0, 1.7, generator)).clamp(0, 1)
    curved = saturated ** uniform((count, 1, 1, 1), 0.5, 2.0, generator)
    return curved * uniform((count, 3, 1, 1), 0.4, 1.2, generator) + uniform((count, 3, 1, 1), -0.1, 0.2, generator)


def _darken(picture: Tensor, generator: torch.Generator) -> Tensor:
    return picture * uniform((len(picture), 1, 1, 1), 0.08, 0.5, generator)


def _invert(picture: Tensor, generator: torch.Generator) -> Tensor:
    return 1 - picture


def _glow(picture: Tensor, generator: torch.Generator) -> Tensor:
    count = len(picture)
    color = uniform((count, 3, 1, 1), 0, 1, generator)
    edges = (3 * edge_strength(gaussian(picture, 0.8)) - 0.1).clamp(0, 1)
    strength = uniform((count, 1, 1, 1), 0.3, 1.2, generator)
    light = (edges + strength * gaussian(edges, 4.0)).clamp(0, 1)
    dark = picture * uniform((count, 1, 1, 1), 0.05, 0.9, generator)
    return dark + light * color + 0.7 * light**3


def _ink(picture: Tensor, generator: torch.Generator) -> Tensor:
    lines = (2.5 * edge_strength(picture) - 0.1).clamp(0, 1)
    return picture * (1 - lines) + lines * uniform((len(picture), 3, 1, 1), 0, 0.4, generator)


def _paint(picture: Tensor, generator: torch.Generator) -> Tensor:
    return kuwahara(picture, 3) * (1 + 0.15 * directional_noise(picture, generator))


def _relief(picture: Tensor, generator: torch.Generator) -> Tensor:
    height = gaussian(luminance(picture), 0.9)
    lit = 0.5 + 2.5 * (height - warp_by(height, -1.5)) + 0.3 * (luminance(picture) - 0.5)
    tint = uniform((len(picture), 3, 1, 1), 0.3, 1.1, generator)
    return ramp(lit.clamp(0, 1), ((0.1, 0.1, 0.1), (0.9, 0.9, 0.9), (1.0, 1.0, 1.0))) * tint


def _texture(picture: Tensor, generator: torch.Generator) -> Tensor:
    count, side = len(picture), picture.shape[-1]
    at = torch.arange(side, device=picture.device, dtype=picture.dtype)
    waves = uniform((count, 2, 2), -1.6, 1.6, generator)  # radians a pixel, two gratings
    phase = waves[:, :, 0, None, None] * at[None, None, :, None] + waves[:, :, 1, None, None] * at
    return picture * (1 + uniform((count, 1, 1, 1), 0, 0.12, generator) * torch.cos(phase).sum(1, keepdim=True))


def _ripple(picture: Tensor, generator: torch.Generator) -> Tensor:
    strength = uniform((len(picture), 1, 1, 1), 1, 5, generator)
    right, up = smooth_noise(picture, 10, generator), smooth_noise(picture, 10, generator)
    return warp(picture, strength * right, strength * up)


def _posterize(picture: Tensor, generator: torch.Generator) -> Tensor:
    levels = uniform((len(picture), 1, 1, 1), 2, 6, generator).round()
    return (picture * levels).round() / levels


def _blur(picture: Tensor, generator: torch.Generator) -> Tensor:
    return torch.lerp(gaussian(picture, 1.0), gaussian(picture, 3.5), uniform((len(picture), 1, 1, 1), 0, 1, generator))


def _pixelate(picture: Tensor, generator: torch.Generator) -> Tensor:
    return F.interpolate(F.avg_pool2d(picture, 4), scale_factor=4.0, mode="nearest")


def _noise(picture: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(picture.shape, generator=generator, device=picture.device)
    return picture + uniform((len(picture), 1, 1, 1), 0, 0.08, generator) * noise


_TREATMENTS = (
    (_ripple, 0.1),
    (_paint, 0.15),
    (_posterize, 0.08),
    (_pixelate, 0.06),
    (_blur, 0.1),
    (_ink, 0.12),
    (_glow, 0.2),
    (_relief, 0.1),
    (_invert, 0.05),
    (_grade, 0.5),
    (_darken, 0.12),
    (_texture, 0.15),
    (_noise, 0.15),
)
