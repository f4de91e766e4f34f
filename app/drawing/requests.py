"""Draws for visitors who wait, stop and change their mind, and keeps what is finished in their history."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from app.drawing.session import OnStep, Session, shifted
from app.history.galleries import Galleries, Visitor
from app.settings.picture import Picture
from app.settings.settings import Settings

Series = tuple[tuple[str, Settings], ...]
"""Pictures that belong together, each with its label."""


class Stopped(Exception):
    """The visit has stopped the drawing, or asked for a newer preview."""


@dataclass(eq=False, slots=True)
class _Request:
    """What a visit waits for; once stopped, the next step ends it."""

    preview: bool
    stopped: threading.Event = field(default_factory=threading.Event)


class DrawingRequests:
    """Draws pictures for visits without holding a thread while they wait.

    A request that is cancelled, or whose page is closed, ends at its next step and leaves nothing active. What a visit
    draws at the same time has a ``task`` each, such as a tab, so that one can be stopped alone.
    """

    def __init__(self, session: Session, galleries: Galleries) -> None:
        self._session, self._galleries = session, galleries
        self._requests: dict[tuple[str, str], set[_Request]] = {}  # by visit and task, as the next
        self._announced: dict[tuple[str, str], _Request] = {}
        self._changing = threading.Lock()

    def announce(self, visit: str, task: str = "") -> None:
        """Let ``stop`` end the task's next drawing before it is asked for.

        A page shows its Stop button at once, but the request for the drawing comes later, by itself.
        """
        with self._changing:
            self._announced[visit, task] = _Request(preview=False)

    async def draw(
        self, visitor: Visitor, settings: Settings, on_step: OnStep | None = None, task: str = ""
    ) -> tuple[Picture, Path]:
        """Draw checked settings and keep the picture; returns it and its file.

        Raises:
            Stopped: see ``stop``.
            OSError: it cannot be kept.
        """
        with self._requested(visitor.visit, task) as request:
            picture = await self._drawn(visitor.visit, request, settings, on_step)
        kept = await asyncio.to_thread(self._galleries.add, visitor, picture)
        return picture, kept.path

    async def draw_series(
        self, visitor: Visitor, series: Series, on_step: OnStep | None = None, task: str = ""
    ) -> AsyncIterator[tuple[str, Picture, Path]]:
        """Draw several, a turn each; ``on_step`` counts the steps of all together. Raises as ``draw``."""
        total = sum(settings.steps_drawn for _, settings in series)
        done = 0
        with self._requested(visitor.visit, task) as request:
            for label, settings in series:
                picture = await self._drawn(visitor.visit, request, settings, shifted(on_step, done, total))
                kept = await asyncio.to_thread(self._galleries.add, visitor, picture)
                done += settings.steps_drawn
                yield label, picture, kept.path

    async def preview(self, visit: str, settings: Settings) -> Picture:
        """Draw a picture that is not kept, in place of the visit's preview before.

        Raises:
            Stopped: a newer preview took its place, or see ``stop``.
        """
        self._stop(visit, previews_only=True)
        with self._requested(visit, preview=True) as request:
            return await self._drawn(visit, request, settings, None)

    def stop(self, visit: str, task: str | None = None) -> None:
        """End all that a visit has asked for or announced, or that of one task alone, at the next step of each."""
        self._stop(visit, task, previews_only=False)

    def _stop(self, visit: str, task: str | None = None, *, previews_only: bool) -> None:
        with self._changing:
            asked = [*self._requests.items(), *((key, {request}) for key, request in self._announced.items())]
        for (of, its), requests in asked:
            for request in requests if of == visit and task in (None, its) else ():
                if request.preview or not previews_only:
                    request.stopped.set()

    @contextmanager
    def _requested(self, visit: str, task: str = "", *, preview: bool = False) -> Iterator[_Request]:
        key = visit, task
        with self._changing:
            announced = None if preview else self._announced.pop(key, None)
            request = announced or _Request(preview)
            self._requests.setdefault(key, set()).add(request)
        try:
            yield request
        finally:
            request.stopped.set()  # whatever ended the wait ends the drawing
            with self._changing:
                self._requests[key].discard(request)
                if not self._requests[key]:
                    del self._requests[key]

    async def _drawn(self, visit: str, request: _Request, settings: Settings, on_step: OnStep | None) -> Picture:
        def step(done: int, of: int) -> None:
            if request.stopped.is_set():
                raise Stopped
            if on_step:
                on_step(done, of)

        return await asyncio.wrap_future(self._session.submit(settings, step, visit))
