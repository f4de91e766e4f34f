"""Requests to draw, of visits that wait, stop and change their mind."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from app.drawing.requests import DrawingRequests, Stopped
from app.drawing.session import Session
from app.history.galleries import Visitor
from app.history.history import Kept
from app.settings.settings import Settings
from app.studio import Studio
from tests.app.conftest import SUGGESTION

ADA, BOB = Visitor("ada"), Visitor("bob")


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """In a thread of its own: a browser's driver may have an event loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result(60)


def settings(session: Session, steps: int = 2, seed: int = 3) -> Settings:
    return session.checked(SUGGESTION, {"bluefire": 1.0}, seed, steps)


def pictures(studio: Studio) -> int:
    return len(studio.galleries.of(ADA))


def test_a_picture_is_kept_and_is_what_the_session_draws(studio: Studio, session: Session) -> None:
    picture, path = run(studio.requests.draw(ADA, settings(session)))
    alone = session.generate(SUGGESTION, {"bluefire": 1.0}, 3, 2)
    assert picture.image.tobytes() == alone.image.tobytes()
    assert Kept(path.name, path).settings == picture.report


def test_a_visit_that_stops_ends_its_own_pictures_only(studio: Studio, session: Session) -> None:
    before = pictures(studio)

    def stop(done: int, of: int) -> None:
        if done == 1:
            studio.requests.stop("ada")

    async def both() -> Any:
        hers = studio.requests.draw(ADA, settings(session, 50), stop)
        return await asyncio.gather(hers, studio.requests.draw(BOB, settings(session, 3)), return_exceptions=True)

    stopped, drawn = run(both())
    assert isinstance(stopped, Stopped) and drawn[0].report["steps"] == 3
    assert session.active == {} and pictures(studio) == before + 1
    assert not studio.requests._requests


def test_one_task_of_a_visit_is_stopped_alone_and_a_visit_that_leaves_ends_all(
    studio: Studio, session: Session
) -> None:
    """The page draws a series while Mix draws, and each has a Stop of its own."""

    async def stopped(task: str | None) -> list[bool]:
        studio.requests.announce("ada", "announced")
        tasks = ("mix", "series")
        drawings = [asyncio.create_task(studio.requests.draw(ADA, settings(session), task=each)) for each in tasks]
        await asyncio.sleep(0)
        studio.requests.stop("ada", task)
        late = studio.requests.draw(ADA, settings(session), task="announced")
        ended = await asyncio.gather(*drawings, late, return_exceptions=True)
        return [isinstance(each, Stopped) for each in ended]

    assert run(stopped("mix")) == [True, False, False]
    assert run(stopped("announced")) == [False, False, True]
    assert run(stopped(None)) == [True, True, True]


def test_a_stop_that_comes_before_the_order_ends_it_and_none_after(studio: Studio, session: Session) -> None:
    studio.requests.announce("ada")
    studio.requests.stop("ada")
    with pytest.raises(Stopped):
        run(studio.requests.draw(ADA, settings(session)))
    run(studio.requests.draw(ADA, settings(session)))
    studio.requests.stop("ada")  # nothing is under way
    run(studio.requests.draw(ADA, settings(session)))


def test_a_newer_preview_takes_the_place_of_the_one_before(studio: Studio, session: Session) -> None:
    before = pictures(studio)

    async def moved() -> Any:
        first = asyncio.create_task(studio.requests.preview("ada", settings(session, 50)))
        await asyncio.sleep(0.05)
        kept = asyncio.create_task(studio.requests.draw(ADA, settings(session)))  # no preview: it stays
        second = asyncio.create_task(studio.requests.preview("ada", settings(session, seed=4)))
        return await asyncio.gather(first, second, kept, return_exceptions=True)

    first, second, kept = run(moved())
    assert isinstance(first, Stopped) and second.report["seed"] == 4 and kept[0].report["seed"] == 3
    assert pictures(studio) == before + 1


def test_a_page_that_is_closed_draws_no_further(studio: Studio, session: Session) -> None:
    steps: list[int] = []

    async def leave() -> None:
        drawing = asyncio.create_task(
            studio.requests.draw(ADA, settings(session, 100), lambda done, of: steps.append(done))
        )
        while not steps:
            await asyncio.sleep(0.01)
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)

    run(leave())
    session.generate(SUGGESTION, {}, 1, 1)  # comes to its turn after it
    assert max(steps) < 100 and session.active == {}


def test_a_series_counts_all_steps_and_stops_as_one(studio: Studio, session: Session) -> None:
    seen: list[tuple[int, int]] = []
    series = tuple((str(seed), settings(session, seed=seed)) for seed in range(4))

    def step(done: int, of: int) -> None:
        seen.append((done, of))
        if done == 5:
            studio.requests.stop("ada")

    async def draw() -> list[str]:
        drawn = []
        with pytest.raises(Stopped):
            async for label, _, _ in studio.requests.draw_series(ADA, series, step):
                drawn.append(label)
        return drawn

    assert run(draw()) == ["0", "1"]
    assert seen == [(0, 8), (1, 8), (2, 8), (2, 8), (3, 8), (4, 8), (4, 8), (5, 8)]


def test_what_goes_wrong_amid_is_told_to_who_waits(studio: Studio, session: Session) -> None:
    def fail(done: int, of: int) -> None:
        raise MemoryError("full")

    with pytest.raises(MemoryError, match="full"):
        run(DrawingRequests(session, studio.galleries).draw(ADA, settings(session), fail))
    assert session.active == {}
