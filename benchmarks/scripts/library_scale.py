"""A library of 10,000 adapters: its start, memory over 100,000 requests, prefetching, and its eviction against others.

python -m benchmarks.scripts.library_scale [--toy] [--count 10000] [--requests 100000] [--out FILE]

Small real files of 16 weights, on one CPU. Requests are Zipf-distributed; one in 50 is a use on a model, the others
load only. Memory is that of the process, after a fifth of the requests and at the end.
Eviction is simulated: files of 2 to 60 MB, 4 GiB, costs of 1.6 ms + 2.2 ms per MB. GDS and GDSF are GreedyDual-Size
(Cao and Irani, 1997), without and with frequency (Cherkasova, 1998); "library" is the cache of AdapterLibrary itself.
"""

import gc
import os
import random
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import nn

from benchmarks.measure import Run, options, seconds_of
from shira_diffusers import AdapterLibrary, ShiraAdapter, SparseDelta, save_adapter
from shira_diffusers.library.folder import Version
from shira_diffusers.library.two_tier_cache import Tier

LAYERS, SIDE, KEPT = 16, 16, 8
WEIGHTS = 160  # of SD 1.5's attention and feed-forward
RAM, SIZES, LOAD_MS, MS_PER_MB = 4 * 2**30, (2, 60), 1.6, 2.2  # from cold_start, SD 1.5
EXPONENT = 0.9


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=100_000)
    args = parser.parse_args()
    args.device = "cpu"
    if args.toy:
        args.count, args.requests = 100, 1000
    run = Run("library_scale", args, zipf=EXPONENT, count=args.count, requests=args.requests)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_files(Path(folder), args.count)
        for policy in (*POLICIES, "library"):
            run.case(partial(evict, args, policy), part="eviction", policy=policy)
        for part in (start, prefetching, requests):
            run.case(partial(part, Path(folder), args, adapter), part=part.__name__)


def model() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(LAYERS)))


def write_files(folder: Path, count: int) -> ShiraAdapter:
    """Eight adapters under so many names; the first of them."""
    made = []
    for seed in range(8):
        torch.manual_seed(seed)
        kept = {f"{at}.weight": torch.randperm(SIDE**2)[:KEPT].sort().values for at in range(LAYERS)}
        made.append(
            ShiraAdapter({n: SparseDelta(at, torch.randn(KEPT).half(), (SIDE, SIDE)) for n, at in kept.items()})
        )
    contents = [save_adapter(adapter, folder / f"a{at}.safetensors").read_bytes() for at, adapter in enumerate(made)]
    for number in range(count):
        (folder / f"a{number}.safetensors").write_bytes(contents[number % 8])
    return made[0]


def start(_: Path, args: Namespace, adapter: ShiraAdapter) -> dict[str, Any]:
    """CPU seconds of starts: of names alone, and with all headers, from the files and from an index.

    Headers are as long as those of SD 1.5 and the same for all, as reading one takes as long as another.
    """
    with tempfile.TemporaryDirectory() as made:
        folder, index = Path(made, "adapters"), Path(made, "index")
        delta = SparseDelta(torch.arange(KEPT), torch.ones(KEPT), (SIDE, SIDE))
        named = {f"unet.{at}.attentions.0.transformer_blocks.0.attn1.to_q.weight": delta for at in range(WEIGHTS)}
        file = save_adapter(ShiraAdapter(named, {"instance_prompt": "sks style"}), folder / "a0.safetensors")
        os.utime(file, (1, 1))  # what is young is read again
        for number in range(1, args.count):
            os.link(file, folder / f"a{number}.safetensors")
        first = cpu_seconds(lambda: start_with_headers(folder, index))
        again = [cpu_seconds(lambda: start_with_headers(folder, index)) for _ in range(5)]
        names = [cpu_seconds(lambda: AdapterLibrary(folder, device="cpu").close()) for _ in range(5)]
        size = index.stat().st_size
    return {
        "names_s": round(median(names), 3),
        "first_s": round(first, 3),
        "indexed_s": round(median(again), 3),
        "first_by_indexed": round(first / median(again), 1),
        "index_bytes": size,
    }


def start_with_headers(folder: Path, index: Path) -> None:
    with AdapterLibrary(folder, device="cpu", index=index) as library:
        library.headers()


def cpu_seconds(action: Callable[[], object]) -> float:
    """Of this process: on a machine that others use too, time of the wall would be theirs."""
    began = time.process_time()
    action()
    return time.process_time() - began


