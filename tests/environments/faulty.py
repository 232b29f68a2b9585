"""A zoo of faulty environments, for `tests/environments/faulty.py:make`: one kind of fault each, from a given step on, or once."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Sound(gymnasium.Env):
    """Observes three numbers in [-1, 1] that its seed decides; an episode terminates after 6 to 20 steps."""

    observation_space: Any = spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space: Any = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        self.length = int(self.np_random.integers(6, 21))
        return self.observe(), {}

    def observe(self) -> Any:
        return self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32)

    def step(self, action: Any) -> Any:
        self.count += 1
        return self.observe(), 1.0, self.count >= self.length, False, {}


def _segfault() -> None:
    import ctypes

    ctypes.string_at(0)


def _raises() -> None:
    raise ValueError("the arm is stuck")


def _raises_long() -> None:
    raise ValueError("the arm is stuck " * 100_000)


ACTS = {
    "raises": _raises,
    "raises_long": _raises_long,
    "sleeps": lambda: time.sleep(1e6),
    "loops": lambda: sum(range(10**13)),  # in C, with the interpreter's lock
    "exits": lambda: os._exit(7),
    "sys_exit": lambda: sys.exit("the simulator gave up"),
    "segfaults": _segfault,
    "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}  # fmt: skip

RETURNS = {
    "nan": lambda o, r, x, t, i: (o * np.float32(np.nan), r, x, t, i),
    "inf": lambda o, r, x, t, i: (o / np.float32(0), r, x, t, i),
    "shape": lambda o, r, x, t, i: (o[:2], r, x, t, i),
    "dtype": lambda o, r, x, t, i: (o.astype(np.float64), r, x, t, i),
    "structure": lambda o, r, x, t, i: ({"o": o}, r, x, t, i),
    "range": lambda o, r, x, t, i: (o + np.float32(5), r, x, t, i),
    "reward_nan": lambda o, r, x, t, i: (o, float("nan"), x, t, i),
    "reward_array": lambda o, r, x, t, i: (o, np.ones(2), x, t, i),
    "reward_none": lambda o, r, x, t, i: (o, None, x, t, i),
    "four": lambda o, r, x, t, i: (o, r, x or t, i),
    "flag": lambda o, r, x, t, i: (o, r, int(x), t, i),
    "endless": lambda o, r, x, t, i: (o, r, False, False, i),
}  # fmt: skip


class Faulty(Sound):
    """One fault at step `at` of its life (0: the first) and at every later one; with `marker`, a file, once in all processes;
    `hidden`: at the fifth step of every episode with a seed as training has them, so that a short look does not see it."""

    def __init__(self, fault: str, at: int = 0, where: str = "step", marker: str | None = None, hidden: bool = False) -> None:
        self.fault, self.at, self.where, self.marker, self.life, self.hidden, self.seed = fault, at, where, marker, 0, hidden, 0
        self.act("init")

    def act(self, where: str) -> None:
        if where == self.where and self.fault in ACTS and self.due():
            ACTS[self.fault]()

    def due(self) -> bool:
        if self.life < self.at or (self.hidden and (self.seed < 1000 or self.count != 5)):
            return False
        if self.marker is None:
            return True
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        result = super().reset(seed=seed)
        self.seed = seed or 0
        self.act("reset")
        if self.where == "reset" and self.fault in RETURNS and self.due():
            return RETURNS[self.fault](result[0], 0.0, False, False, {})[0], {}
        return result

    def step(self, action: Any) -> Any:
        result = super().step(action)
        self.act("step")
        if self.where == "step" and self.fault in RETURNS and self.due():
            result = RETURNS[self.fault](*result)
        self.life += 1
        return result

    def close(self) -> None:
        self.act("close")


class Refuses(Sound):
    def step(self, action: Any) -> Any:
        assert action == 0, f"I take only 0, not {action}"
        return super().step(action)


class Reuses(Sound):
    buffer: Any = np.zeros(3, np.float32)

    def observe(self) -> Any:
        Reuses.buffer[:] = super().observe()
        return Reuses.buffer


class Unseeded(Sound):
    def observe(self) -> Any:
        return np.random.default_rng().uniform(-1.0, 1.0, 3).astype(np.float32)


class OutOfChoices(Sound):
    observation_space = spaces.Discrete(3)

    def observe(self) -> Any:
        return np.int64(3)


class Wide(Sound):
    """Its bounds are more than one message between processes holds."""

    observation_space = spaces.Box(-np.arange(1, 12_001, dtype=np.float32), np.arange(1, 12_001, dtype=np.float32))

    def observe(self) -> Any:
        return self.np_random.uniform(-1.0, 1.0, 12_000).astype(np.float32)


SPECIES = {"refuses": Refuses, "reuses": Reuses, "unseeded": Unseeded, "choices": OutOfChoices, "wide": Wide, "sound": Sound}


def make(fault: str = "sound", at: int = 0, where: str = "step", marker: str | None = None, hidden: bool = False) -> Any:
    if fault in SPECIES:
        return SPECIES[fault]()
    return Faulty(fault, at, where, marker, hidden)
