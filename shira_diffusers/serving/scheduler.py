"""StepScheduler: many clients' pictures from one resident pipeline, in turns from one denoising step to the next."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from shira_diffusers.errors import ShiraError
from shira_diffusers.integrations.pipelines import resident_of, unguarded
from shira_diffusers.library import AdapterLibrary, NoRoomError
from shira_diffusers.serving.cuda_graphs import CapturedForward
from shira_diffusers.serving.jobs import Job
from shira_diffusers.serving.loaded import LoadedAdapters
from shira_diffusers.serving.requests import ClosedError, ImageRequest, QueueFullError, RequestError
from shira_diffusers.serving.stepping import SteppedCall, require_steps
from shira_diffusers.serving.turns import POLICIES, Group, Turns

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """What a scheduler does and has done.

    Args:
        waiting, running: jobs that have not begun, and those that have.
        finished, failed, cancelled: jobs that are over; deadlines that passed count as failed.
        steps, switches: of all batches, and how often the mix was changed for one.
        step_seconds, switch_seconds: the time that these took.
    """

    waiting: int = 0
    running: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    steps: int = 0
    switches: int = 0
    step_seconds: float = 0.0
    switch_seconds: float = 0.0


class StepScheduler:
    """Draws what clients ask for on one pipeline, which it has to itself while there is something to draw.

    Requests of one mix, size and number of steps that wait together are one batch; different mixes take turns after
    each denoising step, which costs a switch of adapters. Each picture has the bits that its settings give in a plain
    call of the pipeline with a batch of that size. When nothing is left to draw, the pipeline has the mix, and all
    bits, that it had before. Deadlines and cancelled jobs are looked at before each step.

    Args:
        pipe: any pipeline with ``callback_on_step_end``; not one that replaces parts of its models while it runs.
        library: the adapters that requests may name. Mixes that there is no room for within its ``device_bytes``,
            beside those that take turns, begin later.
        policy: ``turns``, ``arrival`` or ``grouped``, see ``turns.Turns``.
        max_batch: pictures drawn together; no request may have more.
        max_waiting: jobs that may wait; more are refused.
        max_running: batches that may take turns; each keeps its latents.
        output_type: of the pictures, as the pipeline takes it.
        cuda_graphs: replay the denoiser's calls, see ``CapturedForward``; it stays where it is, on a GPU.

    Raises:
        ShiraError: an unknown policy, limits below 1, or a pipeline whose calls cannot take turns or be replayed.

    All methods are safe to call from several threads.
    """

    def __init__(
        self,
        pipe: Any,
        library: AdapterLibrary,
        *,
        policy: str = "turns",
        max_batch: int = 4,
        max_waiting: int = 256,
        max_running: int = 64,
        output_type: str = "pil",
        cuda_graphs: bool = False,
    ) -> None:
        if policy not in POLICIES:
            raise ShiraError(f"expected a policy of {', '.join(POLICIES)}, got {policy!r}")
        if min(max_batch, max_waiting, max_running) < 1:
            raise ShiraError(f"expected limits of 1 or more, got {max_batch=}, {max_waiting=}, {max_running=}")
        self._pipe, self._call = pipe, unguarded(pipe)
        require_steps(pipe, self._call)
        self._library, self._output_type = library, output_type
        self._captured = CapturedForward(pipe) if cuda_graphs else None
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._turns = Turns(policy, max_batch, max_running)
        self._done = SchedulerStats()
        self._changed = threading.Condition()  # of all that is above and of what it holds
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="shira-scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: ImageRequest, on_step: Callable[[int], object] | None = None) -> Job:
        """Queue a request; returns at once, and reads its adapters in the background.

        Args:
            request: what is wanted.
            on_step: called with the number of steps done after each, in the thread that draws: it must return at once.

        Raises:
            RequestError: more pictures than a batch has.
            QueueFullError: ``max_waiting`` jobs wait.
            ClosedError: the scheduler is closed.
        """
        if request.n > self._max_batch:
            raise RequestError(f"n: expected at most {self._max_batch} pictures per request, got {request.n}")
        job = Job(request, on_step)
        with self._changed:
            self._require_open()
            if self._turns.count_waiting() >= self._max_waiting:
                raise QueueFullError(f"{self._max_waiting} requests wait, which is as many as may; try again later")
            self._library.prefetch(request.mix)
            self._turns.add(job)
            self._changed.notify()
        job.future.add_done_callback(self._count)
        return job

    def stats(self) -> SchedulerStats:
        """What it does and has done."""
        with self._changed:
            running = sum(len(group.live) for group in self._turns.running)
            return replace(self._done, waiting=self._turns.count_waiting(), running=running)

    def close(self) -> None:
        """End all jobs by a ``ClosedError``, before their next step, and wait for the step that runs. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._fail_all(ClosedError("the scheduler was closed before the request was finished; send it again"))
        self._thread.join()

    def __enter__(self) -> "StepScheduler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- in its thread

    @torch.no_grad()
    def _work(self) -> None:
        while self._await_work():
            try:
                self._draw_all()
            except Exception as error:  # the bits of before cannot be put back: others have changed them
                logger.exception("the scheduler could not draw")
                self._fail_all(error)

    def _await_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._turns.waiting or self._turns.running or self._closed)
            return not self._closed

    def _draw_all(self) -> None:
        """Hold the pipeline's models and draw until there is nothing left; what was active before returns after."""
        resident = resident_of(self._pipe)
        applied = self._captured.applied() if self._captured else nullcontext()
        with resident.writing(), applied, LoadedAdapters(resident, self._library, self._pipe) as adapters:
            while (group := self._next()) is not None:
                self._turn(group, adapters)

    def _next(self) -> Group | None:
        for job in self._jobs():
            job.expire()
        with self._changed:
            gone = self._turns.sweep()
        for group in gone:
            self._leave(group)
        with self._changed:
            return self._turns.next()

    def _turn(self, group: Group, adapters: LoadedAdapters) -> None:
        """One step of a group, under its mix."""
        try:
            if group.call is None:
                self._begin(group, adapters)
            self._switch(group, adapters)
            began = time.perf_counter()
            outcome = group.call.run()
            self._note(steps=1, step_seconds=time.perf_counter() - began)
        except Exception as error:  # noqa: BLE001  # whatever it is belongs to who waits for these pictures
            if isinstance(error, NoRoomError) and len(self._turns.running) > 1:
                with self._changed:
                    self._turns.hold_back(group)
                return
            for job in group.live:
                job.fail(error)
            return
        with self._changed:
            self._turns.ran(group)
        if isinstance(outcome, int):
            for job in group.live:
                job.step(outcome)
        else:
            group.finish(outcome)

    def _begin(self, group: Group, adapters: LoadedAdapters) -> None:
        group.mix = group.leaving.enter_context(adapters.loaded(group.jobs[0].request.mix))
        group.call = SteppedCall(self._pipe, self._call, [job.request for job in group.jobs], self._output_type)
        group.leaving.callback(group.call.close)

    def _switch(self, group: Group, adapters: LoadedAdapters) -> None:
        began = time.perf_counter()
        if adapters.activate(group.mix):
            self._note(switches=1, switch_seconds=time.perf_counter() - began)

    def _leave(self, group: Group) -> None:
        with self._changed:
            self._turns.leave(group)
        group.leaving.close()

    # ---------------------------------------------------------------- what is noted

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the scheduler is closed: make a new one")

    def _fail_all(self, error: Exception) -> None:
        for job in self._jobs():
            job.fail(error)

    def _jobs(self) -> list[Job]:
        with self._changed:
            return self._turns.jobs()

    def _count(self, future: Future[list[Any]]) -> None:
        if future.cancelled():
            self._note(cancelled=1)
        else:
            self._note(failed=1) if future.exception() else self._note(finished=1)

    def _note(self, **more: float) -> None:
        with self._changed:
            self._done = replace(self._done, **{name: getattr(self._done, name) + by for name, by in more.items()})
