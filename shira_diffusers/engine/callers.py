"""Identify the caller, by which locks know their owners: thread, asyncio task, and generators on the stack."""

import asyncio
import inspect
import sys
import threading
from collections.abc import Iterator
from concurrent.futures.thread import _WorkItem
from types import FrameType
from typing import Any, NamedTuple

_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_JOB = _WorkItem.run.__code__
_PACKAGE = __name__.partition(".")[0]


class Caller(NamedTuple):
    """Who is calling.

    Args:
        thread: the current thread.
        loop: the event loop that runs in this thread, if one does.
        task: the asyncio task that runs, or on whose behalf a worker thread of anyio (so of Starlette, FastAPI and
            Gradio) runs; None elsewhere.
        frames: the generators and coroutines on the stack, innermost first. They stay the same when another thread
            resumes them.
        job: the job of a thread pool that runs, if one does.
        entered: the innermost frame outside this package, if it is a generator or coroutine.
        where: the file and line of that frame.
    """

    thread: threading.Thread
    loop: asyncio.AbstractEventLoop | None
    task: "asyncio.Task[Any] | None"
    frames: tuple[FrameType, ...]
    job: FrameType | None
    entered: FrameType | None
    where: str


def current_caller() -> Caller:
    """Who is calling now."""
    frames: list[FrameType] = []
    first: FrameType | None = None
    job: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:  # one plain loop, at each hold over the whole stack
        suspendable = frame.f_code.co_flags & _SUSPENDABLE
        # this package's own frames and those of ``with`` helpers do not count
        if (suspendable or first is None) and _package_of(frame) not in (_PACKAGE, "contextlib"):
            first = first or frame
            if suspendable:
                frames.append(frame)
        if frame.f_code is _JOB:
            job = job or frame
        frame = frame.f_back
    where = f"{first.f_code.co_filename}:{first.f_lineno}" if first else "an unknown place"
    loop = asyncio._get_running_loop()
    task = _host_task() if loop is None else asyncio.current_task(loop)
    entered = first if first in frames[:1] else None
    return Caller(threading.current_thread(), loop, task, tuple(frames), job, entered, where)


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def stacklevel() -> int:
    """The ``stacklevel`` by which a warning of the calling function names the code that called this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _package_of(frame) in (_PACKAGE, "contextlib"):
        frame, level = frame.f_back, level + 1
    return level


def stack_frames() -> Iterator[FrameType]:
    """The stack of this thread, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _host_task() -> "asyncio.Task[Any] | None":
    """The task that awaits this worker thread of anyio.

    FastAPI enters a generator dependency in one such thread and calls the endpoint in another, each in its own copy of
    the task's context, so that a context variable set in the first is lost: the task is all that both have. anyio
    has no public name for it; without it such a dependency waits, and is warned about.
    """
    module = sys.modules.get("anyio._core._eventloop")
    scope = getattr(getattr(module, "threadlocals", None), "current_cancel_scope", None)
    task = getattr(scope, "_host_task", None)
    return task if isinstance(task, asyncio.Task) else None
