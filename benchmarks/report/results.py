"""The files of benchmarks/results, and a way to look figures up in them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

DEVICES = ("cpu", "cuda")
APART = ("origin", "rows", "toy", "device")
Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One file: what a script measured on one machine."""

    script: str
    device: str
    """"cpu" or "cuda"; empty where the script measures one thing only."""
    origin: dict[str, Any]
    about: dict[str, Any]
    rows: list[Row]

    @property
    def machine(self) -> str:
        """A short name, for captions."""
        gpu = self.origin.get("gpu")
        if gpu:
            return f"one {gpu}"
        return f"{self.origin.get('cores')} cores of an {self.origin.get('processor')}"


class Figures:
    """All results of a folder."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.results = [result for path in sorted(folder.glob("*.json")) if (result := read(path))]

    def of(self, script: str) -> list[Result]:
        """Those of a script: the CPU's first."""
        return [result for result in self.results if result.script == script]

    def rows(self, script: str, device: str = "", **labels: Any) -> Iterator[Row]:
        """Measured rows with these labels."""
        for result in self.of(script):
            if result.device == device:
                yield from (row for row in result.rows if all(row.get(key) == value for key, value in labels.items()))

    def value(self, script: str, device: str, key: str, **labels: Any) -> float | None:
        """One figure: of the first row with these labels that has it; a spread gives its median."""
        found = (at(row, key) for row in self.rows(script, device, **labels))
        return next((figure for figure in found if isinstance(figure, int | float)), None)


Read = Callable[[Figures], float | None]
"""How a figure is read from the results; None if it is not there."""


def read(path: Path) -> Result | None:
    """A file of results; None for other figures."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or "origin" not in data:
        return None
    stem, _, end = path.stem.rpartition("_")
    script, device = (stem, end) if end in DEVICES else (path.stem, "")
    about = {key: value for key, value in data.items() if key not in APART}
    rows = data.get("rows")
    if rows is None:
        rows, about = [about], {}
    return Result(script, device, data["origin"], about, rows)


def at(row: Any, key: str) -> Any:
    """A figure by its dotted key; the median of a spread."""
    for part in key.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row["median_ms"] if isinstance(row, dict) and "median_ms" in row else row


def value(script: str, device: str, key: str, **labels: Any) -> Read:
    return lambda figures: figures.value(script, device, key, **labels)


def ratio(above: Read, below: Read) -> Read:
    def read_both(figures: Figures) -> float | None:
        one, other = above(figures), below(figures)
        return None if one is None or not other else one / other

    return read_both


def largest(script: str, device: str, key: str, **labels: Any) -> Read:
    """The largest figure of all rows with these labels; of a mapping, its largest value."""

    def read_all(figures: Figures) -> float | None:
        found = [at(row, key) for row in figures.rows(script, device, **labels)]
        flat = [v for one in found if one is not None for v in (one.values() if isinstance(one, dict) else [one])]
        return max(flat, default=None)

    return read_all
