"""Environments with a vector form of their own: `gymnasium.make_vec`'s vector_entry_point, ale-py's AtariVectorEnv, or a user's VectorEnv.

Whatever its autoreset mode, a group shows the same thing: `ended` with the true last observation, and which rows are steps.

    NEXT_STEP   the last observation is row t+1 itself (`ended` has None); the step after it is the reset and is not valid
    SAME_STEP   row t+1 is the reset observation; the last one comes from info["final_obs"]
    DISABLED    the group keeps the last observation and resets by mask

The environments share one seed, so a group is exactly restorable only with snapshots, which a vector environment may offer:

    snapshots() -> list[bytes]                                   one per environment
    restore_snapshots(list[bytes]) -> (observation [B], info)
    snapshot_bytes: int                                          upper bound on one of them
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from shoal import streams
from shoal.config import EnvConfig
from shoal.environments.faults import (
    FaultKind,
    environment_errors,
    environment_fault,
    is_reset,
    not_fitting,
    raised_in,
    words_of,
    wrong_result,
)
from shoal.environments.group import Progress, nobody_waits, nobody_watches
from shoal.environments.spaces import MASK, SpaceMismatch, action_map, all_fit, allocate, describe, flatten_batch, which_fit
from shoal.environments.vector_snapshots import snapshots_of
from shoal.errors import ConfigError, EnvironmentFault, ShoalError
from shoal.types import CURSOR, Array, Arrays, Ended, EnvironmentSpec, GroupState, GroupStep


def native_factory(env: EnvConfig, callable_: Callable[..., Any] | None = None) -> Callable[[int], Any]:
    """A function num_envs -> gymnasium.vector.VectorEnv. A user's factory is called with num_envs and `env.kwargs`.

    Raises:
      ConfigError: the id has no vector form; as `make.registered`.
    """
    from shoal.environments.make import explained, is_atari, is_path, registered

    if callable_ is None and is_path(env.id):
        from shoal.imports import load_object

        callable_ = load_object(env.id)
    if callable_ is not None:
        factory = callable_
        return lambda num_envs: explained(env, lambda: factory(num_envs=num_envs, **env.kwargs))()
    import gymnasium

    spec = registered(env.id)
    if spec.vector_entry_point is None:
        raise ConfigError(f"env.form is native, but {env.id} has no vector form; leave env.form at auto")
    kwargs = dict(env.kwargs)
    if is_atari(spec):
        kwargs = {"episodic_life": True} | kwargs
        if env.max_episode_steps is not None:
            raise ConfigError("env.max_episode_steps: the native Atari form counts frames; set env.kwargs.max_num_frames_per_episode")
    elif env.max_episode_steps is not None:
        kwargs["max_episode_steps"] = env.max_episode_steps
    return lambda num_envs: explained(
        env, lambda: gymnasium.make_vec(spec, num_envs=num_envs, vectorization_mode="vector_entry_point", **kwargs)
    )()


def native_spec(env: EnvConfig, factory: Callable[..., Any] | None = None) -> EnvironmentSpec:
    """The spec of an environment in its native form. Raises ConfigError and EnvironmentFault, as NativeGroup."""
    vector = _made(env.id, 0, lambda: native_factory(env, factory)(1))
    try:
        return _describe(env.id, 0, vector)
    finally:
        with suppress(*environment_errors()):
            vector.close()


def _made(name: str, group: int, create: Callable[[], Any]) -> Any:
    import gymnasium

    vector = _guarded(name, group, "making the environment", create)
    if not isinstance(vector, gymnasium.vector.VectorEnv):
        raise ConfigError(f"env.form is native, but {name} made {type(vector).__name__}; a gymnasium.vector.VectorEnv was expected")
    return vector


_RESET, _STEP = "(observation, info)", "(observation, reward, terminated, truncated, info)"


def _guarded(name: str, group: int, call: str, action: Callable[[], Any]) -> Any:
    """Before the first episode: what it raises is a fault."""
    try:
        return action()
    except ShoalError:
        raise
    except environment_errors() as error:
        raise environment_fault(**raised_in(call, error), environment=name, group=group, env=0, step=0, seed=0) from error


def _describe(name: str, group: int, vector: Any) -> EnvironmentSpec:
    snapshots = snapshots_of(vector)
    result = _guarded(name, group, "reset()", lambda: vector.reset(seed=0))
    if not is_reset(result):
        what, field, expected, actual, hint = wrong_result("reset()", _RESET, result)
        raise environment_fault(
            "api", what, environment=name, group=group, env=0, step=0, seed=0, field=field, expected=expected, actual=actual, hint=hint
        )
    info = result[1]
    return describe(
        name, vector.single_observation_space, vector.single_action_space,
        mask_in_info=MASK in info, snapshot_bytes=snapshots.snapshot_bytes + 1 if snapshots else 0, exact_restore=snapshots is not None,
    )  # fmt: skip


def make_native_group(
    env: EnvConfig,
    group: int,
    num_envs: int,
    run_seed: int,
    factory: Callable[..., Any] | None = None,
    *,
    epoch: int = 0,
    progress: Progress = nobody_waits,
) -> NativeGroup:
    """A group over one vector environment; raises ConfigError where there is none."""
    create = native_factory(env, factory)
    return NativeGroup(lambda: create(num_envs), env.id, group, num_envs, run_seed, epoch, progress)


class NativeGroup:
    """An EnvironmentGroup over one VectorEnv.

    consumes: actions [B] as stored. waits for: the vector environment. on failure: EnvironmentFault, after which `restore` must follow.
    """

    def __init__(
        self,
        create: Callable[[], Any],
        name: str,
        group: int,
        num_envs: int,
        run_seed: int,
        epoch: int = 0,
        progress: Progress = nobody_waits,
    ) -> None:
        self._progress = progress
        self._create, self._name, self._group, self.num_envs = create, name, group, num_envs
        self._key = (run_seed, group, epoch)
        self._open()
        self._progress(0)
        self.spec = _describe(name, group, self._vector)
        self._current = allocate(self.spec, num_envs)
        self._to_environment = action_map(self.spec.action)
        self._cursor = np.zeros(num_envs, CURSOR)
        self._pending_B = np.zeros(num_envs, np.bool_)  # NEXT_STEP: ended at the last step, so that the next one is its reset
        self._last_action: Any = None
        self._given_up = False
        self.resetting: Callable[[int, bool], None] = nobody_watches

    def _open(self) -> None:
        from gymnasium.vector import AutoresetMode

        self._progress(0)
        self._vector = _made(self._name, self._group, self._create)
        self._snapshots = snapshots_of(self._vector)
        mode = self._vector.metadata.get("autoreset_mode")
        if mode is None:
            raise ConfigError(
                f"{self._name}: the vector environment does not say in metadata['autoreset_mode'] when it resets; set it to an AutoresetMode"
            )
        self._mode = AutoresetMode(mode)
        self._open_now = True

    def restore(self, state: GroupState) -> list[int]:
        """By snapshots where all are there; else every environment begins anew, and those that stood inside an episode are returned."""
        if not self._open_now:
            self._open()
        self._pending_B[:] = False
        self._progress(0)
        if self._snapshots and all(one is not None for one in state.snapshots):
            bodies = [one[1:] for one in state.snapshots if one is not None]
            observation, info = self._reset("restore_snapshots()", lambda: self._snapshots.restore_snapshots(bodies))
            self._cursor[:] = state.cursor
            self._pending_B[:] = [one[0] for one in state.snapshots if one is not None]
            lost: list[int] = []
        else:
            begun = state.cursor["num_steps"] > 0
            lost = [int(b) for b in np.flatnonzero(begun)]
            self._cursor[:] = state.cursor
            self._cursor["episode"] += begun
            observation, info = self._begin_all()
        self._take("reset()", observation, info)
        return lost

    def _begin_all(self) -> tuple[Any, dict[str, Any]]:
        """Reset all, with a seed that depends on how many episodes were begun before."""
        run_seed, group, epoch = self._key
        seed = streams.group_seed(run_seed, group, int(self._cursor["episode"].sum()), epoch)
        self._cursor["seed"], self._cursor["num_steps"], self._cursor["episode_return"] = seed, 0, 0.0
        return self._reset("reset()", lambda: self._vector.reset(seed=seed))

    def give_up(self, b: int) -> None:
        """At the next step, end every environment's episode as an invalid row: a vector form can only be given up as a whole."""
        self._given_up = True

    def name_next_step(self, told: Callable[[int], None]) -> None:
        """A vector form steps all at once: whatever breaks goes by the name of its first environment."""
        told(0)

    def _end_given_up(self, out: Arrays) -> GroupStep:
        self._given_up = False
        ended = [self._end_of(b, self._row(b)) for b in range(self.num_envs)]
        self._cursor["episode"] += 1
        self.resetting(0, True)
        self._take("reset()", *self._begin_all())
        self.resetting(0, False)
        self._pending_B[:] = False
        self.observe(out)
        none_B, all_B = np.zeros(self.num_envs, np.bool_), np.ones(self.num_envs, np.bool_)
        return GroupStep(np.zeros(self.num_envs), none_B, all_B, none_B, ended)

    def observe(self, out: Arrays) -> None:
        """Write the current observation (and mask) of every environment into `out`."""
        for name, array in self._current.items():
            out[name][...] = array

    def step(self, action_B: Array, out: Arrays) -> GroupStep:
        """Step every environment; see EnvironmentGroup."""
        from gymnasium.vector import AutoresetMode

        if self._given_up:
            return self._end_given_up(out)
        self._last_action = self._to_environment(action_B)
        result = self._guard("step()", lambda: self._vector.step(self._last_action))
        if not isinstance(result, tuple) or len(result) != 5 or not isinstance(result[4], dict):
            raise self._fault("api", *wrong_result("step()", _STEP, result))
        observation, reward, terminated, truncated, info = result
        reward_B, terminated_B, truncated_B = self._outcome(reward, terminated, truncated)
        valid_B = ~self._pending_B
        ended_B = (terminated_B | truncated_B) & valid_B
        self._count(reward_B, valid_B)
        ended: list[Ended] = []
        if self._mode is AutoresetMode.SAME_STEP:
            ended = [self._end_of(b, self._final_of(info, b)) for b in map(int, np.flatnonzero(ended_B))]
        self._take("step()", observation, info)
        if self._mode is AutoresetMode.NEXT_STEP:
            ended = [self._end_of(b, None) for b in map(int, np.flatnonzero(ended_B))]
            self._pending_B = ended_B
        elif self._mode is AutoresetMode.DISABLED and ended_B.any():
            ended = [self._end_of(b, self._row(b)) for b in map(int, np.flatnonzero(ended_B))]
            self.resetting(0, True)
            observation, info = self._reset("reset()", lambda: self._vector.reset(options={"reset_mask": ended_B.copy()}))
            self.resetting(0, False)
            self._take_some(observation, info, ended_B)
        self._cursor["episode"][ended_B] += 1
        self._cursor["num_steps"][ended_B] = 0
        self._cursor["episode_return"][ended_B] = 0.0
        self.observe(out)
        return GroupStep(reward_B, terminated_B & valid_B, truncated_B & valid_B, valid_B, ended)

    def _end_of(self, b: int, final: Arrays | None) -> Ended:
        cursor = self._cursor[b]
        return Ended(b, final, int(cursor["seed"]), int(cursor["num_steps"]), float(cursor["episode_return"]))

    def cursor(self) -> Array:
        """CURSOR [B] without the checksums; `seed` is the one that all environments share."""
        cursor = self._cursor.copy()
        cursor["observation_crc"] = cursor["reward_crc"] = 0
        return cursor

    def snapshots(self) -> list[bytes | None]:
        """One per environment, or None where the vector form offers none."""
        if not self._snapshots:
            return [None] * self.num_envs
        taken, longest = self._guard("snapshots()", self._snapshots.snapshots), self.spec.snapshot_bytes - 1
        whole = isinstance(taken, (list, tuple)) and len(taken) == self.num_envs
        if not whole or not all(isinstance(one, bytes) and len(one) <= longest for one in taken):
            actual = f"{type(taken).__name__} {taken!r:.100}"
            expected = f"{self.num_envs} times bytes, at most {longest} each"
            raise self._fault("snapshot", "snapshots() broke its promise", "snapshots", expected, actual)
        return [bytes([int(pending)]) + one for pending, one in zip(self._pending_B, taken, strict=True)]

    def close(self) -> None:
        if self._open_now:
            self._open_now = False
            self._progress(0, closing=True)
            with suppress(*environment_errors()):  # it is given up anyway
                self._vector.close()

    def _outcome(self, reward: Any, terminated: Any, truncated: Any) -> tuple[Array, Array, Array]:
        arrays = []
        for field, value, kinds in (("reward", reward, "fiub"), ("terminated", terminated, "b"), ("truncated", truncated, "b")):
            array = np.asarray(value)
            if array.shape != (self.num_envs,) or array.dtype.kind not in kinds:
                raise self._fault(
                    "reward" if field == "reward" else "flag",
                    f"{field} is not what was expected",
                    field,
                    f"[{self.num_envs}]",
                    f"{array.dtype} {list(array.shape)}",
                )
            arrays.append(array.astype(np.float64 if field == "reward" else np.bool_))
        if not all_fit(arrays[0]):
            b = int(np.flatnonzero(~which_fit(arrays[0]))[0])
            what, expected = not_fitting("reward", arrays[0])
            raise self._fault("reward", what, "reward", expected, f"{arrays[0].tolist()}", env=b)
        return arrays[0], arrays[1], arrays[2]

    def _count(self, reward_B: Array, valid_B: Array) -> None:
        reward_B[~valid_B] = 0.0
        self._cursor["num_steps"] += valid_B
        self._cursor["episode_return"] += reward_B

    def _row(self, b: int) -> Arrays:
        return {name: array[b].copy() for name, array in self._current.items() if name != MASK}

    def _final_of(self, info: dict[str, Any], b: int) -> Arrays:
        if "final_obs" not in info:
            raise self._fault(
                "api", 'info has no "final_obs", which SAME_STEP autoreset promises', "final_obs", "the last observation", f"{sorted(info)}"
            )
        final = _row_of(info["final_obs"], b)
        out = allocate(self.spec, 1)
        out.pop(MASK, None)
        try:
            flatten_batch(_without_mask(self.spec), _batch_of_one(final), out)
        except SpaceMismatch as mismatch:
            raise self._fault(mismatch.kind, "final_obs is not in the space", mismatch.field, mismatch.expected, mismatch.actual) from None
        return {name: array[0] for name, array in out.items()}

    def _take(self, where: str, observation: Any, info: dict[str, Any]) -> None:
        self._flatten(where, observation, info, self._current)

    def _take_some(self, observation: Any, info: dict[str, Any], chosen_B: Array) -> None:
        whole = allocate(self.spec, self.num_envs)
        self._flatten("reset()", observation, info, whole)
        for name, array in self._current.items():
            array[chosen_B] = whole[name][chosen_B]

    def _flatten(self, where: str, observation: Any, info: dict[str, Any], out: Arrays) -> None:
        try:
            flatten_batch(self.spec, observation, out)
            if self.spec.action_mask == "info" and MASK in info:
                out[MASK][...] = np.stack([np.concatenate([np.ravel(p) for p in np.atleast_1d(m)]) for m in info[MASK]]) != 0
        except SpaceMismatch as mismatch:
            what = f"{where} returned an observation that is not in its space"
            raise self._fault(mismatch.kind, what, mismatch.field, mismatch.expected, mismatch.actual, mismatch.hint) from None
        except Exception as error:
            what = f"what {where} returned cannot be read: {words_of(error)}"
            promised = "what the spaces promise, and a dict"
            raise self._fault("structure", what, "observation, info", promised, type(observation).__name__, error=error) from error
        for name, array in out.items():
            if array.dtype.kind == "f" and not all_fit(array):
                b = int(np.flatnonzero(~which_fit(array.reshape(self.num_envs, -1)).all(1))[0])
                what, expected = not_fitting("observation", array[b])
                raise self._fault("not_finite", what, name, expected, f"{array[b].ravel()[:16].tolist()}", env=b)

    def _reset(self, call: str, action: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        result: tuple[Any, dict[str, Any]] = self._guard(call, action)
        if not is_reset(result):
            raise self._fault("api", *wrong_result(call, _RESET, result))
        return result

    def _guard(self, call: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except environment_errors() as error:
            raise self._fault(**raised_in(call, error, "snapshot" if "snapshots" in call else "raised")) from error

    def _fault(
        self,
        kind: FaultKind,
        what: str,
        field: str = "",
        expected: str = "",
        actual: str = "",
        hint: str = "",
        *,
        env: int = 0,
        error: BaseException | None = None,
    ) -> EnvironmentFault:
        self.close()
        row = self._cursor[env]
        step = int(row["num_steps"]) + (self._last_action is not None and kind != "snapshot")
        return environment_fault(
            kind, what, environment=self._name, group=self._group, env=env, step=step, seed=int(row["seed"]),
            last_action=self._last_action, field=field, expected=expected, actual=actual, hint=hint, error=error,
        )  # fmt: skip


def _without_mask(spec: EnvironmentSpec) -> EnvironmentSpec:
    from dataclasses import replace

    return replace(spec, action_mask="none")


def _row_of(batched: Any, b: int) -> Any:
    if isinstance(batched, dict):
        return {key: _row_of(value, b) for key, value in batched.items()}
    if isinstance(batched, tuple):
        return tuple(_row_of(value, b) for value in batched)
    return batched[b]


def _batch_of_one(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _batch_of_one(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_batch_of_one(part) for part in value)
    return np.asarray(value)[None]
