"""Interference as HTML: figures of each pair, and a heat map, a row per pair and a cell per layer."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby

from app.insight.effects import hint
from app.insight.interference import Pair, stage_of
from shira_diffusers.adapters.interference import Interference

MEASURES = {
    "Overlap": ("overlap", "entries that both hold, of those of the smaller one"),
    "Sign conflict": ("sign_conflict", "of the shared entries, those that pull in opposite directions"),
    "AWOM": ("awom", "norm of the product of the two changes; low is good"),
    "AWOR": ("awor", "empty share of that product; high is good, 100 % is orthogonal"),
}


def summary(pairs: Sequence[Pair], opposing: Mapping[tuple[str, ...], float] | None = None) -> str:
    """What to expect of each pair, with figures.

    Args:
        opposing: how far each pushes pictures in opposite directions, once they are drawn.
    """
    return "".join(_pair(pair, (opposing or {}).get((pair.first, pair.second))) for pair in pairs)


def _pair(pair: Pair, opposing: float | None) -> str:
    figures = "".join(
        f'<div title="{escape(meaning)}"><dt>{label}</dt><dd>{_figure(pair.whole, key)}</dd></div>'
        for label, (key, meaning) in MEASURES.items()
    )
    title = f"{escape(pair.first)} + {escape(pair.second)}"
    said, why = map(escape, hint(opposing)) if opposing is not None else ("", "")
    verdict = f'<p class="verdict"><b>{said}</b> {why}</p>' if said else ""
    return f'<section class="pair"><h3>{title}</h3>{verdict}<p>{escape(pair.words)}</p><dl>{figures}</dl></section>'


def heat_map(pairs: Sequence[Pair], measure: str) -> str:
    """A row per pair, a cell per layer that both adapt, darker where they interfere more."""
    key, meaning = MEASURES[measure]
    top = max((_heat(each, key) for pair in pairs for each in pair.layers.values()), default=0.0) or 1.0
    top = top if key == "awom" else 1.0
    rows = "".join(_row(pair, key, top) for pair in pairs)
    scale = '<span class="scale" aria-hidden="true"></span>'
    most = "most" if key == "awom" else "all"
    legend = f'<p class="legend">none {scale} {most} · {escape(measure)}: {escape(meaning)}</p>'
    return f'<div class="heat">{legend}{rows}</div>{_as_table(pairs)}'


def _row(pair: Pair, key: str, top: float) -> str:
    stages = "".join(
        f'<div class="stage" style="flex-grow:{len(members)}"><div class="cells">{"".join(cells)}</div>'
        f'<span title="{escape(stage)}">{escape(stage)}</span></div>'
        for stage, members in ((stage, list(group)) for stage, group in groupby(pair.layers, stage_of))
        if (cells := [_cell(name, pair.layers[name], key, top) for name in members])
    )
    worst = max(pair.layers.items(), key=lambda item: _heat(item[1], key), default=None)
    most = f"; most in {worst[0]}, {_figure(worst[1], key)}" if worst else ""
    label = escape(f"{pair.first} and {pair.second}, {len(pair.layers)} layers{most}")
    return (
        f"<h4>{escape(pair.first)} + {escape(pair.second)}</h4>"
        f'<div class="layers" role="img" aria-label="{label}">{stages}</div>'
    )


def _cell(name: str, each: Interference, key: str, top: float) -> str:
    heat = min(1.0, _heat(each, key) / top)
    return f'<i style="--heat:{100 * heat:.0f}%" title="{escape(name)}: {_figure(each, key)}"></i>'


def _heat(each: Interference, key: str) -> float:
    value = float(getattr(each, key))
    return 1 - value if key == "awor" else value


def _figure(each: Interference, key: str) -> str:
    value = float(getattr(each, key))
    return f"{value:.3g}" if key == "awom" else f"{100 * value:.3g} %"


def _as_table(pairs: Sequence[Pair]) -> str:
    """The same figures for readers of tables."""
    head = "".join(f'<th scope="col">{label}</th>' for label in MEASURES)
    rows = "".join(
        f'<tr><th scope="row">{escape(f"{pair.first} + {pair.second}: {name}" if len(pairs) > 1 else name)}</th>'
        f"{''.join(f'<td>{_figure(each, key)}</td>' for key, _ in MEASURES.values())}</tr>"
        for pair in pairs
        for name, each in pair.layers.items()
    )
    return (
        '<details><summary>All layers as a table</summary><div class="table" tabindex="0"><table>'
        f'<thead><tr><th scope="col">Layer</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>'
    )
