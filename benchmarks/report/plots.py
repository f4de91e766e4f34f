"""Plot the results as SVG files, for a light and a dark page; equal results give equal bytes."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from pandas import DataFrame, Series

from benchmarks.report.results import Result, Results, Row, at, matching
from benchmarks.report.tables import method, number, percent, short

THEMES = {
    "": {"text": "#1f2328", "grid": "#d1d9e0", "SHiRA": "#0969da", "LoRA": "#bc4c00", "PEFT": "#8250df"},
    "-dark": {"text": "#f0f6fc", "grid": "#3d444d", "SHiRA": "#58a6ff", "LoRA": "#f0883e", "PEFT": "#bc8cff"},
}
"""Colours; of methods, by the start of their names."""
STYLES = ("-o", "--s", ":D", "-.^")
SETTINGS = {
    "svg.hashsalt": "shira",
    "svg.fonttype": "none",  # text stays text, in the reader's font; DejaVu Sans, which is wide, gives it room
    "font.size": 9,
    "axes.titlesize": 10,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
COLOURED = {
    "text": ("text.color", "axes.titlecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor"),
    "grid": ("axes.edgecolor", "grid.color"),
}


@dataclass(frozen=True)
class Panel:
    """Lines, a column of ``data`` each, over its index; without ``x_label`` bars, one per row of its only column."""

    title: str
    data: DataFrame
    x_label: str = ""
    y_label: str = "ms"
    linear: bool = False


def overwrite_vs_fuse(result: Result) -> Iterator[Panel]:
    rows = list(matching(result.rows, dtype="float32"))
    names = {"overwrite": "SHiRA: switch", "kernel": "SHiRA: write alone"}
    names |= {"lora_fuse": "LoRA: fuse", "peft_shira_merge": "PEFT's SHiRA: merge"}
    lines = {name: [at(row, key) for row in rows] for key, name in names.items()}
    data = DataFrame(lines, [row["dim"] for row in rows])
    yield Panel(machine(result), data, "rows and columns of the weight")


def switch(result: Result) -> Iterator[Panel]:
    for model in dict.fromkeys(row["model"] for row in result.rows):
        rows = matching(result.measured, model=model)
        bars = {described(row): at(row, "resident") or at(row, "from_disk") for row in rows}
        yield Panel(f"{model}, {machine(result)}", Series(bars).to_frame())


def described(row: Row) -> str:
    if row["method"] == "shira":
        return f"SHiRA, {row['family']}, {percent(row['density'])}"
    name = plain(row["method"]).replace("beside the weights: ", "")
    return name if "resident" in row else f"{name}, from a file"


def fuse(result: Result) -> Iterator[Panel]:
    lines: dict[str, dict[float, float]] = {}
    for row in result.measured:
        lines.setdefault(f"{plain(row['method'])}, {row['model']}", {})[row["adapters"]] = at(row, "slider")
    yield Panel(machine(result), DataFrame(lines), "adapters in the mix")


def load_many(result: Result) -> Iterator[Panel]:
    lines = {plain(row["method"]): {int(count): ms for count, ms in row["ms"].items()} for row in result.measured}
    yield Panel(machine(result), DataFrame(lines), "adapters loaded", "ms for the last one")


def drift(result: Result) -> Iterator[Panel]:
    """SHiRA's lines would coincide, so the largest share of all types; LoRA has a line per type."""
    ours = DataFrame([row["changed"] for row in matching(result.measured, method="shira")]).max()
    lines = {f"LoRA, {row['dtype']}": row["changed"] for row in result.measured if row["method"] != "shira"}
    data = 100 * DataFrame({"SHiRA, all types": ours} | {name: Series(line) for name, line in lines.items()})
    data.index = data.index.astype(int)
    yield Panel(machine(result), data, "switches", "% of entries changed", linear=True)


PLOTS: dict[str, Callable[[Result], Iterator[Panel]]] = {
    each.__name__: each for each in (overwrite_vs_fuse, switch, fuse, load_many, drift)
}


def machine(result: Result) -> str:
    return "CPU" if result.device == "cpu" else str(result.origin["gpu"]).removeprefix("NVIDIA ")


def plain(name: str) -> str:
    return method(name).replace("`", "")


def panels(script: str, results: Results) -> list[Panel]:
    """All panels of a script's plot, the CPU's first; none where nothing was measured."""
    return [p for result in results.of(script) if result.measured for p in PLOTS[script](result) if not p.data.empty]


def digest(shown: list[Panel]) -> str:
    """Identifies what a plot shows."""
    text = "".join(f"{panel.title} {panel.x_label} {panel.y_label} {panel.data.to_json()}" for panel in shown)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw(shown: list[Panel], theme: str) -> str:
    """The SVG text of a plot; its description holds the ``digest``."""
    colours, columns = THEMES[theme], min(2, len(shown))
    rows, most = -(-len(shown) // columns), max(len(panel.data) for panel in shown)
    bars = not shown[0].x_label
    inches = (5.4 * columns, rows * (0.7 + 0.27 * most)) if bars else (10.4 if columns > 1 else 6.4, 3.3 * rows)
    theming = {setting: colours[part] for part, settings in COLOURED.items() for setting in settings}
    with matplotlib.rc_context({**SETTINGS, **theming}):  # type: ignore[arg-type]
        figure = Figure(figsize=inches, layout="constrained")
        figure.patch.set_alpha(0)
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        for axes, panel in zip(grid, shown, strict=False):
            axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
            (draw_lines if panel.x_label else draw_bars)(axes, panel, colours)
        target = StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Description": digest(shown)})
    return target.getvalue()


def colour(name: str, colours: dict[str, str]) -> str:
    return next((code for start, code in colours.items() if name.startswith(start)), colours["text"])


def draw_lines(axes: Axes, panel: Panel, colours: dict[str, str]) -> None:
    seen: list[str] = []
    for name, line in panel.data.items():
        shade = colour(str(name), colours)
        line = line.dropna().sort_index()
        style = STYLES[seen.count(shade) % len(STYLES)]
        axes.plot(line.index, line, style, label=name, color=shade)
        seen.append(shade)
    axes.set_xscale("log")
    if panel.linear:
        top = panel.data.max(axis=None) or 1
        axes.set_ylim(-0.05 * top, 1.15 * top)  # so that a line at zero is visible
    else:
        axes.set_yscale("log")
        label_decades(axes.yaxis, panel.data)
    axes.xaxis.set_major_locator(FixedLocator(sorted(panel.data.index)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.legend()


def draw_bars(axes: Axes, panel: Panel, colours: dict[str, str]) -> None:
    taken = panel.data[0].sort_values(ascending=False, kind="stable")
    bars = axes.barh(taken.index, taken, color=[colour(name, colours) for name in taken.index], height=0.7)
    axes.bar_label(bars, [f" {number(value)}" for value in taken], fontsize=8)
    axes.set(xlabel="ms", ylabel="", xscale="log")
    axes.grid(visible=False, axis="y")
    axes.set_xlim(taken.min() / 3, taken.max() * 5)
    label_decades(axes.xaxis, panel.data)


def label_decades(axis: Axis, data: DataFrame) -> None:
    """Plain numbers; where there are few powers of ten, between them too."""
    decades = numpy.log10(data.max(axis=None) / data.min(axis=None))
    axis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_locator(NullLocator())
