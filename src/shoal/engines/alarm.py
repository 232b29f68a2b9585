"""A limit on the environment's calls where all roles run in one process (`actors: 0`), and nobody outside can watch."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_TICK_SECONDS = 0.2


@contextmanager
def limited(age_seconds: Callable[[], float], limit_seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside of a call of the environment that takes longer than `limit_seconds`; the group reports it as a fault.

    It needs the main thread, and an environment that lets Python run: a loop in C that keeps the interpreter's lock, a crash or an exit
    can only be survived in a process of its own (`actors` of 1 or more). Under a debugger there is no limit.

    Args:
      age_seconds: how long the environment has been in its present call; 0 where it is in none.
    """
    if threading.current_thread() is not threading.main_thread() or sys.gettrace() is not None or not hasattr(signal, "setitimer"):
        yield
        return

    def look(number: int, frame: object) -> None:
        if (seconds := age_seconds()) > limit_seconds:
            raise TimeoutError(f"has not returned for {seconds:.1f} s, allowed are {limit_seconds:g} s (--env.step-timeout-seconds)")

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _TICK_SECONDS, _TICK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


class CallClock:
    """How long an environment has been in a call that it was asked for (environments.probe.Tell)."""

    def __init__(self) -> None:
        self._since: float | None = None

    def __call__(self, call: str, /, **facts: Any) -> None:
        self._since = time.monotonic() if call else None

    def age_seconds(self) -> float:
        return 0.0 if self._since is None else time.monotonic() - self._since
