"""The long soak test: ``python -m tests.soak --operations 100000 --files 50000 -o benchmarks/results/soak.json``.

Half an hour on one core. Replays an episode with ``--episode fp16:12 --seed 0``, a file with ``--file 123``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import psutil
import torch
from diffusers import DiffusionPipeline

from tests.soak.injection import SCENARIOS, bench, pair, try_every
from tests.soak.mutation import Mutants
from tests.soak.operations import DTYPES, EPISODE, Walk

ROOT = Path(__file__).parents[2]
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")
_WARM_UP = 0.2  # of a run, in which caches fill
_MEMORY = 32.0  # MiB that a whole run may add by its slope
_TIME = 0.1  # of the mean time per operation that a whole run may add by its slope


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 0 if all of it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episode", help="replay one episode, DTYPE:NUMBER, in a new pipeline")
    parser.add_argument("--file", type=int, help="replay one mutated file, by number")
    parser.add_argument("-o", "--out", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        if options.episode:
            kind, _, number = options.episode.partition(":")
            Walk(kind, Path(folder)).episode(options.seed, int(number))
        elif options.file is not None:
            Mutants(Path(folder)).run(options.seed, 1, options.file)
        else:
            return everything(options, Path(folder))
    return 0


def everything(options: argparse.Namespace, folder: Path) -> int:
    origin = origin_of_figures()
    files = mutants(options.seed, options.files, folder)
    operations = walk(options.seed, options.operations, folder)
    found = {"seed": options.seed, "operations": operations, "errors injected": inject(folder), "files": files}
    text = json.dumps({"origin": origin, **found}, indent=2) + "\n"
    if options.out is not None:
        options.out.write_text(text)
    tell(text)
    flat = operations["memory"]["flat"] and operations["time"]["flat"]
    return 0 if flat else 1


def tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


# -------------------------------------------------------------------- operations


def walk(seed: int, operations: int, folder: Path) -> dict[str, Any]:
    """Episodes of all dtypes in turn; a point is one of each, so that points are alike."""
    counts: Counter[str] = Counter()
    walks = [Walk(kind, folder, counts) for kind in DTYPES]
    points, began = [], time.monotonic()
    rounds = -(-operations // (EPISODE * len(walks)))
    for number in range(rounds):
        start = time.process_time()
        for one in walks:
            one.episode(seed, number)
        points.append(((time.process_time() - start) / (EPISODE * len(walks)) * 1000, resident_memory()))
        if number % 10 == 9:
            tell(f"{(number + 1) * EPISODE * len(walks)} operations, {time.monotonic() - began:.0f} s, {points[-1]}")
    size = EPISODE * len(walks)
    times, memory = ([point[k] for point in points] for k in (0, 1))
    return {
        "count": sum(counts.values()),
        "episodes": rounds * len(walks),
        "dtypes": list(DTYPES),
        "seconds": round(time.monotonic() - began, 1),
        "by kind": dict(counts.most_common()),
        "time": {"unit": "ms of CPU per operation, checks included"} | trend(times, size, _flat_time),
        "memory": {"unit": "MiB resident"} | trend(memory, size, _flat_memory),
    }


def resident_memory() -> float:
    return psutil.Process().memory_info().rss / 2**20


def trend(values: Sequence[float], size: int, flat: Callable[[float, float, float], bool]) -> dict[str, Any]:
    """The line of least squares through values, one for each ``size`` operations, after a warm-up."""
    kept = torch.tensor(values[round(_WARM_UP * len(values)) :], dtype=torch.float64)
    slope, error = least_squares(kept)
    added = slope * len(kept)
    return {
        "mean": round(float(kept.mean()), 3),
        "first": round(values[0], 3),
        "last": round(values[-1], 3),
        "slope per 1000 operations": round(slope / size * 1000, 6),
        "standard error": round(error / size * 1000, 6),
        "added over the run": round(added, 3),
        "points": len(kept),
        "flat": flat(added, error * len(kept), float(kept.mean())),
    }


def least_squares(values: torch.Tensor) -> tuple[float, float]:
    """Slope per value and its standard error."""
    if len(values) < 3:
        return 0.0, 0.0
    x = torch.arange(len(values), dtype=torch.float64)
    x -= x.mean()
    slope = float((x * values).sum() / (x * x).sum())
    left = values - values.mean() - slope * x
    return slope, float((left.square().sum() / (len(values) - 2) / (x * x).sum()).sqrt())


def _flat_time(added: float, error: float, mean: float) -> bool:
    return added - 2 * error < _TIME * mean


def _flat_memory(added: float, error: float, mean: float) -> bool:
    return added - 2 * error < _MEMORY


# -------------------------------------------------------------------- errors, files


def inject(folder: Path) -> dict[str, Any]:
    """Each call with an error at each of its tensor operations; how many operations each has."""
    found: dict[str, Any] = {}
    makers = {kind: partial(pair, DTYPES[kind]) for kind in ("fp32", "fp8")}
    for kind, make in {**makers, "offloaded": offloaded}.items():
        (folder / kind).mkdir()
        stand, began = bench(make, folder / kind), time.monotonic()
        found[kind] = {name: try_every(scenario, stand, after=kind == "fp8") for name, scenario in SCENARIOS.items()}
        tell(f"errors injected, {kind}: {sum(found[kind].values())}, {time.monotonic() - began:.0f} s")
    return {"total": sum(sum(its.values()) for its in found.values()), **found}


def offloaded() -> DiffusionPipeline:
    pipe = pair()
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    return pipe


def mutants(seed: int, count: int, folder: Path) -> dict[str, Any]:
    (folder / "mutants").mkdir()
    several, before, began = Mutants(folder / "mutants"), resident_memory(), time.monotonic()
    for first in range(0, count, 5000):
        several.run(seed, min(5000, count - first), first)
        tell(f"{first + 5000} files, {time.monotonic() - began:.0f} s, {resident_memory():.0f} MiB")
    return {
        "count": count,
        "seconds": round(time.monotonic() - began, 1),
        "slowest, seconds": round(several.slowest, 3),
        "memory added, MiB": round(resident_memory() - before, 1),
        "outcomes": dict(several.outcomes.most_common()),
    }


def origin_of_figures() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
        "processor": names[0].partition(": ")[2] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


if __name__ == "__main__":
    raise SystemExit(main())
