"""What foretells how much a pair keeps: measures of two adapters, the pair of styles, or how the adapters were made."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pandas import Series

from benchmarks.study.stats import Array, load, table
from benchmarks.study.tables import kinds

MEASURES = ("cosine", "overlap", "conflict", "awom", "awom_rows")
EFFECTS = ("effects_cosine", "effects_distance", "effects_opposing")  # of files since they are measured


def outcomes(file: dict[str, Any]) -> dict[str, float]:
    """By pair: the share kept at the strength that is best for all pairs of this file."""
    answers = table([file], "sum", kinds(2))
    kept = answers.kept.mean((2, 3))  # (strengths, mixes)
    return dict(zip(answers.mixes, kept[kept.mean(1).argmax()].tolist(), strict=True))


def spearman(first: Array, second: Array) -> float:
    """Rank correlation, equal values sharing their mean rank; 0 where one does not vary."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(Series(first).rank(), Series(second).rank())[0, 1])


def study(files: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Over all pairs of all files that mix by the sum.

    Returns:
        "within": for each measure the rank correlation with what is kept among the pairs of one file, mean over files,
        and the share of files in which it has that sign; "between": the same between files, of means over pairs;
        "explained": shares of the variance of what is kept that the pair of styles, the file, and both account for.
    """
    files = [file for file in files if any(row["method"] == "sum" and row["strengths"] for row in file["rows"])]
    kept = [outcomes(file) for file in files]
    pairs = sorted(kept[0])
    grid = np.array([[one[pair] for pair in pairs] for one in kept])  # (files, pairs)
    measures = [*MEASURES, *(m for m in EFFECTS if all(m in row for file in files for row in file["kinship"]))]
    measured = {m: np.array([_measure(file, pairs, m) for file in files]) for m in measures}
    within = {}
    for name, values in measured.items():
        each = np.array([spearman(v, k) for v, k in zip(values, grid, strict=True)])
        same = np.mean(np.sign(each) == np.sign(each.mean()))
        within[name] = {"correlation": round(float(each.mean()), 3), "same_sign": round(float(same), 2)}
    between = {name: round(spearman(values.mean(1), grid.mean(1)), 3) for name, values in measured.items()}
    centred = grid - grid.mean()
    rows, columns = grid.mean(1) - grid.mean(), grid.mean(0) - grid.mean()
    total = float((centred**2).mean())
    shares = {"styles": (columns**2).mean() / total, "recipe": (rows**2).mean() / total}
    shares["both"] = shares["styles"] + shares["recipe"]
    return {
        "files": len(files),
        "within": within,
        "between": between,
        "explained": {name: round(float(share), 3) for name, share in shares.items()},
        "pairs": {pair: round(float(mean), 3) for pair, mean in sorted(zip(pairs, grid.mean(0), strict=True))},
    }


def _measure(file: dict[str, Any], pairs: list[str], name: str) -> list[float]:
    found = {row["mix"]: row[name] if name in EFFECTS else abs(row[name]) for row in file["kinship"]}
    return [found[pair] for pair in pairs]


def of_effects(effects: list[dict[str, Any]], pairs: dict[str, float]) -> dict[str, Any]:
    """Rank correlation of measures of the styles themselves with what pairs keep, 95 % by bootstrap over pairs."""
    rows = {row["mix"]: row for row in effects}
    kept, own = np.array(list(pairs.values())), np.random.default_rng(0)
    found = {}
    for name in (key for key in effects[0] if key != "mix"):
        values = np.array([rows[pair][name] for pair in pairs])
        drawn = [own.integers(len(kept), size=len(kept)) for _ in range(2000)]
        low, high = np.percentile([spearman(values[d], kept[d]) for d in drawn], [2.5, 97.5])
        found[name] = [round(value, 2) for value in (spearman(values, kept), float(low), float(high))]
    return found


def print_study(folders: Iterable[Path], effects: Path) -> None:
    """LoRA and SHiRA apart; `effects` is the file that the step "effects" writes."""
    files = [file for folder in folders for file in load(folder)]
    for kind in ("lora", "shira"):
        own = [file for file in files if file["recipe"]["kind"] == kind]
        found = study(own)
        print(f"{kind}: {found['files']} files; variance explained: {found['explained']}")
        for name, row in found["within"].items():
            print(f"  {name:10s} within {row}, between recipes {found['between'][name]}")
        print(f"  pairs: {found['pairs']}")
        if effects.exists():
            print(f"  measures of the styles: {of_effects(json.loads(effects.read_text()), found['pairs'])}")
