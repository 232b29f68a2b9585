"""B environments that step one after another in the calling thread.

consumes    actions [B] as stored
waits for   the environments, one by one
on failure  raises EnvironmentFault that names group and environment; the group must then be put somewhere by `restore`
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np

from shoal import streams
from shoal.environments.instance import Instance
from shoal.environments.spaces import action_map, all_fit, allocate, which_fit
from shoal.types import CURSOR, Array, Arrays, Ended, EnvironmentSpec, GroupState, GroupStep


class PythonGroup:
    """An EnvironmentGroup over single gymnasium environments. Every episode n of environment b is reset with
    `streams.episode_seed(run_seed, group, b, n, epoch)`; a new episode begins in the step that ended the one before it.

    Args:
      create: makes one environment; called B times, at the first `restore`.
      epoch: the counter that a roll-back after divergence raises.
    """

    def __init__(self, create: Callable[[], Any], spec: EnvironmentSpec, group: int, num_envs: int, run_seed: int, epoch: int = 0) -> None:
        self.spec, self.num_envs = spec, num_envs
        self._current = allocate(spec, num_envs)
        self._floats = [(name, array) for name, array in self._current.items() if array.dtype.kind == "f"]
        self._to_environment = action_map(spec.action)
        self._instances = [Instance(create, spec, self._current, group, b, _seeds(run_seed, group, b, epoch)) for b in range(num_envs)]
        self.resetting: Callable[[int, bool], None] = nobody_watches
        for b, instance in enumerate(self._instances):
            instance.resetting = partial(self._resets, b)
        self._reward_B = np.zeros(num_envs)
        self._terminated_B = np.zeros(num_envs, np.bool_)
        self._truncated_B = np.zeros(num_envs, np.bool_)
        self._valid_B = np.ones(num_envs, np.bool_)
        self.progress: Progress = nobody_waits
        self._flagged = False  # whether the three above hold anything but their defaults
        self._told: Callable[[int], None] | None = None  # of each environment before the next step

    def restore(self, state: GroupState) -> list[int]:
        """Put every environment where `state` says; see EnvironmentGroup."""
        stored = [self._to_environment(actions) for actions in state.actions]
        same = self._restore_all([(state.cursor[b], list(stored[b]), state.snapshots[b]) for b in range(self.num_envs)])
        self._check_finite()
        return [b for b in range(self.num_envs) if not same[b]]

    def observe(self, out: Arrays) -> None:
        """Write the current observation (and mask) of every environment into `out`."""
        for name, array in self._current.items():
            out[name][...] = array

    def step(self, action_B: Array, out: Arrays) -> GroupStep:
        """Step every environment; see EnvironmentGroup."""
        actions = list(self._to_environment(action_B))
        ended = self._advance_all(actions) if self._told is None else self._advance_one_by_one(actions)
        instances = self._instances
        self._reward_B[:] = [instance.reward for instance in instances]
        self._check_finite()
        for name, array in self._current.items():
            out[name][...] = array
        if self._flagged:
            self._terminated_B[:], self._truncated_B[:], self._valid_B[:], self._flagged = False, False, True, False
        ends: list[Ended] = []
        for b in ended:
            instance, self._flagged = instances[b], True
            self._terminated_B[b], self._truncated_B[b], self._valid_B[b] = instance.terminated, instance.truncated, instance.valid
            instance.valid = True
            assert instance.ended is not None
            ends.append(instance.ended)
        return GroupStep(self._reward_B, self._terminated_B, self._truncated_B, self._valid_B, ends)

    def cursor(self) -> Array:
        """CURSOR [B] without the checksums."""
        cursor = np.zeros(self.num_envs, CURSOR)
        for row, instance in zip(cursor, self._instances, strict=True):
            row["episode"], row["seed"] = instance.episode, instance.seed
            row["num_steps"], row["episode_return"] = instance.num_steps, instance.episode_return
        return cursor

    def snapshots(self) -> list[bytes | None]:
        """One per environment: bytes for `restore`, or None where environments offer no snapshots."""
        return [instance.snapshot() for instance in self._instances]

    def give_up(self, b: int) -> None:
        """At the next step, environment b is not stepped: its episode ends there as an invalid row (valid False, truncated, reward 0),
        and the next one begins. For a fault that came again at the same step after re-stepping."""
        self._instances[b].give_up()

    def name_next_step(self, told: Callable[[int], None]) -> None:
        """At the next step only, call `told(b)` before environment b is stepped, one after the other: so that a hang or a crash has a name."""
        self._told = told

    def close(self) -> None:
        for b, instance in enumerate(self._instances):
            self.progress(b, closing=True)
            instance.close()

    def _restore_all(self, arguments: list[tuple[Array, list[Any], bytes | None]]) -> list[bool]:
        return [self._instances[b].restore(*given, partial(self.progress, b)) for b, given in enumerate(arguments)]

    def _advance_all(self, actions: list[Any]) -> list[int]:
        """Step every environment with its action; the indices of those whose episode ended."""
        return [b for b, instance in enumerate(self._instances) if instance.advance(actions[b])]

    def _advance_one_by_one(self, actions: list[Any]) -> list[int]:
        assert self._told is not None
        told, self._told = self._told, None
        ended = []
        for b, action in enumerate(actions):
            told(b)
            if self._advance(b, action):
                ended.append(b)
        return ended

    def _advance(self, b: int, action: Any) -> bool:
        return self._instances[b].advance(action)

    def _resets(self, b: int, begins: bool) -> None:
        self.resetting(b, begins)

    def _check_finite(self) -> None:
        for name, array in self._floats:
            if not all_fit(array):
                b = int(np.flatnonzero(~which_fit(array.reshape(self.num_envs, -1)).all(1))[0])
                raise self._instances[b].not_finite(name, array[b])


NOBODY = -1  # in place of an environment


class Progress(Protocol):
    """Is told of each call of environment b before it is made, while a group is made, put back or closed."""

    def __call__(self, b: int, *, closing: bool = False) -> None: ...


def nobody_waits(b: int, *, closing: bool = False) -> None:
    """Nobody is told."""


def nobody_watches(b: int, begins: bool) -> None:
    """In the place of `EnvironmentGroup.resetting`."""


def _seeds(run_seed: int, group: int, env: int, epoch: int) -> Callable[[int], int]:
    return lambda episode: streams.episode_seed(run_seed, group, env, episode, epoch)
