"""Interrupts: Ctrl-C and SIGTERM let a run finish its step, so that it can be resumed."""

import logging
import signal
import threading
from types import FrameType
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, Ctrl-C and SIGTERM only set ``number``, which the training loop reads after each step.

    A second Ctrl-C ends at once. Signals that were ignored before (``nohup``, jobs in the background) stay so. Outside
    the main thread, where Python delivers no signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in _SIGNALS}
            self._before = {n: old for n, old in handlers.items() if old not in (signal.SIG_IGN, None)}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.number:
            logger.warning("stopping after this step, with a checkpoint; Ctrl-C again stops at once, without one")
        self.number = number if not self.number else self.number


def end_by(number: int) -> NoReturn:
    """End as a signal does: ``KeyboardInterrupt`` for Ctrl-C, ``SystemExit`` with the shell's code, 143, for SIGTERM.

    Raises:
        KeyboardInterrupt, SystemExit: always one of them.
    """
    if number == signal.SIGTERM:
        raise SystemExit(128 + number)
    raise KeyboardInterrupt


def leave_to_the_main_process(_: int = 0) -> None:
    """Ignore Ctrl-C and SIGTERM in a data loader's worker: the process that trains needs it until its step is done."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
