"""Time and memory of the 1st to the 200th adapter loaded, against diffusers' load_lora_weights.

python -m benchmarks.scripts.load_many [--device cpu|cuda] [--toy] [--models "SD 1.5"] [--count 200] [--out FILE]

One file is loaded under ever new names (not made active), so a file is read from the page cache. ``library`` is
``AdapterLibrary.get`` of as many links to it: all stay in RAM as they are in the file, two of them decoded. Memory: of
tensors on a GPU, and of the process; what each adapter added. LoRAs have rank 16 here, a quarter of the usual, so that
many fit. Files of 1 % at random. Once half of ``--budget`` is over no further adapter of a method is loaded.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from benchmarks.measure import Run, budget_of, options, seconds_of, spread
from benchmarks.models import copies, lora_state, make_pipe, require_active, require_base, shira_adapter
from shira_diffusers import AdapterLibrary, save_adapter

LORA_RANK = 16
AT = (1, 2, 10, 50, 100, 200)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    count = 4 if args.toy else args.count
    run = Run("load_many", args, density=0.01, family="rand", lora_rank=LORA_RANK)
    pipe = make_pipe(args.models[0], args)
    seconds = budget_of(args) / 2
    run.case(lambda: ours(pipe, count, seconds), model=args.models[0], method="shira")
    run.case(lambda: library(pipe, count, seconds), model=args.models[0], method="library")
    run.case(lambda: loras(pipe, count, seconds), model=args.models[0], method="lora")


def ours(pipe: Any, count: int, seconds: float) -> dict[str, Any]:
    base = copies(pipe.unet)
    with tempfile.TemporaryDirectory() as folder:
        file = save_adapter(shira_adapter(pipe.unet, "rand", 0.01, 0), Path(folder, "a.safetensors"))
        try:
            figures = loaded(lambda name: pipe.load_shira(file, name, activate=False), count, seconds)
            pipe.set_shira("a1")
        finally:
            pipe.unload_shira()
        require_base(pipe.unet, base)
        return {"file_bytes": file.stat().st_size, **figures}


def library(pipe: Any, count: int, seconds: float) -> dict[str, Any]:
    base, adapter = copies(pipe.unet), shira_adapter(pipe.unet, "rand", 0.01, 0)
    with tempfile.TemporaryDirectory() as folder:
        file = save_adapter(adapter, Path(folder, "a1.safetensors"))
        for number in range(2, count + 1):
            os.link(file, Path(folder, f"a{number}.safetensors"))
        size = file.stat().st_size
        budgets = {"ram_bytes": count * size, "device_bytes": 2 * adapter.nbytes}
        with AdapterLibrary(folder, device=pipe.unet.device, **budgets) as adapters:
            figures = loaded(adapters.get, count, seconds)
            assert adapters.stats().ram.adapters == figures["loaded"], "some are not in memory"
            with adapters.use(pipe, {"a1": 1.0}):
                require_active(pipe.unet, base, [(adapter, 1.0)])
            require_base(pipe.unet, base)
        return {"file_bytes": size, **figures}


def loras(pipe: Any, count: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lora.safetensors")
        save_file(lora_state(pipe.unet, 0, LORA_RANK), file)
        try:
            figures = loaded(lambda name: pipe.load_lora_weights(str(file), adapter_name=name), count, seconds)
        finally:
            pipe.unload_lora_weights()
        return {"file_bytes": file.stat().st_size, **figures}


def loaded(load: Callable[[str], object], count: int, seconds: float) -> dict[str, Any]:
    """Load up to a count: milliseconds of some and of all, the last ten over the first ten, and the memory of each."""
    began, before, taken = time.monotonic(), memory(), []
    for number in range(1, count + 1):
        taken.append(seconds_of(lambda name=f"a{number}": load(name)))
        if time.monotonic() - began > seconds:
            break
    added = {name: round((now - before[name]) / len(taken)) for name, now in memory().items()}
    milliseconds = {str(at): round(1000 * taken[at - 1], 2) for at in {*AT, len(taken)} if at <= len(taken)}
    growth = round(median(taken[-10:]) / median(taken[:10]), 3)
    return {
        "loaded": len(taken),
        "ms": milliseconds,
        "all": spread(taken),
        "last_over_first": growth,
        "bytes_each": added,
    }


def memory() -> dict[str, int]:
    figures = {"process": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        figures["cuda"] = torch.cuda.memory_allocated()
    return figures


if __name__ == "__main__":
    main()
