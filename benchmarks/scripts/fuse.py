"""Mixes of 2, 4 and 8 adapters, and moving a slider of a mix, against diffusers' set_adapters and fuse_lora.

python -m benchmarks.scripts.fuse [--device cpu|cuda] [--toy] [--models "SD 1.5"] [--out FILE]

``first``: from nothing active to a mix that was never used, so it is planned; ``again``: to it once more; ``slider``:
one strength of the active mix moved. For LoRA a moved slider is unfuse_lora, set_adapters, fuse_lora, at rank 64.
``limit_ms``: what a write of the union costs at least, see ``measure.memory_limit``; ``slider_over_limit`` how many
times that a moved slider takes. Few adapters come first, so that a budget cuts the dearest cases; on a CPU SDXL is
left out, where eight LoRAs of it take minutes.
"""

from typing import Any

from benchmarks import rivals
from benchmarks.measure import Run, copy_figures, memory_limit, options, timed
from benchmarks.models import RANK, copies, make_pipe, require_active, require_base, shira_adapter
from shira_diffusers.integrations.pipelines import resident_of
from shira_diffusers.weights.targets import select

DENSITY = 0.01
COUNTS = (2, 4, 8)
SECONDS = {"cuda": 240, "cpu": 240}


def main() -> None:
    args = options(__doc__, SECONDS).parse_args()
    memory = copy_figures(args.device, args.toy)
    run = Run("fuse", args, density=DENSITY, family="rand", lora_rank=RANK, **memory)
    repeats = 2 if args.toy else 10 if args.device == "cuda" else 5
    for model in args.models if args.toy or args.device == "cuda" else args.models[:1]:
        pipe = make_pipe(model, args)
        for count in COUNTS:
            labels = {"model": model, "adapters": count}
            run.case(lambda p=pipe, n=count: ours(p, n, repeats, memory), **labels, method="shira")
            run.case(lambda p=pipe, n=count: loras(p, n, max(1, repeats // 2)), **labels, method="lora")
        del pipe


def ours(pipe: Any, count: int, repeats: int, memory: dict[str, float]) -> dict[str, Any]:
    base = copies(pipe.unet)
    adapters = {str(seed): shira_adapter(pipe.unet, "rand", DENSITY, seed) for seed in range(count)}
    names, scales = list(adapters), [0.5] * count

    def add() -> None:
        for name, adapter in adapters.items():
            resident_of(pipe).add(adapter, name)

    def mix() -> None:
        pipe.set_shira(names, scales)

    def slide() -> None:
        scales[0] += 0.01
        mix()

    def forget() -> None:
        pipe.unload_shira()
        add()

    try:
        add()
        figures: dict[str, Any] = {"first": timed(mix, 3, 1, after=forget)}
        figures["again"] = timed(mix, repeats, 1, after=lambda: pipe.set_shira([]))
        mix()
        figures["slider"] = timed(slide, repeats, 1)
        require_active(pipe.unet, base, zip(adapters.values(), scales, strict=True))
    finally:
        pipe.unload_shira()
    require_base(pipe.unet, base)
    limit = memory_limit(list(adapters.values()), select({"unet": pipe.unet}), memory)
    over = round(figures["slider"]["median_ms"] / limit["limit_ms"], 2)
    return {**figures, **limit, "slider_over_limit": over}


def loras(pipe: Any, count: int, repeats: int) -> dict[str, Any]:
    names, scales = [f"lora{number}" for number in range(count)], [0.5] * count
    with rivals.two_loras(pipe, count):

        def fuse() -> None:
            pipe.set_adapters(names, scales)
            pipe.fuse_lora(components=["unet"], adapter_names=names)

        def unfuse() -> None:
            pipe.unfuse_lora(components=["unet"])

        def slide() -> None:
            unfuse()
            scales[0] += 0.01
            fuse()

        figures = {"first": timed(fuse, 1, 0), "slider": timed(slide, repeats, 0)}
        unfuse()
        figures["again"] = timed(fuse, max(1, repeats // 2), 0, after=unfuse)
        return figures


if __name__ == "__main__":
    main()
