"""Bits that differ from the base after 1, 10 and 100 switches and a removal: ours (none), diffusers' fuse and unfuse.

python -m benchmarks.scripts.drift [--device cpu|cuda] [--toy] [--models "SD 1.5"] [--out FILE]

``changed`` is the share of entries of the adapted weights (attention and feed-forward) that have other bits. Weights
are random, one UNet in each of three dtypes; LoRAs have rank 64. On a CPU LoRAs are fused and unfused 10 times at most.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.measure import DTYPES, Run, options
from benchmarks.models import RANK, add_pair, copies, make_pipe
from shira_diffusers.weights.scatter import bits_of
from shira_diffusers.weights.targets import select


def main() -> None:
    args = options(__doc__).parse_args()
    run = Run("drift", args, lora_rank=RANK, density=0.02, family="rand")
    steps = (1, 10) if args.toy or args.device == "cpu" else (1, 10, 100)
    measures = {
        "shira": lambda pipe, base: ours(pipe, base, (1, 10, 100)),
        "lora fuse/unfuse": lambda *of: fused(*of, steps),
    }
    for method, measure in measures.items():  # ours first, if time should be short
        for dtype in DTYPES:
            pipe = make_pipe(args.models[0], args, DTYPES[dtype])
            base = copies(pipe.unet)
            labels = {"model": args.models[0], "dtype": dtype, "method": method}
            run.case(lambda m=measure, pipe=pipe, base=base: m(pipe, base), **labels)
            del pipe, base


def ours(pipe: Any, base: dict[str, Tensor], steps: tuple[int, ...]) -> dict[str, Any]:
    add_pair(pipe, 0.02)
    changed, done = {}, 0
    try:
        for count in steps:
            for number in range(done, count):
                pipe.set_shira("ab"[number % 2], 0.5 + number % 3)
            pipe.set_shira([])
            done = count
            changed[str(count)] = share_changed(pipe.unet, base)
    finally:
        pipe.unload_shira()
    assert not any(changed.values()), f"bits changed: {changed}"
    return {"changed": changed}


def fused(pipe: Any, base: dict[str, Tensor], steps: tuple[int, ...]) -> dict[str, Any]:
    """Fuse one of two LoRAs, unfuse it, fuse the other, ...; both are unloaded before bits are compared."""
    changed, done = {}, 0
    for count in steps:
        with rivals.two_loras(pipe):
            for number in range(done, count):
                name = f"lora{number % 2}"
                pipe.set_adapters([name], [1.0])
                pipe.fuse_lora(components=["unet"], adapter_names=[name])
                pipe.unfuse_lora(components=["unet"])
        done = count
        changed[str(count)] = share_changed(pipe.unet, base)
    return {"changed": changed}


def share_changed(unet: Any, base: dict[str, Tensor]) -> float:
    now = select({"unet": unet})
    differing = sum(int(torch.count_nonzero(bits_of(now[name]) != bits_of(weight))) for name, weight in base.items())
    return differing / sum(weight.numel() for weight in base.values())


if __name__ == "__main__":
    main()
