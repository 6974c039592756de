"""Signals during a training: the first one waits until the step has ended and its state is saved."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from .state import saved_steps

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class HeldSignals:
    """A context that holds back the first of SIGNALS; a second one takes effect at once.

    A held signal is delivered by :meth:`deliver`, or at the end of the context. Then its usual handler runs: Python's
    own raises KeyboardInterrupt for SIGINT, and SIGTERM ends the process. Signals that are ignored stay ignored.
    Threads other than the main one hold nothing back.

    Args:
        holds: False holds nothing back.

    Attributes:
        number: the signal that is held back; None if there is none.
    """

    def __init__(self, holds: bool) -> None:
        self._holds = holds and threading.current_thread() is threading.main_thread()
        self._usual: dict[int, Any] = {}
        self.number: int | None = None

    def __enter__(self) -> HeldSignals:
        usual = {number: signal.getsignal(number) for number in SIGNALS if self._holds}
        self._usual = {n: handler for n, handler in usual.items() if handler not in (None, signal.SIG_IGN)}
        for number in self._usual:
            signal.signal(number, self._hold)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._restore()
        if kind is None and self.number is not None:
            signal.raise_signal(self.number)

    def deliver(self, number: int) -> None:
        """Run a signal's usual handler; hold signals back again if it returns."""
        self._restore()
        self.number = None
        signal.raise_signal(number)
        self.__enter__()

    def _hold(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            self._restore()
            signal.raise_signal(number)
            return
        self.number = number
        # A print that the signal has interrupted, warnings as errors, or no terminal or pipe to write to, for which
        # some printers exit. Nothing of it may end the step.
        with suppress(Exception, SystemExit):
            warnings.warn("stopping after this step; a second signal stops at once, and loses it", stacklevel=2)

    def _restore(self) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)
        self._usual = {}


@contextmanager
def saved_steps_noted(path: str | Path | None) -> Iterator[None]:
    """Add a note to a KeyboardInterrupt or SystemExit from the block, if a state is saved at ``path``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        steps = saved_steps(path)
        if steps is not None:
            note = f"{steps} optimizer steps are saved in {path}: the same command resumes after them"
            if note not in getattr(stop, "__notes__", ()):
                stop.add_note(note)
        raise
