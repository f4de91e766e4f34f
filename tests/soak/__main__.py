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
import diffusers
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
_POINTS = 20  # without which a slope says nothing
_TIME = 0.1  # of the mean time per operation that a whole run may add by its slope


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 0 if all of it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episode", help="replay one episode, DTYPE:NUMBER, in a new pipeline")
    parser.add_argument("--file", type=int, help="replay one mutated file, by number")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which nothing more is begun")
    parser.add_argument("-o", "--out", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()  # a cast with .to() warns each time
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
    """Laps of operations and files until all are done or the time is over, then the errors; written after each."""
    origin, until = origin_of_figures(), time.monotonic() + 60 * options.minutes
    found: dict[str, Any] = {"seed": options.seed, "asked": {"operations": options.operations, "files": options.files}}
    laps = Laps(options, folder)
    while not laps.done() and time.monotonic() < until:
        laps.lap()
        found |= laps.figures()
        write({"measured on": origin, **found}, options.out)
    for kind, make in BENCHES.items():
        if time.monotonic() < until:
            found.setdefault("errors injected", {})[kind] = inject(kind, make, folder)
            write({"measured on": origin, **found}, options.out)
    return 1 if False in (found["time"]["flat"], found["memory"]["flat"]) else 0


def write(found: dict[str, Any], out: Path | None) -> None:
    text = json.dumps(found, indent=2) + "\n"
    if out is not None:
        out.write_text(text)


def tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


# -------------------------------------------------------------------- operations and files


class Laps:
    """A lap is an episode of each dtype, so that laps are alike, and a share of the files."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        (folder / "mutants").mkdir()
        self.seed, self.operations, self.files = options.seed, options.operations, options.files
        self.counts: Counter[str] = Counter()
        self.walks = [Walk(kind, folder, self.counts) for kind in DTYPES]
        self.size = EPISODE * len(self.walks)  # operations of a lap
        self.laps = -(-self.operations // self.size)
        self.mutants = Mutants(folder / "mutants")
        self.times: list[float] = []
        self.memory: list[float] = []
        self.began, self.loaded, self.of_files = time.monotonic(), 0, 0.0

    def done(self) -> bool:
        return len(self.times) >= self.laps

    def lap(self) -> None:
        start = time.process_time()
        for one in self.walks:
            one.episode(self.seed, len(self.times))
        ended = time.process_time()
        self.times.append((ended - start) / self.size * 1000)
        upto = self.files * len(self.times) // self.laps
        self.mutants.run(self.seed, upto - self.loaded, self.loaded)
        self.loaded, self.of_files = upto, self.of_files + time.process_time() - ended
        self.memory.append(psutil.Process().memory_info().rss / 2**20)
        if len(self.times) % 10 == 0:
            tell(f"{sum(self.counts.values())} operations, {upto} files, {time.monotonic() - self.began:.0f} s")

    def figures(self) -> dict[str, Any]:
        outcomes = dict(self.mutants.outcomes.most_common())
        return {
            "seconds": round(time.monotonic() - self.began, 1),
            "operations": {
                "count": sum(self.counts.values()),
                "episodes": len(self.times) * len(self.walks),
                "dtypes": list(DTYPES),
                "by kind": dict(self.counts.most_common()),
            },
            "files": {"count": self.loaded, "CPU seconds": round(self.of_files, 1), "outcomes": outcomes},
            "time": {"unit": "ms of CPU per operation, checks included"} | trend(self.times, self.size, _flat_time),
            "memory": {"unit": "MiB resident, after each lap"} | trend(self.memory, self.size, _flat_memory),
        }


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
        "flat": flat(added, error * len(kept), float(kept.mean())) if len(kept) >= _POINTS else None,
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


# -------------------------------------------------------------------- errors


def offloaded() -> DiffusionPipeline:
    pipe = pair()
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    return pipe


BENCHES: dict[str, Callable[[], DiffusionPipeline]] = {
    "fp32": pair,
    "fp8": partial(pair, DTYPES["fp8"]),
    "offloaded": offloaded,
}


def inject(kind: str, make: Callable[[], DiffusionPipeline], folder: Path) -> dict[str, int]:
    """Each call with an error at each of its tensor operations in turn; how many it has."""
    (folder / kind).mkdir()
    stand, began = bench(make, folder / kind), time.monotonic()
    found = {name: try_every(scenario, stand, after=kind == "fp8") for name, scenario in SCENARIOS.items()}
    tell(f"errors injected, {kind}: {sum(found.values())}, {time.monotonic() - began:.0f} s")
    return found


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
