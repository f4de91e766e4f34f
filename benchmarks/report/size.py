"""Sizes on disk as a table: a row a family of masks, a column a density."""

from benchmarks.report import cells
from benchmarks.report.results import Result, Row
from benchmarks.report.tables import markdown

SHOWN = 0.01
"""The density whose bound and file are told."""


def size_table(result: Result) -> str:
    groups: dict[tuple[str, ...], dict[float, Row]] = {}
    for row in result.rows:
        named = (row["model"], cells.method(row.get("method", "shira")), row.get("family", ""))
        groups.setdefault(named, {})[row.get("density", 0.0)] = row
    densities = sorted({density for found in groups.values() for density in found if density})
    columns = {name: [key[place] for key in groups] for place, name in enumerate(("Model", "Method", "Mask"))}
    for density in densities:
        columns[f"Bytes an entry, {cells.percent(density)}"] = [
            shown(found.get(density, {}), "bytes_an_entry", 3) for found in groups.values()
        ]
    told = [found.get(SHOWN) or next(iter(found.values())) for found in groups.values()]
    columns[f"Bound, {cells.percent(SHOWN)}"] = [shown(row, "bound", 3) for row in told]
    columns["Over the bound"] = [shown(row, "over_bound", 2, "x") for row in told]
    columns[f"File, {cells.percent(SHOWN)}"] = [cells.size(row["bytes"]) for row in told]
    return markdown(columns)


def shown(row: Row, key: str, digits: int, unit: str = "") -> str:
    return f"{row[key]:.{digits}f}{unit}" if key in row else ""
