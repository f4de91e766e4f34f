"""Contact sheets: many pictures in one PNG, with captions."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor


def to_images(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> PIL images."""
    pixels = (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in pixels]


def contact_sheet(pictures: Tensor, labels: list[str], columns: int, path: Path, colors: int = 0) -> None:
    """Write pictures (B, 3, H, W) with a line of text under each; `colors` > 0 makes a smaller palette PNG."""
    side, line = pictures.shape[-1], 12
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(to_images(pictures), labels, strict=True)):
        left, top = (i % columns) * side, (i // columns) * (side + line)
        sheet.paste(image, (left, top))
        draw.text((left + 2, top + side), label[: side // 6], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    (sheet.quantize(colors) if colors else sheet).save(path, optimize=True)
