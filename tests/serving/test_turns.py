"""Whose step comes next: pure decisions, no models."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from shira_diffusers.serving.jobs import Job
from shira_diffusers.serving.requests import ImageRequest
from shira_diffusers.serving.turns import Turns


def job(mix: str, steps: int = 4, **options: Any) -> Job:
    return Job(ImageRequest(prompt="", mix={mix: 1.0}, steps=steps, **options))


def ended(policy: str, jobs: list[Job], later: dict[int, Job] | None = None, **limits: int) -> list[Job]:
    """Jobs in the order in which they end; ``later`` come after so many turns."""
    turns = Turns(policy, **{"max_batch": 1, "max_running": 16, **limits})
    done, took = list[Job](), 0
    for each in jobs:
        turns.add(each)
    while (group := turns.next()) is not None:
        took += 1
        turns.ran(group)
        if took in (later or {}):
            turns.add(later[took])
        if group.jobs[0].steps == group.jobs[0].request.steps:  # this was the turn in which it is decoded
            done += group.jobs
            group.finish([None] * 99)
            turns.leave(group)
        for each in group.live:
            each.step(each.steps + 1)
    return done


def test_a_short_job_never_waits_for_a_long_one() -> None:
    for policy, is_first in (("turns", True), ("arrival", False)):
        long, short = job("a", 50), job("b", 2)
        assert ended(policy, [long], {3: short}) == ([short, long] if is_first else [long, short])


def test_jobs_begin_before_those_that_came_earlier_end() -> None:
    jobs = [job("a"), job("b"), job("c")]
    turns = Turns("turns", 1, 16)
    for each in jobs:
        turns.add(each)
    begun = []
    while turns.waiting and (group := turns.next()):
        begun.append(group.jobs[0])
        turns.ran(group)
        group.jobs[0].step(group.jobs[0].steps + 1)
    assert len(begun) <= 2 * len(jobs)
    assert not any(each.steps > each.request.steps for each in jobs)


def test_a_client_with_many_jobs_delays_another_by_one_of_them() -> None:
    for policy, before in (("turns", 1), ("arrival", 8)):
        many, other = [job("a", client="greedy") for _ in range(8)], job("b", client="modest")
        assert ended(policy, many, {7: other}).index(other) == before


def test_a_long_job_is_not_put_off_for_ever_by_short_ones() -> None:
    long = job("a", 20)
    done = ended("turns", [long], {at: job("b", 3) for at in range(1, 200, 4)})
    assert done.index(long) < 15


@pytest.mark.parametrize("steps", [(2, 2, 2, 4, 4, 10), (1, 1, 1, 50)])
@pytest.mark.parametrize("client", [lambda number: "one", str, lambda _: None])
def test_no_job_waits_for_more_than_its_share_of_the_others(steps: tuple[int, ...], client: Callable[..., Any]) -> None:
    """Connections each of which asks as soon as it has its picture: short jobs never cease to come."""
    turns, draw, came, now = Turns("turns", 1, 16), random.Random(0), dict[Job, tuple[int, int]](), 0

    def ask(number: int) -> None:
        turns.add(asked := job("a", draw.choice(steps), client=client(number)))
        came[asked] = now, number

    for number in range(16):
        ask(number)
    while now < 5000:
        now += 1
        group = turns.next()
        assert group is not None
        turns.ran(group)
        (one,) = group.jobs
        assert now - came[one][0] <= 16 * (one.request.steps + max(steps) + 3)
        if one.steps == one.request.steps:
            one.finish([])
            turns.leave(group)
            ask(came[one][1])
        one.step(one.steps + 1)


def test_what_a_client_had_before_others_came_counts_no_longer() -> None:
    first, second = job("a", 6, client="one"), job("a", 6, client="two")
    assert ended("turns", [job("a", client="one") for _ in range(5)], {24: first, 25: second})[-2:] == [first, second]


def test_jobs_of_one_kind_that_wait_are_a_batch() -> None:
    jobs = [job("a"), job("b"), job("a", n=2), job("a", 5), job("a"), job("a")]
    ended("turns", jobs, max_batch=4)
    assert [each.batch for each in jobs] == [4, 1, 4, 1, 4, 1]


def test_by_arrival_only_neighbours_are_a_batch() -> None:
    jobs = [job("a"), job("a"), job("b"), job("a")]
    assert ended("arrival", jobs, max_batch=4) == jobs
    assert [each.batch for each in jobs] == [2, 2, 1, 1]


def test_grouped_draws_all_of_the_active_mix_first() -> None:
    jobs = [job("a"), job("b"), job("a")]
    assert ended("grouped", jobs) == [jobs[0], jobs[2], jobs[1]]


def test_no_more_groups_begin_than_may_run() -> None:
    turns = Turns("turns", 1, 2)
    for name in "abcd":
        turns.add(job(name))
    for _ in range(6):
        group = turns.next()
        assert group is not None
        turns.ran(group)
    assert len(turns.running) == 2


def test_jobs_that_are_over_are_swept() -> None:
    turns = Turns("turns", 1, 2)
    jobs = [job("a"), job("b"), job("c", deadline=1e-9)]
    for each in jobs:
        turns.add(each)
    group = turns.next()
    assert group is not None
    for each in jobs[:2]:
        assert each.cancel()
    jobs[2].expire()
    assert turns.sweep() == [group]
    assert turns.waiting == []


def test_a_job_may_be_cancelled_between_sweep_and_next() -> None:
    turns, only = Turns("turns", 1, 2), job("a")
    turns.add(only)
    group = turns.next()
    assert turns.sweep() == []
    only.cancel()
    assert turns.next() is group
    assert turns.sweep() == [group]
