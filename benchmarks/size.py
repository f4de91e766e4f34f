"""Bytes an entry on disk, by mask family and density, beside the entropy bound.

python -m benchmarks.size
"""

import math
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks.common import write
from shira_diffusers import ShiraAdapter, SparseDelta, build_masks, save_adapter
from shira_diffusers.targets import select

FAMILIES = ("rand", "struct", "block_rand")  # wm, grad and snip cost what rand costs: their gaps are about as random
DENSITIES = (0.01, 0.02)
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}


def main() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    unet.to_empty(device="cpu")  # masks of these families do not look at values
    rows = [figures(unet, family, density) for density in DENSITIES for family in FAMILIES]
    print(
        write("size", {"values": "float16", "weights": "SD 1.5, attention and feed-forward", "rows": rows}).read_text()
    )


def figures(unet: nn.Module, family: str, density: float) -> dict[str, object]:
    """The size of a float16 adapter with masks of a family."""
    weights = select({"unet": unet})
    masks = build_masks({"unet": unet}, family, density)
    deltas = {
        name: SparseDelta(mask, torch.randn(mask.numel()).half(), tuple(weights[name].shape))
        for name, mask in masks.items()
    }
    adapter = ShiraAdapter(deltas)
    with tempfile.TemporaryDirectory() as folder:
        size = save_adapter(adapter, Path(folder, "a.safetensors")).stat().st_size
    return {
        "family": family,
        "density": density,
        "entries": adapter.nnz,
        "bytes": size,
        "bytes_an_entry": round(size / adapter.nnz, 4),
        "entropy_bound_of_random_masks": round(2 + entropy(adapter.density) / 8, 4),
    }


def entropy(density: float) -> float:
    """Bits an index costs at least, for random masks of a density."""
    return -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / density


if __name__ == "__main__":
    main()
