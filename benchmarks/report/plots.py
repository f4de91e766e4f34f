"""Plots as SVG files, for a light and a dark page; the same bytes for the same figures."""

import math
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.report import cells
from benchmarks.report.series import Line, Panel, digest

THEMES = {
    "": {"text": "#1f2328", "grid": "#d1d9e0", "shira": "#0969da", "lora": "#bc4c00", "peft": "#8250df"},
    "-dark": {"text": "#f0f6fc", "grid": "#3d444d", "shira": "#58a6ff", "lora": "#f0883e", "peft": "#bc8cff"},
}
COLUMNS = 2
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^"
SETTINGS: Any = {
    "svg.hashsalt": "shira",
    "svg.fonttype": "none",  # text stays text, in the reader's font; DejaVu Sans, which is wide, gives it room
    "font.size": 9,
    "axes.titlesize": 10,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
}


def draw(shown: list[Panel], theme: str) -> str:
    """The SVG text of a plot; ``digest`` of what it shows is in its description."""
    colours = THEMES[theme]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=size_of(shown), layout="constrained")
        figure.patch.set_alpha(0)
        grid = figure.subplots(-(-len(shown) // COLUMNS), min(COLUMNS, len(shown)), squeeze=False).flat
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        for axes, panel in zip(grid[: len(shown)], shown, strict=True):
            (lines if panel.form == "lines" else bars)(axes, panel, colours)
            dress(axes, panel, colours)
        target = StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Description": digest(shown)})
    return target.getvalue()


def size_of(shown: list[Panel]) -> tuple[float, float]:
    """Inches: about the width of a page for two panels beside each other."""
    columns, rows = min(COLUMNS, len(shown)), -(-len(shown) // COLUMNS)
    if shown[0].form == "bars":
        return 5.4 * columns, rows * (0.7 + 0.27 * max(len(panel.lines) for panel in shown))
    return (10.4 if columns > 1 else 6.4), 3.3 * rows


def lines(axes: Axes, panel: Panel, colours: dict[str, str]) -> None:
    seen: dict[str, int] = {}
    for one in panel.lines:
        number = seen[one.kind] = seen.get(one.kind, -1) + 1
        style: dict[str, Any] = {
            "linestyle": DASHES[number % 4],
            "marker": MARKERS[number % 4],
            "color": colour(one, colours),
        }
        axes.plot(one.x, one.y, label=one.label, linewidth=1.6, markersize=4, **style)
    axes.set_xscale("log")
    if panel.linear:
        top = max(y for one in panel.lines for y in one.y)
        axes.set_ylim(-0.05 * (top or 1), 1.15 * (top or 1))  # a line at zero is seen
    else:
        axes.set_yscale("log")
        label_decades(axes.yaxis, [y for one in panel.lines for y in one.y])
    ticks = sorted({x for one in panel.lines for x in one.x})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cells.number(value)))
    legend = axes.legend(frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_color(colours["text"])


def bars(axes: Axes, panel: Panel, colours: dict[str, str]) -> None:
    shown = sorted(panel.lines, key=lambda one: one.y[0], reverse=True)
    for place, one in enumerate(shown):
        axes.barh(place, one.y[0], color=colour(one, colours), height=0.7)
        axes.text(one.y[0] * 1.1, place, cells.number(one.y[0]), va="center", fontsize=8, color=colours["text"])
    axes.set_yticks(range(len(shown)), [one.label for one in shown])
    axes.set_xscale("log")
    axes.set_xlim(min(one.y[0] for one in shown) / 3, max(one.y[0] for one in shown) * 5)
    label_decades(axes.xaxis, [one.y[0] for one in shown])


def label_decades(axis: Axis, figures: list[float]) -> None:
    """Plain numbers; between powers of ten where there are few of them."""
    decades = math.log10(max(figures) / min(figures))
    axis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: cells.short(value)))
    axis.set_minor_locator(NullLocator())


def colour(one: Line, colours: dict[str, str]) -> str:
    return colours.get(one.kind, colours["text"])


def dress(axes: Axes, panel: Panel, colours: dict[str, str]) -> None:
    axes.set_title(panel.title, color=colours["text"])
    axes.set_xlabel(panel.x_label, color=colours["text"])
    axes.set_ylabel(panel.y_label, color=colours["text"])
    axes.tick_params(colors=colours["text"], which="both")
    axes.grid(True, which="major", axis="x" if panel.form == "bars" else "both", color=colours["grid"], linewidth=0.6)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(colours["grid"])


def write_plots(folder: Path, plots: dict[str, list[Panel]]) -> None:
    """Write ``<script>.svg`` and ``<script>-dark.svg`` for each script that has panels."""
    folder.mkdir(exist_ok=True)
    for script, shown in plots.items():
        for theme in THEMES if shown else ():
            (folder / f"{script}{theme}.svg").write_text(draw(shown, theme), encoding="utf-8")
