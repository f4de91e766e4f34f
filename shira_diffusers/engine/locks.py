"""Lock models for readers and writers: generations read the weights together, a switch writes them alone.

A hold belongs to the context that entered it, not to its thread: to the code inside the ``with`` block, and to the
threads and tasks that it starts with its context (``asyncio.to_thread``, ``asyncio.create_task``). Inside a hold
further ones nest; of those that start in parallel inside one, each waits for the other, as outside. A block that is
left while a thread or task that it started still holds the models ends with the last of these.
"""

import asyncio
import gc
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import nn

from shira_diffusers.engine.bookkeeping import Ends, Entered, Guard
from shira_diffusers.engine.callers import Caller, current_caller, stacklevel
from shira_diffusers.errors import ResidentStateError

T = TypeVar("T")
V = TypeVar("V")

PATIENCE = 10.0  # seconds of waiting after which garbage is collected, and a warning names what is still waited for

_lists = Guard()  # one for all holds: who waits for whom is seen over several models
_active: list["Hold"] = []  # in the order in which they were taken
_waiting: list["Hold"] = []
_collected = [-math.inf]  # when whoever waited has collected garbage last


class _Here(threading.local):
    ended: ExitStack | None = None  # what the thread is leaving; it takes more, so that a long chain is no recursion


_here = _Here()
_entered: ContextVar[tuple["Hold", ...]] = ContextVar("shira_holds", default=())


@dataclass(eq=False, slots=True)
class Hold:
    """Models that a caller reads or writes, or waits for.

    Args:
        modules: all taken at once, so that no two holds have a part each of what both want.
        write: alone, else together with others that read.
        owner: who entered it.
        parents: the holds that it is nested in.
        wake: lets it look again whether it may be entered, while it is waited for.
        blocks: its thread sleeps until then; else it is awaited in an event loop.
        undo: what puts back the mix before, where this hold has changed it.
        within: the holds that entering it has taken, which leave with it.
        left: its block was left: what starts now is outside of it.
        rest: what is still to be done to leave it, once nothing runs inside any more.
        ending: the thread that does it, which is inside until it is done.
    """

    modules: tuple[nn.Module, ...]
    write: bool
    owner: Caller
    parents: frozenset["Hold"]
    wake: Callable[[], object] | None = None
    blocks: bool = True
    undo: Callable[[], None] | None = None
    within: frozenset["Hold"] = frozenset()
    left: bool = False
    rest: Ends | None = None
    ending: threading.Thread | None = None

    def conflicts_with(self, other: "Hold") -> bool:
        """Whether the two cannot be active together, were neither nested in the other."""
        return (self.write or other.write) and self.overlaps(other)

    def overlaps(self, other: "Hold") -> bool:
        """Whether the two have a model in common."""
        return any(one is two for one in self.modules for two in other.modules)

    def needs(self, loop: asyncio.AbstractEventLoop | None) -> bool:
        """Whether it ends only if an event loop goes on."""
        if loop is None or self.owner.loop is loop:
            return loop is not None
        suspended = self.owner.entered is not None and self.owner.entered.f_back is None
        return suspended and self.owner.task is not None and self.owner.task.get_loop() is loop


