"""A fleet of 1,000 replicas and 100,000 adapters, simulated: SHiRA against LoRA and one merged model per adapter.

python -m benchmarks.scripts.fleet [--toy] [--parameters FILE] [--requests 600000] [--out FILE]

Times are medians measured on one H200 with SD 1.5 (benchmarks/results); what was assumed is in ASSUMED. A JSON file of
parameters overrides any of both. A replica draws one picture at a time, in the order of arrival, and has two tiers with
LRU eviction; requests are a Poisson process, and adapters Zipf-distributed. While a request waits, its adapter is
fetched from the store and decoded; only the switch itself holds the GPU. Routing: "any", the less busy of two random
replicas; "warm", of two that have the adapter, unless both are busy for longer than ``patience_ms`` (Ray Serve's
multiplexing, where ``max_ongoing_requests`` bounds that); "cheapest", of all four the one that is free first, where a
miss counts as the time that it takes.
A load of 1 is what the replicas could draw if adapters cost nothing. Two thirds of the requests only fill caches.
"""

import json
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import RESULTS, Run, options

ASSUMED = {
    "replicas": 1000,
    "adapters": 100_000,
    "zipf": 0.9,
    "steps": 20,
    "device_gib": 2.0,  # for adapters or models, beside the base
    "ram_gib": 4.0,
    "store_ms": 20.0,  # to the first byte
    "store_gb_s": 1.25,  # per replica: 10 Gbit/s
    "patience_ms": 1000.0,
    "merged_bytes": 1_719_041_928,  # SD 1.5's UNet in float16
}
LOADS, ROUTINGS = (0.5, 0.8), ("any", "warm", "cheapest")


@dataclass(frozen=True)
class Method:
    """What an adapter costs.

    Args:
        file_bytes: in the store and in RAM.
        device_bytes: of one that is ready on the device; 0 keeps none there but the active one.
        ready_ms: holds the GPU; to switch to one that is ready on the device.
        switch_ms: holds the GPU; to switch to one that has just been loaded.
        from_ram_ms, from_store_ms: beside drawing; to load it before, without the transfer from the store.
        step_ratio: a step with it, by one of the base.
    """

    file_bytes: int
    device_bytes: int
    ready_ms: float
    switch_ms: float
    from_ram_ms: float
    from_store_ms: float
    step_ratio: float = 1.0

    def missed_ms(self, world: dict[str, float]) -> float:
        """To load it from the store."""
        return self.from_store_ms + world["store_ms"] + self.file_bytes / world["store_gb_s"] / 1e6


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--parameters", type=Path, help="JSON that overrides parameters, those of methods by their names"
    )
    parser.add_argument("--requests", type=int, default=600_000)
    args = parser.parse_args()
    args.device = "cpu"
    given = json.loads(args.parameters.read_text()) if args.parameters else {}
    if args.toy:
        args.requests, given = 4000, {"replicas": 10, "adapters": 1000, **given}
    world, methods = parameters(given)
    about = {name: asdict(method) for name, method in methods.items()}
    run = Run("fleet", args, per_device=False, requests=args.requests, world=world, methods=about)
    for load in LOADS:
        for name, method in methods.items():
            for routing in ROUTINGS:
                run.case(partial(simulate, method, world, args, load, routing), load=load, method=name, routing=routing)


def parameters(given: dict[str, Any]) -> tuple[dict[str, float], dict[str, Method]]:
    """What all methods share, and what each costs."""
    shira, fused, hotswap = (_row("switch", method=m) for m in ("shira", "lora cycle", "lora hotswap"))
    cold, unfused = _row("cold_start", density=0.02), _row("inference", method="lora unfused")
    copy_ms = cold["copy"]["median_ms"] * ASSUMED["merged_bytes"] / cold["file_bytes"]
    packed, library, prefetched = (cold[part]["median_ms"] for part in ("packed", "library", "prefetched"))
    lora_bytes = _row("load_many", method="lora")["file_bytes"]
    merged = int(ASSUMED["merged_bytes"])
    ratio = unfused["call"]["median_ms"] / unfused["base"]["median_ms"]
    # the library keeps half of its adapters on the device registered with the model
    methods = {
        "SHiRA": Method(
            shira["file_bytes"],
            2 * 6 * shira["entries"],
            shira["resident"]["median_ms"],
            prefetched,
            packed - prefetched,
            library - prefetched,
        ),
        "LoRA, hotswap": Method(lora_bytes, 0, 0.0, hotswap["from_disk"]["median_ms"], 0.0, 0.0, ratio),
        "LoRA, fused": Method(lora_bytes, 0, 0.0, fused["resident"]["median_ms"], 0.0, 0.0),
        "merged models": Method(merged, merged, 0.0, 0.0, copy_ms, copy_ms),
    }
    step_ms = _row("inference", method="shira")["base"]["median_ms"]
    world = ASSUMED | {"step_ms": step_ms}
    if unknown := given.keys() - world.keys() - methods.keys():
        raise ValueError(f"no such parameters: {sorted(unknown)}; there are {[*world, *methods]}")
    world = {name: given.get(name, value) for name, value in world.items()}
    return world, {name: Method(**(asdict(method) | given.get(name, {}))) for name, method in methods.items()}


def _row(script: str, **labels: Any) -> dict[str, Any]:
    """The first measured row of SD 1.5 with these labels."""
    rows = json.loads((RESULTS / f"{script}_cuda.json").read_text())["rows"]
    labels |= {"model": "SD 1.5"}
    return next(row for row in rows if labels.items() <= row.items())


