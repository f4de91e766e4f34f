"""docs/benchmarks.md, from the figures in benchmarks/results; nothing in it is written by hand.

python -m benchmarks.report

A section for each file of figures that is there: the machine and commit, a row for each case, in milliseconds (median,
10th to 90th percentile) where that is what was measured. A case that failed or was skipped says why.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
QUESTIONS = {
    "overwrite_vs_fuse": "One weight: overwriting 1 % of it, against fusing a LoRA and merging PEFT's SHiRA",
    "switch": "From one adapter to another, end to end",
    "fuse": "Mixes of several adapters, and moving a slider",
    "inference": "A UNet call after a switch, and recompiles",
    "load_many": "The 1st to the 200th adapter",
    "drift": "Share of the adapted weights' entries whose bits differ from the base after so many switches",
    "size": "Bytes an entry on disk",
}
HIDDEN = ("took_s",)


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page(results: Path = RESULTS) -> str:
    """The whole page, Markdown."""
    parts = ["# Benchmarks", "Generated from `benchmarks/results/*.json` by `python -m benchmarks.report`. Times: ms."]
    for name, question in QUESTIONS.items():
        found = [file for end in ("_cpu", "_cuda", "") if (file := results / f"{name}{end}.json").is_file()]
        parts += [f"## {question}", f"`python -m benchmarks.{name}`"] if found else []
        for file in found:
            parts += section(json.loads(file.read_text(encoding="utf-8")))
    return "\n\n".join(parts) + "\n"


def section(figures: dict[str, Any]) -> Iterator[str]:
    """Where the figures come from, and a table of them."""
    origin = figures["origin"]
    machine = origin["gpu"] or f"{origin['processor']}, {origin['threads']} threads"
    about = {k: v for k, v in figures.items() if k not in ("origin", "rows", "toy", "device")}
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in about.items())
    yield f"{machine}; torch {origin['torch']}, {origin['date']}, commit {origin['commit']}; {settings}."
    rows = [{key: cell(v) for key, v in row.items() if key not in HIDDEN} for row in figures["rows"]]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [" | ".join(column.replace("_", " ") for column in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(row.get(column, "") for column in columns) for row in rows]
    yield "\n".join(f"| {line} |" for line in lines)


def cell(value: Any) -> str:
    """A figure, spread or mapping as the text of a cell."""
    if isinstance(value, dict) and "median_ms" in value:
        return f"{value['median_ms']:.4g} ({value['p10_ms']:.4g} to {value['p90_ms']:.4g})"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {cell(v)}" for key, v in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
