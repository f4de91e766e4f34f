"""What the scores of `scores` come to, as text."""

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.stats import Array, load
from benchmarks.study.tables import grouped

FIGURES = {"clip_i", "clip_t", "dino", "named"}


def print_scores(folder: Path) -> None:
    """A line per recipe, size of mix and strength: the mean of each figure, with its 95 % over prompts."""
    print(f"{'recipe':20s} styles strength" + "".join(f"{name:>16s}" for name in sorted(FIGURES)))
    for files in grouped(load(folder)):
        for (size, strength), found in sorted(figures(files).items()):
            print(f"{files[0]['recipe']['name']:20s} {size:6d} {strength:8.2f}", end="")
            print(
                *(f"{_interval(found[name]):>16s}" if name in found else " " * 16 for name in sorted(FIGURES)), sep=""
            )


def _interval(values: Array) -> str:
    return f"{values.mean():.3f} +- {1.96 * values.std() / max(1, len(values) - 1) ** 0.5:.3f}"


def figures(files: list[dict[str, Any]]) -> dict[tuple[int, float], dict[str, Array]]:
    """By size of mix and strength: each of `FIGURES` by prompt, ``[prompts]``, the mean over mixes and seeds.

    Of a mix that style counts which a picture is least like. The base is every mix at strength 0.
    """
    found: dict[tuple[int, float], dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for row in (row for file in files for row in file["rows"]):
        every = [mix for size in (1, 2) for mix in itertools.combinations(row["clip_i"], size)]
        for mix, name in itertools.product([row["mix"]] if row["mix"] else every, FIGURES & row.keys()):
            likeness = [row[name][style] for style in mix] if isinstance(row[name], dict) else [row[name]]
            found[len(mix), row["strength"]][name].append(np.min(likeness, axis=0))
    return {at: {name: np.mean(kinds[name], axis=0) for name in sorted(kinds)} for at, kinds in found.items()}
