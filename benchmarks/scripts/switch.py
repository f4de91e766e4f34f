"""From one adapter to another, end to end, by mask family, against what LoRA and PEFT's SHiRA offer.

python -m benchmarks.scripts.switch [--device cpu|cuda] [--toy] [--models "SD 1.5"] [--out FILE]

Attention and feed-forward of a UNet of random weights. ``resident``: both adapters loaded, ``set_shira`` from one to
the other in turns. ``from_disk``: ``load_shira`` of a file until it is active, the one before deleted first.
``device_ms`` is the sum of the GPU's kernels and copies by torch.profiler. ``python_calls``: Python functions that one
warm switch enters. ``limit_ms`` is the least that memory allows: lines that hold entries, read and written, saved bits
and the adapters' bytes, over the bandwidth of a copy; both it and ``line_bytes``, the fewest that memory moves, are
measured in the same run.
Masks of grad and snip have the shape of rand's; two adapters of wm (block) on one base have the same entries.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import rivals
from benchmarks.measure import Run, alternate, copy_figures, device_ms, memory_limit, options, python_calls, timed
from benchmarks.models import RANK, copies, make_pipe, require_active, require_base, shira_adapter
from shira_diffusers import save_adapter
from shira_diffusers.integrations.pipelines import resident_of
from shira_diffusers.weights.targets import select

CASES = (("rand", 0.02), ("block_rand", 0.02), ("struct", 0.02), ("rand", 0.01), ("wm", 0.02), ("block", 0.02))


def main() -> None:
    args = options(__doc__).parse_args()
    memory = copy_figures(args.device, args.toy)
    run = Run("switch", args, **memory, lora_rank=RANK)
    repeats = 3 if args.toy else 20 if args.device == "cuda" else 7
    for model in args.models:
        compare(run, model, make_pipe(model, args), repeats, memory)


def compare(run: Run, model: str, pipe: Any, repeats: int, memory: dict[str, float]) -> None:
    """All rows of a model; the most important come first, in case time runs out."""
    base, few = copies(pipe.unet), max(2, repeats // 3)
    labels = {"model": model, "dtype": str(pipe.unet.dtype).removeprefix("torch.")}

    def shira(family: str, density: float) -> None:
        case = {"method": "shira", "family": family, "density": density}
        run.case(lambda: ours(pipe, base, family, density, memory, repeats), **labels, **case)

    shira(*CASES[0])
    run.case(lambda: lora_cycle(pipe, repeats if model == "SD 1.5" else few), **labels, method="lora cycle")
    run.case(lambda: lora_unfused(pipe, few), **labels, method="lora set_adapters")
    run.case(lambda: lora_hotswap(pipe, few), **labels, method="lora hotswap")
    put_back(pipe.unet, base)
    for case in CASES[1:]:
        shira(*case)
    run.case(lambda: peft_shira(pipe, few), **labels, method="peft shira merge")


def put_back(unet: Any, base: dict[str, Any]) -> None:
    """The base's bits, which LoRA's unfusing loses."""
    now = select({"unet": unet})
    for name, weight in base.items():
        now[name].copy_(weight)


def ours(
    pipe: Any, base: dict[str, Any], family: str, density: float, memory: dict[str, float], repeats: int
) -> dict[str, Any]:
    adapters = {name: shira_adapter(pipe.unet, family, density, seed) for seed, name in enumerate(("a", "b"))}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: save_adapter(adapter, Path(folder, f"{name}.safetensors")) for name, adapter in adapters.items()}
        try:
            for name, adapter in adapters.items():
                resident_of(pipe).add(adapter, name)
            switch = alternate(pipe.set_shira, "ab")
            figures: dict[str, Any] = {"entries": adapters["a"].nnz, "resident": timed(switch, repeats)}
            figures["engine"] = ", ".join(sorted(set(resident_of(pipe).engines.values())))
            figures |= {"python_calls": python_calls(switch), "device_ms": device_ms(switch)}
            pipe.set_shira("b")
            require_active(pipe.unet, base, [(adapters["b"], 1.0)])
            pipe.unload_shira()
            require_base(pipe.unet, base)
            figures["from_disk"] = timed(from_disk(pipe, files), max(2, repeats // 3), 1)
            figures["file_bytes"] = files["a"].stat().st_size
        finally:
            pipe.unload_shira()
        require_base(pipe.unet, base)
    least = memory_limit(list(adapters.values()), select({"unet": pipe.unet}), memory)
    took = figures["device_ms"] or figures["resident"]["median_ms"]
    return {**figures, **least, "over_limit": round(took / least["limit_ms"], 2)}


def from_disk(pipe: Any, files: dict[str, Path]) -> Callable[[], None]:
    def load(name: str) -> None:
        if pipe.list_shira():
            pipe.unload_shira()
        pipe.load_shira(files[name], name)

    return alternate(load, list(files))


def switched(key: str, action: Callable[[], object], repeats: int) -> dict[str, Any]:
    """The figures of another method's switch, its time under ``key``."""
    taken = timed(action, repeats, 1)
    return {key: taken, "python_calls": python_calls(action), "device_ms": device_ms(action, 1)}


def lora_cycle(pipe: Any, repeats: int) -> dict[str, Any]:
    """Unfuse, unload, load, fuse: what users do for weights without a cost at inference."""
    with tempfile.TemporaryDirectory() as folder:
        files = rivals.lora_files(pipe, folder)
        cycle = rivals.LoraCycle(pipe, files)
        try:
            cycle()
            stages = cycle.stages()
            return {**switched("resident", cycle, repeats), "stages_ms": stages}
        finally:
            cycle.close()


def lora_unfused(pipe: Any, repeats: int) -> dict[str, Any]:
    with rivals.two_loras(pipe) as switch:
        return switched("resident", switch, repeats)


def lora_hotswap(pipe: Any, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, rivals.hotswapped(pipe, rivals.lora_files(pipe, folder)) as switch:
        return switched("from_disk", switch, repeats)


def peft_shira(pipe: Any, repeats: int) -> dict[str, Any]:
    with rivals.peft_shira(pipe.unet, 0.02) as merged:
        return switched("resident", merged.switch, repeats)


if __name__ == "__main__":
    main()
