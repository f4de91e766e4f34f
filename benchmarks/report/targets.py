"""The aims, by script: what should be reached, where it is read, and what stands in the way where it is not."""

from benchmarks.report.bars import Bar
from benchmarks.report.results import Figures, Read, largest, ratio, value

RANDOM = {"method": "shira", "family": "rand", "density": 0.02}
BLOCKS = {**RANDOM, "family": "block_rand"}
SD15, SDXL = "SD 1.5", "SDXL"
STEP = {"batch": 1, "checkpointing": False, "autocast": True}

WEIGHT = {"dim": 4096, "dtype": "float32"}
LINES = (
    "At 2 % most lines of memory hold an entry of one of the two adapters, so a switch reads and writes most of the "
    "weights: {limit} at the bandwidth of a copy, which lines that are reached at random do not get. (An H200 moves at "
    "least 64 bytes: one value in every 64 takes as long as one in every 32, measured in the same run.)"
)
CYCLE = "The GPU's time is bound as above; the cycle is mostly the host's work, reading files and wrapping layers."
LAUNCHES = (
    "Steps at batch 1 are bound by launching kernels, and gathering the gradients at the masks adds some to each layer."
)
INPUTS = (
    "A layer's dense gradient needs its inputs, kept from the forward pass; `--recompute_inputs` and `struct` masks "
    "keep none, for more time."
)
COST = "The page cache, the allocator and other processes vary by more than the aim allows."


def time_of_switch(device: str, key: str, model: str, **labels: object) -> Read:
    return value("switch", device, key, model=model, **labels)


def cycle(device: str, model: str) -> Read:
    return value("switch", device, "resident", model=model, method="lora cycle")


def device_bars(model: str, aim: float) -> tuple[Bar, ...]:
    device_time = time_of_switch("cuda", "device_ms", model, **RANDOM)
    limit, least = (time_of_switch("cuda", key, model, **RANDOM) for key in ("over_limit", "limit_ms"))
    return (
        Bar(f"{model}, H200, a switch at 2 %: the GPU's time", "less", aim, " ms", device_time, LINES, limit, least),
        Bar(
            f"{model}, H200: LoRA's cycle over the GPU's time of a switch at 2 %",
            "more",
            1000,
            "x",
            ratio(cycle("cuda", model), device_time),
            CYCLE,
            limit,
        ),
    )


def saving(model: str, method: str) -> Read:
    """Percent of LoRA's peak memory that a training step does without."""
    share = value("training", "", "peak_over_lora", model=model, method=method, **STEP)

    def read(figures: Figures) -> float | None:
        found = share(figures)
        return None if found is None else 100 * (1 - found)

    return read


def speed_up(model: str, method: str, other: str = "time_over_lora") -> Read:
    return ratio(lambda figures: 1.0, value("training", "", other, model=model, method=method, **STEP))


def loading(device: str, name: str, method: str) -> tuple[Bar, ...]:
    where = {"model": SD15, "method": method}
    each = value("load_many", device, "bytes_each.process", **where)
    file = value("load_many", device, "file_bytes", **where)
    late, first = (value("load_many", device, f"ms.{number}", **where) for number in (200, 1))
    grown, how = (value("load_many", device, "last_over_first", **where), ", medians of ten")
    if device == "cuda":  # steadier, and measured before those were kept
        grown, how = ratio(late, first), ""
    called = f"{SD15}, {name}{', `AdapterLibrary`' if method == 'library' else ''}"
    unpacked = "An entry takes 6 bytes in memory and 3 on disk, as gaps are unpacked to indices of 4 bytes; "
    memory = unpacked + (
        "two adapters are kept so."
        if method == "library"
        else "`AdapterLibrary` keeps adapters as they are in their files."
    )
    return (
        Bar(f"{called}: loading the 200th adapter over loading the 1st{how}", "less", 1.1, "x", grown, COST),
        Bar(f"{called}: memory an adapter adds over its file", "less", 1.1, "x", ratio(each, file), memory),
    )


def drift(device: str, name: str) -> Bar:
    none = "This is a defect: please report it."
    changed = largest("drift", device, "changed", method="shira")
    return Bar(
        f"{name}: share of bits changed after 100 switches, in any type", "less", 0, "", changed, none, digits=12
    )


def inference(device: str, name: str, model: str) -> Bar:
    noise = "The same kernels run on the same addresses; what differs is noise of the machine: see the pairs' spread."
    over = value("inference", device, "over_base", model=model, method="shira")
    return Bar(
        f"{model}, {name}: a UNet call after a switch over one of the base",
        "less",
        1,
        "x",
        over,
        noise,
        digits=2,
        fixed=True,
    )


def compiled(device: str, name: str, key: str) -> Bar:
    what = {"recompiles": "recompiles under `torch.compile`", "recaptures": "CUDA graphs captured anew"}[key]
    defect = "This is a defect: please report it."
    over_all = largest("inference", device, key, method="shira")
    return Bar(f"{name}: {what} over 100 switches and strengths, in any mode", "less", 0, "", over_all, defect)


