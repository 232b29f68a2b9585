"""An environment that does something dreadful at certain places, and only there."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Wall(gymnasium.Env):
    """A counter with noise; in the processes of a role, dreadful things happen at step `at` of some episodes.

    what: by an episode's seed (as text), or for all episodes: hang (sleeps), grip (hangs in C with the interpreter's lock), segfault, exit,
    raise, close (raises, then hangs as it is closed). length: steps of an episode. role: "" is the process that is no role's.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(
        self, what: Mapping[str, str] | str = "", at: int = 3, length: int = 9, step_seconds: float = 0.0, role: str = "actor"
    ) -> None:
        self._step_seconds = step_seconds
        self._what, self._at, self._length = what, at, length
        name = Path("/proc/self/comm").read_text()
        self._in_role = name.startswith(f"shoal:{role}") if role else not name.startswith("shoal:")

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._seed, self.count = seed or 0, 0
        return self._observe(), {}

    def _observe(self) -> Any:
        return np.array([self.count, self.np_random.random()], np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        time.sleep(self._step_seconds)
        if self._in_role and self.count == self._at:
            self._do(self._what if isinstance(self._what, str) else self._what.get(str(self._seed), ""))
        return self._observe(), float(action), False, self.count >= self._length, {}

    def _do(self, what: str) -> None:
        if what == "hang":
            time.sleep(1000)
        elif what == "grip":
            while True:  # a signal ends one of them
                ctypes.PyDLL(None).sleep(1000)
        elif what == "segfault":
            ctypes.string_at(0)
        elif what == "exit":
            os._exit(0)
        elif what in ("raise", "close"):
            raise RuntimeError("there is a wall")

    def close(self) -> None:
        if self._in_role and self._what == "close":
            time.sleep(1000)