class Replica:
    """One GPU with its caches; times in ms.

    Args:
        device, ram: adapters that fit.
    """

    def __init__(self, device: int, ram: int) -> None:
        self.free = self.loader = 0.0  # when it will be
        self.drawing = self.loading = 0.0
        self.active = -1
        self.tiers = (Lru(device), Lru(ram))


class Lru:
    def __init__(self, room: int) -> None:
        self.room, self.held = room, dict[int, None]()

    def find(self, name: int) -> bool:
        """Whether a name is there; after that it is, if there is any room."""
        found = name in self.held
        if found:
            del self.held[name]
        elif len(self.held) >= self.room > 0:
            del self.held[next(iter(self.held))]
        if self.room:
            self.held[name] = None
        return found


def simulate(method: Method, world: dict[str, float], args: Namespace, load: float, routing: str) -> dict[str, Any]:
    """Latencies, hits and bytes of the last third of the requests."""
    draw = np.random.default_rng(0)
    count, picture = int(world["replicas"]), world["steps"] * world["step_ms"]
    rooms = [
        int(world["device_gib"] * 2**30 // method.device_bytes) if method.device_bytes else 0,
        int(world["ram_gib"] * 2**30 // method.file_bytes),
    ]
    replicas = [Replica(*rooms) for _ in range(count)]
    choices = draw.integers(count, size=(args.requests, 2)).tolist()
    arrivals = np.cumsum(draw.exponential(picture / (load * count), args.requests)).tolist()
    names = zipf(draw, world, args.requests)
    miss_ms = method.switch_ms + method.missed_ms(world)
    holders: list[list[int]] = [[] for _ in range(int(world["adapters"]))]
    latencies, tiers, started = list[float](), [0, 0, 0, 0], 0.0
    for number, (at, name, pair) in enumerate(zip(arrivals, names, choices, strict=True)):
        if number == args.requests * 2 // 3:
            latencies, tiers, started = [], [0, 0, 0, 0], at
            for replica in replicas:
                replica.drawing = replica.loading = 0.0
        chosen = choose(routing, some_with(name, holders[name], replicas, pair), pair, at, replicas, world, miss_ms)
        replica = replicas[chosen]
        tier, ready, switch = fetch(replica, name, at, method, world)
        if tier == 3:
            holders[name].append(chosen)
        begun = max(replica.free, ready)
        replica.free = begun + switch + picture * method.step_ratio
        replica.drawing += replica.free - begun
        latencies.append(replica.free - at)
        tiers[tier] += 1
    busy = max(sum(replica.drawing for replica in replicas), sum(replica.loading for replica in replicas))
    return figures(latencies, tiers, arrivals[-1] - started, busy / count, method)


def choose(
    routing: str,
    warm: list[int],
    pair: list[int],
    at: float,
    replicas: Sequence[Replica],
    world: dict[str, float],
    miss_ms: float,
) -> int:
    """The replica that draws: of two that have the adapter, and of any two."""
    if routing == "warm" and warm and min(replicas[one].free for one in warm) - at <= world["patience_ms"]:
        pair = []
    elif routing != "cheapest":
        warm = []
    return min(warm + pair, key=lambda one: max(replicas[one].free, at) + (0 if one in warm else miss_ms))


def zipf(draw: np.random.Generator, world: dict[str, float], requests: int) -> list[int]:
    weights = np.arange(1, int(world["adapters"]) + 1) ** -world["zipf"]
    return np.searchsorted(np.cumsum(weights) / weights.sum(), draw.random(requests)).tolist()


def some_with(name: int, holders: list[int], replicas: Sequence[Replica], pair: Iterable[int]) -> list[int]:
    """Up to two replicas that have an adapter, at random; those that have it no more leave ``holders``."""
    found = []
    for number in pair:
        while holders:
            at = number % len(holders)
            if any(name in tier.held for tier in replicas[holders[at]].tiers):
                found.append(holders[at])
                break
            holders[at] = holders[-1]
            holders.pop()
    return found


def fetch(replica: Replica, name: int, at: float, method: Method, world: dict[str, float]) -> tuple[int, float, float]:
    """Where an adapter was (active, device, RAM, store), when it is loaded, and how long the switch will take."""
    same, replica.active = replica.active == name, name
    device, ram = replica.tiers
    if device.find(name) or same:
        return (0, at, 0.0) if same else (1, at, method.ready_ms)
    in_ram = ram.find(name)
    taken = method.from_ram_ms if in_ram else method.missed_ms(world)
    replica.loading += taken
    replica.loader = max(replica.loader, at) + taken
    return (2 if in_ram else 3), replica.loader, method.switch_ms


def figures(latencies: list[float], tiers: list[int], ms: float, busy: float, method: Method) -> dict[str, Any]:
    """``capacity``: pictures per second that keep all replicas drawing or loading; above it waiting only grows."""
    total = len(latencies)
    p50, p99 = (round(float(value) / 1000, 3) for value in np.percentile(latencies, (50, 99)))
    return {
        "rate": round(1000 * total / ms, 1),
        "capacity": round(1000 * total / busy, 1),
        "overloaded": busy > ms,
        "p50_s": p50,
        "p99_s": p99,
        "hits": {
            name: round(number / total, 4) for name, number in zip(("active", "device", "RAM"), tiers, strict=False)
        },
        "store_mb_per_picture": round(tiers[3] * method.file_bytes / total / 1e6, 2),
        "store_gbit_s": round(tiers[3] * method.file_bytes * 8 / ms / 1e6, 1),
    }


if __name__ == "__main__":
    main()
