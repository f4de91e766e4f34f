"""A readers-writer lock: generations read the weights together, a switch writes them alone."""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from shira_diffusers.errors import ResidentStateError


class ReadWriteLock:
    """Many readers or one writer; reentrant in one thread, a waiting writer goes before new readers.

    A thread that reads may also write (a switch from a step callback): it waits until it is the only reader.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers: Counter[int] = Counter()
        self._writer: int | None = None
        self._depth = 0
        self._waiting_writers = 0
        self._upgrading: int | None = None

    @contextmanager
    def read(self) -> Iterator[None]:
        """Hold the lock together with other readers."""
        me = threading.get_ident()
        with self._condition:
            if self._writer != me and not self._readers[me]:
                self._condition.wait_for(lambda: self._writer is None and not self._waiting_writers)
            self._readers[me] += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                self._condition.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        """Hold the lock alone.

        Raises:
            ResidentStateError: two threads that both read want to write: they would wait for each other for ever.
        """
        me = threading.get_ident()
        with self._condition:
            if self._writer != me:
                self._wait_to_write(me)
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._condition:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                self._condition.notify_all()

    def _wait_to_write(self, me: int) -> None:
        upgrade = self._readers[me] > 0
        if upgrade and self._upgrading is not None:
            raise ResidentStateError(
                "two generations on one model want to switch its adapters at the same time; expected one at a time: "
                "switch before or after a generation, or give each generation its own pipeline"
            )
        if upgrade:
            self._upgrading = me
        self._waiting_writers += 1
        try:
            self._condition.wait_for(lambda: self._writer is None and not (self._readers.keys() - {me}))
        finally:
            self._waiting_writers -= 1
            if upgrade:
                self._upgrading = None


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
