"""Draws for visitors who wait, stop and change their mind, and keeps what is finished in their history."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from app.drawing.session import OnStep, Session, shifted
from app.history.galleries import Archive, Visitor
from app.settings.picture import Picture
from app.settings.settings import Settings

Series = tuple[tuple[str, Settings], ...]
"""Pictures that belong together, each with its label."""


class Stopped(Exception):
    """The visit has stopped the drawing, or asked for a newer preview."""


@dataclass(eq=False, slots=True)
class _Order:
    """What a visit waits for; once stopped, the next step ends it."""

    preview: bool
    stopped: threading.Event = field(default_factory=threading.Event)


class Desk:
    """Draws pictures for visits without holding a thread while they wait.

    An order that is cancelled, or whose page is closed, ends at its next step and leaves nothing active.
    """

    def __init__(self, session: Session, archive: Archive) -> None:
        self._session, self._archive = session, archive
        self._orders: dict[str, set[_Order]] = {}
        self._announced: dict[str, _Order] = {}
        self._changing = threading.Lock()

    def announce(self, visit: str) -> None:
        """Let ``stop`` end the visit's next drawing before it is asked for.

        A page shows its Stop button at once, but its order comes in a request of its own, later.
        """
        with self._changing:
            self._announced[visit] = _Order(preview=False)

    async def draw(self, visitor: Visitor, settings: Settings, on_step: OnStep | None = None) -> tuple[Picture, Path]:
        """Draw checked settings and keep the picture; returns it and its file.

        Raises:
            Stopped: see ``stop``.
            OSError: it cannot be kept.
        """
        with self._ordered(visitor.visit) as order:
            picture = await self._drawn(visitor.visit, order, settings, on_step)
        kept = await asyncio.to_thread(self._archive.add, visitor, picture)
        return picture, kept.path

    async def draw_series(
        self, visitor: Visitor, series: Series, on_step: OnStep | None = None
    ) -> AsyncIterator[tuple[str, Picture, Path]]:
        """Draw several, a turn each; ``on_step`` counts the steps of all together. Raises as ``draw``."""
        total = sum(settings.steps for _, settings in series)
        done = 0
        with self._ordered(visitor.visit) as order:
            for label, settings in series:
                picture = await self._drawn(visitor.visit, order, settings, shifted(on_step, done, total))
                kept = await asyncio.to_thread(self._archive.add, visitor, picture)
                done += settings.steps
                yield label, picture, kept.path

    async def preview(self, visit: str, settings: Settings) -> Picture:
        """Draw a picture that is not kept, in place of the visit's preview before.

        Raises:
            Stopped: a newer preview took its place, or see ``stop``.
        """
        self._stop(visit, previews_only=True)
        with self._ordered(visit, preview=True) as order:
            return await self._drawn(visit, order, settings, None)

    def stop(self, visit: str) -> None:
        """End all that a visit has asked for or announced, at the next step of each."""
        self._stop(visit, previews_only=False)

    def _stop(self, visit: str, *, previews_only: bool) -> None:
        with self._changing:
            orders = {*self._orders.get(visit, ()), *filter(None, [self._announced.get(visit)])}
        for order in orders:
            if order.preview or not previews_only:
                order.stopped.set()

    @contextmanager
    def _ordered(self, visit: str, *, preview: bool = False) -> Iterator[_Order]:
        with self._changing:
            announced = None if preview else self._announced.pop(visit, None)
            order = announced or _Order(preview)
            self._orders.setdefault(visit, set()).add(order)
        try:
            yield order
        finally:
            order.stopped.set()  # whatever ended the wait ends the drawing
            with self._changing:
                self._orders[visit].discard(order)
                if not self._orders[visit]:
                    del self._orders[visit]

    async def _drawn(self, visit: str, order: _Order, settings: Settings, on_step: OnStep | None) -> Picture:
        def step(done: int, of: int) -> None:
            if order.stopped.is_set():
                raise Stopped
            if on_step:
                on_step(done, of)

        return await asyncio.wrap_future(self._session.submit(settings, step, visit))
