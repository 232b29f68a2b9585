"""Small environments for whole runs: images with snapshots, scattered readings in a Dict, and stamps that are written down."""

from __future__ import annotations

import itertools
import json
import os
import struct
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

STAMPS = "SHOAL_TEST_STAMPS"  # environment variable: the directory into which stamped environments write
STAMP = np.dtype([("seed", np.int64), ("step", np.int64)])


class Images(gymnasium.Env):
    """A bright square drifts over a noisy picture; pushing it towards the middle is rewarded. Episodes terminate or are truncated.

    It offers snapshots, so that a run on it restores by them and never steps again.
    """

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(3)
    snapshot_bytes = 4096

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._x, self._y, self._count = 16, int(self.np_random.integers(0, 33)), 0
        self._length = int(self.np_random.integers(5, 60))
        return self._draw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._count += 1
        self._x = int(np.clip(self._x + int(action) - 1 + self.np_random.integers(-1, 2), 0, 32))
        return self._draw(), 1.0 - abs(self._x - 16) / 8, self._x in (0, 32), self._count >= self._length, {}

    def _draw(self) -> Any:
        self._picture = self.np_random.integers(0, 60, (36, 36, 1)).astype(np.uint8)
        self._picture[self._y : self._y + 4, self._x : self._x + 4] = 255
        return self._picture

    def snapshot(self) -> bytes:
        place = json.dumps([self._x, self._y, self._count, self._length, self.np_random.bit_generator.state]).encode()
        return self._picture.tobytes() + place

    def restore_snapshot(self, data: bytes) -> tuple[Any, dict[str, Any]]:
        size = 36 * 36
        self._picture = np.frombuffer(data[:size], np.uint8).reshape(36, 36, 1).copy()
        self._x, self._y, self._count, self._length, state = json.loads(data[size:])
        self.np_random.bit_generator.state = state
        return self._picture, {}


class Readings(gymnasium.Env):
    """Readings of very different scales in a Dict; a continuous action is to follow one of them. No snapshots: it is stepped again."""

    observation_space = spaces.Dict(
        {
            "position": spaces.Box(-np.inf, np.inf, (3,), np.float32),
            "pressure": spaces.Box(-1e6, 1e6, (2,), np.float64),
            "gear": spaces.Discrete(4),
            "lamps": spaces.MultiBinary(3),
        }
    )
    action_space = spaces.Box(-2.0, 2.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._position, self._count = self.np_random.normal(0.0, 3.0, 3), 0
        self._length = int(self.np_random.integers(20, 90))
        return self._observe(), {}

    def _observe(self) -> dict[str, Any]:
        return {
            "position": self._position.astype(np.float32),
            "pressure": 1e4 + 5e3 * self._position[:2],
            "gear": int(abs(self._position[0])) % 4,
            "lamps": (self._position > 0).astype(np.int8),
        }

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._count += 1
        self._position[:2] += 0.3 * np.asarray(action, np.float64) + self.np_random.normal(0.0, 0.2, 2)
        reward = -40.0 * float(np.square(self._position[:2]).sum())
        return self._observe(), reward, bool(np.abs(self._position[:2]).max() > 12), self._count >= self._length, {}


class Stamps(gymnasium.Env):
    """Every observation is a stamp of its own, (seed of the episode, steps since its reset), and each one that is stepped is written down.

    An episode's length hangs on its seed alone, so what a group produces is known whatever its actions are. Each instance appends to a
    file of its own, at once and without buffer: a kill takes nothing away.
    """

    observation_space = spaces.Box(0.0, 1.0, (3,), np.float32)
    action_space = spaces.Discrete(2)
    _names = itertools.count()

    def __init__(self) -> None:
        directory = os.environ.get(STAMPS)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        who = Path("/proc/self/comm").read_text().strip()  # actors apart from the process that looks at the environment first
        self._file = os.open(Path(directory) / f"{who}-{os.getpid()}-{next(self._names)}", flags) if directory else -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._seed, self._count = seed or 0, 0
        self._length = int(self.np_random.integers(10, 200))
        return self._observe(), {}

    def _observe(self) -> Any:
        return np.array([(self._seed >> 16) / 65536, (self._seed & 0xFFFF) / 65536, self._count / 1024], np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._file >= 0:
            os.write(self._file, struct.pack("<qq", self._seed, self._count))
        self._count += 1
        over = self._count >= self._length
        return self._observe(), float(action), over and self._seed % 2 == 0, over and self._seed % 2 == 1, {}

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def stamps_of(observation: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Observations of Stamps, float32 [..., 3], as STAMP records [...]: all three numbers are exact."""
    out = np.empty(observation.shape[:-1], STAMP)
    high, low, count = np.moveaxis(observation.astype(np.float64), -1, 0)
    out["seed"], out["step"] = np.round(high * 65536) * 65536 + np.round(low * 65536), np.round(count * 1024)
    return out


def stamps_stepped(directory: Path) -> np.ndarray[Any, Any]:
    """Every stamp that actors stepped, STAMP records, those stepped again as often as it was done."""
    files = sorted(directory.glob("shoal:actor-*"))
    return np.concatenate([np.empty(0, STAMP), *(np.fromfile(file, STAMP) for file in files)])
