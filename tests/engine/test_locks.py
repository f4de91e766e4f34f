"""The readers-writer lock, with real threads. Nothing here waits for time to pass where an event can be waited for."""

import asyncio
import contextvars
import gc
import multiprocessing
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from torch import nn

from shira_diffusers import ResidentStateError
from shira_diffusers.engine import locks
from shira_diffusers.engine.locks import Held, hold

SOON = 5.0  # seconds in which a thread that may go on must have gone on
STILL = 0.05  # seconds after which a thread that must wait is taken to be waiting


class Task(threading.Thread):
    """A thread that remembers what it raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._work, self.error = work, None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except ResidentStateError as error:
            self.error = error

    def assert_ends(self) -> None:
        self.join(SOON)
        assert not self.is_alive(), "the thread is stuck"

    def assert_waits(self) -> None:
        self.join(STILL)
        assert self.is_alive(), "the thread went on, it should wait"


class Lock:
    """The lock of one model."""

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1)

    def read(self) -> Held[None]:
        return hold([self.module], write=False)

    def write(self) -> Held[None]:
        return hold([self.module], write=True)


@pytest.fixture
def lock() -> Lock:
    return Lock()


def take(context: object) -> Callable[[], None]:
    def work() -> None:
        with context():
            pass

    return work


def test_readers_read_together(lock: Lock) -> None:
    together = threading.Barrier(4, timeout=SOON)

    def read() -> None:
        with lock.read():
            together.wait()

    readers = [Task(read) for _ in range(4)]
    for reader in readers:
        reader.assert_ends()
    assert not together.broken


def test_a_writer_waits_for_readers_and_readers_for_a_writer(lock: Lock) -> None:
    with lock.read():
        writer = Task(take(lock.write))
        writer.assert_waits()
    writer.assert_ends()
    with lock.write():
        reader, other = Task(take(lock.read)), Task(take(lock.write))
        reader.assert_waits()
        other.assert_waits()
    reader.assert_ends()
    other.assert_ends()


def test_writers_write_alone(lock: Lock) -> None:
    inside, most = [], []

    def write() -> None:
        for _ in range(50):
            with lock.write():
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    writers = [Task(write) for _ in range(4)]
    for writer in writers:
        writer.assert_ends()
    assert max(most) == 1
    assert len(most) == 200


def test_a_waiting_writer_goes_before_new_readers(lock: Lock) -> None:
    order: list[str] = []

    def note(name: str, context: object) -> Callable[[], None]:
        def work() -> None:
            with context():
                order.append(name)

        return work

    with lock.read():
        writer = Task(note("writer", lock.write))
        writer.assert_waits()
        reader = Task(note("reader", lock.read))
        reader.assert_waits()
        with lock.read():  # who reads already may read again
            pass
    writer.assert_ends()
    reader.assert_ends()
    assert order == ["writer", "reader"]


@pytest.mark.parametrize("reading", [False, True], ids=["writers", "a reader too"])
def test_who_comes_again_at_once_waits_for_those_who_wait(lock: Lock, reading: bool) -> None:
    done: dict[str, int] = {}
    first_done, all_there = threading.Event(), threading.Barrier(3)

    def client(name: str) -> None:
        all_there.wait(SOON)
        while not first_done.is_set():
            with lock.read() if reading and name == "c" else lock.write():
                time.sleep(0.001)
                done[name] = done.get(name, 0) + 1
            if done[name] == 50:
                first_done.set()

    threads = [threading.Thread(target=client, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert min(done.get(name, 0) for name in "abc") >= 25


def test_reentrance(lock: Lock) -> None:
    with lock.write(), lock.write(), lock.read(), lock.read(), lock.write():
        pass
    with lock.read(), lock.write(), lock.read():
        writer = Task(take(lock.write))
        writer.assert_waits()
    writer.assert_ends()


def test_a_reader_that_writes_waits_for_the_other_readers(lock: Lock) -> None:
    reading, leave = threading.Event(), threading.Event()

    def read() -> None:
        with lock.read():
            reading.set()
            leave.wait(SOON)

    def upgrade() -> None:
        with lock.read(), lock.write():
            pass

    other = Task(read)
    reading.wait(SOON)
    upgrader = Task(upgrade)
    upgrader.assert_waits()
    leave.set()
    upgrader.assert_ends()
    other.assert_ends()


def test_two_readers_that_both_want_to_write_are_told_so(lock: Lock) -> None:
    both = threading.Barrier(2, timeout=SOON)

    def upgrade() -> None:
        with lock.read():
            both.wait()
            with lock.write():
                pass

    tasks = [Task(upgrade), Task(upgrade)]
    for task in tasks:
        task.assert_ends()
    errors = [task.error for task in tasks if task.error]
    assert len(errors) == 1
    assert "switch before or after a generation" in str(errors[0])
    Task(take(lock.write)).assert_ends()


def nested(outer: object, both: threading.Barrier, inner: object) -> Callable[[], None]:
    def work() -> None:
        with outer():
            both.wait()
            with inner():
                pass

    return work


def test_two_that_hold_each_others_lock_are_told_so() -> None:
    one, two = Lock(), Lock()
    both = threading.Barrier(2, timeout=SOON)
    tasks = [Task(nested(one.read, both, two.write)), Task(nested(two.read, both, one.write))]
    for task in tasks:
        task.assert_ends()
    assert len([task for task in tasks if task.error]) == 1
    Task(take(one.write)).assert_ends()
    Task(take(two.write)).assert_ends()


def test_readers_of_two_models_in_opposite_order_pass_the_writers_that_wait_for_them() -> None:
    one, two = Lock(), Lock()
    both = threading.Barrier(3, timeout=SOON)
    readers = [Task(nested(one.read, both, two.read)), Task(nested(two.read, both, one.read))]
    while len(locks._active) < 2:
        time.sleep(STILL)
    writers = [Task(take(one.write)), Task(take(two.write))]
    for writer in writers:
        writer.assert_waits()
    both.wait()
    for task in [*readers, *writers]:
        task.assert_ends()
        assert task.error is None


def test_a_circle_of_three_is_told_once() -> None:
    locks = [Lock() for _ in range(3)]
    all_in = threading.Barrier(3, timeout=SOON)
    tasks = [Task(nested(locks[k].write, all_in, locks[(k + 1) % 3].read)) for k in range(3)]
    for task in tasks:
        task.assert_ends()
    assert len([task for task in tasks if task.error]) == 1


def test_a_reader_of_another_model_waits_behind_a_writer_who_does_not_wait_for_it() -> None:
    one, two = Lock(), Lock()
    with two.read():
        writer = Task(take(two.write))
        writer.assert_waits()
        reader = Task(nested(one.read, threading.Barrier(1), two.read))
        reader.assert_waits()
    writer.assert_ends()
    reader.assert_ends()


@pytest.mark.parametrize("kind", ["read", "write"])
def test_exceptions_release(lock: Lock, kind: str) -> None:
    with pytest.raises(KeyError), getattr(lock, kind)():
        raise KeyError
    Task(take(lock.write)).assert_ends()
    Task(take(lock.read)).assert_ends()


def test_nothing_of_a_hold_stays_when_it_is_left() -> None:
    module = nn.Linear(1, 1)
    with hold([module], write=True), hold([module], write=False):
        pass
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    assert not locks._active
    assert not locks._waiting


def test_a_block_that_is_left_while_a_thread_goes_on_in_it_is_waited_for(lock: Lock) -> None:
    """By its own thread, and by one that was started in it and has only waited."""
    inside, go_on, left = threading.Event(), threading.Event(), threading.Event()
    started: list[Task] = []

    def write() -> None:
        with lock.write():
            inside.set()
            assert go_on.wait(SOON)

    def leave() -> None:
        with lock.write():
            started.append(Task(partial(contextvars.copy_context().run, write)))
            assert inside.wait(SOON)
            started.append(Task(partial(contextvars.copy_context().run, take(lock.write))))
            started[1].assert_waits()
        left.set()
        take(lock.read)()

    leaving = Task(leave)
    assert left.wait(SOON)
    leaving.assert_waits()
    go_on.set()
    for task in (leaving, *started):
        task.assert_ends()
        assert task.error is None
    assert not locks._active


def test_a_block_ends_with_holds_of_its_own_inside_of_one_that_was_left_before(lock: Lock) -> None:
    """As ``AdapterLibrary.use`` does, which takes adapters off the model at its end."""
    inside, go_on = threading.Event(), threading.Event()

    @contextmanager
    def ending(*_: object) -> Iterator[None]:
        yield
        take(lock.write)()

    def go() -> None:
        with Held([lock.module], write=True, inside=ending):
            inside.set()
            assert go_on.wait(SOON)

    def leave() -> None:
        with lock.write():
            inner.append(Task(partial(contextvars.copy_context().run, go)))
            assert inside.wait(SOON)

    inner: list[Task] = []
    Task(leave).assert_ends()
    go_on.set()
    inner[0].assert_ends()
    assert inner[0].error is None
    assert not locks._active


def test_a_generator_that_another_thread_resumes_is_inside_of_what_it_was_started_in(lock: Lock) -> None:
    def go() -> Iterator[None]:
        with lock.write():
            yield
            take(lock.write)()

    with lock.write():
        started = go()
        next(started)
        resumed = Task(partial(next, started, None))
        resumed.assert_ends()
        assert resumed.error is None


def test_modules_are_held_one_by_one() -> None:
    one, two = Lock(), Lock()
    with one.write():
        Task(take(two.write)).assert_ends()
        both = Task(take(lambda: hold([two.module, one.module], write=False)))
        both.assert_waits()
        Task(take(two.write)).assert_ends()  # who waits for two models has neither
    both.assert_ends()


def test_several_modules_in_any_order_do_not_deadlock() -> None:
    modules = [nn.Linear(1, 1) for _ in range(4)]
    orders = [modules, modules[::-1], modules[2:] + modules[:2], modules[1:3] * 2]

    def work(order: list[nn.Module], write: bool) -> Callable[[], None]:
        def often() -> None:
            for _ in range(100):
                with hold(order, write=write):
                    pass

        return often

    tasks = [Task(work(order, write)) for order in orders for write in (True, False)]
    for task in tasks:
        task.assert_ends()


def exit_code_of_a_fork(work: Callable[[], object]) -> int | None:
    """Of a child that does some work; None if it is stuck."""
    child = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    child.start()
    child.join(SOON)
    child.kill()
    return child.exitcode


@pytest.mark.parametrize("writes", [True, False])
def test_a_forked_process_waits_for_no_thread_of_its_parent(lock: Lock, writes: bool) -> None:
    held, done = threading.Event(), threading.Event()

    def other() -> None:
        with lock.write() if writes else lock.read():
            held.set()
            done.wait()

    task = Task(other)
    held.wait(SOON)
    waiting = Task(take(lock.write))
    waiting.assert_waits()
    assert exit_code_of_a_fork(take(lock.write)) == 0
    waiting.assert_waits()  # the parent's holds are what they were
    done.set()
    for one in (task, waiting):
        one.assert_ends()


def test_a_forked_process_is_inside_the_holds_of_the_thread_that_forked_it(lock: Lock) -> None:
    def work() -> None:
        stranger = Task(take(lock.read))
        stranger.assert_waits()
        take(lock.write)()
        hold.__exit__(None, None, None)
        stranger.assert_ends()

    hold = lock.write()
    hold.__enter__()
    assert exit_code_of_a_fork(work) == 0
    hold.__exit__(None, None, None)
    take(lock.write)()


@pytest.mark.parametrize("turns", range(6))
def test_a_cancellation_is_not_lost_in_the_moment_of_waking(turns: int) -> None:
    """Every change of any model wakes all that wait."""
    one, two = Lock(), Lock()

    async def wait() -> None:
        async with one.write():
            raise AssertionError("it was cancelled before its turn")

    async def main() -> None:
        async with one.write():
            waits = contextvars.Context().run(asyncio.create_task, wait())
            await asyncio.sleep(0.01)
            take(two.write)()
            for _ in range(turns):
                await asyncio.sleep(0)
            waits.cancel()
            await asyncio.wait([waits], timeout=STILL)
            cancelled = waits.cancelled()
            waits.cancel()
        assert cancelled

    asyncio.run(main())
