"""The tables of each script: which rows and columns they have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.report import cells
from benchmarks.report.results import Result, Row, at
from benchmarks.report.tables import METHOD, Column, over

LABELS = ("model", "dim", "dtype", "method", "family", "density", "adapters", "compiled", "mode")
"""The keys that name a row."""


@dataclass(frozen=True)
class Part:
    """A table, or one a model: its columns, and the rows that it takes."""

    columns: tuple[Column, ...]
    takes: Callable[[Row], bool] = lambda row: True
    title: str = ""
    by_model: bool = False


def is_compiled(row: Row) -> bool:
    return "compile" in row or "compiled" in row


def square(row: Row, result: Result) -> str:
    return f"{row['dim']:,} x {row['dim']:,}"


def quotient(above: str, below: str) -> Callable[[Row, Result], float | None]:
    """The ratio of two medians of a row."""

    def divide(row: Row, result: Result) -> float | None:
        one, other = at(row, above), at(row, below)
        return None if one is None or not other else one / other

    return divide


def middle_of_pairs(row: Row, result: Result) -> str | None:
    low, high = row.get("over_base_p10"), row.get("over_base_p90")
    return None if low is None or high is None else f"{low:.3f}x to {high:.3f}x"


def compile_mode(row: Row, result: Result) -> Any:
    return row.get("mode") or row.get("compile", {}).get("mode", "default")


MODEL = Column("Model", "model", label=True)
TYPE = Column("Type", "dtype", label=True)
MASK = Column("Mask", "family", label=True)
DENSITY = Column("Entries", "density", cells.percent, label=True)
FILE = Column("File", "file_bytes", cells.size)
LIMIT = Column("Limit of memory, ms", "limit_ms", uses=("bytes",))
CYCLE = {"method": "lora cycle"}
NTH = {1: "1st", 10: "10th", 100: "100th", 200: "200th"}

PARTS: dict[str, tuple[Part, ...]] = {
    "overwrite_vs_fuse": (
        Part(
            (
                Column("Weight", square, uses=("dim",)),
                TYPE,
                Column("SHiRA: a switch, ms", "overwrite"),
                Column("SHiRA: the write alone, ms", "kernel"),
                Column("LoRA: fuse, ms", "lora_fuse"),
                Column("PEFT's SHiRA: merge, ms", "peft_shira_merge"),
                *(
                    Column(f"{name} over {what}", quotient(other, own), cells.times, uses=(f"{other}_over_{own}",))
                    for other, name in (("lora_fuse", "LoRA"), ("peft_shira_merge", "PEFT's SHiRA"))
                    for own, what in (("overwrite", "a switch"), ("kernel", "the write"))
                ),
                LIMIT,
                Column("Switch over the limit", "over_limit", cells.times),
            ),
        ),
    ),
    "switch": (
        Part(
            (
                MODEL,
                TYPE,
                METHOD,
                MASK,
                DENSITY,
                Column("Engine", "engine", label=True),
                Column("In memory, ms", "resident"),
                Column("GPU's time of it, ms", "device_ms"),
                LIMIT,
                Column("Over the limit", "over_limit", cells.times),
                Column("From a file, ms", "from_disk"),
                Column("File", "file_bytes", cells.size, uses=("entries", "stages_ms")),
                Column("LoRA's cycle over this", over("resident", "resident", **CYCLE), cells.times),
                Column("LoRA's cycle over the GPU's time", over("resident", "device_ms", **CYCLE), cells.times),
            ),
            by_model=True,
        ),
    ),
    "fuse": (
        Part(
            (
                MODEL,
                Column("Adapters", "adapters"),
                METHOD,
                Column("First use of the mix, ms", "first"),
                Column("Again, ms", "again"),
                Column("A slider moved, ms", "slider"),
                LIMIT,
                Column("Slider over the limit", "slider_over_limit", cells.times),
                Column("LoRA's slider over this", over("slider", "slider", method="lora"), cells.times),
            ),
            by_model=True,
        ),
    ),
    "inference": (
        Part(
            (
                MODEL,
                METHOD,
                Column("Latents", "latents", label=True),
                Column("Base, ms", "base"),
                Column("After the switch, ms", "call"),
                Column("Over the base", "over_base", lambda ratio: f"{ratio:.3f}x"),
                Column("10 % to 90 % of the pairs", middle_of_pairs, uses=("over_base_p10", "over_base_p90")),
                Column("Pairs", "base.n"),
            ),
            lambda row: not is_compiled(row),
        ),
        Part(
            (
                MODEL,
                METHOD,
                Column("Latents", "latents"),
                Column("Compiled", "compiled"),
                Column("Mode", compile_mode, uses=("mode", "compile")),
                Column("Moves", "switches"),
                Column("Graphs", "graphs"),
                Column("Recompiles", "recompiles"),
                Column("CUDA graphs", "captures"),
                Column("Captured anew", "recaptures"),
                Column("Largest error", "error"),
                Column("Smallest change by a move", "change"),
                Column("A call, ms", "call"),
                Column("First calls, s", "first_calls_s"),
            ),
            is_compiled,
            "Under `torch.compile`:",
        ),
    ),
    "load_many": (
        Part(
            (
                MODEL,
                METHOD,
                Column("Loaded", "loaded"),
                *(Column(f"The {name}, ms", f"ms.{number}") for number, name in NTH.items()),
                Column("All, ms", "all"),
                FILE,
                Column("Memory of each: process", "bytes_each.process", cells.size),
                Column("GPU", "bytes_each.cuda", cells.size),
            ),
        ),
    ),
    "drift": (
        Part((MODEL, TYPE, METHOD, *(Column(f"After {n}", f"changed.{n}", cells.percent) for n in (1, 10, 100)))),
    ),
    "app_memory": (
        Part(
            (
                Column("Pictures drawn", "pictures"),
                Column("Resident memory, MB", "rss_mb"),
                Column("Since the start, s", "s"),
            ),
        ),
    ),
}
UNKNOWN = (Part((MODEL, METHOD, MASK, DENSITY)),)
"""For a script that is not in ``PARTS``: names of rows first, then whatever it measured."""
