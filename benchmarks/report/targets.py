"""List what each script should reach, where the figure is read, and what limits it where it is missed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pandas import DataFrame

from benchmarks.report.results import Read, Results, Source, derived, ratio
from benchmarks.report.tables import WHY, markdown, short, times


@dataclass(frozen=True)
class Target:
    """One figure that should be reached.

    Args:
        what: the figure, with model, device and setting.
        bound: whether ``aim`` is the least or the most that reaches it, after rounding to ``digits``.
        aim: the bound.
        unit: appended to figures: " ms", "x", ...
        read: how the figure is read from the results.
        missed: why, where the target is missed; ``{limit}`` stands for the milliseconds that memory bandwidth allows.
        limit: the row with ``limit_ms`` and ``over_limit``, if memory bandwidth bounds the figure.
        digits: decimals that count; ``fixed``: all are shown.
    """

    what: str
    bound: Literal["at least", "at most"]
    aim: float
    unit: str
    read: Read
    missed: str
    limit: Source | None = None
    digits: int = 3
    fixed: bool = False

    def met(self, results: Results) -> bool | None:
        """None where nothing was measured."""
        figure = self.read(results)
        if figure is None:
            return None
        rounded = round(figure, self.digits)
        return rounded >= self.aim if self.bound == "at least" else rounded <= self.aim

    def text(self, figure: float | None) -> str:
        if figure is None:
            return "not measured"
        return (f"{figure:.{self.digits}f}" if self.fixed else short(round(figure, self.digits))) + self.unit

    @property
    def aimed(self) -> str:
        return f"{self.bound} {self.text(self.aim)}" if self.aim else "none"

    def why(self, results: Results) -> str:
        least = self.limit.value("limit_ms")(results) if self.limit else None
        return " ".join(self.missed.split()).replace(
            "{limit}", "not measured" if least is None else f"{short(least)} ms"
        )

    def over_limit(self, results: Results) -> str:
        found = self.limit.value("over_limit")(results) if self.limit else None
        return "" if found is None else times(round(found, 1))


def target_table(targets: Sequence[Target], results: Results) -> str:
    verdicts = {True: "yes", False: "**no**", None: ""}
    columns = {
        "Target": [each.what for each in targets],
        "Required": [each.aimed for each in targets],
        "Measured": [each.text(each.read(results)) for each in targets],
        "Met": [verdicts[each.met(results)] for each in targets],
        "Time / memory limit": [each.over_limit(results) for each in targets],
    }
    return markdown(DataFrame({heading: texts for heading, texts in columns.items() if any(texts)}))


def reasons(targets: Sequence[Target], results: Results) -> Iterator[str]:
    """Why targets are missed, one line per reason."""
    found: dict[str, list[str]] = {}
    for each in targets:
        if each.met(results) is False:
            found.setdefault(each.why(results), []).append(each.what)
    for reason, names in found.items():
        yield f"Missed: {'; '.join(names)}. {reason}"


def counted(targets: Sequence[Target], results: Results) -> str:
    met = [each.met(results) for each in targets]
    text = f"{met.count(True)} of {len(met)} targets are met, {met.count(False)} are missed"
    return f"{text}, {met.count(None)} were not measured." if None in met else f"{text}."


RANDOM = {"method": "shira", "family": "rand", "density": 0.02}
BLOCKS = {**RANDOM, "family": "block_rand"}
CYCLE = {"method": "lora cycle"}
SD15, SDXL = MODELS = ("SD 1.5", "SDXL")
STEP = {"batch": 1, "checkpointing": False, "autocast": True}


def overwriting(what: str, key: str) -> Target:
    row = Source("overwrite_vs_fuse", "cpu", dim=4096, dtype="float32")
    # the write alone repeats on cached lines: a copy of what it moves is no limit
    limit, missed = (row, WHY["overwriting"]) if key == "overwrite" else (None, WHY["writing"])
    what = f"One 4096 x 4096 float32 weight, 1 %, CPU: LoRA's fuse / {what}"
    return Target(what, "at least", 100, "x", ratio(row.value("lora_fuse"), row.value(key)), missed, limit)


def switch_cpu(name: str, labels: dict[str, object], aim: float, missed: str) -> Target:
    row = Source("switch", "cpu", model=SD15, **labels)
    cycle = Source("switch", "cpu", model=SD15, **CYCLE).value("resident")
    what = f"SD 1.5, CPU, 2 %{name}: LoRA's cycle / a switch"
    return Target(what, "at least", aim, "x", ratio(cycle, row.value("resident")), missed, row)


def switch_gpu(model: str, aim: float) -> Iterator[Target]:
    row = Source("switch", "cuda", model=model, **RANDOM)
    cycle, own = Source("switch", "cuda", model=model, **CYCLE).value("resident"), row.value("device_ms")
    yield Target(f"{model}, H200, GPU time of a switch at 2 %", "at most", aim, " ms", own, WHY["lines"], row)
    what = f"{model}, H200: LoRA's cycle / GPU time of a switch at 2 %"
    yield Target(what, "at least", 1000, "x", ratio(cycle, own), WHY["host"], row)


def python_calls(name: str, device: str) -> Target:
    calls = Source("switch", device, model=SD15, **RANDOM).value("python_calls")
    return Target(f"SD 1.5, {name}: Python calls of a warm switch", "at most", 500, "", calls, WHY["bookkeeping"])


def inference(name: str, device: str, model: str) -> Target:
    over = Source("inference", device, model=model, method="shira").value("over_base")
    what = f"{model}, {name}: a UNet call after a switch / one of the base"
    return Target(what, "at most", 1, "x", over, WHY["noise"], digits=2, fixed=True)


def compiled(name: str, device: str, key: str, called: str) -> Target:
    most = Source("inference", device, method="shira").largest(key)
    return Target(
        f"{name}: {called} in 100 switches of adapter or strength, in any mode", "at most", 0, "", most, WHY["defect"]
    )


def loading(name: str, device: str, method: str) -> Iterator[Target]:
    row = Source("load_many", device, model=SD15, method=method)
    grown, how = row.value("last_over_first"), ", medians of ten"
    if device == "cuda":  # steadier, and measured before those were kept
        grown, how = ratio(row.value("ms.200"), row.value("ms.1")), ""
    called = f"{SD15}, {name}{', `AdapterLibrary`' if method == 'library' else ''}"
    yield Target(f"{called}: loading the 200th adapter / the 1st{how}", "at most", 1.1, "x", grown, WHY["varies"])
    memory = ratio(row.value("bytes_each.process"), row.value("file_bytes"))
    yield Target(
        f"{called}: memory that an adapter adds / its file", "at most", 1.1, "x", memory, WHY[f"kept_{method}"]
    )


def schedule() -> Iterator[Target]:
    turns, loras, graphs, graphs_of_one = (
        Source("serving_schedule", "cuda", mode="throughput", policy=policy).value("throughput")
        for policy in ("turns", "lora server", "graphs", "graphs, one adapter")
    )
    mixed = "SD 1.5's size, H200: pictures with different adapters, taking turns"
    yield Target(f"{mixed} / pictures with one", "at least", 0.95, "x", turns, WHY["noise"])
    replayed = f"{mixed}, CUDA graphs / pictures with one, CUDA graphs"
    yield Target(replayed, "at least", 0.95, "x", ratio(graphs, graphs_of_one), WHY["short_steps"])
    yield Target(f"{mixed} / those of a plain LoRA server", "at least", 2, "x", ratio(turns, loras), WHY["loras"])


def over_lora_server() -> Iterator[Target]:
    for method in ("shira serve", "shira serve, CUDA graphs"):
        read = Source("serving_gpus", "cuda", method=method, replicas=1).value("times_lora")
        what = f"SD 1.5's size, one H200, over HTTP: pictures per second of `{method}` / those of a plain LoRA server"
        yield Target(what, "at least", 2, "x", read, WHY["loras"])


def drift(name: str, device: str) -> Target:
    most = Source("drift", device, method="shira").largest("changed")
    what = f"{name}: share of bits changed after 100 switches, in any dtype"
    return Target(what, "at most", 0, "", most, WHY["defect"], digits=12)


def bytes_per_entry(model: str) -> Iterator[Target]:
    row = Source("size", model=model, family="rand", density=0.01)
    own, over = row.value("bytes_an_entry"), ratio(row.value("bytes_an_entry"), row.value("bound"))
    yield Target(
        f"{model}, random masks, 1 %, float16: bytes per entry on disk",
        "at most",
        3.09,
        "",
        own,
        WHY["headers"],
        digits=2,
    )
    yield Target(f"{model}: the same / the entropy bound", "at most", 1.03, "x", over, WHY["headers"], digits=2)
    runs = Source("size", model=model, family="block", density=0.01).value("bytes_an_entry")
    yield Target(f"{model}, block masks: bytes per entry on disk", "at most", 2.1, "", runs, WHY["headers"], digits=2)


def step(model: str, method: str) -> Source:
    return Source("training", model=model, method=method, **STEP)


def faster(model: str, method: str = "shira rand") -> Read:
    """How many steps are done in one of LoRA's."""
    return derived(lambda over: 1 / over, step(model, method).value("time_over_lora"))


