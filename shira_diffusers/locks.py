"""A readers-writer lock: generations read the weights together, a switch writes them alone."""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from shira_diffusers.errors import ResidentStateError

_changed = threading.Condition()  # one for all locks: who waits for whom is seen over several models
_waiting: dict[int, Callable[[], set[int]]] = {}  # threads, and those which each waits for


class ReadWriteLock:
    """Many readers or one writer; reentrant in one thread, a waiting writer goes before new readers.

    A thread that reads may also write (a switch from a step callback): it waits until it is the only reader.
    """

    def __init__(self) -> None:
        self._readers: Counter[int] = Counter()
        self._writer: int | None = None
        self._depth = 0
        self._queue: set[int] = set()  # threads that wait to write

    @contextmanager
    def read(self) -> Iterator[None]:
        """Hold the lock together with other readers.

        Raises:
            ResidentStateError: the writer waits for this thread, itself or through others: that would never end.
        """
        me = threading.get_ident()
        with _changed:
            if self._writer != me and not self._readers[me]:
                _wait(me, self._writers, self._queue)
            self._readers[me] += 1
        try:
            yield
        finally:
            with _changed:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                _changed.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        """Hold the lock alone.

        Raises:
            ResidentStateError: a reader or the writer waits for this thread, itself or through others: that would
                never end.
        """
        me = threading.get_ident()
        with _changed:
            self._queue.add(me)
            try:
                _wait(me, lambda: (self._writers() | self._readers.keys()) - {me})
            finally:
                self._queue.remove(me)
                _changed.notify_all()
            self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with _changed:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                _changed.notify_all()

    def _writers(self) -> set[int]:
        return set() if self._writer is None else {self._writer}


def _wait(me: int, holders: Callable[[], set[int]], queue: Collection[int] = ()) -> None:
    """Wait for those who hold a lock and for those who come first, but not for any of these who waits for this one."""
    _waiting[me] = lambda: holders().union(queue)
    try:
        while not _is_my_turn(me, holders(), set(queue)):
            _changed.wait()
    finally:
        del _waiting[me]


def _is_my_turn(me: int, holders: set[int], queue: set[int]) -> bool:
    if _waits_for(me, holders):
        raise ResidentStateError(
            "two generations want to switch adapters of each other's model, or of one, at the same time, and would "
            "wait for each other for ever; expected one at a time: switch before or after a generation, or give each "
            "generation its own pipeline"
        )
    return not holders and (not queue or _waits_for(me, queue))


def _waits_for(me: int, threads: set[int]) -> bool:
    """Whether one of these threads waits for this one, itself or through others."""
    seen: set[int] = set()
    while threads and me not in threads:
        seen |= threads
        threads = {other for thread in threads & _waiting.keys() for other in _waiting[thread]()} - seen
    return bool(threads)


_locks: WeakKeyDictionary[nn.Module, ReadWriteLock] = WeakKeyDictionary()
_guard = threading.Lock()


def lock_of(module: nn.Module) -> ReadWriteLock:
    """The one lock of a module, kept beside it: a copy of the module has another."""
    with _guard:
        return _locks.setdefault(module, ReadWriteLock())


@contextmanager
def hold(modules: Iterable[nn.Module], *, write: bool) -> Iterator[None]:
    """Hold the locks of several modules, always taken in the same order, so that no two threads wait for each other."""
    with ExitStack() as stack:
        for module in sorted({id(module): module for module in modules}.values(), key=id):
            lock = lock_of(module)
            stack.enter_context(lock.write() if write else lock.read())
        yield
