"""An environment in a file of its own. From the command line:

shoal check examples/corridor.py:make
shoal train examples/corridor.py:make --env.kwargs.length 6 --stop.return 0.9 --stop.env-steps 50000
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Corridor(gymnasium.Env[np.ndarray, np.int64]):
    """Begin somewhere in a corridor, walk to its right end: +1 there, and a little less for every step on the way."""

    def __init__(self, length: int = 8) -> None:
        self.length = length
        self.observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)  # shoal resets every episode with a seed; draw from self.np_random only
        self.place = int(self.np_random.integers(self.length - 1))
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.place = max(0, self.place + (1 if action == 1 else -1))
        self.steps += 1
        arrived = self.place >= self.length - 1
        too_long = self.steps >= 4 * self.length  # a time limit truncates: the future is not worth nothing
        return self._observe(), 1.0 if arrived else -0.01, arrived, too_long and not arrived, {}

    def _observe(self) -> np.ndarray:
        return np.array([self.place / (self.length - 1)], np.float32)


def make(length: int = 8) -> gymnasium.Env:
    """The factory: what follows `:` on the command line. It is called with `env.kwargs`."""
    return Corridor(length)
