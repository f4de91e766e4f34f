"""From what the judge saw to figures: kept, the curve along the strengths, its best and its area, with intervals."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Table:
    """Answers of one recipe and one way to mix, bool ``[strengths, mixes, seeds, prompts]`` each.

    `seen` is whether all styles of a mix are to be seen.
    """

    strengths: tuple[float, ...]
    mixes: tuple[str, ...]
    concept: Array
    seen: Array

    @property
    def kept(self) -> Array:
        """Concept right and all styles seen."""
        return self.concept & self.seen


def unpack(text: str) -> Array:
    """The inverse of `arena.pack`: bool ``[n]``."""
    count, digits = text.split(":")
    return np.array([digit == "1" for digit in f"{int(digits, 16):0{count}b}"])


def load(folder: Path) -> list[dict[str, Any]]:
    """All files of a study, in order of names."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def table(files: Iterable[dict[str, Any]], method: str, keep: Callable[[str], bool] = lambda mix: True) -> Table:
    """The answers of one recipe's files, one a seed, at equal strengths; raises ValueError where a point is missing."""
    files = list(files)
    found: dict[tuple[float, str, int], tuple[Array, Array]] = {}
    for number, file in enumerate(files):
        for row in file["rows"]:
            if row["method"] == method and row["strengths"] and len(set(row["strengths"])) == 1 and keep(row["mix"]):
                seen = np.all([unpack(text) for text in row["seen"].values()], axis=0)
                concept = unpack(row["concept"])
                found[row["strengths"][0], row["mix"], number] = concept, np.broadcast_to(seen, concept.shape)
    strengths = tuple(sorted({key[0] for key in found}))
    mixes = tuple(sorted({key[1] for key in found}))
    missing = [(s, m, n) for s in strengths for m in mixes for n in range(len(files)) if (s, m, n) not in found]
    if missing or not found:
        raise ValueError(f"{method!r}: {len(missing)} of {len(found)} points are missing, for instance {missing[:3]}")
    cube = [[[found[s, m, n] for n in range(len(files))] for m in mixes] for s in strengths]
    both = np.array(cube)  # (strengths, mixes, seeds, 2, prompts)
    return Table(strengths, mixes, both[:, :, :, 0], both[:, :, :, 1])


def best(answers: Table) -> float:
    """The highest mean of "kept" along the strengths."""
    return float(answers.kept.mean((1, 2, 3)).max())


def best_of_each(answers: Table) -> float:
    """The same, each mix at its own best strength."""
    return float(answers.kept.mean((2, 3)).max(0).mean())


def area(answers: Table) -> float:
    """The area that the curve dominates: styles seen (x) against concept kept (y), whatever the strength.

    For each x the best concept among strengths that show the styles at least so often; 1 is a mix that never fails.
    """
    points = sorted(zip(answers.seen.mean((1, 2, 3)), answers.concept.mean((1, 2, 3)), strict=True), reverse=True)
    total, height = 0.0, 0.0
    for (x, y), (lower, _) in zip(points, [*points[1:], (0.0, 0.0)], strict=True):
        height = max(height, y)
        total += height * (x - lower)
    return float(total)


Figure = Callable[[Table], float]


def interval(answers: Table, figure: Figure) -> tuple[float, float]:
    """95 %, by bootstrap over prompts and seeds (and not over mixes, of which all there are were tried)."""
    return _middle([figure(answers_) for (answers_,) in _redrawn(answers)])


def ratio(answers: Table, others: Table, figure: Figure) -> tuple[float, float, float]:
    """A figure over that of others, with its 95 %; the same prompts and seeds are drawn for both, as both saw the same.

    Raises:
        ValueError: they have other prompts or seeds.
    """
    drawn = [figure(own) / figure(other) for own, other in _redrawn(answers, others)]
    return figure(answers) / figure(others), *_middle(drawn)


def _redrawn(*tables: Table) -> Iterator[tuple[Table, ...]]:
    own = np.random.default_rng(0)
    _, _, seeds, prompts = tables[0].concept.shape
    if any(one.concept.shape[2:] != (seeds, prompts) for one in tables):
        raise ValueError(f"tables differ in seeds or prompts: {[one.concept.shape[2:] for one in tables]}")
    for _ in range(400):
        s, p = own.integers(seeds, size=seeds), own.integers(prompts, size=prompts)
        yield tuple(
            Table(one.strengths, one.mixes, *(part[:, :, s][:, :, :, p] for part in (one.concept, one.seen)))
            for one in tables
        )


def _middle(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
