"""Mixes of 2, 4 and 8 adapters, and moving a slider of a mix, against diffusers' set_adapters and fuse_lora.

python -m benchmarks.fuse [--device cpu|cuda] [--toy] [--models "SD 1.5"] [--out FILE]

``first``: from nothing active to a mix that was never used (one measurement); ``again``: to it once more; ``slider``:
one strength of the active mix moved. For LoRA a moved slider is unfuse_lora, set_adapters, fuse_lora, at rank 64.
"""

from typing import Any

from benchmarks import rivals
from benchmarks.common import timed
from benchmarks.harness import Run, copies, make_pipe, options, require_active, require_base, shira_adapter
from benchmarks.overwrite_vs_fuse import in_turns
from benchmarks.training import RANK
from shira_diffusers.pipeline import resident_of

DENSITY = 0.01


def main() -> None:
    args = options(__doc__).parse_args()
    run = Run("fuse", args, density=DENSITY, family="rand", lora_rank=RANK)
    repeats = 2 if args.toy else 10 if args.device == "cuda" else 5
    for model in args.models:
        pipe = make_pipe(model, args)
        for count in (2, 4, 8):
            run.case(lambda pipe=pipe, n=count: ours(pipe, n, repeats), model=model, adapters=count, method="shira")
        for count in (2, 4, 8):
            run.case(lambda pipe=pipe, n=count: loras(pipe, n), model=model, adapters=count, method="lora")
        del pipe


def ours(pipe: Any, count: int, repeats: int) -> dict[str, Any]:
    base = copies(pipe.unet)
    adapters = {str(seed): shira_adapter(pipe.unet, "rand", DENSITY, seed) for seed in range(count)}
    scales = [0.5] * count
    try:
        for name, adapter in adapters.items():
            resident_of(pipe).add(adapter, name)
        names = list(adapters)

        def mix() -> None:
            pipe.set_shira(names, scales)

        def slide() -> None:
            scales[0] += 0.01
            mix()

        figures: dict[str, Any] = {"first": timed(mix, 1, 0)}
        pipe.set_shira([])
        figures["again"] = in_turns(mix, lambda: pipe.set_shira([]), repeats)
        mix()
        figures["slider"] = timed(slide, repeats, 1)
        require_active(pipe.unet, base, zip(adapters.values(), scales, strict=True))
    finally:
        pipe.unload_shira()
    require_base(pipe.unet, base)
    return figures


def loras(pipe: Any, count: int) -> dict[str, Any]:
    scales = [0.5] * count
    with rivals.two_loras(pipe, count):
        names = [f"lora{number}" for number in range(count)]

        def fuse() -> None:
            pipe.set_adapters(names, scales)
            pipe.fuse_lora(components=["unet"], adapter_names=names)

        def unfuse() -> None:
            pipe.unfuse_lora(components=["unet"])

        def slide() -> None:
            unfuse()
            scales[0] += 0.01
            fuse()

        figures = {"first": timed(fuse, 1, 0), "slider": timed(slide, 2, 0)}
        unfuse()
        figures["again"] = timed(fuse, 1, 0)
        unfuse()
        return figures


if __name__ == "__main__":
    main()
