"""The table of training steps, for docs/benchmarks.md and docs/training.md."""

from collections.abc import Iterator
from itertools import groupby

from benchmarks.report import cells
from benchmarks.report.results import Figures, Row
from benchmarks.report.tables import markdown

METHODS = {
    "frozen": "frozen",
    "shira rand": "`rand`",
    "shira rand recompute": "`rand`, recompute",
    "shira struct": "`struct`",
    "lora": "PEFT LoRA, rank 64",
    "peft shira": "PEFT SHiRA",
    "full": "all weights",
}
SETTINGS = ("model", "batch", "checkpointing", "autocast")


def training_table(figures: Figures) -> str:
    """Milliseconds a step and MiB of peak memory in each cell: a row a setting, a column a method."""
    rows = [row for result in figures.of("training") for row in result.rows if "step" in row]
    settings = list(dict.fromkeys(tuple(row[key] for key in SETTINGS) for row in rows))
    methods = [*METHODS, *dict.fromkeys(row["method"] for row in rows if row["method"] not in METHODS)]
    cell = {(*(row[key] for key in SETTINGS), row["method"]): figure_of(row) for row in rows}
    columns = {"": [described(*setting) for setting in settings]}
    for method in methods:
        columns[METHODS.get(method, method)] = [cell.get((*setting, method), "") for setting in settings]
    return markdown(columns)


def figure_of(row: Row) -> str:
    peak = row.get("peak_mib")
    step = f"{row['step']['median_ms']:,.0f}"
    return step if peak is None else f"{step}, {peak:,.0f}"


def described(model: str, batch: int, checkpointing: bool, autocast: bool) -> str:
    return f"{model}, batch {batch}" + ", checkpointing" * checkpointing + ", no autocast" * (not autocast)


def training_words(figures: Figures) -> str:
    """What the table says at batch 1, in a few sentences."""
    rows = {
        (row["model"], row["method"]): row
        for result in figures.of("training")
        for row in result.rows
        if "step" in row and row["batch"] == 1 and not row["checkpointing"] and row["autocast"]
    }
    return " ".join(sentences(rows))


def sentences(rows: dict[tuple[str, str], Row]) -> Iterator[str]:
    for model, _ in groupby(model for model, _ in rows):
        plain, saving, struct = (
            rows.get((model, name)) for name in ("shira rand", "shira rand recompute", "shira struct")
        )
        if not plain or not saving or "time_over_lora" not in plain:
            continue
        yield (
            f"On {model} at batch 1 random masks train {against_lora(plain)}; "
            f"with recomputation {against_lora(saving)}. "
            "Beyond the floor a step costs "
            f"{cells.percent(plain['time_over_frozen'] - 1)} of time, and "
            f"{plain['peak_minus_frozen_mib']:,.0f} MiB for the inputs that layers keep: with recomputation "
            f"{saving['peak_minus_frozen_mib']:,.0f}"
            + (f", with `struct` masks {struct['peak_minus_frozen_mib']:,.0f}." if struct else ".")
        )


def against_lora(row: Row) -> str:
    faster, less = 1 / row["time_over_lora"], 1 - row["peak_over_lora"]
    return f"{faster:.2f} times as fast as LoRA, in {100 * less:.0f} % less memory"
