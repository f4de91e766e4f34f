"""Provide what every script needs: options, timing, limits of memory, and results written with their origin.

In: an action to measure. Out: figures as JSON-ready dicts. It knows neither models nor methods.
"""

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:  # so that the report, which reads RESULTS only, loads without diffusers
    from shira_diffusers import ShiraAdapter

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "assets"
SECONDS = {"cuda": 100, "cpu": 200}
MODELS = ("SD 1.5", "SDXL")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy")


def toy_options(
    doc: str | None, toy: str = "tiny models", file: str = "<name>_<device>.json"
) -> argparse.ArgumentParser:
    """The options of scripts that run on one machine only: ``--toy``, which says what it means, and ``--out``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help=f"{toy}, to try the code")
    parser.add_argument("--out", type=Path, help=f"file to write; default benchmarks/results/{file}")
    return parser


def options(
    doc: str | None, budget: dict[str, int] = SECONDS, models: Sequence[str] = MODELS
) -> argparse.ArgumentParser:
    """The options that nearly all scripts share; ``budget`` has the default seconds per device."""
    parser = toy_options(doc)
    parser.add_argument("--device", choices=SECONDS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=models, default=list(models))
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default float16 on CUDA, float32 on a CPU")
    limits = f"{budget['cuda']} on CUDA, {budget['cpu']} on a CPU"
    parser.add_argument("--budget", type=float, help=f"seconds after which no further case starts; default {limits}")
    parser.set_defaults(seconds=budget)
    return parser


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    return DTYPES[args.dtype or ("float16" if args.device == "cuda" else "float32")]


def budget_of(args: argparse.Namespace) -> float:
    """Seconds after which no further case starts."""
    return args.budget or args.seconds[args.device]


class Run:
    """Measures cases one after another and writes all rows after each, so that an interrupted run keeps its results.

    Args:
        name: of the file of results, without the device.
        args: the parsed ``options``.
        per_device: whether the file's name ends in the device.
        about: settings that hold for all rows.
    """

    def __init__(self, name: str, args: argparse.Namespace, *, per_device: bool = True, **about: Any) -> None:
        self.name, self.rows = f"{name}_{args.device}" if per_device else name, list[dict[str, Any]]()
        self.about = {"device": args.device, "toy": args.toy, **about}
        self.path = out_of(self.name, args)
        self.until = time.monotonic() + budget_of(args)
        warnings.simplefilter("ignore")
        from diffusers.utils import logging

        logging.set_verbosity_error()

    def case(self, measure: Callable[[], dict[str, Any]], **labels: Any) -> dict[str, Any]:
        """Measure one case, or record why not: ``skipped`` (out of time or memory) or ``failed``."""
        began = time.monotonic()
        if began > self.until:
            figures: dict[str, Any] = {"skipped": "the time for all cases was over"}
        else:
            figures = self._attempt(measure)
        self.rows.append({**labels, **figures, "took_s": round(time.monotonic() - began, 1)})
        print(self.rows[-1], flush=True)
        self.write()
        free()
        return self.rows[-1]

    def write(self) -> Path:
        return write(self.name, {**self.about, "rows": self.rows}, self.path)

    def _attempt(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return measure()
        except torch.OutOfMemoryError as error:
            return {"skipped": f"out of memory: {str(error).splitlines()[0][:200]}"}
        except Exception as error:  # noqa: BLE001  other libraries' limits must not cost the other cases
            return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile in milliseconds, and the number of measurements."""
    ordered = sorted(seconds)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9)]
    low, high = (round(1000 * value, 4) for value in at)
    return {"median_ms": round(1000 * statistics.median(ordered), 4), "p10_ms": low, "p90_ms": high, "n": len(ordered)}


def nothing() -> None:
    """Stands for an action that is not needed."""


# torch.utils.benchmark does not fit: its Timer repeats one statement, by default on one thread, and returns means of
# blocks. Here two adapters alternate call by call, an untimed undo runs between calls, and percentiles are of calls.
def timed(
    action: Callable[[], object],
    repeats: int = 30,
    warm_up: int = 5,
    *,
    before: Callable[[], object] = nothing,
    after: Callable[[], object] = nothing,
) -> dict[str, float]:
    """``spread`` of the wall time of an action; ``before`` and ``after`` run around each call, untimed."""
    taken = []
    for _ in range(warm_up + repeats):
        before()
        taken.append(seconds_of(action))
        after()
    return spread(taken[warm_up:])


