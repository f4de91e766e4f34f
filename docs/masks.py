"""Draw docs/plots/masks.svg: masks of a real weight, and the overlap of adapters; ``python -m docs.masks``."""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from shira_diffusers import ShiraAdapter, SparseDelta, build_masks

ROOT = Path(__file__).parents[1]
DRAWING = ROOT / "docs" / "plots" / "masks.svg"
WEIGHT = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
SIDE, CELL, GAP, HEAD = 64, 3, 24, 22
DENSITY = 0.05
FIRST, SECOND, BOTH = "#3f7fd9", "#e08a1e", "#d1345b"


def weight() -> nn.Linear:
    """The upper left corner of a weight of the demo model, (64, 64)."""
    layer = nn.Linear(SIDE, SIDE, bias=False)
    with safe_open(ROOT / "assets/emoji-diffusion/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        layer.weight.data = file.get_slice(WEIGHT)[:SIDE, :SIDE].float()
    return layer


def mask(layer: nn.Linear, family: str, seed: int = 0, avoid: Iterable[ShiraAdapter] = ()) -> Tensor:
    """The flat indices of one mask, int64 (nnz,)."""
    return build_masks(layer, family, DENSITY, targets="weight", seed=seed, avoid=avoid)["weight"]


def dots(indices: Iterable[int], colour: str, left: int, top: int) -> str:
    """A path of squares, one per entry."""
    places = (f"M{left + i % SIDE * CELL} {top + i // SIDE * CELL}h{CELL}v{CELL}h-{CELL}z" for i in sorted(indices))
    return f'<path fill="{colour}" d="{"".join(places)}"/>'


def panel(number: int, title: str, first: Tensor, second: Iterable[int] = ()) -> str:
    """One weight with one or two masks."""
    size = SIDE * CELL
    left, top = (size + GAP) * (number % 3) + 1, (size + HEAD + GAP) * (number // 3) + HEAD
    one, other = set(first.tolist()), set(second)
    return (
        f'<text x="{left}" y="{top - 7}">{title}</text>'
        f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none" stroke="#888"/>'
        + dots(one - other, FIRST, left, top)
        + dots(other - one, SECOND, left, top)
        + dots(one & other, BOTH, left, top)
    )


def drawing() -> str:
    """The whole drawing as SVG."""
    layer = weight()
    rand = mask(layer, "rand")
    held = ShiraAdapter({"weight": SparseDelta(rand.int(), torch.ones(rand.numel()), (SIDE, SIDE))})
    second, free = mask(layer, "rand", seed=1), mask(layer, "rand", seed=1, avoid=[held])
    shared = len(set(rand.tolist()) & set(second.tolist()))
    panels = [
        *(panel(i, family, mask(layer, family)) for i, family in enumerate(("wm", "struct", "block"))),
        panel(3, "rand", rand),
        panel(4, f"two rand: {shared} of {rand.numel()} shared", rand, second.tolist()),
        panel(5, "the second avoids the first", rand, free.tolist()),
    ]
    size = SIDE * CELL
    width, height = 3 * size + 2 * GAP + 2, 2 * (size + HEAD) + GAP + 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<g font-family="sans-serif" font-size="13" fill="#888">{"".join(panels)}</g></svg>\n'
    )


def main() -> int:
    """Write the drawing."""
    DRAWING.write_text(drawing(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
