"""Figures as the text of a cell."""

from collections.abc import Mapping
from typing import Any

NAMES = {
    "shira": "SHiRA",
    "library": "SHiRA, `AdapterLibrary`",
    "lora": "LoRA",
    "lora cycle": "LoRA: unfuse, unload, load, fuse",
    "lora set_adapters": "LoRA beside the weights: `set_adapters`",
    "lora hotswap": "LoRA beside the weights: hotswap",
    "lora unfused": "LoRA beside the weights",
    "lora fuse/unfuse": "LoRA: fuse, unfuse",
    "peft shira": "PEFT's SHiRA",
    "peft shira merge": "PEFT's SHiRA: unmerge, merge",
    "peft shira unmerged": "PEFT's SHiRA beside the weights",
}
"""What the results' short names of methods stand for."""


def cell(value: Any) -> str:
    """A figure, spread, list or mapping as the text of a Markdown cell."""
    if isinstance(value, Mapping):
        return spread(value) if "median_ms" in value else ", ".join(f"{key}: {cell(v)}" for key, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(cell(v) for v in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int | float):
        return number(value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def number(value: float) -> str:
    """Three digits, whole above a hundred."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def short(value: float) -> str:
    """As ``number``, without zeros at the end."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def times(ratio: float) -> str:
    return f"{short(ratio)}x"


def spread(figures: Mapping[str, float]) -> str:
    """A median and, of three measurements or more, the 10th to 90th percentile."""
    median = number(figures["median_ms"])
    if figures.get("n", 1) < 3:
        return median
    return f"{median} ({number(figures['p10_ms'])}\u2013{number(figures['p90_ms'])})"


def percent(share: float) -> str:
    return f"{short(round(100 * share, 2))} %"


def size(count: float) -> str:
    """Bytes, in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= factor:
            return f"{number(count / factor)} {unit}"
    return f"{number(count)} B"


def heading(key: str) -> str:
    """A key of the results as the heading of a column, where no better one is given."""
    for end, unit in (
        ("_gb_s", ", GB/s"),
        ("_ms", ", ms"),
        ("_s", ", s"),
        ("_bytes", ", bytes"),
        ("_mib", ", MiB"),
        ("_mb", ", MB"),
    ):
        if key.endswith(end):
            return heading(key.removesuffix(end)) + unit
    text = key.replace("_", " ")
    return text[:1].upper() + text[1:]


def method(name: str) -> str:
    return NAMES.get(name, name)
