"""Faults from outside, at random moments: a thread that kills, stops and slows the roles of the run in this process.

It finds them as anybody could, by their names among the descendants of this process, and signals through descriptors of processes, which a
number that was given to another meanwhile cannot mislead.

    waits for   the moment of the next fault
    unblocked   by the time, or by `close`
    on failure  a process that is gone already is passed over: the next fault comes when it is due
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.supervision.processes import role_of

TICK_SECONDS = 0.01
SLOW_SECONDS, PULSE_STOPPED_SECONDS, PULSE_RUNNING_SECONDS = (
    1.0,
    0.06,
    0.04,
)  # an actor is slowed to less than half, and never stopped for long


@dataclass(frozen=True)
class Injection:
    """One fault that was sent. `time` is since the epoch, as in run.db's events."""

    kind: str
    role: str
    index: int
    time: float


def roles_below(pid: int) -> dict[tuple[str, int], int]:
    """(role, index) -> number of the living roles among the descendants of a process, by the names that the zygote gave them."""
    found: dict[tuple[str, int], int] = {}
    todo = [pid]
    while todo:
        parent = todo.pop()
        try:
            children = [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()]
        except OSError:
            continue
        for child in children:
            with contextlib.suppress(OSError, ValueError):
                who = role_of(Path(f"/proc/{child}/comm").read_text(encoding="utf-8").strip())
                if who is not None:
                    found[who] = child
                else:
                    todo.append(child)
    return found


class Injector:
    """Sends each kind of fault about every so many seconds while `active(kind)`.

    Args:
      every: seconds between two faults of a kind, on average: `kill` and `stop` of an actor, `slow` (pulses of SIGSTOP and SIGCONT), `nan`
        (see `flags`), `learner` (kills it).
      flags: the file in which one actor's byte is set (environments/chaotic.py).
      active: whether faults of a kind are sent now; asked in its thread.
    """

    def __init__(self, every: Mapping[str, float], seed: int, active: Callable[[str], bool], flags: Path | None = None) -> None:
        self._every, self._active, self._flags = dict(every), active, flags
        self._random = random.Random(f"chaos {seed}")
        self._wait = {kind: self._draw(kind) for kind in self._every}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)
        self.sent: list[Injection] = []

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _draw(self, kind: str) -> float:
        """Seconds to the next: half to one and a half of the mean."""
        return self._every[kind] * (0.5 + self._random.random())

    def _run(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(TICK_SECONDS):
            now = time.monotonic()
            passed, before = now - before, now
            for kind in filter(self._active, self._wait):
                self._wait[kind] -= passed
                if self._wait[kind] <= 0 and self._inject(kind):
                    self._wait[kind] = self._draw(kind)

    def _inject(self, kind: str) -> bool:
        wanted = "learner" if kind == "learner" else "actor"
        victims = sorted(who for who in roles_below(os.getpid()).items() if who[0][0] == wanted)
        if not victims:
            return False  # it is being replaced: a moment later
        (role, index), pid = self._random.choice(victims)
        when = time.time()
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return False
        if kind == "slow":
            threading.Thread(target=self._slow, args=(descriptor,), daemon=True).start()
        else:
            with contextlib.suppress(ProcessLookupError):
                if kind == "nan":
                    self._set_flag(index)
                else:
                    signal.pidfd_send_signal(descriptor, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
            os.close(descriptor)
        self.sent.append(Injection(kind, role, index, when))
        return True

    def _set_flag(self, index: int) -> None:
        assert self._flags is not None
        with self._flags.open("r+b") as file:
            file.seek(index)
            file.write(b"\1")

    def _slow(self, descriptor: int) -> None:
        end = time.monotonic() + SLOW_SECONDS
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end and not self._closed.is_set():
                signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
                time.sleep(PULSE_STOPPED_SECONDS)
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)
                time.sleep(PULSE_RUNNING_SECONDS)
        os.close(descriptor)