def saved(model: str, method: str = "shira rand") -> Read:
    """Percent of LoRA's peak memory that a step does not need."""
    return derived(lambda over: 100 * (1 - over), step(model, method).value("peak_over_lora"))


def training(model: str) -> Iterator[Target]:
    name, less = f"{model}, training step at batch 1", "less peak memory than LoRA"
    recomputed, over = saved(model, "shira rand recompute"), step(model, "shira rand").value("time_over_frozen")
    yield Target(f"{name}: PEFT's LoRA / SHiRA", "at least", 1.5, "x", faster(model), WHY["launches"])
    yield Target(f"{name}: {less}", "at least", 15, " %", saved(model), WHY["inputs"], digits=1)
    yield Target(f"{name}: {less}, `--recompute_inputs`", "at least", 15, " %", recomputed, WHY["inputs"], digits=1)
    yield Target(f"{name}: time / that of the frozen backbone", "at most", 1.3, "x", over, WHY["launches"])


def demo() -> Iterator[Target]:
    switches = Source("demo")
    one = switches.value("random_switches.by_kind.one adapter to another")
    differ = switches.value("random_switches.parameters_that_differ")
    yield Target(
        "Demo model, CPU, all switches random: from one adapter to another", "at most", 5, " ms", one, WHY["restored"]
    )
    yield Target(
        "Demo model: parameters that differ after all random switches", "at most", 0, "", differ, WHY["defect"]
    )


