"""What the files in a run's `faults/` are made of: the environment as the run makes it, checked call by call as in training."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import EnvConfig
from shoal.environments.instance import Instance, offered_snapshot_bytes, unwrap
from shoal.environments.make import Factory, environment_factory
from shoal.environments.native import make_native_group
from shoal.environments.spaces import allocate, describe
from shoal.types import CURSOR, GroupState


class _Limit:
    """A call that takes longer than env.step_timeout_seconds ends the process with its stack; a crash shows its own."""

    def __init__(self, seconds: float) -> None:
        faulthandler.enable()
        self._seconds, self._watched = seconds, float("-inf")

    def __call__(self) -> None:
        """A call begins."""
        now = time.monotonic()
        if now - self._watched > self._seconds / 4:  # each call would cost more than most steps do
            self._watched = now
            faulthandler.dump_traceback_later(1.25 * self._seconds, exit=True)


class Checked:
    """One environment. What `reset` and `step` find wrong is raised as an EnvironmentFault, what the environment raises comes with it."""

    def __init__(self, env: EnvConfig, factory: Factory | None, mask_in_info: bool) -> None:
        self._watch = _Limit(env.step_timeout_seconds)
        self._watch()
        made = environment_factory(env, factory)()
        bare, _ = unwrap(made)
        spec = describe(
            env.id, bare.observation_space, bare.action_space, mask_in_info=mask_in_info, snapshot_bytes=offered_snapshot_bytes(bare)
        )
        self.action_space = bare.action_space
        self._seed = 0
        self._instance = Instance(lambda: made, spec, allocate(spec, 1), 0, 0, lambda episode: self._seed)
        self._instance.open()

    def reset(self, seed: int) -> None:
        self._seed = seed
        self._watch()
        self._instance.restore(np.zeros((), CURSOR), [], None)
        self._instance.check_finite()

    def restore(self, snapshot: str) -> None:
        """Stand where a snapshot says (a file beside the snippet)."""
        self._watch()
        self._instance.restore(np.zeros((), CURSOR), [], Path(snapshot).read_bytes())

    def step(self, action: Any) -> None:
        """action: as the environment takes it, nested lists of numbers where it is an array."""
        self._watch()
        self._instance.apply(np.asarray(action, self.action_space.dtype)[()])
        self._instance.check_finite()

    def close(self) -> None:
        self._watch()
        self._instance.close()
        faulthandler.cancel_dump_traceback_later()


class CheckedVector:
    """A group in its native form, checked as in training."""

    def __init__(
        self,
        env: EnvConfig,
        factory: Factory | None,
        group: int,
        run_seed: int,
        epoch: int,
        episodes: Sequence[int],
        snapshots: Sequence[str],
    ) -> None:
        self._watch = _Limit(env.step_timeout_seconds)
        self._watch()
        self._group = make_native_group(env, group, len(episodes), run_seed, factory, epoch=epoch)
        self._rows = allocate(self._group.spec, len(episodes))
        cursor = np.zeros(len(episodes), CURSOR)
        cursor["episode"] = episodes
        kept: list[bytes | None] = [None] * len(episodes)
        kept[: len(snapshots)] = [Path(snapshot).read_bytes() for snapshot in snapshots]
        self._watch()
        self._group.restore(GroupState(cursor, [], kept))

    def step(self, action_B: Any) -> None:
        """action_B: as a rollout holds them, nested lists of numbers."""
        self._watch()
        self._group.step(np.asarray(action_B, self._group.spec.action.dtype), self._rows)
        self._watch()
        self._group.snapshots()

    def close(self) -> None:
        self._watch()
        self._group.close()
        faulthandler.cancel_dump_traceback_later()


def vector(
    config: Mapping[str, Any],
    episodes: Sequence[int],
    snapshots: Sequence[str] = (),
    factory: Factory | None = None,
    *,
    group: int = 0,
    run_seed: int = 0,
    epoch: int = 0,
) -> CheckedVector:
    """A group of `len(episodes)` environments in their native form, as a run with this `env` section makes it.

    Args:
      episodes: how many each has begun before, which decides the seed of the reset. snapshots: files, where the form offers them.
      factory: as of `environment`.
    """  # fmt: skip
    return CheckedVector(EnvConfig.model_validate(config), factory, group, run_seed, epoch, episodes, snapshots)


def environment(config: Mapping[str, Any], factory: Factory | None = None, *, mask_in_info: bool = False) -> Checked:
    """One environment as a run with this `env` section makes it.

    Args:
      factory: what was passed to `shoal.train`, where it was an object that no import path leads to.
      mask_in_info: whether the environment gives an action mask in `info`.
    """
    return Checked(EnvConfig.model_validate(config), factory, mask_in_info)
