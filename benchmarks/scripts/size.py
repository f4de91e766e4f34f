"""Measure bytes per entry on disk, by mask family and density, beside the entropy bound, PEFT's SHiRA and LoRA.

python -m benchmarks.scripts.size [--models "SD 1.5"] [--toy] [--out FILE]

Attention and feed-forward of a UNet of random weights; every file is written and its size read. The same on every
machine. ``bound``: what an entry costs at least, 2 bytes for its float16 value and its share of the bits that select
one mask of the family among all others: log2 of the number of masks of so many entries, or of so many runs of 32 for
block. A struct mask is given by its first line, so its bound is the value alone; its file lists entries all the same.
The masks of grad and snip are those of the loss of one step on random weights, on SD 1.5 only. PEFT's SHiRA keeps
float32 values and two indices; LoRA has rank 64 and float16 values, and no share of entries to be counted by.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import rivals
from benchmarks.measure import MODELS, out_of, toy_options, write
from benchmarks.models import RANK, TOY, UNETS, inputs_of, lora_state, make_unet
from shira_diffusers import ShiraAdapter, SparseDelta, build_masks, save_adapter
from shira_diffusers.masks.calibration import gradient_magnitudes
from shira_diffusers.masks.families import BLOCK_SIZE
from shira_diffusers.weights.targets import select

DENSITIES = (0.005, 0.01, 0.02, 0.05)
FAMILIES = ("rand", "wm", "struct", "struct_rows", "block", "block_rand")
CALIBRATED = ("grad", "snip")
VALUE_BYTES = 2


def main() -> None:
    parser = toy_options(__doc__, file="size.json")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in args.models:
        unet = make_unet((TOY if args.toy else UNETS)[model], "cpu", torch.bfloat16)
        for row in sizes(model, unet, calibrated=model == "SD 1.5"):
            rows.append({"model": model, **row})
            print(rows[-1], flush=True)
            about = {"values": "float16", "weights": "attention and feed-forward", "lora_rank": RANK, "toy": args.toy}
            write("size", {**about, "rows": rows}, out_of("size", args))


def sizes(model: str, unet: Any, calibrated: bool) -> Iterator[dict[str, Any]]:
    for family in FAMILIES:
        for density in DENSITIES:
            yield shira(unet, family, density)
    gradients = gradients_of(unet, model) if calibrated else None
    for family in CALIBRATED if calibrated else ():
        for density in DENSITIES:
            yield shira(unet, family, density, gradients)
    del gradients
    with rivals.peft_shira(unet, 0.01, names=("a",)):
        state = {key: own(tensor) for key, tensor in get_peft_model_state_dict(unet, adapter_name="a").items()}
    count = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    yield {"method": "peft shira", "density": 0.01, **figures(written(state), count)}
    lora = {key: tensor.half() for key, tensor in lora_state(unet, 0, RANK).items()}
    yield {"method": "lora", "bytes": written(lora), "parameters": sum(tensor.numel() for tensor in lora.values())}


def gradients_of(unet: Any, model: str) -> dict[str, Tensor]:
    """Their magnitudes, for the squared output of one call on noise of 16 x 16 latents."""
    inputs = inputs_of(unet, model, 16)
    models = {"unet": unet}
    return gradient_magnitudes(models, select(models), [lambda: unet(**inputs).sample.float().square().mean()])


def own(tensor: Tensor) -> Tensor:
    """As PEFT writes it after training in float32."""
    return tensor.detach().clone().float() if tensor.is_floating_point() else tensor.detach().clone()


def shira(unet: Any, family: str, density: float, gradients: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """The size of a float16 adapter of a family."""
    weights = select({"unet": unet})
    masks = build_masks({"unet": unet}, family, density, calibration=gradients)
    drawn = torch.randn(max(mask.numel() for mask in masks.values()), generator=torch.Generator().manual_seed(0)).half()
    deltas = {
        name: SparseDelta(mask, drawn[: mask.numel()], tuple(weights[name].shape)) for name, mask in masks.items()
    }
    adapter = ShiraAdapter(deltas)
    with tempfile.TemporaryDirectory() as folder:
        size = save_adapter(adapter, Path(folder, "a.safetensors")).stat().st_size
    bound = bound_of(family, {name: weights[name].numel() for name in masks}, masks)
    more = {"bound": round(bound, 4), "over_bound": round(size / adapter.nnz / bound, 4)}
    return {"method": "shira", "family": family, "density": density, **figures(size, adapter.nnz), **more}


def figures(size: int, entries: int) -> dict[str, Any]:
    return {"entries": entries, "bytes": size, "bytes_an_entry": round(size / entries, 4)}


def written(state: dict[str, Tensor]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, Path(folder, "adapter.safetensors"))
        return Path(folder, "adapter.safetensors").stat().st_size


def bound_of(family: str, numels: Mapping[str, int], masks: Mapping[str, Tensor]) -> float:
    """Bytes that an entry of a float16 adapter costs at least."""
    if family.startswith("struct"):
        return VALUE_BYTES
    unit = BLOCK_SIZE if family.startswith("block") else 1
    bits = sum(log2_choices(numels[name] // unit, mask.numel() // unit) for name, mask in masks.items())
    return VALUE_BYTES + bits / 8 / sum(mask.numel() for mask in masks.values())


def log2_choices(places: int, chosen: int) -> float:
    """log2 of the number of ways to choose."""
    ways = math.lgamma(places + 1) - math.lgamma(chosen + 1) - math.lgamma(places - chosen + 1)
    return ways / math.log(2)


if __name__ == "__main__":
    main()
