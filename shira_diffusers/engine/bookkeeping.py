"""Locks for bookkeeping, and ends of blocks that never come amid it.

Python's garbage collector closes a generator that was dropped in a reference cycle in whatever thread allocates next,
between any two of its instructions: also where that thread holds a lock and has changed half of a list. Ends of blocks
that such a generator is suspended in are put off there until the thread holds no lock of these any more.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Here(threading.local):
    """Of the current thread: how many guards it is inside of, and the ends that were put off."""

    depth = 0
    catches_up = False

    def __init__(self) -> None:
        self.put_off: deque[Callable[[], None]] = deque()


_here = _Here()


class Guard:
    """A reentrant lock for bookkeeping: in its thread no ``Ends`` come until it is free again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        _here.depth += 1  # before the lock is taken, so that nothing comes in between
        try:
            self._lock.acquire()
        except BaseException:  # Ctrl-C while it waits
            _here.depth -= 1
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._lock.release()
        finally:
            _here.depth -= 1
        if _here.put_off and not _here.depth and not _here.catches_up:
            _catch_up()


def _catch_up() -> None:
    _here.catches_up = True  # one after the other, not each inside of the one before
    try:
        while _here.put_off:
            end = _here.put_off.popleft()
            try:
                end()
            except Exception:  # it is not of whoever runs here: Python prints what a generator raises that it closes
                logger.exception("a block that was left by the garbage collector has failed to end")
    finally:
        _here.catches_up = False


class Ends(ExitStack):
    """A stack that is never left amid bookkeeping, but right after it, unless it was made there."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = _here.depth

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        if _here.depth > self._depth:
            _here.put_off.append(self.pop_all().close)
            return False
        return super().__exit__(kind, error, trace)


class Entered(AbstractContextManager[T]):
    """A context manager as ``contextlib.contextmanager`` makes them, but without a generator.

    The garbage collector closes every generator that it finds, so those too by which a block is to end that it has put
    off.

    Args:
        enter: enters what it needs on a stack, which is left with the block; returns the value of the ``with``.
    """

    def __init__(self, enter: Callable[[ExitStack], T]) -> None:
        self._enter, self._ends = enter, ExitStack()

    def __enter__(self) -> T:
        with self._ends as ends:
            value = self._enter(ends)
            self._ends = ends.pop_all()
        return value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        return self._ends.__exit__(kind, error, trace)
