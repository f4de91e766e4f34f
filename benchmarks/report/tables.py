"""Format figures as text, and each script's rows as Markdown tables."""

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas

from benchmarks.report.results import Result, Results, Row, at, matching

SCRIPTS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("descriptions.toml").read_text("utf-8"))
"""By script: its question, how it measures, what its plot shows, the columns of its table."""
NAMES, WHY, PAGE = (SCRIPTS.pop(key) for key in ("names", "why", "page"))
"""Long names of methods and parts, reasons why targets are missed, and the rest of the pages' text."""
UNITS = {"_gb_s": "GB/s", "_ms": "ms", "_s": "s", "_bytes": "bytes", "_mib": "MiB", "_mb": "MB"}


def cell(value: Any) -> str:
    """A figure, spread, list or mapping as the text of a Markdown cell."""
    if isinstance(value, Mapping):
        return spread(value) if "median_ms" in value else ", ".join(f"{key}: {cell(v)}" for key, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return number(value) if isinstance(value, int | float) else str(value).replace("|", "\\|").replace("\n", " ")


def number(value: float) -> str:
    """Three digits, no decimals from a hundred on."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def short(value: float) -> str:
    """As ``number``, without trailing zeros."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def spread(figures: Mapping[str, float]) -> str:
    """A median and, of three measurements or more, the 10th to 90th percentile."""
    median = number(figures["median_ms"])
    if figures.get("n", 1) < 3:
        return median
    return f"{median} ({number(figures['p10_ms'])}\u2013{number(figures['p90_ms'])})"


def times(ratio: float) -> str:
    return f"{short(ratio)}x"


def percent(share: float) -> str:
    return f"{short(round(100 * share, 2))} %"


def size(count: float) -> str:
    """Bytes, in decimal units."""
    unit, factor = next((u for u in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if abs(count) >= u[1]), ("B", 1))
    return f"{number(count / factor)} {unit}"


def method(name: str) -> str:
    return NAMES["methods"].get(name, name)


def heading(key: str) -> str:
    """A key of the results as a heading, where the tables below have no better one."""
    for end, unit in UNITS.items():
        if key.endswith(end):
            return f"{heading(key.removesuffix(end))}, {unit}"
    return key.replace("_", " ").capitalize() if key.islower() else key[:1].upper() + key[1:].replace("_", " ")


def markdown(frame: pandas.DataFrame) -> str:
    lines = [list(frame.columns), ["---"] * frame.shape[1], *frame.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pairs(rows: Mapping[str, str]) -> str:
    """A table of what was measured, a row each."""
    return markdown(pandas.DataFrame({"What": list(rows), "Measured": list(rows.values())}))


FORMATS: dict[str, Callable[[Any], str]] = {
    "dim": lambda side: f"{side:,} x {side:,}",
    "method": method,
    "density": percent,
    "file_bytes": size,
    "bytes_each.process": size,
    "bytes_each.cuda": size,
    "over_limit": times,
    "slider_over_limit": times,
    "over_base": lambda value: f"{value:.3f}x",
    **{f"changed.{count}": percent for count in (1, 10, 100)},
}
"""How the figure of a key becomes text, where ``cell`` does not do."""
LABELS = ("model", "dim", "dtype", "method", "family", "density", "adapters", "compiled", "mode")
"""The keys that name a row."""
CONSTANT = {"dtype", "family", "density", "engine"}
"""The keys whose column is replaced by one sentence where it has the same value in all rows."""
HIDDEN = {"took_s", "skipped", "failed", "bytes", "entries", "stages_ms", "over_base_p10", "over_base_p90"}
"""The keys that get no column of their own."""

ANY = {"Model": "model", "Method": "method", "Mask": "family", "Entries": "density"}
"""The columns of a script without a description."""


def tables_of(result: Result) -> Iterator[str]:
    """The tables of one file of results, then what was not measured."""
    rows, about = result.measured, SCRIPTS.get(result.script, {})
    if result.script in SPECIAL:
        yield SPECIAL[result.script](result)
    elif not about and len(rows) == 1:
        yield pairs({heading(key): cell(value) for key, value in rows[0].items() if key not in HIDDEN})
    elif result.script != "training":  # whose table has no device
        yield from filled(about.get("columns", ANY), [row for row in rows if "compiled" not in row])
        compiled = [row for row in rows if "compiled" in row]
        if compiled:
            yield "Under `torch.compile`:"
            yield from filled(about["compiled"], compiled)
    lost = "\n".join(missing(result.rows))
    if lost:
        yield lost


def filled(columns: dict[str, str], rows: list[Row]) -> Iterator[str]:
    """A table, or one per model where the model has no column, each after what all its rows have in common.

    Keys that ``columns`` does not mention come last.
    """
    for model in dict.fromkeys(None if "Model" in columns else row.get("model") for row in rows):
        own = [row for row in rows if model in (None, row.get("model"))]
        mentioned = {*" ".join(columns.values()).replace(".", " ").split(), *HIDDEN, "model"}
        rest = (key for row in own for key in row if key not in mentioned and "_over_" not in key)
        every = columns | {heading(key): key for key in rest}
        frame = pandas.DataFrame({name: [text_of(key, row, own) for row in own] for name, key in every.items()})
        frame = frame.loc[:, (frame != "").any()]
        same = [name for name in frame if every[name] in CONSTANT and len(own) > 1 and frame[name].nunique() == 1]
        said = [f"Model: {model}"] * bool(model) + [f"{name}: {frame[name].iloc[0]}" for name in same]
        if said:
            yield f"{'; '.join(said)}."
        yield markdown(frame.drop(columns=same))


def text_of(key: str, row: Row, rows: Iterable[Row] = ()) -> str:
    """The text of a column's key, see descriptions.toml."""
    of, _, ratio = key.rpartition(": ")
    if " / " in ratio:
        other = {"method": of} | {name: row[name] for name in ("dtype", "adapters") if name in row}
        above, below = ratio.split(" / ")
        one, own = at(next(matching(rows, **other), {}) if of else row, above), at(row, below)
        return "" if one is None or not own else times(one / own)
    if " to " in key:
        ends = [at(row, end) for end in key.split(" to ")]
        return "" if None in ends else " to ".join(f"{end:.3f}x" for end in ends)
    value = at(row, key, whole=True)
    return "" if value is None else FORMATS.get(key, cell)(value)


def missing(rows: Iterable[Row]) -> Iterator[str]:
    """What was not measured, one line per reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if reason := row.get("skipped") or row.get("failed"):
            name = ", ".join(text_of(key, row) for key in LABELS if key in row)
            reasons.setdefault(cell(reason), []).append(name)
    for reason, names in reasons.items():
        yield f"Not measured ({reason}): {'; '.join(names)}."


def cold_start_table(result: Result) -> str:
    """A row per part, a column per file."""
    keys = dict.fromkeys([*NAMES["parts"], *(key for row in result.measured for key in row)])
    shown = [key for key in keys if key not in {*LABELS, *HIDDEN} and any(key in row for row in result.measured)]
    columns = {"Part": [NAMES["parts"].get(key, heading(key)) for key in shown]}
    for row in result.measured:
        name = f"{row['model']}, {row['family']}, {percent(row['density'])}"
        columns[name] = [text_of(key, row) for key in shown]
    return markdown(pandas.DataFrame(columns))


def size_table(result: Result) -> str:
    """A row per family of masks, a column per density; the bound and the file are those of 1 %."""
    frame = pandas.DataFrame(result.rows)
    frame["Model"], frame["Mask"] = frame["model"], frame["family"].fillna("")
    frame["Method"] = frame["method"].map(method)
    frame["density"] = frame["density"].fillna(0.01)  # LoRAs have none
    named = ["Model", "Method", "Mask"]
    wide = frame.pivot_table("bytes_an_entry", named, "density", sort=False).sort_index(axis=1)
    table = wide.map(lambda value: f"{value:.3f}").rename(columns=lambda d: f"Bytes per entry, {percent(d)}")
    at_one = frame[frame["density"] == 0.01].set_index(named)
    table = at_one[[]].join(table)
    table["Bound, 1 %"] = at_one["bound"].map(lambda value: f"{value:.3f}", na_action="ignore")
    table["Bytes / bound"] = at_one["over_bound"].map(lambda value: f"{value:.2f}x", na_action="ignore")
    table["File, 1 %"] = at_one["bytes"].map(size)
    return markdown(table.fillna("").replace("nan", "").reset_index())


def demo_table(result: Result) -> str:
    row = result.rows[0]
    switches, picture = row["random_switches"], row["picture"]
    return pairs(
        {f"A switch: {kind}, ms": spread(taken) for kind, taken in switches["by_kind"].items()}
        | {
            "Random switches; adapters": f"{switches['count']:,}, {len(row['adapters'])}",
            "Parameters whose bits differ from the base's afterwards": cell(switches["parameters_that_differ"]),
            "Share of all weights that one adapter changes": percent(switches["share_of_weights_one_adapter_changes"]),
            "A picture of the base, ms": spread(picture["base"]),
            "A picture after a switch, including the switch, ms": spread(picture["after_a_switch"]),
        }
    )


def training_table(results: Results) -> str:
    """Milliseconds per step and MiB of peak memory in each cell: a row per setting, a column per method."""
    rows = [row for result in results.of("training") for row in result.rows if "step" in row]
    frame = pandas.DataFrame({"": setting(row), "method": row["method"], "cell": step(row)} for row in rows)
    if frame.empty:
        return ""
    wide = frame.pivot(index="", columns="method", values="cell").reindex(frame[""].unique()).fillna("")
    wide = wide[[*(m for m in NAMES["trained"] if m in wide), *(m for m in wide if m not in NAMES["trained"])]]
    return markdown(wide.rename(columns=NAMES["trained"]).reset_index())


def step(row: Row) -> str:
    peak = row.get("peak_mib")
    return f"{row['step']['median_ms']:,.0f}" + ("" if peak is None else f", {peak:,.0f}")


def setting(row: Row) -> str:
    more = ", checkpointing" * row["checkpointing"] + ", no autocast" * (not row["autocast"])
    return f"{row['model']}, batch {row['batch']}{more}"


SPECIAL: dict[str, Callable[[Result], str]] = {"size": size_table, "cold_start": cold_start_table, "demo": demo_table}
"""The tables of a shape of their own."""
