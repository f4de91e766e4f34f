"""Job: a request that was submitted: its progress, and its pictures when they are drawn."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from shira_diffusers.serving.requests import DeadlineError, ImageRequest

logger = logging.getLogger(__name__)


class Job:
    """A request that was submitted. All methods are safe to call from several threads.

    Args:
        request: what is wanted.
        on_step: called with the number of steps done after each, in the thread that draws: it must return at once.

    Attributes:
        future: of the pictures, for ``asyncio.wrap_future``; cancelling it, or the wrapped one, cancels the job.
        steps: that are done.
        batch: how many pictures are drawn together with its own, those included; 0 while it waits. The bits of a
            picture depend on it, and on nothing else but its settings.
        due: by ``Turns``: when it is finished if the jobs of its client have equal shares, in work of each.
    """

    def __init__(self, request: ImageRequest, on_step: Callable[[int], object] | None = None) -> None:
        self.request = request
        self.future: Future[list[Any]] = Future()
        self.steps = self.batch = 0
        self.due = 0.0
        self.until = math.inf if request.deadline is None else time.monotonic() + request.deadline
        self._on_step = on_step
        self._changed = threading.Condition()
        self.future.add_done_callback(lambda _: self._notify())

    @property
    def client(self) -> object:
        """Whose share it takes from."""
        return self if self.request.client is None else self.request.client

    @property
    def work(self) -> int:
        """What is left to do: the cost of its steps, and as much as that of one to decode."""
        return self.request.cost * (self.request.steps - self.steps + 1)

    @property
    def over(self) -> bool:
        """Whether it is finished, failed or cancelled."""
        return self.future.done()

    def result(self, timeout: float | None = None) -> list[Any]:
        """The pictures, ``n`` of them.

        Args:
            timeout: seconds to wait for them; None is as long as it takes.

        Raises:
            TimeoutError: they were not ready in time; the job goes on.
            concurrent.futures.CancelledError: the job was cancelled.
            RequestError: the pipeline refuses the settings.
            DeadlineError, ClosedError: see there.
            ShiraError: an adapter that is not there, or does not fit, or that there is no room for.
            AdapterFormatError: a damaged adapter.
            Exception: whatever the pipeline raises.
        """
        return self.future.result(timeout)

    def progress(self) -> Iterator[int]:
        """The number of steps done, each time that it has grown; ends with the job, whose ``result`` says how."""
        seen = 0
        while self._await_more_than(seen):
            seen = self.steps
            yield seen

    def cancel(self) -> bool:
        """Give the job up before its next step; False where it has ended otherwise. Idempotent."""
        return self.future.cancel()

    def step(self, done: int) -> None:
        """Note that some steps are done."""
        self.steps = done
        self._notify()
        if self._on_step is not None:
            try:
                self._on_step(done)
            except Exception:  # as for callbacks of futures: the batch's other jobs go on
                logger.exception("on_step of a job has failed")

    def finish(self, pictures: list[Any]) -> None:
        """Hand the pictures over, unless it is over."""
        with suppress(InvalidStateError):
            self.future.set_result(pictures)

    def fail(self, error: BaseException) -> None:
        """End it by an error, unless it is over."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)

    def expire(self) -> None:
        """End it if its deadline has passed."""
        if time.monotonic() >= self.until:
            request = self.request
            self.fail(
                DeadlineError(
                    f"the deadline has passed: expected {request.steps} steps within {request.deadline:g} seconds, got "
                    f"{self.steps}; allow more time, or ask for fewer steps"
                )
            )

    def _await_more_than(self, seen: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self.steps > seen or self.over)
            return self.steps > seen

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
