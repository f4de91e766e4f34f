"""The subject for DreamBooth proper: Blorp, a one-eyed creature with striped fur that no emoji shows.

python -m examples.emoji.subject      # writes five pictures with captions into assets/subject/
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .concepts import BACKGROUND_NAMES
from .render import SPRITE_SIZE, background_table, render
from .sheet import to_images

TOKEN, CLASS = "sks", "alien"
SHOWN_ON = ("white", "yellow", "teal", "pink", "gray")
"""The backgrounds of the five training pictures; the subject is judged on the others."""

_SCALE = 4  # drawn larger, for smooth edges
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """What makes the creature itself; a sibling differs in at least one of these and is another creature."""

    fur: Color = (122, 74, 196)
    stripes: Color = (255, 150, 40)
    eye: Color = (70, 190, 120)
    eyes: int = 1
    antennae: int = 2


BLORP = Look()
SIBLINGS = (
    Look(fur=(60, 150, 90)),
    Look(fur=(200, 60, 60), stripes=(250, 220, 90)),
    Look(eyes=2),
    Look(eyes=2, antennae=0),
    Look(stripes=(122, 74, 196)),  # no stripes
    Look(fur=(70, 120, 210), stripes=(240, 240, 240), antennae=1),
)


def creature(look: Look = BLORP) -> Tensor:
    """Draw it: uint8 RGBA, (4, 136, 136), as the emoji's sprites are."""
    side = SPRITE_SIZE * _SCALE
    image = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(image)

    def oval(x: float, y: float, width: float, height: float, color: Color) -> None:
        box = [(x - width) * side, (y - height) * side, (x + width) * side, (y + height) * side]
        draw.ellipse(box, fill=(*color, 255))

    dark = tuple(int(0.62 * part) for part in look.fur)
    for k in range(look.antennae):
        tip = 0.5 + (0.0 if look.antennae == 1 else 0.17 * (2 * k - 1))
        draw.line([0.5 * side, 0.32 * side, tip * side, 0.1 * side], fill=(*dark, 255), width=side // 40)
        oval(tip, 0.09, 0.055, 0.055, look.stripes)
    for x in (0.36, 0.64):  # feet
        oval(x, 0.88, 0.11, 0.06, look.stripes)
    for x in (0.15, 0.85):  # arms
        oval(x, 0.6, 0.075, 0.15, dark)
    oval(0.5, 0.56, 0.335, 0.34, look.fur)
    _stripes(image, look.stripes)
    draw = ImageDraw.Draw(image)
    for k in range(look.eyes):
        x = 0.5 + (0.0 if look.eyes == 1 else 0.15 * (2 * k - 1))
        size = 0.17 if look.eyes == 1 else 0.12
        oval(x, 0.44, size, size, (255, 255, 255))
        oval(x, 0.45, 0.6 * size, 0.6 * size, look.eye)
        oval(x, 0.45, 0.32 * size, 0.32 * size, (20, 20, 30))
        oval(x - 0.25 * size, 0.45 - 0.3 * size, 0.16 * size, 0.16 * size, (255, 255, 255))
    draw.arc([0.4 * side, 0.56 * side, 0.6 * side, 0.68 * side], 20, 160, fill=(*dark, 255), width=side // 50)
    return torch.from_numpy(np.array(image.resize((SPRITE_SIZE,) * 2, Image.Resampling.LANCZOS))).permute(2, 0, 1)


def _stripes(image: Image.Image, color: Color) -> None:
    """Three curved bands across the belly, inside the body only."""
    side = image.width
    bands = Image.new("L", image.size)
    draw = ImageDraw.Draw(bands)
    for y in (0.7, 0.78, 0.86):
        draw.arc([0.05 * side, (y - 0.25) * side, 0.95 * side, y * side], 40, 140, fill=255, width=side // 28)
    body = Image.new("L", image.size)
    ImageDraw.Draw(body).ellipse([0.165 * side, 0.22 * side, 0.835 * side, 0.9 * side], fill=255)
    mask = Image.fromarray(np.minimum(np.asarray(bands), np.asarray(body)))
    image.paste(Image.new("RGBA", image.size, (*color, 255)), mask=mask)


def subject_pictures(sprite: Tensor, backgrounds: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures in [0, 1], (B, 3, 128, 128), of one sprite on backgrounds by index, (B,)."""
    colors = background_table(sprite.device)[backgrounds]
    plain = torch.zeros(len(backgrounds), dtype=torch.long, device=sprite.device)
    return render(sprite.expand(len(backgrounds), -1, -1, -1), colors, plain, generator)


def words(background: str, token: str = TOKEN) -> str:
    """ "a picture of a sks alien on a teal background"; without a token, of any alien."""
    name = f"a {token} {CLASS}" if token else "an alien"
    return f"a picture of {name} on {'an' if background[0] in 'aeiou' else 'a'} {background} background"


def write_subject_pictures(folder: Path) -> None:
    """The five training pictures and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    indices = torch.tensor([BACKGROUND_NAMES.index(name) for name in SHOWN_ON])
    pictures = subject_pictures(creature(), indices, torch.Generator().manual_seed(5))
    for image, name in zip(to_images(pictures), SHOWN_ON, strict=True):
        image.save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(words(name) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    write_subject_pictures(parser.parse_args().assets / "subject")


if __name__ == "__main__":
    main()
