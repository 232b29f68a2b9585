"""What the files in a run's `faults/` are made of: the environment as the run makes it, checked call by call as in training."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import EnvConfig
from shoal.environments.instance import Instance, offered_snapshot_bytes, unwrap
from shoal.environments.make import Factory, environment_factory
from shoal.environments.spaces import allocate, describe
from shoal.types import CURSOR


class Checked:
    """One environment. What `reset` and `step` find wrong is raised as an EnvironmentFault, what the environment raises comes with it.

    A call that takes longer than env.step_timeout_seconds ends the process with its stack; a crash shows its own.
    """

    def __init__(self, env: EnvConfig, factory: Factory | None, mask_in_info: bool) -> None:
        faulthandler.enable()
        self._timeout, self._watched = env.step_timeout_seconds, float("-inf")
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

    def _watch(self) -> None:
        now = time.monotonic()
        if now - self._watched > self._timeout / 4:  # each call would cost more than most steps do
            self._watched = now
            faulthandler.dump_traceback_later(1.25 * self._timeout, exit=True)


def environment(config: Mapping[str, Any], factory: Factory | None = None, *, mask_in_info: bool = False) -> Checked:
    """One environment as a run with this `env` section makes it.

    Args:
      factory: what was passed to `shoal.train`, where it was an object that no import path leads to.
      mask_in_info: whether the environment gives an action mask in `info`.
    """
    return Checked(EnvConfig.model_validate(config), factory, mask_in_info)
