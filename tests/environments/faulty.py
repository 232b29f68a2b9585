"""A zoo of faulty environments, for `tests/environments/faulty.py:make`: one kind of fault each, from a given step on, or once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv


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


def _interrupts() -> None:
    raise KeyboardInterrupt


ACTS = {
    "raises": _raises,
    "raises_long": _raises_long,
    "sleeps": lambda: time.sleep(1e6),
    "loops": lambda: sum(range(10**13)),  # in C, with the interpreter's lock
    "exits": lambda: os._exit(7),
    "interrupts": _interrupts,
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
    "info": lambda o, r, x, t, i: (o, r, x, t, []),
    "endless": lambda o, r, x, t, i: (o, r, False, False, i),
}  # fmt: skip


class Faulty(Sound):
    """One fault at step `at` of its life (0: the first) and at every later one; with `marker`, a file, once in all processes;
    `hidden`: at the fifth step of every episode with a seed as training has them, so that a short look does not see it;
    `told`: a file that holds the time of the first fault."""

    def __init__(
        self, fault: str, at: int = 0, where: str = "step", marker: str | None = None, hidden: bool = False, told: str | None = None
    ) -> None:
        self.fault, self.at, self.where, self.marker, self.life, self.hidden, self.seed = fault, at, where, marker, 0, hidden, 0
        self.told = told
        self.act("init")

    def act(self, where: str) -> None:
        if where == self.where and self.fault in ACTS and self.due():
            ACTS[self.fault]()

    def due(self) -> bool:
        if self.life < self.at or (self.hidden and (self.seed < 1000 or self.count != 5)):
            return False
        if self.marker is not None and not first(self.marker):
            return False
        if self.told is not None:
            first(self.told)
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


def first(path: str) -> bool:
    """Whether nobody made this file before; it holds the time."""
    with contextlib.suppress(FileExistsError), open(path, "x", encoding="ascii") as file:
        file.write(repr(time.time()))
        return True
    return False


class Rare(Sound):
    """Each of `faults` (names with a + between them) once in all processes, `every` seconds apart, the first `since` seconds after training began.
    `directory` holds when each came."""

    def __init__(self, faults: str, directory: str, since: float, every: float) -> None:
        self.faults, self.directory, self.since, self.every = faults.split("+"), Path(directory), since, every
        self.begun = float("inf")
        self.next, self.seed = 0, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        result = super().reset(seed=seed)
        if (seed or 0) >= 1000:  # a look before training has small ones
            first(str(self.directory / "begun"))
            self.begun = float((self.directory / "begun").read_text() or "inf")
        return result

    def step(self, action: Any) -> Any:
        result = super().step(action)
        passed = time.time() - self.begun - self.since
        while self.next < len(self.faults) and passed > self.next * self.every:
            fault = self.faults[self.next]
            self.next += 1
            if first(str(self.directory / f"{self.next}-{fault}")):
                if fault in ACTS:
                    ACTS[fault]()
                return RETURNS[fault](*result)
        return result


class Snapshots(Sound):
    """Its snapshots raise, or hold more than it says, from the `at`-th on."""

    snapshot_bytes = 64

    def __init__(self, fault: str, at: int) -> None:
        self.fault, self.at, self.taken = fault, at, 0

    def snapshot(self) -> bytes:
        self.taken += 1
        if self.taken > self.at:
            if self.fault == "snapshot_raises":
                raise RuntimeError("the simulator cannot be saved now")
            return bytes(65)
        return bytes([self.count, self.length])

    def restore_snapshot(self, data: bytes) -> Any:
        self.count, self.length = data
        return np.zeros(3, np.float32), {}


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


def make(
    fault: str = "sound",
    at: int = 0,
    where: str = "step",
    marker: str | None = None,
    hidden: bool = False,
    told: str | None = None,
) -> Any:
    if fault in SPECIES:
        return SPECIES[fault]()
    if fault.startswith("snapshot"):
        return Snapshots(fault, at)
    return Faulty(fault, at, where, marker, hidden, told)


def rare(faults: str, directory: str, since: float = 11.0, every: float = 2.0) -> Any:
    return Rare(faults, directory, since, every)


class FaultyVector(SyncVectorEnv):
    """B sound environments in one vector form; `fault` comes in environment 1 at its `at`-th step, or in `where`. With `snapshots`, it offers them."""

    def __init__(self, num_envs: int, fault: str, at: int, where: str, told: str | None) -> None:
        self.fault, self.at, self.where, self.told, self.life = fault, at, where, told, 0
        if where == "init":
            self.act()
        super().__init__([Sound] * num_envs)

    def act(self) -> None:
        if self.told is not None and (self.fault in ACTS or self.fault in RETURNS):
            first(self.told)
        if self.fault in ACTS:
            ACTS[self.fault]()

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        result = super().reset(seed=seed, options=options)
        if self.where == "reset":
            self.act()
            return {"none": None, "info": (result[0], None)}.get(self.fault, result)
        return result

    def step(self, actions: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(actions)
        self.life += 1
        if self.where != "step" or self.life < self.at:
            return observation, reward, terminated, truncated, info
        self.act()
        if self.fault in ("nan", "inf"):
            observation[1] = np.nan if self.fault == "nan" else np.inf
        elif self.fault == "reward_nan":
            reward[1] = np.nan
        elif self.fault == "info":
            info = None
        elif self.fault in RETURNS:
            return RETURNS[self.fault](observation, reward, terminated, truncated, info)
        return observation, reward, terminated, truncated, info


class SavedVector(FaultyVector):
    """Offers snapshots, from the `at`-th on broken ones."""

    snapshot_bytes = 4096

    def snapshots(self) -> Any:
        self.life += 1
        if self.life > self.at:
            if self.fault == "snapshots_raise":
                raise RuntimeError("the simulators cannot be saved now")
            return [bytes(5000)] * self.num_envs
        return [bytes([env.count, env.length]) for env in self.envs]

    def restore_snapshots(self, given: list[bytes]) -> Any:
        self.reset(seed=0)
        return np.zeros((self.num_envs, 3), np.float32), {}


def vector(num_envs: int, fault: str = "sound", at: int = 5, where: str = "step", told: str | None = None) -> Any:
    kind = SavedVector if fault.startswith("snapshots") else FaultyVector
    return kind(num_envs, fault, at, where, told)
