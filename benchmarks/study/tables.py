"""What came out, as text."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.stats import Table, area, best, best_of_each, interval, load, ratio, table

SUBJECT = "subject"
RIVAL = "lora16@0.001"
HEAD = (
    f"{'recipe':28s}{'mix':18s}{'n':>2s} {'single':>6s} {'best':>6s} {'95 %':>12s} {'at':>5s} {'each':>5s} {'area':>5s}"
    f" {'to ' + RIVAL:>19s}  concept seen, by strength"
)


def print_tables(folders: Iterable[Path]) -> None:
    """A line per recipe and way to mix: single style, best mix with strength and interval, ratio to LoRA, area."""
    print(HEAD)
    for folder in folders:
        print(folder)
        groups = grouped(load(folder))
        rival = next((files for files in groups if files[0]["recipe"]["name"].startswith(RIVAL)), None)
        lines = [line for files in groups for line in lines_of(files, rival)]
        for line in sorted(lines, key=lambda line: -line[0]):
            print(line[1])


def grouped(files: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Files of one recipe, seed by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        found.setdefault(file["recipe"]["name"], []).append(file)
    return list(found.values())


def kinds(size: int) -> Any:
    """Which mixes are meant: of so many styles, or (0) of the subject with one."""
    if size == 0:
        return lambda mix: mix.startswith(SUBJECT + "+")
    return lambda mix: SUBJECT not in mix and mix.count("+") == size - 1


def lines_of(files: list[dict[str, Any]], rival: list[dict[str, Any]] | None) -> list[tuple[float, str]]:
    methods = dict.fromkeys(row["method"] for row in files[0]["rows"] if row["method"] != "base")
    lines = []
    for method in methods:
        alone = best(table(files, method, kinds(1)))
        for size, label in ((2, ""), (3, " x3"), (0, " +subject")):
            try:
                answers = table(files, method, kinds(size))
            except ValueError:
                continue
            against = None if rival is None or size != 2 else _ratio(rival, method, answers)
            lines.append((best(answers), _line(files, method + label, alone, answers, against)))
    return lines


def _ratio(rival: list[dict[str, Any]], method: str, answers: Table) -> tuple[float, float, float] | None:
    """Best over the rival's best with the same way to mix, where it has as many seeds and prompts."""
    try:
        return ratio(answers, table(rival, method, kinds(2)), best)
    except ValueError:
        return None


def _line(
    files: list[dict[str, Any]], method: str, alone: float, answers: Table, against: tuple[float, float, float] | None
) -> str:
    means = answers.kept.mean((1, 2, 3))
    at = int(np.argmax(means))
    low, high = interval(answers, best)
    compared = "" if against is None else f"{against[0]:.2f} ({against[1]:.2f}-{against[2]:.2f})"
    return (
        f"{files[0]['recipe']['name']:28s}{method:18s}{len(files):2d} {alone:6.3f} {max(means):6.3f} "
        f"{low:.3f}-{high:.3f} {answers.strengths[at]:5.2f} {best_of_each(answers):5.2f} {area(answers):5.2f} "
        f"{compared:>19s}  {answers.concept[at].mean():.2f} {answers.seen[at].mean():.2f}  "
        + " ".join(f"{mean:.2f}" for mean in means)
    )
