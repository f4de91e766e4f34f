"""One thread in which visitors take turns, however much each of them asks for."""

import contextvars
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from shira_diffusers import ShiraError

T = TypeVar("T")
BACKGROUND = "\0background"
"""The visit of background work, which runs when no other visit waits."""


class Closed(ShiraError):
    """A job was asked for, waits or is under way as the app ends."""

    def __init__(self) -> None:
        super().__init__("the app is ending; draw again when it has started anew")


class FairQueue:
    """Runs jobs one at a time, in one thread; the next job is one of the visit that has waited longest for a turn.

    A visit that asks for a hundred pictures so delays another's by one. Jobs of one visit keep their order.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = OrderedDict()
        self._changing = threading.Lock()
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="drawing")

    def submit(self, visit: str, job: Callable[[], T]) -> Future[T]:
        """Queue a job; cancelling its future takes it out of the queue, unless it has begun.

        Raises:
            Closed: see ``close``.
        """
        future: Future[T] = Future()
        context = contextvars.copy_context()
        with self._changing:
            self.require_open()
            self._waiting.setdefault(visit, deque()).append((future, lambda: context.run(job)))
            self._thread.submit(self._run_next)
        return future

    def require_open(self) -> None:
        """Raise Closed after ``close``; a long job that asks between its steps ends early."""
        if self._closed:
            raise Closed

    @property
    def wanted(self) -> bool:
        """Whether a visit waits: background work should end soon and be submitted again."""
        return any(visit != BACKGROUND for visit in tuple(self._waiting))

    def close(self) -> None:
        """Refuse further jobs, and let those that have not begun fail with Closed."""
        with self._changing:
            self._closed = True
            waiting = [future for jobs in self._waiting.values() for future, _ in jobs]
            self._waiting.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(Closed())

    def _run_next(self) -> None:
        future, job = self._take()
        if future is None or not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(job())
        except BaseException as error:  # noqa: BLE001  # whatever it is belongs to who waits for the job
            future.set_exception(error)

    def _take(self) -> tuple[Future[Any] | None, Callable[[], Any]]:
        with self._changing:
            visit = next((each for each in self._waiting if each != BACKGROUND), BACKGROUND)
            jobs = self._waiting.pop(visit, None)
            if not jobs:
                return None, lambda: None  # closed meanwhile
            taken = jobs.popleft()
            if jobs:
                self._waiting[visit] = jobs  # at the end of the row
            return taken
