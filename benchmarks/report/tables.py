"""Tables of rows: columns with names that a stranger understands, the rest of the keys after them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import cells
from benchmarks.report.results import Result, Row, at

HIDDEN = ("took_s", "skipped", "failed")


@dataclass(frozen=True)
class Column:
    """A column.

    Args:
        heading: its name, with the unit.
        key: dotted key of a row, or a function of the row and its file of results.
        text: how a figure becomes text.
        uses: further keys of rows that it stands for, which then get no column of their own.
        label: whether it names rows: then it is left out where it says the same of all, see ``constants``.
    """

    heading: str
    key: str | Callable[[Row, Result], Any]
    text: Callable[[Any], str] = cells.cell
    uses: tuple[str, ...] = ()
    label: bool = False

    def cell(self, row: Row, result: Result) -> str:
        found = self.key(row, result) if callable(self.key) else self._find(row)
        return "" if found is None else self.text(found)

    def _find(self, row: Row) -> Any:
        found: Any = row
        for part in str(self.key).split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    @property
    def keys(self) -> set[str]:
        return {*self.uses, *(() if callable(self.key) else (self.key.split(".")[0],))}


METHOD = Column("Method", "method", cells.method)


def table(columns: Sequence[Column], rows: Sequence[Row], result: Result, hidden: Iterable[str] = ()) -> str:
    """A Markdown table; keys that no column stands for come last, columns without any figure are left out."""
    known: set[str] = {*HIDDEN, *hidden}.union(*(column.keys for column in columns))
    rest = dict.fromkeys(key for row in rows for key in row if key not in known)
    every = [*columns, *(Column(cells.heading(key), key) for key in rest)]
    said = constants(columns, rows, result)
    texts = {column.heading: [column.cell(row, result) for row in rows] for column in every}
    return markdown({heading: found for heading, found in texts.items() if any(found) and heading not in said})


def constants(columns: Sequence[Column], rows: Sequence[Row], result: Result) -> dict[str, str]:
    """What labels say of all rows, where there are several."""
    found: dict[str, str] = {}
    for column in (column for column in columns if column.label and len(rows) > 1):
        texts = {column.cell(row, result) for row in rows}
        if len(texts) == 1 and any(texts):
            found[column.heading] = texts.pop()
    return found


def markdown(columns: dict[str, list[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *map(list, zip(*columns.values(), strict=True))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "skipped" not in row and "failed" not in row]


def missing(rows: Iterable[Row], labels: Sequence[str]) -> Iterator[str]:
    """What was not measured, and why: one line for each reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        reason = row.get("skipped") or row.get("failed")
        if reason:
            reasons.setdefault(cells.cell(reason), []).append(", ".join(named(row, labels)))
    for reason, cases in reasons.items():
        yield f"Not measured ({reason}): {'; '.join(cases)}."


def named(row: Row, labels: Sequence[str]) -> Iterator[str]:
    texts: dict[str, Callable[[Any], str]] = {"method": cells.method, "density": cells.percent}
    yield from (texts.get(key, cells.cell)(row[key]) for key in labels if key in row)


def over(key: str, below: str, **labels: Any) -> Callable[[Row, Result], float | None]:
    """How many times a row's figure another row's is: that of the same model, dtype and adapters with these labels."""

    def compare(row: Row, result: Result) -> float | None:
        wanted: dict[str, Any] = {name: row[name] for name in ("model", "dtype", "adapters") if name in row}
        wanted.update(labels)
        others = (other for other in result.rows if all(other.get(name) == v for name, v in wanted.items()))
        above = next((figure for other in others if (figure := at(other, key)) is not None), None)
        own = at(row, below)
        return None if above is None or not own else above / own

    return compare
