"""The comparison in README.md, and the figures that most people ask for."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.measure import ASSETS
from benchmarks.report import cells
from benchmarks.report.results import Figures, Read, largest, value
from benchmarks.report.tables import markdown
from benchmarks.report.targets import STEP

MIX = {"method": "shira", "family": "rand", "density": 0.02}
MODELS = ("SD 1.5", "SDXL")


COMPARED = {
    "SHiRA": ("shira", {"family": "rand", "density": 0.02}, "shira"),
    "LoRA, fused": ("lora cycle", {}, None),
    "LoRA, `set_adapters`": ("lora set_adapters", {}, "lora unfused"),
    "LoRA, hotswap": ("lora hotswap", {}, "lora unfused"),
}
"""Heading -> method and labels of its switch, and the method whose steps it has; None costs nothing a step."""


def readme_block(figures: Figures) -> str:
    """The comparison that a reader of the README needs: what a switch costs, and each step after it."""
    table = {"": list(MODELS)}
    for heading, (method, labels, call) in COMPARED.items():
        table[heading] = [compared(figures, model, method, labels, call) for model in MODELS]
    machine = next(result.machine for result in figures.of("switch") if result.device == "cuda")
    drifted = 100 * (value("drift", "cuda", "changed.100", method="lora fuse/unfuse", dtype="float16")(figures) or 0)
    return (
        "Time of a switch in memory / from a file, and of each step after it over a step of the base:\n\n"
        f"{markdown(table)}\n\n"
        f"*Medians on {machine}, float16; SHiRA with 2 % of attention and feed-forward, LoRA of rank 64 on the same "
        "layers; fused means unfuse, unload, load, fuse. Unfusing subtracts and rounds: after 100 such switches "
        f"{drifted:.0f} % of the weights are no longer the base's. With SHiRA all are, bit by bit. From a file, LoRA's "
        "hotswap is faster today. All figures, and the targets that are missed: "
        "[docs/benchmarks.md](docs/benchmarks.md).*"
    )


def compared(figures: Figures, model: str, method: str, labels: dict[str, Any], call: str | None) -> str:
    """``1.85 / 68.7 ms, 0.99x``."""
    reads = [value("switch", "cuda", key, model=model, method=method, **labels) for key in ("resident", "from_disk")]
    took = [f"{cells.short(ms)}" if (ms := read(figures)) is not None else "-" for read in reads]
    if method == "lora cycle":
        took.reverse()  # each of its switches reads a file
    over = 1.0 if call is None else value("inference", "cuda", "over_base", model=model, method=call)(figures)
    return f"{' / '.join(took)} ms" + ("" if over is None else f", {over:.2f}x")


def in_short(figures: Figures) -> str:
    """The figures that most people ask for, for the page."""
    lines = {what: text for what, text in [*benchmark_lines(figures), *model_lines()] if text}
    return markdown({"What": list(lines), "Measured": list(lines.values())})


def benchmark_lines(figures: Figures) -> Iterator[tuple[str, str | None]]:
    """Lines with None were not measured."""
    yield from demo_lines(figures)
    for device, name in (("cuda", "an H200"), ("cpu", "two CPU cores")):
        yield from switch_lines(figures, device, name)
    over = [value("inference", "cuda", "over_base", model=model, method="shira") for model in MODELS]
    yield "a UNet call after a switch over one of the base, on an H200: SD 1.5 / SDXL", listed(figures, over, "x")
    again = [largest("inference", device, "recompiles", method="shira")(figures) for device in ("cuda", "cpu")]
    counts = [count for count in again if count is not None]
    yield (
        "recompiles under `torch.compile` over 100 switches and strengths",
        cells.number(max(counts)) if counts else None,
    )
    loads = [value("load_many", "cuda", f"ms.{number}", model="SD 1.5", method="shira") for number in (1, 200)]
    yield "loading the 1st / the 200th adapter, SD 1.5, on an H200's host", listed(figures, loads, " ms")
    sizes = [value("size", "", "bytes_an_entry", model=model, family="rand", density=0.01) for model in MODELS]
    yield "bytes an entry on disk, float16 values, random masks at 1 %: SD 1.5 / SDXL", listed(figures, sizes)
    yield from training_lines(figures)


def switch_lines(figures: Figures, device: str, name: str) -> Iterator[tuple[str, str | None]]:
    """Of the models that were measured on a device."""
    switches = {model: value("switch", device, "resident", model=model, **MIX) for model in MODELS}
    cycles = {model: value("switch", device, "resident", model=model, method="lora cycle") for model in MODELS}
    found = [model for model in MODELS if switches[model](figures) is not None and cycles[model](figures) is not None]
    if found:
        yield (
            f"to another adapter, 2 % of attention and feed-forward, on {name}: {' / '.join(found)}; "
            "diffusers' LoRA cycle (unfuse, unload, load, fuse)",
            joined("; ", *(listed(figures, [reads[m] for m in found], " ms") for reads in (switches, cycles))),
        )


def demo_lines(figures: Figures) -> Iterator[tuple[str, str | None]]:
    kinds = ("one adapter to another", "a strength moved", "a mix of several")
    count = figures.value("demo", "", "random_switches.count")
    if count is None:
        return
    differ = figures.value("demo", "", "random_switches.parameters_that_differ")
    yield (
        f"parameters that differ from the base after {count:,} random switches, mixes and strengths on the demo model",
        f"{cells.number(differ or 0)} of all, bit by bit",
    )
    yield (
        "one of these switches on a CPU: to another adapter / another strength / a mix of up to four",
        listed(figures, [value("demo", "", f"random_switches.by_kind.{kind}") for kind in kinds], " ms"),
    )


def training_lines(figures: Figures) -> Iterator[tuple[str, str | None]]:
    def of(key: str, method: str, made: Callable[[float], float]) -> list[float]:
        found = [figures.value("training", "", key, model=model, method=method, **STEP) for model in MODELS]
        return [made(figure) for figure in found if figure is not None]

    faster = of("time_over_lora", "shira rand", lambda ratio: 1 / ratio)
    less, least = (
        of("peak_over_lora", m, lambda ratio: 100 * (1 - ratio)) for m in ("shira rand", "shira rand recompute")
    )
    if len(faster) == len(less) == len(least) == len(MODELS):
        yield (
            "a training step beside PEFT's LoRA of rank 64, batch 1, "
            f"on {figures.of('training')[0].machine}: SD 1.5 / SDXL",
            f"{faster[0]:.2f} / {faster[1]:.2f} times as fast, in {less[0]:.0f} / {less[1]:.0f} % less memory "
            f"({least[0]:.0f} / {least[1]:.0f} % with `--recompute_inputs`)",
        )
    sent = [
        figures.value("training", "", "data_parallel_bytes", model="SDXL", method=method, **STEP)
        for method in ("shira rand", "lora")
    ]
    if None not in sent:
        yield (
            "what two processes exchange a training step, SDXL at 1 % / LoRA of rank 64",
            f"{sent[0] / 1e6:.0f} / {sent[1] / 1e6:.0f} MB",  # type: ignore[operator]
        )


def model_lines() -> Iterator[tuple[str, str]]:
    """What assets/metrics.json knows of the demo model's pictures."""
    metrics: dict[str, Any] = json.loads((ASSETS / "metrics.json").read_text(encoding="utf-8"))
    parts = [metrics["generated"][part] for part in ("trained_pairs", "held_out_pairs")]
    pictures = sum(part["pictures"] for part in parts)
    both = sum(part["both"] * part["pictures"] for part in parts) / pictures
    yield (
        "the demo model's pictures in which a classifier finds the asked concept and background",
        f"{both:.0%} of {pictures:,}".replace("%", " %"),
    )
    styles = [style["adapter"] for style in metrics["styles"].values()]
    ranges = [
        f"{100 * min(s[key] for s in styles):.0f} to {100 * max(s[key] for s in styles):.0f} %"
        for key in ("style", "concept")
    ]
    yield (
        "bundled styles, on concepts that they were not trained on: style seen, concept named",
        f"{', '.join(ranges)} of {styles[0]['pictures']} each",
    )
    subject = metrics["subject"]
    yield (
        "the bundled subject, learned from five pictures in six minutes on two cores: seen with its token / without",
        f"{100 * subject['with_token']['subject']:.0f} % / {100 * subject['class_without_token']['subject']:.0f} % "
        f"of {subject['pictures_each']} each",
    )


def listed(figures: Figures, reads: list[Read], unit: str = "") -> str | None:
    """``3.7 / 10.9 ms``; None where any is missing."""
    found = [read(figures) for read in reads]
    return None if None in found else " / ".join(cells.short(f) for f in found if f is not None) + unit


def joined(between: str, *texts: str | None) -> str | None:
    return None if None in texts else between.join(text for text in texts if text is not None)