class Held(Generic[T]):
    """What is done while models are held, for ``with`` and, without blocking the event loop, ``async with``. One use.

    Args:
        modules: the models.
        write: hold them alone.
        inside: runs while they are held, with the hold and what ``before`` gave; its value is that of the ``with``.
        before: runs around the wait and the hold; under ``async with`` it is entered in a worker thread.

    Raises:
        ResidentStateError: whoever holds the models waits for this caller, or is another task of the event loop that
            a plain ``with`` would block: a deadlock.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        *,
        write: bool,
        inside: Callable[[Hold, Any], AbstractContextManager[T]],
        before: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._modules, self._write = tuple(modules), write
        self._inside, self._before = inside, before
        self._open: Ends | None = None

    def giving(self, value: V) -> "Held[V]":
        """The same, with another value of the ``with``."""

        def enter(hold: Hold, prepared: Any, ends: ExitStack) -> V:
            ends.enter_context(self._inside(hold, prepared))
            return value

        def inside(hold: Hold, prepared: Any) -> Entered[V]:
            return Entered(partial(enter, hold, prepared))

        return Held(self._modules, write=self._write, inside=inside, before=self._before)

    def __enter__(self) -> T:
        hold = _hold(self._modules, self._write)
        with Ends() as stack:
            prepared = stack.enter_context(self._before())
            _wait(hold)
            return self._enter(hold, prepared, stack)

    async def __aenter__(self) -> T:
        hold = _hold(self._modules, self._write)
        if hold.owner.entered is None:
            raise ResidentStateError(
                "a task that only enters `async with` (as asyncio.wait_for or create_task make it) would hold the "
                "model for no code: its context ends with it; expected `async with asyncio.timeout(...):` around an "
                "`async with` in the task that uses the model"
            )
        with Ends() as stack:
            before = self._before()
            prepared = before.__enter__() if isinstance(before, nullcontext) else await _in_thread(before, stack)
            await _wait_async(hold)
            return self._enter(hold, prepared, stack)

    def _enter(self, hold: Hold, prepared: Any, stack: Ends) -> T:
        _note_entered(hold)
        stack.callback(_release, hold)
        if self._open is not None:
            raise ResidentStateError("this block is entered already, expected one of its own; make another for it")
        value = stack.enter_context(self._inside(hold, prepared))
        with _lists:
            hold.within = frozenset(one for one in _active if hold in one.parents)
        self._open = Ends()
        self._open.push(partial(_leave, hold, stack.pop_all()))
        return value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._open is not None  # __enter__ has set it
        ends, self._open = self._open, None
        return ends.__exit__(kind, error, trace)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self.__exit__(kind, error, trace)


def _leave(
    hold: Hold,
    stack: Ends,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> bool | None:
    with _lists:
        _mark_left(hold)
        if _goes_on(hold):
            hold.rest = stack
            return None
        _mark_left(hold, threading.current_thread())
    return stack.__exit__(kind, error, trace)


async def _in_thread(before: AbstractContextManager[Any], stack: ExitStack) -> Any:
    """Enter a context manager in a worker thread, which leaves it again where it is not awaited any more."""
    awaited: Future[None] = Future()  # cancelled while the thread enters, or too late for that

    def enter() -> Any:
        value = before.__enter__()
        if not awaited.set_running_or_notify_cancel():
            before.__exit__(None, None, None)
        return value

    try:
        value = await asyncio.to_thread(enter)
    except BaseException:
        if not awaited.cancel():
            before.__exit__(None, None, None)
        raise
    stack.push(before)
    return value


def hold(modules: Iterable[nn.Module], *, write: bool) -> Held[None]:
    """Hold several models at once, for ``with`` and ``async with``."""
    return Held(modules, write=write, inside=lambda *_: nullcontext())


@contextmanager
def hold_free(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Hold those models alone that nobody uses, each by itself; the others are not waited for."""
    with ExitStack() as stack:
        yield [module for module in modules if _enter_free(module, stack)]


def _enter_free(module: nn.Module, stack: ExitStack) -> bool:
    hold = _hold((module,), write=True)
    with _lists:
        if _conflicts(hold):
            return False
        _take(hold)
    _note_entered(hold)
    stack.callback(_release, hold)
    return True


def awaiting() -> list[Callable[[], None]]:
    """What will put back the mixes before blocks that are open."""
    with _lists:
        return [one.undo for one in _active if one.undo is not None]


def leave(hold: Hold) -> None:
    """Put back the mix before a hold, or leave that to a hold inside it that is still open.

    Generators that are resumed in turns leave their holds in another order than that of nesting.
    """
    with _lists:
        inner = next((one for one in _active if hold in one.parents and one.undo is not None), None)
    if hold.undo is None:
        return
    if inner is None:
        hold.undo()
    else:
        inner.undo = hold.undo


# ---------------------------------------------------------------- whose holds


def _note_entered(*holds: Hold) -> None:
    """Note holds in the current context, and forget those that were left."""
    _entered.set((*(one for one in _entered.get() if one in _active), *holds))


def _hold(modules: tuple[nn.Module, ...], write: bool) -> Hold:
    caller = current_caller()
    with _lists:
        return Hold(modules, write, caller, frozenset(_own(caller)))


def _own(caller: Caller) -> list[Hold]:
    """The active holds that a caller is inside of.

    A generator that was resumed is not inside what another one has entered since, though both run in one context.
    """
    entered = _entered_by(caller)
    own = [one for one in _active if one in entered or _belongs_to(one, caller)]
    outer = frozenset().union(*[one.parents for one in own])  # also of a generator that another thread resumes
    own = [one for one in _active if one in own or one in outer]
    own = [one for one in own if _is_open(one, own, caller)]
    return [one for k, one in enumerate(own) if not any(_is_beside(one, outer, caller) for outer in own[:k])]


def _mark_left(hold: Hold, ending: threading.Thread | None = None) -> None:
    for one in (hold, *hold.within):
        one.left, one.ending = True, ending


def _is_open(hold: Hold, own: Iterable[Hold], caller: Caller) -> bool:
    """Whether a block was not left, or goes on for a caller that is inside ``own``: one of these runs inside it."""
    inside = (one for one in own if not one.left or one.ending is caller.thread)
    return any(one is hold or hold in one.parents for one in inside)