def bytes_an_entry(model: str) -> tuple[Bar, ...]:
    labels = {"model": model, "family": "rand", "density": 0.01}
    small = (
        "Each weight costs some hundred bytes of names and header beside its entries, and gaps of one byte must escape "
        "those above 254; an entropy coder would come nearer, and take longer to read."
    )
    size, bound = (value("size", "", key, **labels) for key in ("bytes_an_entry", "bound"))
    return (
        Bar(f"{model}, random masks, 1 %, float16: bytes an entry on disk", "less", 3.1, "", size, small),
        Bar(f"{model}: the same over the entropy bound", "less", 1.03, "x", ratio(size, bound), small, digits=2),
    )


def training(model: str) -> tuple[Bar, ...]:
    step = f"{model}, training step at batch 1"
    return (
        Bar(f"{step}: PEFT's LoRA over SHiRA", "more", 1.5, "x", speed_up(model, "shira rand"), LAUNCHES),
        Bar(f"{step}: less peak memory than LoRA", "more", 15, " %", saving(model, "shira rand"), INPUTS, digits=1),
        Bar(
            f"{step}: less peak memory than LoRA, `--recompute_inputs`",
            "more",
            15,
            " %",
            saving(model, "shira rand recompute"),
            INPUTS,
            digits=1,
        ),
        Bar(
            f"{step}: time over that of the frozen backbone",
            "less",
            1.3,
            "x",
            value("training", "", "time_over_frozen", model=model, method="shira rand", **STEP),
            LAUNCHES,
        ),
    )


def overwriting(what: str, key: str) -> Bar:
    """The write alone is repeated on lines that are in the cache, so that the limit of memory says nothing of it."""
    fuse, limit = (value("overwrite_vs_fuse", "cpu", one, **WEIGHT) for one in ("lora_fuse", "limit_ms"))
    own = value("overwrite_vs_fuse", "cpu", key, **WEIGHT)
    return Bar(
        f"One 4096 x 4096 float32 weight, 1 %, CPU: LoRA's fuse over {what}",
        "more",
        100,
        "x",
        ratio(fuse, own),
        "At 1 % every seventh cache line holds an entry, and each is read and written whole, {limit} at the "
        "bandwidth of a copy; a fuse is one large product of matrices, which both cores do at full speed.",
        ratio(own, limit) if key == "overwrite" else None,
        limit,
    )


AIMS: dict[str, tuple[Bar, ...]] = {
    "overwrite_vs_fuse": (
        overwriting("overwriting, as the paper measures it", "kernel"),
        overwriting("a whole switch, which checks, saves and mixes too", "overwrite"),
    ),
    "switch": (
        Bar(
            "SD 1.5, CPU, 2 %: LoRA's cycle over a switch",
            "more",
            25,
            "x",
            ratio(cycle("cpu", SD15), time_of_switch("cpu", "resident", SD15, **RANDOM)),
            LINES,
            time_of_switch("cpu", "over_limit", SD15, **RANDOM),
            time_of_switch("cpu", "limit_ms", SD15, **RANDOM),
        ),
        Bar(
            "SD 1.5, CPU, 2 %, random blocks: LoRA's cycle over a switch",
            "more",
            60,
            "x",
            ratio(cycle("cpu", SD15), time_of_switch("cpu", "resident", SD15, **BLOCKS)),
            "Runs of 32 entries are copied one by one, {limit} at the bandwidth of one long copy.",
            time_of_switch("cpu", "over_limit", SD15, **BLOCKS),
            time_of_switch("cpu", "limit_ms", SD15, **BLOCKS),
        ),
        *device_bars(SD15, 0.2),
        *device_bars(SDXL, 1.5),
    ),
    "inference": (
        inference("cpu", "CPU", SD15),
        inference("cuda", "H200", SD15),
        inference("cuda", "H200", SDXL),
        compiled("cpu", "CPU", "recompiles"),
        compiled("cuda", "H200", "recompiles"),
        compiled("cuda", "H200", "recaptures"),
    ),
    "load_many": (
        *loading("cpu", "CPU", "shira"),
        *loading("cuda", "H200", "shira"),
        *loading("cpu", "CPU", "library"),
        *loading("cuda", "H200", "library"),
    ),
    "drift": (drift("cpu", "CPU"), drift("cuda", "H200")),
    "size": (*bytes_an_entry(SD15), *bytes_an_entry(SDXL)),
    "training": (*training(SD15), *training(SDXL)),
    "demo": (
        Bar(
            "Demo model, CPU, all switches random: from one adapter to another",
            "less",
            5,
            " ms",
            value("demo", "", "random_switches.by_kind.one adapter to another"),
            "Most of these switches come from a mix of several adapters, whose entries are all restored first.",
        ),
        Bar(
            "Demo model: parameters that differ after all random switches",
            "less",
            0,
            "",
            value("demo", "", "random_switches.parameters_that_differ"),
            "This is a defect: please report it.",
        ),
    ),
}
