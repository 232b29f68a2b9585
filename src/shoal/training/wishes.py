"""What the user's signals ask of a training."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Wishes:
    """What the user's signals ask for. Not armed: the first Ctrl-C ends at once, since nothing runs yet."""

    def __init__(self) -> None:
        self.armed = False
        self.wanted = False
        self.asked = False

    def __call__(self) -> bool:
        return self.wanted

    def take_asked(self) -> bool:
        """Whether somebody wants to know who waits for whom, since the last call."""
        asked, self.asked = self.asked, False
        return asked

    def signalled(self, number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            self.asked = True
            return
        if self.wanted or not self.armed:
            raise KeyboardInterrupt
        self.wanted = True


@contextlib.contextmanager
def listening() -> Iterator[Wishes]:
    """Ctrl-C, SIGTERM or SIGHUP once: end well, with a checkpoint; twice: at once. Under nohup, SIGHUP stays ignored. SIGUSR1: say who waits for
    whom, unless the caller uses it. In a thread, only the caller can end the run."""
    wishes = Wishes()
    if threading.current_thread() is not threading.main_thread():
        yield wishes
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        numbers.append(signal.SIGUSR1)
    before = {number: signal.signal(number, wishes.signalled) for number in numbers}
    try:
        yield wishes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
