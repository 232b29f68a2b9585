"""Environments that wait, as a simulator behind a socket does: for the rows `waiting/*` of speed.py.

shoal train benchmarks/waiting.py:fixed --algorithm impala
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

EPISODE_STEPS = 200


class Waiting(gymnasium.Env[np.ndarray, np.int64]):
    """Every step sleeps for `seconds_of(rng)`, computes nothing, and says so in `requested_seconds`."""

    def __init__(self, seconds_of: Callable[[np.random.Generator], float]) -> None:
        self._seconds_of = seconds_of
        self.observation_space = spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._observation = np.zeros(4, np.float32)
        self.num_steps = 0
        self.requested_seconds = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.num_steps = 0
        return self._observation, {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.requested_seconds = self._seconds_of(self.np_random)
        time.sleep(self.requested_seconds)
        self.num_steps += 1
        return self._observation, float(action), self.num_steps >= EPISODE_STEPS, False, {}


class Straggler(Waiting):
    """`times` slower than the others while it holds the lock on a file: of all that are alive with the same file, one."""

    def __init__(self, seconds: float, times: float, lock: str) -> None:
        self._file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            seconds *= times
        except OSError:
            pass  # another one is it
        super().__init__(lambda rng: seconds)

    def close(self) -> None:
        os.close(self._file)


def fixed(seconds: float = 0.01) -> Waiting:
    return Waiting(lambda rng: seconds)


def exponential(seconds: float = 0.01) -> Waiting:
    """Exponentially distributed, with this mean."""
    return Waiting(lambda rng: float(rng.exponential(seconds)))


def straggler(lock: str, seconds: float = 0.01, times: float = 100.0) -> Waiting:
    return Straggler(seconds, times, lock)


def blocking_seconds(make: Callable[[], Waiting], mean_seconds: float, num_steps: int = 300) -> float:
    """w: how long one step blocks, measured alone: the mean that was asked for, and what the system's sleep adds to it on average."""
    environment = make()
    environment.reset(seed=0)
    added = 0.0
    for _ in range(num_steps):
        begun = time.perf_counter()
        environment.step(np.int64(0))
        added += time.perf_counter() - begun - environment.requested_seconds
    environment.close()
    return mean_seconds + added / num_steps
