"""The queue is fair between visits, whatever each asks for, and survive what goes wrong in a job."""

import threading
from concurrent.futures import Future

import pytest

from app.drawing.fair_queue import BACKGROUND, Closed, FairQueue


@pytest.fixture
def queue() -> FairQueue:
    return FairQueue()


def held(queue: FairQueue) -> tuple[threading.Event, Future[bool]]:
    """Keeps the thread busy until the event is set, so that what comes after queues up."""
    gate = threading.Event()
    return gate, queue.submit("holder", lambda: gate.wait(10))


def test_visits_take_turns_however_much_each_asks_for(queue: FairQueue) -> None:
    gate, _ = held(queue)
    order: list[str] = []
    jobs = [queue.submit("greedy", lambda n=n: order.append(f"greedy {n}")) for n in range(4)]  # type: ignore[misc]
    jobs += [queue.submit(BACKGROUND, lambda: order.append("background"))]
    jobs += [queue.submit("late", lambda n=n: order.append(f"late {n}")) for n in range(2)]  # type: ignore[misc]
    gate.set()
    for job in jobs:
        job.result(10)
    assert order == ["greedy 0", "late 0", "greedy 1", "late 1", "greedy 2", "greedy 3", "background"]


def test_an_error_belongs_to_who_waits_for_the_job(queue: FairQueue) -> None:
    def fail() -> None:
        raise MemoryError("full")

    failed, next_one = queue.submit("a", fail), queue.submit("a", lambda: 1)
    with pytest.raises(MemoryError, match="full"):
        failed.result(10)
    assert next_one.result(10) == 1


def test_a_job_can_be_cancelled_before_its_turn(queue: FairQueue) -> None:
    gate, _ = held(queue)
    seen: list[int] = []
    cancelled = queue.submit("a", lambda: seen.append(1))
    kept = queue.submit("a", lambda: seen.append(2))
    assert cancelled.cancel()
    gate.set()
    kept.result(10)
    assert seen == [2]


def test_closing_forgets_what_waits(queue: FairQueue) -> None:
    gate, _ = held(queue)
    waiting = queue.submit("a", lambda: 1)
    queue.close()
    gate.set()
    with pytest.raises(Closed, match="the app is ending"):
        waiting.result(10)
    with pytest.raises(Closed):
        queue.submit("a", lambda: 1)