def requests(folder: Path, args: Namespace, adapter: ShiraAdapter) -> dict[str, Any]:
    target, size = model(), (folder / "a0.safetensors").stat().st_size
    budgets = {"ram_bytes": args.count // 5 * size, "device_bytes": max(8, args.count // 20) * adapter.nbytes}
    before = [weight.detach().clone() for weight in target.parameters()]
    points, times = [], []
    with AdapterLibrary(folder, device="cpu", **budgets) as library:
        for number, name in enumerate(trace(args.count, args.requests), 1):
            began = time.process_time()
            if number % 50 == 0:
                with library.use(target, {name: 1.0}):
                    pass
            else:
                library.get(name)
            times.append(time.process_time() - began)
            if number in (args.requests // 5, args.requests):
                gc.collect()
                points.append((psutil.Process().memory_info().rss, len(os.listdir("/proc/self/fd"))))
        stats = library.stats()
    assert all(map(torch.equal, before, target.parameters())), "weights are not what they were"
    tenth = len(times) // 10
    return {
        "device_hit_rate": round(stats.device.hits / args.requests, 4),
        "file_reads": stats.ram.misses,
        "rss_mb": [round(rss / 2**20, 1) for rss, _ in points],
        "open_files": [files for _, files in points],
        "cpu_last_by_second_tenth": round(sum(times[-tenth:]) / sum(times[tenth : 2 * tenth]), 3),
    }


def prefetching(folder: Path, args: Namespace, adapter: ShiraAdapter) -> dict[str, Any]:
    """Requests in a queue, each as long as five loads, with and without prefetching the next four."""
    names, found = trace(args.count, args.requests // 50, seed=1), {}
    for ahead in (0, 4):
        target = model()  # what a closed library leaves on a model is not the next one's
        budgets = {"ram_bytes": 0, "device_bytes": 16 * adapter.nbytes}
        with AdapterLibrary(folder, device="cpu", **budgets) as library:
            work = 5 * median([seconds_of(partial(library.get, f"a{number}")) for number in range(9)])
            for at, name in enumerate(names):
                library.prefetch(names[at + 1 : at + 1 + ahead])
                with library.use(target, {name: 1.0}):
                    time.sleep(work)
            stats = library.stats().device
            assert stats.nbytes <= stats.budget, "the budget did not hold"
            found[ahead] = stats.hits / (stats.hits + stats.misses)
    return {"decoded_at_use": {f"{ahead} ahead": round(rate, 4) for ahead, rate in found.items()}}


def trace(count: int, length: int, seed: int = 0) -> list[str]:
    """Names by Zipf's law, the popular ones anywhere in the list."""
    draw = random.Random(seed)
    names = [f"a{number}" for number in range(count)]
    draw.shuffle(names)
    return draw.choices(names, cum_weights=list(accumulate((at + 1) ** -EXPONENT for at in range(count))), k=length)


# -------------------------------------------------------------------- eviction

Priority = Callable[[float, int, float, int], float]
"""Of an item by the inflation, its uses, its cost in ms and its bytes."""
Lookup = Callable[[str], bool]
"""Whether a name is there; after that it is."""

POLICIES: dict[str, Priority] = {
    "LRU": lambda inflation, uses, cost, size: inf,  # of equals the least recently used
    "GDS": lambda inflation, uses, cost, size: inflation + cost / size,
    "GDSF": lambda inflation, uses, cost, size: inflation + uses * cost / size,
}


def evict(args: Namespace, policy: str) -> dict[str, Any]:
    """Hit rate, bytes read and time of loading of one policy, for the same trace."""
    draw, (low, high) = random.Random(2), SIZES
    budget = max(RAM * args.count // 10_000, high * 2**20)
    sizes = {f"a{n}": int(2**20 * low * (high / low) ** draw.random()) for n in range(args.count)}
    lookup = by_priority(POLICIES[policy], budget, sizes) if policy in POLICIES else of_the_library(budget, sizes)
    missed = [sizes[name] for name in trace(args.count, args.requests) if not lookup(name)]
    return {
        "hit_rate": round(1 - len(missed) / args.requests, 4),
        "gb_read": round(sum(missed) / 1e9, 2),
        "load_s": round(sum(map(cost_ms, missed)) / 1e3, 1),
    }


def cost_ms(size: int) -> float:
    return LOAD_MS + MS_PER_MB * size / 2**20


def of_the_library(budget: int, sizes: Mapping[str, int]) -> Lookup:
    """What ``AdapterLibrary`` does."""
    tier: Tier[bool] = Tier(budget)

    def lookup(name: str) -> bool:
        key = Version(name, Path(name), sizes[name], 0, 0)
        if tier.find(key):
            return True
        tier.reserve(key, sizes[name], lambda *_: True)
        tier.put(key, True, sizes[name])
        tier.find(key)
        return False

    return lookup


def by_priority(priority: Priority, budget: int, sizes: Mapping[str, int]) -> Lookup:
    held, uses, inflation = dict[str, float](), Counter[str](), 0.0

    def lookup(name: str) -> bool:
        nonlocal budget, inflation
        found = held.pop(name, None) is not None
        while not found and budget < sizes[name]:
            out = min(held, key=held.__getitem__)
            inflation, budget = held.pop(out), budget + sizes[out]
            del uses[out]
        budget -= 0 if found else sizes[name]
        uses[name] += 1
        held[name] = priority(inflation, uses[name], cost_ms(sizes[name]), sizes[name])
        return found

    return lookup


if __name__ == "__main__":
    main()
