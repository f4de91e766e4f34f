"""What came out, as text."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.stats import Table, area, best, best_of_each, interval, load, table

SUBJECT = "subject"


def print_tables(folders: Iterable[Path]) -> None:
    """A line a recipe and way to mix: single style, best mix with its strength, area."""
    print(
        f"{'recipe':34s}{'mix':18s}{'n':>2s} {'single':>7s} {'best':>6s} {'95 %':>12s} {'at':>5s} "
        f"{'each':>5s} {'area':>5s}  concept seen at best, by strength"
    )
    for folder in folders:
        print(folder)
        lines = [line for files in grouped(load(folder)) for line in lines_of(files)]
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


def lines_of(files: list[dict[str, Any]]) -> list[tuple[float, str]]:
    methods = dict.fromkeys(row["method"] for row in files[0]["rows"] if row["method"] != "base")
    lines = []
    for method in methods:
        alone = best(table(files, method, kinds(1)))
        for size, label in ((2, ""), (3, " x3"), (0, " +subject")):
            try:
                answers = table(files, method, kinds(size))
            except ValueError:
                continue
            lines.append((best(answers), _line(files, method + label, alone, answers)))
    return lines


def _line(files: list[dict[str, Any]], method: str, alone: float, answers: Table) -> str:
    means = answers.kept.mean((1, 2, 3))
    at = answers.strengths[int(np.argmax(means))]
    low, high = interval(answers, best, 200)
    curve = " ".join(f"{m:.2f}" for m in means)
    index = int(np.argmax(means))
    parts = f"{answers.concept[index].mean():.2f} {answers.seen[index].mean():.2f}"
    return (
        f"{files[0]['recipe']['name']:34s}{method:18s}{len(files):2d} {alone:7.3f} {max(means):6.3f} "
        f"{low:.3f}-{high:.3f} {at:5.2f} {best_of_each(answers):5.2f} {area(answers):5.2f}  {parts}  {curve}"
    )