PLACES = (("CPU", "cpu"), ("H200", "cuda"))
RECOMPILES = ("recompiles", "recompilations under `torch.compile`")
TARGETS: dict[str, tuple[Target, ...]] = {
    "overwrite_vs_fuse": (
        overwriting("overwriting, as the paper measures it", "kernel"),
        overwriting("a whole switch, which checks, saves and mixes too", "overwrite"),
    ),
    "switch": (
        switch_cpu("", RANDOM, 25, WHY["lines"]),
        switch_cpu(", random blocks", BLOCKS, 60, WHY["runs"]),
        *switch_gpu(SD15, 0.2),
        *switch_gpu(SDXL, 1.5),
        *(python_calls(*place) for place in PLACES),
    ),
    "inference": (
        *(inference(*place, SD15) for place in PLACES),
        inference("H200", "cuda", SDXL),
        *(compiled(*place, *RECOMPILES) for place in PLACES),
        compiled("H200", "cuda", "recaptures", "CUDA graphs recaptured"),
    ),
    "load_many": tuple(t for method in ("shira", "library") for place in PLACES for t in loading(*place, method)),
    "drift": tuple(drift(*place) for place in PLACES),
    "size": tuple(t for model in MODELS for t in bytes_per_entry(model)),
    "training": tuple(t for model in MODELS for t in training(model)),
    "demo": tuple(demo()),
    "serving_schedule": tuple(schedule()),
    "serving_gpus": tuple(over_lora_server()),
    "serving_load": (
        Target(
            "Demo model, CPU: wrong pictures of `shira serve` under faults",
            "at most",
            0,
            "",
            Source("serving_load", "cpu", method="shira serve", faults="all").value("wrong"),
            WHY["defect"],
        ),
    ),
}
