"""The switch over tiles: found entries, runs, threads, and that it can be undone at any point."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

from shira_diffusers import Resident, ShiraAdapter, SparseDelta, build_masks
from shira_diffusers.weights import sweep_cpu
from shira_diffusers.weights.finder import WeightMap, weights_of
from shira_diffusers.weights.steps import EntryPlan, SavedEntries, SwitchStep
from shira_diffusers.weights.sweep_cpu import TorchSweep
from shira_diffusers.weights.tiles import BLOCK_SIZE, find_starts, in_runs, tile_for
from tests import reference, tiny

MIXES: list[dict[str, float]] = [
    {"a": 1.0},
    {"b": -0.5},
    {"a": 0.3},
    {"a": 0.7},
    {"a": 0.3, "b": 1.5, "c": 1.0},
    {"c": 2.0},
    {},
    {"b": 1.0, "c": 0.1},
]


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, and memory used again, for any number of entries, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(sweep_cpu, "_ALONE", 0)
    monkeypatch.setattr(sweep_cpu, "_LONG", 0)
    yield
    torch.set_num_threads(before)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32), nn.Conv2d(4, 8, 3))


def adapters_of(model: nn.Module) -> dict[str, ShiraAdapter]:
    """In runs, in other runs, and on their own; the last one leaves a layer out."""
    made = {}
    for seed, (name, family) in enumerate((("a", "block_rand"), ("b", "block_rand"), ("c", "rand"))):
        masks = build_masks(model, family, 0.2, "all", seed=seed)
        made[name] = ShiraAdapter(
            {
                n: SparseDelta(mask, torch.randn(mask.numel()).half(), tuple(model.get_parameter(n).shape))
                for n, mask in masks.items()
                if name != "c" or n != "1.weight"
            }
        )
    return made


@pytest.mark.parametrize("tile", [1, 7, 64, 10_000])
def test_starts_are_those_of_counting(tile: int) -> None:
    generator = torch.Generator().manual_seed(tile)
    numels = {"a": 640, "b": 1, "c": 333, "d": 4000, "e": 12}
    chosen = {
        name: torch.randperm(numels[name], generator=generator)[:count].sort().values.int()
        for name, count in (("a", 100), ("c", 333), ("d", 7), ("e", 0))
    }
    grid = {name: -(-numel // tile) for name, numel in numels.items()}
    bounds = [0, 100, 433, 440, 440]
    found = find_starts(grid, tile, list(chosen), bounds, torch.cat(list(chosen.values())))
    counts = [
        int(((chosen[name] >= first) & (chosen[name] < first + tile)).sum()) if name in chosen else 0
        for name, numel in numels.items()
        for first in range(0, numel, tile)
    ]
    assert found.dtype == torch.int32
    assert found.tolist() == [sum(counts[:k]) for k in range(len(counts) + 1)]


def test_runs_are_told_from_what_only_looks_like_them() -> None:
    runs = torch.cat([torch.arange(BLOCK_SIZE) + BLOCK_SIZE * k for k in (0, 3, 4)]).int()
    assert in_runs(runs, [0, 96], [320])
    assert not in_runs(runs, [0, 96], [319])
    assert not in_runs(runs, [0, 40, 96], [320, 320])
    assert not in_runs(runs + 1, [0, 96], [320])
    runs[-1] += 1
    assert not in_runs(runs, [0, 96], [320])
    assert not in_runs(runs[:0], [0, 0], [320])


@pytest.mark.parametrize(("density", "expected"), [(0.02, 8192), (0.01, 16384), (1.0, 128), (0.0, 2**27)])
def test_tiles_hold_about_as_many_entries_at_any_density(density: float, expected: int) -> None:
    assert tile_for(160, density) == expected
    assert tile_for(1, density) >= BLOCK_SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("entries", "small"), [(8, 0), (2**14, 0), (2**14, 2**12)])
@pytest.mark.usefixtures("two_threads")
def test_switching_with_threads_and_runs_gives_the_oracle_s_bits(
    dtype: torch.dtype, channels_last: bool, entries: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_cpu, "_ENTRIES", entries)
    monkeypatch.setattr(sweep_cpu, "_SMALL", small)
    model = layers()
    adapters = adapters_of(model)
    model.to(dtype)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    base = tiny.snapshot(model)
    resident = Resident(model)
    for name, adapter in adapters.items():
        resident.add(adapter, name)
    for mix in MIXES:
        resident.set(mix)
        expected = reference.apply(base, adapters, mix)
        assert all(tiny.same_bits(now, expected[name]) for name, now in tiny.snapshot(model).items()), mix
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_block_masks_are_copied_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_cpu, "_SMALL", 0)
    model = layers()
    resident = Resident(model)
    for name, adapter in adapters_of(model).items():
        resident.add(adapter, name)
    shapes = []
    for name in "ac":
        resident.set({name: 1.0})
        (saved,) = model._shira.overwritten
        weights = weights_of(model)
        shapes.append((saved.plan.runs, saved.plan.at(weights.live(saved.plan.names), weights.version)[0].numel()))
    count = sum(delta.nnz for delta in resident.adapter("a").deltas.values())
    assert shapes == [(True, count // BLOCK_SIZE), (False, resident.adapter("c").nnz)]


@pytest.mark.usefixtures("two_threads")
def test_small_weights_are_shared_out_between_threads_whole() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    resident = Resident(model)
    for seed, name in enumerate("ab"):
        resident.add(tiny.adapter_for(model, seed, only=("",)), name)
    resident.set({"a": 1.0})
    (saved,) = model._shira.overwritten
    weights = weights_of(model)
    step = SwitchStep(weights, weights.live(saved.plan.names), saved, None)
    sizes = [len(leaving[2]) for leaving, *_ in sweep_cpu._tiles_of(step) if leaving is not None]
    assert len(sizes) == 2
    assert sizes[0] in saved.plan.bounds
    assert 0.3 < sizes[0] / sum(sizes) < 0.7


@pytest.fixture
def in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tiles a weight in ``three_weights``."""
    monkeypatch.setattr(sweep_cpu, "_SMALL", 0)
    monkeypatch.setattr(sweep_cpu, "_ENTRIES", 16)


