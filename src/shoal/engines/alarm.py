"""A limit on the environment's calls where all roles run in one process (`actors: 0`), and nobody outside can watch."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from shoal.environments.faults import TookTooLong

_TICK_SECONDS = 0.2
_STACK_SECONDS = 1.0  # after the limit, for a call that nothing of Python can end


class GivenUp(BaseException):
    """Raised inside of whatever takes long once somebody wants the end: no code of an environment or an algorithm takes it for its own."""


def _never() -> bool:
    return False


@contextmanager
def limited(age_seconds: Callable[[], float], limit_seconds: float, given_up: Callable[[], bool] = _never) -> Iterator[None]:
    """Raise TookTooLong inside of a call of the environment that takes longer than `limit_seconds`; the group reports it as a fault.

    It needs the main thread, and an environment that lets Python run: a loop in C that keeps the interpreter's lock, a crash or an exit
    can only be survived in a process of its own (`actors` of 1 or more); here the stack of a loop or a crash is written to standard error,
    and that is all. Under a debugger there is no limit.

    Args:
      age_seconds: how long the environment has been in its present call; 0 where it is in none.
      given_up: whether what is under way is not waited for any longer; GivenUp is raised inside of it then.
    """
    if threading.current_thread() is not threading.main_thread() or sys.gettrace() is not None or not hasattr(signal, "setitimer"):
        yield
        return

    stacks = _Stacks(limit_seconds + _STACK_SECONDS)

    def look(number: int, frame: object) -> None:
        stacks.later()
        if (seconds := age_seconds()) > limit_seconds:
            raise TookTooLong(seconds, limit_seconds)
        if given_up():
            raise GivenUp

    stacks.later()
    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _TICK_SECONDS, _TICK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        stacks.close()


class _Stacks:
    """What C code can still say where Python does not run: the stack of a crash, and of a call that keeps the interpreter's lock.

    Written to standard error; nothing is written where the caller's process watches itself already, or has no standard error.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._mine = False
        if not faulthandler.is_enabled() and sys.__stderr__ is not None:
            with suppress(OSError, ValueError, RuntimeError):  # no file, or a closed one
                faulthandler.enable(sys.__stderr__, all_threads=False)
                self._mine = True

    def later(self) -> None:
        """Python runs: the time begins anew."""
        if self._mine:
            faulthandler.dump_traceback_later(self._seconds, file=sys.__stderr__ or sys.stderr)

    def close(self) -> None:
        if self._mine:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()


class CallClock:
    """How long an environment has been in a call that it was asked for (environments.probe.Tell)."""

    def __init__(self) -> None:
        self._since: float | None = None

    def __call__(self, call: str, /, **facts: Any) -> None:
        self._since = time.monotonic() if call else None

    def age_seconds(self) -> float:
        return 0.0 if self._since is None else time.monotonic() - self._since
