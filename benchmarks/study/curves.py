"""The plot: styles seen against concept kept, a curve a recipe and way to mix, a point a strength."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.study.score_tables import figures
from benchmarks.study.stats import best, load, table
from benchmarks.study.tables import grouped, kinds


def draw_curves(folders: Iterable[Path], file: Path, recipes: Collection[str], ways: Collection[str]) -> None:
    """Write an SVG with a panel for single styles and one for pairs; the point of the highest "kept" is larger.

    Args:
        recipes, ways: names of those to draw; empty is all.
    """
    labels = {"xlabel": "seen, share of pictures", "xlim": (0, 1), "ylim": (0.4, 1.01)}
    with _panels(file, "concept right", "highest share with all right", **labels) as panels:
        for files in (files for folder in folders for files in grouped(load(folder))):
            found = dict.fromkeys(row["method"] for row in files[0]["rows"] if row["strengths"])
            if recipes and files[0]["recipe"]["name"] not in recipes:
                continue
            for method in [way for way in found if not ways or way in ways]:
                for axes, size in zip(panels, (1, 2), strict=True):
                    answers = table(files, method, kinds(size))
                    seen, concept = (part.mean((1, 2, 3)) for part in (answers.seen, answers.concept))
                    label = f"{files[0]['recipe']['name']}, {method}: {best(answers):.2f}"
                    (line,) = axes.plot(seen, concept, "o-", markersize=3, linewidth=1, label=label)
                    at = int(answers.kept.mean((1, 2, 3)).argmax())
                    axes.plot(seen[at], concept[at], "o", markersize=7, color=line.get_color())


def draw_scores(folder: Path, file: Path) -> None:
    """Write an SVG of the results of `scores`: likeness to training pictures against that to the prompt, from 0 on."""
    with _panels(file, "clip_t: likeness to the prompt", "", xlabel="likeness to training pictures") as panels:
        for files in grouped(load(folder)):
            found = figures(files)
            kind = "dino" if "dino" in found[1, 0.0] else "clip_i"
            for axes, size in zip(panels, (1, 2), strict=True):
                points = [found[at] for at in sorted(found) if at[0] == size]
                lines = [[point[name].mean() for point in points] for name in (kind, "clip_t")]
                axes.plot(*lines, "o-", markersize=3, linewidth=1, label=f"{files[0]['recipe']['name']}, {kind}")


@contextmanager
def _panels(file: Path, ylabel: str, title: str, **labels: Any) -> Iterator[Any]:
    """Two panels, for single styles and for pairs, that are written when they are drawn."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "shira", "svg.fonttype": "none", "font.size": 9}):
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
        yield panels
        for axes, name in zip(panels, ("single styles", "pairs: both styles"), strict=True):
            axes.set(title=name, **labels)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, loc="lower left", title=title)
        panels[0].set_ylabel(ylabel)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