def _goes_on(hold: Hold) -> bool:
    """Whether a thread or task that was started inside a block still holds models."""
    return any(hold in one.parents and one not in hold.within for one in _active)


def _entered_by(caller: Caller) -> list[Hold]:
    """The holds in a caller's context, less what suspended generators left in a pool's thread in earlier jobs."""
    return [
        one
        for one in _entered.get()
        if one.owner.entered is None or one.owner.thread is not caller.thread or one.owner.job is caller.job
    ]


def _belongs_to(hold: Hold, caller: Caller) -> bool:
    if hold.ending is caller.thread:
        return True
    owner = hold.owner
    if owner.entered is not None and owner.entered in caller.frames:
        return True
    if owner.task is not None and not owner.task.done():
        return owner.task is caller.task
    if caller.task is not None and caller.loop is owner.loop and not hasattr(sys, "ps1"):
        return False
    # a notebook enters in one cell and draws in the next, which is another context and task of the main thread
    return owner.thread is caller.thread is threading.main_thread()


def _is_beside(hold: Hold, outer: Hold, caller: Caller) -> bool:
    if hold.ending is caller.thread:
        return False
    generator = outer.owner.entered
    return generator is not None and generator in caller.frames and generator not in hold.owner.frames


def _keep_own_alone() -> None:
    """Forget the holds of threads that did not survive a fork: nobody would ever end them."""
    _active[:] = _own(current_caller())
    _waiting.clear()
    _lists.__exit__()


if hasattr(os, "register_at_fork"):  # where there are forks
    os.register_at_fork(before=_lists.__enter__, after_in_parent=_lists.__exit__, after_in_child=_keep_own_alone)


# ---------------------------------------------------------------- waiting


def _wait(hold: Hold) -> None:
    with _lists:
        if not _waiting and not _conflicts(hold):  # as a rule: nobody is there
            _take(hold)
            return
    turn = threading.Lock()  # no condition: the thread sleeps outside of bookkeeping, and has done all ends before
    turn.acquire()
    hold.wake = turn.release
    until, warned = time.monotonic() + PATIENCE, False
    with Ends() as ends:
        _queue_up(hold, ends)
        while not _try(hold):
            turn.acquire(timeout=max(0.0, until - time.monotonic()))
            if time.monotonic() >= until:
                if _try_without_garbage(hold):
                    return
                if not warned:
                    _warn(hold)
                until, warned = time.monotonic() + PATIENCE, True


async def _wait_async(hold: Hold) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    hold.wake, hold.blocks = lambda: loop.call_soon_threadsafe(event.set), False
    until, warned = loop.time() + PATIENCE, False
    with Ends() as ends:
        _queue_up(hold, ends)
        while not _try(hold):
            try:
                async with asyncio.timeout_at(until):  # wait_for of Python 3.11 loses a cancellation by the way
                    await event.wait()
            except TimeoutError:
                if _try_without_garbage(hold):
                    return
                if not warned:
                    _warn(hold)
                until, warned = loop.time() + PATIENCE, True
            event.clear()


def _take(hold: Hold) -> None:
    """Make it active, nested in what goes on: the end of an outer one may have begun since it was made."""
    hold.parents = frozenset(_inside_of(hold))
    _active.append(hold)


def _queue_up(hold: Hold, ends: ExitStack) -> None:
    ends.callback(_leave_queue, hold)
    with _lists:
        _waiting.append(hold)


def _try(hold: Hold) -> bool:
    with _lists:
        if not _may_enter(hold):
            return False
        _leave_queue(hold)
        _take(hold)
        return True


def _try_without_garbage(hold: Hold) -> bool:
    """Try it again without blocks of generators that were dropped: where all threads wait for one, nobody collects.

    One of those who wait collects for all, again and again: what it waits for may be dropped later.
    """
    with _lists:
        _forget_closed_loops()
        collects = time.monotonic() >= _collected[0] + PATIENCE
        if collects:
            _collected[0] = time.monotonic()
    if collects:
        gc.collect()
    return _try(hold)


def _forget_closed_loops() -> None:
    """Let tasks of closed event loops be garbage: they never go on."""
    for one in [*_active, *_waiting]:
        if one.owner.loop is not None and one.owner.loop.is_closed():
            one.owner, one.wake = one.owner._replace(task=None, frames=(), job=None, entered=None), None
            _leave_queue(one)


def _leave_queue(hold: Hold) -> None:
    with _lists:
        if hold in _waiting:
            _waiting.remove(hold)
            _wake_all()


