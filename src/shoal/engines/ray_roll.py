"""Which machines a cluster has, asked again and again in a thread of its own: a head that is gone lets a question stand, and the supervisor's loop waits for nobody.

consumes    what `ask` answers
waits for   each answer, as long as it takes, then PAUSE_SECONDS
unblocked   by the answer, or by its error
on failure  `silent_seconds` grows; whoever reads it decides
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

PAUSE_SECONDS = 0.5
CLOSE_SECONDS = 5.0

Machine = dict[str, Any]


class Roll:
    """`machines` is the newest answer. The first is waited for here, and its error is raised."""

    def __init__(self, ask: Callable[[], list[Machine]]) -> None:
        self._ask = ask
        self.machines, self._answered = ask(), time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="roll", daemon=True)
        self._thread.start()

    @property
    def silent_seconds(self) -> float:
        """Since the last answer."""
        return time.monotonic() - self._answered

    def close(self) -> None:
        """Ask no more. Waits for an answer that is due, CLOSE_SECONDS at most. May be called twice."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._closing.wait(PAUSE_SECONDS):
            with contextlib.suppress(Exception):  # the head is not there; perhaps it is next time
                self.machines, self._answered = self._ask(), time.monotonic()
