"""Generators that are dropped amid a block, in reference cycles: Python closes them in any thread, at any moment.

Here the moment is chosen: the collector is off but for what a test asks for.
"""

import asyncio
import contextvars
import gc
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from shira_diffusers import AdapterLibrary, Resident, ResidentStateError
from shira_diffusers.engine import locks
from shira_diffusers.engine.bookkeeping import Entered
from shira_diffusers.engine.locks import Held
from shira_diffusers.formats.shira_file import save_adapter
from tests.engine.test_locks import SOON, Lock, Task, take
from tests.tiny import adapter_for, assert_same_bits, linears, snapshot


@pytest.fixture(autouse=True)
def collector_off() -> Iterator[None]:
    gc.freeze()  # a collection looks at no more than what a test makes
    gc.disable()
    yield
    gc.collect()
    gc.enable()
    gc.unfreeze()
    assert not locks._active
    assert not locks._waiting


@pytest.fixture
def library(tmp_path: Path) -> Iterator[AdapterLibrary]:
    for name in ("a", "b"):
        save_adapter(adapter_for(linears(1), ord(name), only=("",)), tmp_path / f"{name}.safetensors")
    with AdapterLibrary(tmp_path) as library:
        yield library


class Cycle:
    """What only the garbage collector frees."""

    def __init__(self, held: object) -> None:
        self.held, self.me = held, self


def drop(*contexts: Callable[[], object]) -> None:
    """Leave a generator behind in each of some blocks, one inside of the other."""

    def suspended(context: Callable[[], object]) -> Iterator[None]:
        with context():
            yield

    def start() -> None:
        generators = [suspended(context) for context in contexts]
        for generator in generators:
            next(generator)
        Cycle(generators)

    contextvars.copy_context().run(start)


class Collecting(list):
    """A list after which garbage is collected, whenever it was gone through while somebody waits."""

    def __iter__(self) -> Iterator[object]:
        yield from super().__iter__()
        if locks._waiting:
            gc.collect()


def test_who_is_about_to_wait_for_a_block_that_ends_in_that_moment_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Lock()
    monkeypatch.setattr(locks, "_active", Collecting())
    drop(lock.write)
    waiting = Task(take(lock.write))
    waiting.assert_ends()
    assert waiting.error is None
    assert not locks._active