def _release(hold: Hold) -> None:
    ended = ExitStack() if _here.ended is None else _here.ended
    with _lists:
        _active.remove(hold)
        for outer in hold.parents:
            if outer.rest is not None and not _goes_on(outer):
                ended.push(outer.rest)
                outer.rest = None
                _mark_left(outer, threading.current_thread())
        _wake_all()
    _note_entered()
    # contexts that never enter again keep the hold, but nothing through it
    hold.owner = hold.owner._replace(frames=(), job=None, entered=None)
    hold.modules, hold.parents, hold.undo, hold.within = (), frozenset(), None, frozenset()
    if ended is not _here.ended:
        _here.ended = ended
        try:
            ended.close()
        finally:
            _here.ended = None
        ended.close()  # what was added between these two


def _wake_all() -> None:
    for one in _waiting:
        if one.wake is not None:
            with suppress(RuntimeError):  # it is awake already, or its event loop was closed while it waited
                one.wake()


def _may_enter(hold: Hold) -> bool:
    busy, queue = _conflicts(hold), _queue(hold)
    if _leads_to(hold, busy):
        raise ResidentStateError(
            "deadlock: two generations want to switch adapters of each other's model, or of one, at the same time; "
            "expected one at a time: switch before or after a generation, or give each generation its own pipeline"
        )
    if hold.blocks:
        _require_progress(hold, busy)
        queue = {one for one in queue if one.blocks or one.owner.loop is not hold.owner.loop}
    return not busy and (not queue or _leads_to(hold, queue))


def _conflicts(hold: Hold) -> set[Hold]:
    inside = _inside_of(hold)
    return {one for one in _active if one not in inside and hold.conflicts_with(one)}


def _inside_of(hold: Hold) -> set[Hold]:
    """The holds that it is nested in, less those whose blocks were left meanwhile: these it waits for, as others do."""
    return {one for one in hold.parents if _is_open(one, hold.parents, hold.owner)}


def _queue(hold: Hold) -> set[Hold]:
    """Those that have waited for longer and go first: one that could enter now, and before a reader all writers.

    Nobody goes before what is nested in a hold of the models, whose end they wait for.
    """
    if any(hold.overlaps(outer) for outer in _inside_of(hold)):
        return set()
    earlier = _waiting[: _waiting.index(hold)] if hold in _waiting else _waiting
    rivals = [one for one in earlier if hold.conflicts_with(one)]
    if not hold.write:
        return set(rivals)
    first = next((one for one in rivals if not _conflicts(one)), None)
    return set() if first is None else {first}


def _leads_to(hold: Hold, others: set[Hold]) -> bool:
    """Whether one of the others waits for a hold, or for one that it is nested in, itself or through others."""
    seen: set[Hold] = set()
    while others:
        if hold in others or _inside_of(hold) & others:
            return True
        seen |= others
        waiting = [one for one in _waiting if one in others or _inside_of(one) & others]
        others = set().union(*(_conflicts(one) | _queue(one) for one in waiting)) - seen
    return False


def _require_progress(hold: Hold, busy: set[Hold]) -> None:
    """Refuse to block a thread in which those who are waited for would have to go on."""
    stuck = next((one for one in busy if one.needs(hold.owner.loop)), None)
    if stuck is not None:
        raise ResidentStateError(
            f"{hold.owner.where} would block the event loop: {_names(hold)} in use by another task of it, entered at "
            f"{stuck.owner.where}, which could then never finish; expected `async with` in place of `with`, and "
            "pipelines called by `await asyncio.to_thread(pipe, ...)`"
        )
    beside = next((one for one in busy if not one.left and one in _entered_by(hold.owner)), None)
    if beside is not None:
        raise ResidentStateError(
            f"{hold.owner.where} would deadlock: {_names(hold)} in use by another generator of this thread, "
            f"entered at {beside.owner.where}; expected generators that hold a mix one after the other, or each in "
            "a thread of its own"
        )


def _warn(hold: Hold) -> None:
    with _lists:
        busy = sorted({one.owner.where for one in _conflicts(hold) | _queue(hold)})
    warnings.warn(
        f"{hold.owner.where} has waited for {PATIENCE:g} seconds: {_names(hold)} in use by {', '.join(busy)}. If that "
        "waits for this call, the two deadlock: run the call in the context that holds the model, by "
        "asyncio.to_thread or contextvars.copy_context().run. If it waits for a free thread of the pool that this call "
        "waits in, wait in coroutines: `async with` around what is done in threads",
        RuntimeWarning,
        stacklevel=stacklevel(),
    )


def _names(hold: Hold) -> str:
    names = sorted({type(module).__name__ for module in hold.modules})
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"
