"""Read the files of benchmarks/results, and single figures from them."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

DEVICES = ("cpu", "cuda")
Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One file: what a script measured on one machine; ``device`` is empty where the file's name has none."""

    script: str
    device: str
    origin: dict[str, Any]
    about: dict[str, Any]
    rows: list[Row]

    @property
    def machine(self) -> str:
        if gpu := self.origin.get("gpu"):
            return f"{self.about.get('gpus', 'one')} {gpu}"
        return f"{self.origin.get('cores')} cores of an {self.origin.get('processor')}"

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if "skipped" not in row and "failed" not in row]


class Results:
    """All results of a folder, those of a CPU first."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.all = [result for path in sorted(folder.glob("*.json")) if (result := read(path))]

    def of(self, script: str) -> list[Result]:
        return [result for result in self.all if result.script == script]


def read(path: Path) -> Result | None:
    """A file of results; None for other JSON."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or "origin" not in data:
        return None
    stem, _, end = path.stem.rpartition("_")
    script, device = (stem, end) if end in DEVICES else (path.stem, "")
    about = {key: value for key, value in data.items() if key not in ("origin", "rows", "toy", "device")}
    if "rows" not in data:
        return Result(script, device, data["origin"], {}, [about])
    return Result(script, device, data["origin"], about, data["rows"])


def at(row: Any, key: str, *, whole: bool = False) -> Any:
    """A figure by its dotted key, None if it is not there; a spread gives its median, unless it is wanted whole."""
    for part in key.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row["median_ms"] if isinstance(row, dict) and "median_ms" in row and not whole else row


def matching(rows: Iterable[Row], **labels: Any) -> Iterator[Row]:
    return (row for row in rows if all(row.get(key) == value for key, value in labels.items()))


Read = Callable[[Results], float | None]
"""How a figure is read from the results; None if it was not measured."""


class Source:
    """The rows of a script on a device ("" where it has one file) that have these labels."""

    def __init__(self, script: str, device: str = "", **labels: Any) -> None:
        self.script, self.device, self.labels = script, device, labels

    def found(self, results: Results, key: str) -> list[Any]:
        rows = (row for one in results.of(self.script) if one.device == self.device for row in one.rows)
        return [value for row in matching(rows, **self.labels) if (value := at(row, key)) is not None]

    def value(self, key: str) -> Read:
        """Of the first row that has it."""
        return lambda results: next((x for x in self.found(results, key) if isinstance(x, int | float)), None)

    def largest(self, key: str) -> Read:
        """Of all rows; of mappings, the largest of their values."""

        def read_all(results: Results) -> float | None:
            values = self.found(results, key)
            return max((x for v in values for x in (v.values() if isinstance(v, dict) else [v])), default=None)

        return read_all


def derived(make: Callable[..., float], *reads: Read) -> Read:
    """A figure that is computed from others; None if one of them is missing."""

    def read_all(results: Results) -> float | None:
        figures = [read(results) for read in reads]
        return None if None in figures else make(*figures)

    return read_all


def ratio(above: Read, below: Read) -> Read:
    return derived(lambda one, other: one / other, above, below)
