"""What the plots show, as numbers: panels of lines or bars, read from the results."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.report import cells
from benchmarks.report.results import Figures, Result, Row, at

KINDS = {"shira": "shira", "library": "shira", "peft": "peft", "lora": "lora"}
"""Methods by the start of their names: one colour each."""


@dataclass(frozen=True)
class Line:
    """One method's figures: a line, or a single bar."""

    label: str
    kind: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    title: str
    form: Literal["lines", "bars"]
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    linear: bool = False


def machine(result: Result) -> str:
    return "CPU" if result.device == "cpu" else str(result.origin["gpu"]).removeprefix("NVIDIA ")


def kind_of(method: str) -> str:
    return next((kind for start, kind in KINDS.items() if method.startswith(start)), "other")


def line(label: str, kind: str, points: Iterable[tuple[float, Any]]) -> Line | None:
    """None where nothing was measured."""
    found = sorted((float(x), float(y)) for x, y in points if y is not None)
    return Line(label, kind, tuple(x for x, _ in found), tuple(y for _, y in found)) if found else None


def drawn(*lines: Line | None) -> tuple[Line, ...]:
    return tuple(one for one in lines if one is not None)


def overwrite_vs_fuse(result: Result) -> Iterator[Panel]:
    rows = [row for row in result.rows if row.get("dtype") == "float32"]
    methods = {
        "overwrite": ("SHiRA: switch", "shira"),
        "kernel": ("SHiRA: write alone", "shira"),
        "lora_fuse": ("LoRA: fuse", "lora"),
        "peft_shira_merge": ("PEFT's SHiRA: merge", "peft"),
    }
    lines = (line(*name, ((row["dim"], at(row, key)) for row in rows)) for key, name in methods.items())
    yield Panel(machine(result), "lines", "rows and columns of the weight", "ms", drawn(*lines))


def switch(result: Result) -> Iterator[Panel]:
    for model in dict.fromkeys(row["model"] for row in result.rows):
        rows = [row for row in result.rows if row["model"] == model]
        lines = (line(described(row), kind_of(row["method"]), [(0, switch_time(row))]) for row in rows)
        yield Panel(f"{model}, {machine(result)}", "bars", "ms", "", drawn(*lines))


def switch_time(row: Row) -> Any:
    """In memory where both adapters can be there, else from a file."""
    taken = at(row, "resident")
    return at(row, "from_disk") if taken is None else taken


def described(row: Row) -> str:
    if row["method"] == "shira":
        return f"SHiRA, {row['family']}, {cells.percent(row['density'])}"
    name = plain(row["method"]).replace("beside the weights: ", "")
    return name if "resident" in row else f"{name}, from a file"


def plain(method: str) -> str:
    return cells.method(method).replace("`", "")


def fuse(result: Result) -> Iterator[Panel]:
    lines = []
    for model in dict.fromkeys(row["model"] for row in result.rows):
        for method, name in (("shira", "SHiRA"), ("lora", "LoRA")):
            rows = [row for row in result.rows if row["model"] == model and row["method"] == method]
            lines.append(line(f"{name}, {model}", method, ((row["adapters"], at(row, "slider")) for row in rows)))
    yield Panel(machine(result), "lines", "adapters in the mix", "ms", drawn(*lines))


def load_many(result: Result) -> Iterator[Panel]:
    lines = (
        line(
            cells.method(row["method"]).replace("`", ""),
            kind_of(row["method"]),
            [(float(k), v) for k, v in row["ms"].items()],
        )
        for row in result.rows
        if isinstance(row.get("ms"), dict)
    )
    yield Panel(machine(result), "lines", "adapters loaded", "ms for the last one", drawn(*lines))


def drift(result: Result) -> Iterator[Panel]:
    """The largest share of all types for SHiRA, whose lines would lie on each other; a line a type for LoRA."""
    rows = [row for row in result.rows if "changed" in row]
    ours = [row["changed"] for row in rows if row["method"] == "shira"]
    counts = dict.fromkeys(count for changed in ours for count in changed)
    most = [(float(count), 100 * max(changed.get(count, 0) for changed in ours)) for count in counts]
    lines = [line("SHiRA, all types", "shira", most)]
    for row in (row for row in rows if row["method"] != "shira"):
        shares = [(float(count), 100 * share) for count, share in row["changed"].items()]
        lines.append(line(f"LoRA, {row['dtype']}", "lora", shares))
    yield Panel(machine(result), "lines", "switches", "% of entries changed", drawn(*lines), linear=True)


PLOTS: dict[str, Callable[[Result], Iterator[Panel]]] = {
    "overwrite_vs_fuse": overwrite_vs_fuse,
    "switch": switch,
    "fuse": fuse,
    "load_many": load_many,
    "drift": drift,
}


def panels(script: str, figures: Figures) -> list[Panel]:
    """All panels of a script's plot, the CPU's first; none where nothing was measured."""
    found = (panel for result in figures.of(script) for panel in PLOTS[script](result))
    return [panel for panel in found if panel.lines]


def digest(shown: list[Panel]) -> str:
    """Tells whether a plot shows these panels."""
    text = json.dumps([asdict(panel) for panel in shown], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