@pytest.mark.parametrize("coroutine", [False, True])
def test_who_waits_for_garbage_collects_it(
    coroutine: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Nobody else does, where all wait."""
    lock = Lock()
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    drop(lock.write)

    async def take_async() -> None:
        async with lock.write():
            pass

    waiting = Task((lambda: asyncio.run(take_async())) if coroutine else take(lock.write))
    waiting.assert_ends()
    assert waiting.error is None
    assert not recwarn.list


@pytest.mark.parametrize("coroutine", [False, True])
def test_who_waits_collects_what_is_dropped_later_too(coroutine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is woken for other models meanwhile."""
    one, two = Lock(), Lock()
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    dropped: list[Iterator[None]] = []

    def suspended() -> Iterator[None]:
        with one.write():
            yield

    def start() -> None:
        dropped.append(suspended())
        next(dropped[0])

    async def take_async() -> None:
        async with one.write():
            pass

    contextvars.copy_context().run(start)
    waiting = Task((lambda: asyncio.run(take_async())) if coroutine else take(one.write))
    with warnings.catch_warnings(record=True):
        waiting.join(0.5)
        assert waiting.is_alive()
        Cycle(dropped.pop())
        until = time.monotonic() + SOON
        while waiting.is_alive() and time.monotonic() < until:
            take(two.write)()
            time.sleep(0.02)
    waiting.assert_ends()
    assert waiting.error is None


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_tasks_of_an_event_loop_that_was_closed_are_garbage(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of a block, or before."""
    lock, free = Lock(), Lock()
    monkeypatch.setattr(locks, "PATIENCE", 0.1)

    async def forever() -> None:
        async with lock.write():
            await asyncio.sleep(SOON)

    def run() -> None:
        loop = asyncio.new_event_loop()
        task = contextvars.Context().run(loop.create_task, forever())
        loop.run_until_complete(asyncio.sleep(0.05))
        task._log_destroy_pending = False
        loop.close()

    with lock.write() if waits else free.write():
        Task(run).assert_ends()
        assert len(locks._waiting) == waits
    waiting = Task(take(lock.write))
    waiting.assert_ends()
    assert waiting.error is None


def test_one_of_many_who_wait_collects(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection takes long, and an event loop stands still meanwhile."""
    lock, collections = Lock(), []
    monkeypatch.setattr(locks, "PATIENCE", 0.5)
    monkeypatch.setattr(gc, "collect", lambda: collections.append(time.monotonic()))

    async def wait() -> None:
        async with lock.write():
            pass

    async def main() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            async with lock.write():
                tasks = [contextvars.Context().run(asyncio.create_task, wait()) for _ in range(20)]
                await asyncio.sleep(0.9)
            await asyncio.wait(tasks)

    asyncio.run(main())
    assert 1 <= len(collections) < 10  # more than one on a machine that is very busy


def test_an_end_takes_no_lock_of_the_library_amid_bookkeeping_of_blocks(
    library: AdapterLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library takes them in the other order."""
    model, lock = linears(1), Lock()
    here, collecting, has_lock = threading.local(), threading.Event(), threading.Event()

    class Meeting(list):
        def __iter__(self) -> Iterator[object]:
            if vars(here).pop("collects", False):
                collecting.set()
                assert has_lock.wait(SOON)
                gc.collect()
            return super().__iter__()

    def use_store() -> None:
        assert collecting.wait(SOON)
        with library._store.lock:
            has_lock.set()
            time.sleep(0.05)  # the other thread collects meanwhile
            locks.awaiting()

    def read() -> None:
        here.collects = True
        take(lock.read)()

    monkeypatch.setattr(locks, "_active", Meeting())
    drop(lambda: library.use(model, {"a": 1.0}))
    for task in [Task(use_store), Task(read)]:
        task.assert_ends()
    assert not locks._active


def test_a_block_ends_as_a_whole_once_its_thread_is_out_of_the_librarys_lock(library: AdapterLibrary) -> None:
    """Nothing of it before: the collector closes all generators of a cycle, those too by which a block would end."""
    model = linears(1)
    before = snapshot(model)
    drop(lambda: library.use(model, {"a": 1.0}), lambda: library.pinned("b", model))
    active = snapshot(model)
    with library._store.lock:
        gc.collect()
        assert_same_bits(model, active)
        assert len(locks._active) == 2
        assert library.stats().device.adapters == 2
        assert [slot.pins for slot in library._store.device._slots.values()] == [1, 1]
    assert_same_bits(model, before)
    assert not locks._active
    assert [slot.pins for slot in library._store.device._slots.values()] == [0, 0]
    assert not library._store._wanted


def test_what_fails_at_such_an_end_is_logged_and_not_raised_where_it_does_not_belong(
    caplog: pytest.LogCaptureFixture, library: AdapterLibrary
) -> None:
    def fail() -> None:
        raise KeyError("gone")

    module = nn.Linear(1, 1)
    drop(lambda: Held([module], write=True, inside=lambda *_: Entered(lambda ends: ends.callback(fail))))
    with library._store.lock:
        gc.collect()
    assert "has failed to end" in caplog.text
    assert "gone" in caplog.text


def test_a_long_chain_of_blocks_ends_one_after_the_other() -> None:
    lock = Lock()
    drop(*[lock.write] * 200)
    assert len(locks._active) == 200
    gc.collect()
    assert not locks._active


def ending(lock: Lock) -> Held[None]:
    """A block that takes its model once more at its end, as ``AdapterLibrary.use`` does."""

    @contextmanager
    def inside(*_: object) -> Iterator[None]:
        try:
            yield
        finally:
            take(lock.write)()

    return Held([lock.module], write=True, inside=inside)


def test_a_generator_that_is_closed_by_another_one_ends_its_block() -> None:
    one, two = Lock(), Lock()

    def suspended() -> Iterator[None]:
        with ending(two):
            yield

    def closing() -> Iterator[None]:
        with one.write():
            yield
            inner.close()

    def work() -> None:
        outer = closing()
        next(outer)
        next(inner)
        next(outer, None)

    inner = suspended()
    task = Task(work)
    task.assert_ends()
    assert task.error is None


def test_a_thread_is_not_inside_of_a_block_whose_end_began_while_it_waited() -> None:
    """Nor through what it has waited for, which was to be inside."""
    one, two = Lock(), Lock()
    begun, go_on = threading.Event(), threading.Event()

    @contextmanager
    def slowly(*_: object) -> Iterator[None]:
        yield
        begun.set()
        assert go_on.wait(SOON)
        order.append("ended")

    def inside() -> None:
        with two.write(), one.write():
            order.append("entered")

    def leave() -> None:
        with Held([one.module], write=True, inside=slowly):
            context = contextvars.copy_context()
            tasks.append(Task(lambda: context.run(inside)))
            tasks[-1].assert_waits()

    order: list[str] = []
    tasks: list[Task] = []
    with two.write():
        tasks.append(Task(leave))
        assert begun.wait(SOON)
    tasks[-1].assert_waits()
    go_on.set()
    for task in tasks:
        task.assert_ends()
        assert task.error is None
    assert order == ["ended", "entered"]


def test_generators_that_are_collected_anywhere(library: AdapterLibrary) -> None:
    """Some threads leave generators behind in blocks, others use the models: all see their mix, and the base after."""
    models = [linears(1), linears(2)]
    base = [snapshot(model) for model in models]
    wanted = [{name: mixed(seed, library, name) for name in ("a", "b")} for seed in (1, 2)]
    until = time.monotonic() + 2
    wrong: list[str] = []

    def use() -> Iterator[None]:
        k, name = random.randrange(2), random.choice("ab")
        with library.use(models[k], {name: 1.0}):
            now = snapshot(models[k])
            if not all(torch.equal(now[key], wanted[k][name][key]) for key in now):
                wrong.append(name)
            yield

    def often(act: Callable[[Iterable[None]], object]) -> Callable[[], None]:
        def work() -> None:
            while time.monotonic() < until:
                generator = use()
                try:
                    next(generator)
                except ResidentStateError:  # of another generator in this thread
                    gc.collect()
                act(generator)

        return work

    threshold = gc.get_threshold()
    gc.set_threshold(20, 2, 2)
    gc.enable()
    try:
        tasks = [Task(often(act)) for act in (Cycle, Cycle, list, list)]
        while any(task.is_alive() for task in tasks) and time.monotonic() < until + SOON:
            gc.collect()  # all may wait for garbage
            time.sleep(0.1)
        for task in tasks:
            task.assert_ends()
    finally:
        gc.disable()
        gc.set_threshold(*threshold)
    gc.collect()
    assert not wrong
    for model, bits in zip(models, base, strict=True):
        assert_same_bits(model, bits)


def mixed(seed: int, library: AdapterLibrary, name: str) -> dict[str, torch.Tensor]:
    model = linears(seed)
    resident = Resident(model)
    resident.add(library.get(name), name)
    resident.set({name: 1.0})
    return snapshot(model)


@pytest.mark.parametrize("by", ["the task", "the loop"])
def test_files_that_a_thread_reads_for_a_loop_that_has_ended_are_wanted_no_more(
    by: str, library: AdapterLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with all of its tasks; nothing runs in it any more when the thread is done."""
    reads, go_on = threading.Event(), threading.Event()
    warm = library._store.warm

    def read(*args: object) -> object:
        reads.set()
        assert go_on.wait(SOON)
        return warm(*args)

    async def use() -> None:
        async with library.use(linears(1), {"a": 1.0}):
            raise AssertionError("it was cancelled before its turn")

    async def main() -> None:
        task = asyncio.create_task(use())
        assert await asyncio.to_thread(reads.wait, SOON)
        asyncio.get_running_loop().call_soon(threading.Timer(0.05, go_on.set).start)
        if by == "the task":
            task.cancel()
            await asyncio.wait([task])

    monkeypatch.setattr(library._store, "warm", read)
    asyncio.run(main())
    assert not library._store._wanted
