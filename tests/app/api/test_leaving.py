"""Calls that are no longer wanted: one that is cancelled, and all of a client that is gone."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from app.history.galleries import Visitor
from app.studio import Studio
from tests.app.conftest import SUGGESTION, connect


@pytest.fixture
def release(studio: Studio) -> Iterator[Callable[[], None]]:
    """Nothing is drawn before it is called."""
    open_ = threading.Event()
    studio.session.queue.submit("blocker", lambda: open_.wait())
    yield open_.set
    open_.set()


def pictures(studio: Studio) -> int:
    return len(studio.galleries.of(Visitor("")))


def wait_until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 120  # machines of tests are busy
    while not ready() and time.monotonic() < end:
        time.sleep(0.02)
    assert ready()


def waiting(studio: Studio) -> int:
    return sum(map(len, list(studio.requests._requests.values())))


def stopped(studio: Studio) -> int:
    return sum(each.stopped.is_set() for requests in list(studio.requests._requests.values()) for each in requests)


def test_cancelling_one_call_leaves_the_others(studio: Studio, url: str, release: Callable[[], None]) -> None:
    before, client = pictures(studio), connect(url)
    jobs = [client.submit(SUGGESTION, seed=seed, steps=1, api_name="/generate") for seed in range(3)]
    wait_until(lambda: waiting(studio) == 3)
    jobs[1].cancel()
    wait_until(lambda: waiting(studio) == 2)
    release()
    assert [jobs[number].result(60)[1]["seed"] for number in (0, 2)] == [0, 2]
    assert pictures(studio) == before + 2
    client.close()


def test_what_a_client_that_is_gone_has_asked_for_is_not_drawn(
    studio: Studio, url: str, release: Callable[[], None]
) -> None:
    before, client, other = pictures(studio), connect(url), connect(url)
    for seed in range(3):
        client.submit(SUGGESTION, seed=seed, steps=1, api_name="/generate")
    kept = other.submit(SUGGESTION, seed=9, steps=1, api_name="/generate")
    wait_until(lambda: waiting(studio) == 4)
    client.close()
    wait_until(lambda: stopped(studio) == 3)
    release()
    assert kept.result(60)[1]["seed"] == 9
    assert pictures(studio) == before + 1
    other.close()
