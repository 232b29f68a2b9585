"""An environment that now and then shows a NaN where nobody asked for it: what `shoal chaos --nan` wraps around another.

When it does so hangs on a file of flags, one byte per actor, which somebody outside sets, and on nothing that belongs to the environment: so
the same step, made again, comes without, and what is learned stays the same.
"""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from shoal.config import EnvConfig
from shoal.environments.instance import unwrap
from shoal.environments.make import environment_factory

NUM_FLAGS = 1024
_importing = threading.Lock()  # the environments of a group may be made in threads


def make_flags(path: Path) -> None:
    """All flags down."""
    path.write_bytes(bytes(NUM_FLAGS))


def _attach(path: Path) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, NUM_FLAGS)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class ChaoticFactory:
    """Makes what `env` names, wrapped; to be handed over in its place."""

    env: EnvConfig
    flags: Path

    def __call__(self, **kwargs: Any) -> Any:
        from gymnasium.wrappers import TimeLimit

        with _importing:
            create = environment_factory(self.env.model_copy(update={"kwargs": kwargs}))
        bare, limit = unwrap(create())
        made = Chaotic(bare, self.flags)
        return made if limit is None else TimeLimit(made, limit)


class Chaotic(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Spoils one step's observation (or its reward, where the observation has no real numbers) once its actor's flag is set."""

    def __init__(self, env: gymnasium.Env[Any, Any], flags: Path) -> None:
        super().__init__(env)
        name = Path("/proc/self/comm").read_text().strip()
        self._actor = int(name.rpartition("-")[2]) if name.startswith("shoal:act") else -1  # -1: who looks at the environment first
        self._flags = _attach(flags)
        for offered in ("snapshot", "restore_snapshot", "snapshot_bytes"):
            if hasattr(env, offered):
                setattr(self, offered, getattr(env, offered))

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self._actor >= 0 and self._flags[self._actor]:
            self._flags[self._actor] = 0
            spoiled = spoil(observation)
            if spoiled is None:
                reward = float("nan")
            else:
                observation = spoiled
        return observation, reward, terminated, truncated, info


def spoil(observation: Any) -> Any:
    """The observation with a NaN in its first real number; None where it has none. What was given is left as it is."""
    if isinstance(observation, np.ndarray) and observation.dtype.kind == "f" and observation.size:
        spoiled = observation.copy()
        spoiled.flat[0] = np.nan
        return spoiled
    if isinstance(observation, dict):
        for key, part in observation.items():
            if (spoiled := spoil(part)) is not None:
                return {**observation, key: spoiled}
    if isinstance(observation, tuple):
        for place, part in enumerate(observation):
            if (spoiled := spoil(part)) is not None:
                return (*observation[:place], spoiled, *observation[place + 1 :])
    return None