def alternate(act: Callable[[Any], object], choices: Sequence[Any]) -> Callable[[], None]:
    """An action that calls ``act`` with the next choice, round and round."""
    turns = itertools.cycle(choices)

    def turn() -> None:
        act(next(turns))

    return turn


def seconds_of(action: Callable[[], object]) -> float:
    """Wall time of one call, synchronised where there is a GPU."""
    _synchronize()
    start = time.perf_counter()
    action()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_ms(action: Callable[[], object], repeats: int = 5) -> float | None:
    """Milliseconds of GPU kernels and copies per call, summed by ``torch.profiler``; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    action()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            action()
        torch.cuda.synchronize()
    kernels = (event.self_device_time_total for event in profiled.key_averages())
    return round(sum(kernels) / repeats / 1000, 4)


def copy_figures(device: str, toy: bool) -> dict[str, float]:
    """``copy_gb_s``: GB per second that a large copy reads and writes; ``line_bytes``: see there."""
    source = torch.ones(2**20 if toy else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / (timed(lambda: target.copy_(source), 10)["median_ms"] / 1000)
    return {"copy_gb_s": round(bandwidth / 1e9, 3), "line_bytes": line_bytes(device)}


@cache
def line_bytes(device: str) -> int:
    """The smallest unit that memory transfers: a cache line; on a GPU one sector of 32 bytes or two, as measured."""
    if device == "cpu":
        return 64
    memory = torch.zeros(2**28, dtype=torch.int16, device=device)
    apart = {step: timed(lambda step=step: memory[:: step // 2].add_(1), 10)["median_ms"] for step in (32, 64)}
    return 64 if apart[64] > 0.9 * apart[32] else 32  # half the values take as long


def touched(adapters: "list[ShiraAdapter]", weights: dict[str, Tensor], device: str) -> int:
    """Bytes of the lines (see ``line_bytes``) of the weights that hold an entry of any of the adapters."""
    lines, line = 0, line_bytes(device)
    for name in adapters[0].deltas:
        held = torch.cat([adapter.deltas[name].indices for adapter in adapters]).long()
        lines += (held * weights[name].element_size() // line).unique().numel()
    return lines * line


def memory_limit(
    adapters: "list[ShiraAdapter]", weights: dict[str, Tensor], memory: dict[str, float]
) -> dict[str, float]:
    """The least time that memory bandwidth allows for writing the union of adapters; ``memory``: ``copy_figures``.

    ``bytes``: lines of the weights that hold entries, read and written; the bits saved; the adapters' own bytes.
    """
    first = next(iter(weights.values()))
    lines = touched(adapters, weights, first.device.type)
    own = sum(delta.nbytes for adapter in adapters for delta in adapter.deltas.values())
    saved = sum(adapter.nnz for adapter in adapters) * first.dtype.itemsize
    least = 2 * lines + own + saved
    return {"bytes": least, "limit_ms": round(least / (1e6 * memory["copy_gb_s"]), 5)}


def python_calls(action: Callable[[], object]) -> int:
    """How many Python functions one call of an action enters in this thread, the action included.

    C functions do not count. For a warm figure the action has run before.
    """
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(before)
    return calls


def free() -> None:
    """Collect garbage, and return the GPU's unused memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of(name: str, args: argparse.Namespace) -> Path | None:
    """The file that the options name; of a toy run, one outside the results."""
    return args.out or (Path(tempfile.gettempdir(), f"{name}_toy.json") if args.toy else None)


def write(name: str, figures: dict[str, Any], path: Path | None = None) -> Path:
    """Write figures with machine, versions and commit to ``results/<name>.json``, or to another file."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"origin": origin(), **figures}, indent=2) + "\n")
    return path


def origin() -> dict[str, Any]:
    """Where and with what figures were measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
