"""Emoji sprites, and batched renderings of them on any torch device."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .captions import LOOKS
from .concepts import BACKGROUNDS, CONCEPTS
from .model import IMAGE_SIZE

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SPRITE_SIZE = 136
_STRIKE = 109  # the only size of the font's bitmaps, in pixels
LOOK_INDEX = {look: i for i, look in enumerate(LOOKS)}


@dataclass(frozen=True)
class Placement:
    """Where a sprite goes: `scale` is its side over the picture's, `shift` in half pictures, `angle` in radians."""

    scale: Tensor  # (B,)
    shift: Tensor  # (B, 2)
    angle: Tensor  # (B,)


def sprites(characters: list[str], font: Path = FONT) -> Tensor:
    """The font's bitmaps, uint8 RGBA, (N, 4, 136, 136), centred."""
    face = ImageFont.truetype(str(font), _STRIKE)
    return torch.stack([_sprite(character, face) for character in characters])


def concept_sprites(font: Path = FONT) -> Tensor:
    """The sprites of `CONCEPTS`, in order."""
    return sprites([concept.emoji for concept in CONCEPTS], font)


def other_emoji() -> list[str]:
    """Single-character emoji that are no concept: they teach the autoencoder variety."""
    taken = {concept.emoji for concept in CONCEPTS}
    skin_tones = range(0x1F3FB, 0x1F400)
    codes = [*range(0x1F300, 0x1F650), *range(0x1F680, 0x1F6FD), *range(0x1F90C, 0x1FAF9)]
    found = (chr(code) for code in codes if code not in skin_tones)
    return [character for character in found if unicodedata.category(character) == "So" and character not in taken]


def _sprite(character: str, face: ImageFont.FreeTypeFont) -> Tensor:
    canvas = Image.new("RGBA", (2 * SPRITE_SIZE, 2 * SPRITE_SIZE))
    ImageDraw.Draw(canvas).text((SPRITE_SIZE // 2,) * 2, character, font=face, embedded_color=True)
    box = canvas.getbbox() or (0, 0, SPRITE_SIZE, SPRITE_SIZE)
    left = (box[0] + box[2] - SPRITE_SIZE) // 2
    top = (box[1] + box[3] - SPRITE_SIZE) // 2
    picture = canvas.crop((left, top, left + SPRITE_SIZE, top + SPRITE_SIZE))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Uniform draws on the generator's device."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def random_placement(looks: Tensor, generator: torch.Generator) -> Placement:
    """Nearly centred and upright; the look "small" is half the size."""
    count = len(looks)
    scale = uniform((count,), 0.76, 0.92, generator)
    scale = torch.where(looks == LOOK_INDEX["small"], 0.52 * scale, scale)
    shift = uniform((count, 2), -0.08, 0.08, generator)
    return Placement(scale, shift, uniform((count,), -0.06, 0.06, generator))


def render(sprite: Tensor, background: Tensor, looks: Tensor, generator: torch.Generator) -> Tensor:
    """Draw sprites on plain backgrounds with a soft shadow, then apply the looks.

    Args:
        sprite: uint8 RGBA, (B, 4, 136, 136).
        background: colours in [0, 1], (B, 3).
        looks: indices into `LOOKS`, (B,).
        generator: on the tensors' device; the only source of randomness.

    Returns:
        Pictures in [0, 1], float32, (B, 3, 128, 128).
    """
    color, alpha = place(sprite, random_placement(looks, generator))
    rim = gaussian(F.max_pool2d(alpha, 7, 1, 3), 0.7) * (looks == LOOK_INDEX["outlined"]).view(-1, 1, 1, 1)
    shadow = 0.3 * gaussian(torch.roll(torch.maximum(alpha, rim), 4, dims=2), 3.0)
    picture = background[:, :, None, None] * (1 - shadow)
    picture = picture * (1 - rim) + rim
    picture = color + picture * (1 - alpha)
    return apply_looks(picture, looks, generator)


def place(sprite: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
    """Resample sprites to the picture: premultiplied colour (B, 3, 128, 128) and alpha (B, 1, 128, 128)."""
    pixels = sprite.float() / 255
    pixels = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], dim=1)
    cos, sin = torch.cos(placement.angle) / placement.scale, torch.sin(placement.angle) / placement.scale
    x, y = placement.shift.unbind(1)
    rows = [torch.stack([cos, -sin, -cos * x + sin * y], 1), torch.stack([sin, cos, -sin * x - cos * y], 1)]
    size = [len(sprite), 4, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE]
    grid = F.affine_grid(torch.stack(rows, 1), size, align_corners=False)
    drawn = F.avg_pool2d(F.grid_sample(pixels, grid, align_corners=False), 2)  # drawn at twice the size: smooth edges
    return drawn[:, :3], drawn[:, 3:]


def apply_looks(picture: Tensor, looks: Tensor, generator: torch.Generator) -> Tensor:
    """Give each picture its look; "plain", "outlined" and "small" were settled while drawing."""
    gray = luminance(picture)
    noise = torch.randn(gray.shape, generator=generator, device=gray.device)
    tint = torch.tensor([1.08, 0.88, 0.64], device=picture.device).view(1, 3, 1, 1)
    coarse = F.interpolate(F.avg_pool2d(picture, 8), scale_factor=8.0, mode="nearest")
    changed = {
        "pastel": 0.55 * (0.8 * picture + 0.2 * gray) + 0.42,
        "dark": 0.3 * picture,
        "black and white": gray.expand_as(picture),
        "sepia": (0.1 + 0.85 * gray) * tint,
        "blurry": gaussian(picture, 2.5),
        "grainy": picture + 0.15 * gaussian(noise, 0.7),
        "pixelated": coarse,
    }
    for look, version in changed.items():
        picture = torch.where((looks == LOOK_INDEX[look]).view(-1, 1, 1, 1), version, picture)
    return picture.clamp(0, 1)


def luminance(picture: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), Rec. 601 weights."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=picture.device, dtype=picture.dtype)
    return (picture * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)


def gaussian(picture: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur, edges replicated."""
    radius = max(1, round(2.5 * sigma))
    at = torch.arange(-radius, radius + 1, device=picture.device, dtype=picture.dtype)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    flat = picture.flatten(0, 1).unsqueeze(1)  # (B, C, H, W) -> (B C, 1, H, W)
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel)
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel.transpose(2, 3))
    return flat.view(picture.shape)


def background_table(device: torch.device) -> Tensor:
    """The background colours in [0, 1], (16, 3), in the order of `BACKGROUND_NAMES`."""
    return torch.tensor(list(BACKGROUNDS.values()), device=device).float() / 255