def three_weights() -> tuple[list[torch.Tensor], SwitchStep]:
    """Three weights; what leaves is active in them."""
    torch.manual_seed(0)
    weights = {name: torch.randn(128) for name in "abc"}
    at = torch.arange(0, 128, 2, dtype=torch.int32)
    both = []
    for shift in (0, 1):
        plan = EntryPlan(tuple(weights), (128,) * 3, (0, 64, 128, 192), torch.cat([at + shift] * 3))
        both.append(SavedEntries(plan, torch.zeros(192), torch.randn(192)))
    leaving, arriving = both
    for weight, values in zip(weights.values(), leaving.written.split(64), strict=True):
        weight[at.long()] = values
    step = SwitchStep(WeightMap(nn.Module()), weights, leaving, arriving, torch.randn(192), 1.0)
    return list(weights.values()), step


@pytest.mark.usefixtures("two_threads", "in_tiles")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 1, 5, 23])
def test_a_sweep_that_breaks_off_in_a_thread_is_undone(
    at: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, step = three_weights()
    before = [weight.clone() for weight in memory]
    write, calls = torch.Tensor.scatter_, []

    def fails(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == at + 1:
            raise error("power cut")
        return write(*args)

    monkeypatch.setattr(torch.Tensor, "scatter_", fails)
    sweep = TorchSweep([step])
    with pytest.raises(error, match="power cut"):
        sweep.run()
    monkeypatch.undo()
    sweep.undo()
    assert all(torch.equal(now, old) for now, old in zip(memory, before, strict=True))


@pytest.mark.usefixtures("in_tiles")
def test_what_left_must_have_been_there() -> None:
    memory, step = three_weights()
    memory[1][8] += 1
    before = [weight.clone() for weight in memory]
    sweep = TorchSweep([step])
    assert not sweep.run()
    sweep.undo()
    assert all(torch.equal(now, old) for now, old in zip(memory, before, strict=True))
    memory[1][8] -= 1
    memory[1][8] = step.outgoing.written[64 + 4]
    assert TorchSweep([step]).run()


HALF_STEPS = {
    torch.float8_e4m3fn: 16.0,
    torch.float8_e5m2: 4096.0,
    torch.float8_e4m3fnuz: 8.0,
    torch.float8_e5m2fnuz: 4096.0,
}


@pytest.mark.parametrize("dtype", HALF_STEPS)
def test_the_range_of_8_bit_floats(dtype: torch.dtype) -> None:
    """What rounds to the maximum is in range; what torch clamps to it, in some versions, is not."""
    top = torch.finfo(dtype).max
    half_step = HALF_STEPS[dtype]
    for extra, finite in ((0.9 * half_step, True), (1.1 * half_step, False), (1e6, False)):
        weight = torch.tensor([top, 0.0]).to(dtype)
        plan = EntryPlan(("weight",), (2,), (0, 1), torch.tensor([0], dtype=torch.int32))
        saved = SavedEntries(plan, *torch.zeros(2, 1).to(dtype))
        step = SwitchStep(WeightMap(nn.Module()), {"weight": weight}, None, saved, torch.tensor([extra]), 1.0)
        sweep = TorchSweep([step])
        assert sweep.run()
        assert sweep.finite == finite
        sweep.undo()
        assert weight.float().tolist() == [top, 0.0]


def _work_in_child(queue: "multiprocessing.Queue[int]") -> None:
    queue.put(sweep_cpu._pool(2).submit(int, 7).result(timeout=20))


def test_a_forked_process_has_threads_of_its_own() -> None:
    assert sweep_cpu._pool(2).submit(int, 1).result() == 1  # the threads of this process are there now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_work_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=20) == 7
        child.join(20)
    finally:
        child.kill()


@pytest.mark.usefixtures("two_threads")
def test_threads_of_a_sweep_compute_alone_and_leave_all_others_as_they_were() -> None:
    sweep_cpu._pool.cache_clear()
    pool = sweep_cpu._pool(2)
    here = Barrier(2)

    def threads() -> int:
        here.wait()
        return torch.get_num_threads()

    assert [job.result() for job in [pool.submit(threads) for _ in range(2)]] == [1, 1]
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == 2
