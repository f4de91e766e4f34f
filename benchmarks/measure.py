"""What the scripts share: timing with spread, and results with their origin."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "assets"
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy")

UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "SDXL": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""The architectures of the UNets that people adapt, as ``UNet2DConditionModel`` takes them."""


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, in milliseconds, and how many were measured."""
    ordered = sorted(seconds)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9)]
    low, high = (round(1000 * value, 4) for value in at)
    return {"median_ms": round(1000 * statistics.median(ordered), 4), "p10_ms": low, "p90_ms": high, "n": len(ordered)}


def timed(action: Callable[[], object], repeats: int = 30, warm_up: int = 5) -> dict[str, float]:
    """``spread`` of the wall time of an action, synchronised where there is a GPU."""
    seconds = []
    for number in range(warm_up + repeats):
        _synchronize()
        start = time.perf_counter()
        action()
        _synchronize()
        if number >= warm_up:
            seconds.append(time.perf_counter() - start)
    return spread(seconds)


def in_turns(there: Callable[[], object], back: Callable[[], object], repeats: int, warm_up: int) -> dict[str, float]:
    """``spread`` of the wall time of one action, with another, untimed, after each."""
    seconds = []
    for number in range(warm_up + repeats):
        taken = timed(there, 1, 0)["median_ms"] / 1000
        back()
        if number >= warm_up:
            seconds.append(taken)
    return spread(seconds)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
