"""Bytes an entry on disk, by mask family and density, beside the entropy bound.

python -m benchmarks.size
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks.common import UNETS, write
from shira_diffusers import ShiraAdapter, SparseDelta, build_masks, save_adapter
from shira_diffusers.targets import select

FAMILIES = ("rand", "struct", "block_rand")  # wm, grad and snip cost what rand costs: their gaps are about as random
DENSITIES = (0.01, 0.02)


def main() -> None:
    torch.manual_seed(0)
    rows = [
        figures(name, unet, family, density)
        for name, unet in ((name, empty_unet(config)) for name, config in UNETS.items())
        for density in DENSITIES
        for family in FAMILIES
    ]
    print(write("size", {"values": "float16", "weights": "attention and feed-forward", "rows": rows}).read_text())


def empty_unet(config: dict[str, Any]) -> nn.Module:
    """The architecture with whatever is in memory: masks of these families do not look at values."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    return unet.to_empty(device="cpu")


def figures(model: str, unet: nn.Module, family: str, density: float) -> dict[str, object]:
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
        "model": model,
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
