"""What processes of the model share: cores, and the links between nodes. Both know how long they were busy."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

from simpy import Environment, Event


class Cores:
    """`cores` that all jobs share alike, as an operating system lets them; a job of width k is k threads, of which each has one core at most.

    Every thread has had the same share since it began, so a job ends when the sum of these shares has grown by its length.
    """

    def __init__(self, env: Environment, cores: int, crowding: float = 1.0) -> None:
        """crowding: how many times as much work costs while all cores are busy; in between, in proportion to those that are busy beside one."""
        self._env, self._cores, self._crowding = env, cores, crowding
        self._jobs: list[tuple[float, int, float, Event]] = []  # (share at which it ends, number, width, its end)
        self._numbers = count()
        self._width = 0.0
        self._share = 0.0  # seconds of a core that a thread would have had since the beginning
        self._at = 0.0
        self._busy = 0.0
        self._alarm = 0

    def work(self, seconds: float, width: float = 1.0) -> Event:
        """An event that comes when `width` threads have had so many seconds each."""
        end = self._env.event()
        if seconds <= 0.0:
            return end.succeed()
        self._advance()
        heapq.heappush(self._jobs, (self._share + seconds, next(self._numbers), width, end))
        self._width += width
        self._set_alarm()
        return end

    @property
    def busy(self) -> float:
        """Core seconds so far."""
        self._advance()
        return self._busy

    def _rate(self) -> float:
        beside = max(0.0, min(self._width, self._cores) - 1) / max(1, self._cores - 1)
        return min(1.0, self._cores / self._width) / (1.0 + (self._crowding - 1.0) * beside)

    def _advance(self) -> None:
        elapsed, self._at = self._env.now - self._at, self._env.now
        if self._jobs:
            self._share += elapsed * self._rate()
            self._busy += elapsed * min(float(self._cores), self._width)

    def _set_alarm(self) -> None:
        """For the next end; one that was set before is void."""
        self._alarm += 1
        if self._jobs:
            delay = max(0.0, self._jobs[0][0] - self._share) / self._rate()
            call_after(self._env, delay, self._end_next, self._alarm)

    def _end_next(self, event: Event) -> None:
        if event.value != self._alarm:
            return
        self._advance()
        self._share = self._jobs[0][0]
        while self._jobs and self._jobs[0][0] <= self._share:
            _, _, width, end = heapq.heappop(self._jobs)
            self._width = self._width - width if self._jobs else 0.0
            end.succeed()
        self._set_alarm()


class Occupied:
    """How long things were at something, all of them together."""

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._number = self._seconds = self._at = 0.0

    def change(self, number: float) -> None:
        """So many more are at it from now on; fewer, where it is negative."""
        self._seconds, self._at = self.seconds, self._env.now
        self._number += number

    @property
    def seconds(self) -> float:
        """So far."""
        return self._seconds + self._number * (self._env.now - self._at)


class Link:
    """One direction of a connection: what is sent goes one after the other."""

    def __init__(self, env: Environment, bytes_per_second: float) -> None:
        self._env, self._bytes_per_second = env, bytes_per_second
        self._free_at = self._sold = 0.0

    def send(self, num_bytes: float) -> Event:
        """An event that comes when the last byte is on its way."""
        seconds = num_bytes / self._bytes_per_second
        self._sold += seconds
        self._free_at = max(self._env.now, self._free_at) + seconds
        return self._env.timeout(self._free_at - self._env.now)

    @property
    def busy(self) -> float:
        """Seconds so far."""
        return self._sold - max(0.0, self._free_at - self._env.now)


def call_after(env: Environment, delay: float, what: Callable[[Event], Any], value: Any) -> None:
    """Have `what` called after `delay`, with an event of this value."""
    callbacks = env.timeout(delay, value).callbacks
    assert callbacks is not None
    callbacks.append(what)
