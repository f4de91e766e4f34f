"""Show adapters, mixes and reports as tables in notebooks."""

from collections.abc import Iterable
from html import escape

from shira_diffusers.adapters.scales import Scale

_SHOWN = 200  # characters of a cell


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """An HTML table; each cell is escaped and cut to 200 characters."""
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, cells: Iterable[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(_short(str(cell)))}</{tag}>' for cell in cells)}</tr>"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


class MixTable(dict[str, Scale]):
    """A mix, ``{adapter: strength}``, that notebooks show as a table."""

    def _repr_html_(self) -> str:
        return table(["adapter", "strength"], self.items())


class ReportTable(dict[tuple[str, str], dict[str, float]]):
    """The figures of each pair of adapters, which notebooks show as a table."""

    def _repr_html_(self) -> str:
        figures = list(dict.fromkeys(figure for each in self.values() for figure in each))
        rows = ([*pair, *(f"{each[figure]:.4g}" for figure in figures)] for pair, each in self.items())
        return table(["adapter", "with", *figures], rows)
