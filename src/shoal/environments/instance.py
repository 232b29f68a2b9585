"""One environment of a group: its episodes, each with a seed of its own, and everything that is checked at each step.

An environment may offer snapshots, which are cheaper than re-stepping, and exact where re-stepping is not:

    snapshot() -> bytes                                  everything that its future depends on, in a fixed layout, never a pickle
    restore_snapshot(data: bytes) -> (observation, info) stand there again, also in a new instance; the observation as it was then
    snapshot_bytes: int                                  upper bound on the length of a snapshot

`gymnasium.make`'s own wrappers (OrderEnforcing, PassiveEnvChecker, TimeLimit, Autoreset) are taken off: what they do is done here.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from shoal.environments.faults import (
    FaultKind,
    TookTooLong,
    environment_errors,
    environment_fault,
    is_reset,
    not_fitting,
    raised_in,
    words_of,
    wrong_result,
)
from shoal.environments.spaces import MASK, MOST, SpaceMismatch, all_fit, extend_crc, mask_writer, observation_writer, which_fit
from shoal.errors import ConfigError, EnvironmentFault
from shoal.types import Array, Arrays, Ended, EnvironmentSpec

_LEAST = -MOST
_REWARD = struct.Struct("=d")
_SNAPSHOT_HEADER = struct.Struct("<I")  # crc32 of the observation at the snapshot, compared after restoring


def unwrap(env: Any) -> tuple[Any, int | None]:
    """The environment without gymnasium's bookkeeping wrappers, and the time limit that was among them.

    Raises:
      ConfigError: no gymnasium.Env, or an Autoreset wrapper deep inside, which would hide the ends of episodes.
    """
    import gymnasium
    from gymnasium import wrappers

    if not isinstance(env, gymnasium.Env):
        raise ConfigError(f"the environment's factory returned {type(env).__name__}, but a gymnasium.Env was expected")
    limit: int | None = None
    while isinstance(env, (wrappers.OrderEnforcing, wrappers.PassiveEnvChecker, wrappers.TimeLimit, wrappers.Autoreset)):
        if isinstance(env, wrappers.TimeLimit):
            own = int(env._max_episode_steps)
            limit = own if limit is None else min(limit, own)
        env = env.env
    inner = env
    while isinstance(inner, gymnasium.Wrapper):
        inner = inner.env
        if isinstance(inner, wrappers.Autoreset):
            raise ConfigError(
                "the environment resets itself (gymnasium.wrappers.Autoreset); remove that wrapper: shoal resets each episode with a seed of its own"
            )
    return env, limit


def offered_snapshot_bytes(env: Any) -> int:
    """Upper bound on an environment's snapshot as a group keeps it, 0 where it offers none."""
    bare, _ = unwrap(env)
    if callable(getattr(bare, "snapshot", None)) and callable(getattr(bare, "restore_snapshot", None)):
        return int(bare.snapshot_bytes) + _SNAPSHOT_HEADER.size
    return 0


class Instance:
    """Environment b of a group. Observations go into row b of `current`; `ended` says what the last ended episode came to.

    After an EnvironmentFault the instance is not usable until `restore`, which makes a new environment.
    """

    def __init__(
        self,
        create: Callable[[], Any],
        spec: EnvironmentSpec,
        current: Arrays,
        group: int,
        index: int,
        seed_of: Callable[[int], int],
    ) -> None:
        self._create, self._spec, self._current = create, spec, current
        self._group, self._index, self._seed_of = group, index, seed_of
        self._rows: Arrays = {name: array[index, ...] for name, array in current.items()}
        self._write = observation_writer(spec, self._rows)
        self._write_mask = mask_writer(spec, self._rows[MASK]) if spec.action_mask == "info" else None
        self._env: Any = None
        self._step: Callable[[Any], Any] = _not_open
        self._limit: float = float("inf")
        self._failed = False
        self.resetting: Callable[[bool], None] = _nobody_watches  # True: a reset follows, that of an episode's end; False: it is over
        self._given_up = 0  # times: so many episodes are passed over
        self._last_action: Any = None
        self.episode, self.seed, self.num_steps = 0, 0, 0
        self.episode_return = 0.0
        self.reward = 0.0
        self.terminated = self.truncated = False
        self.valid = True
        self.ended: Ended | None = None

    def open(self) -> None:
        """Make the environment; what it raises is a fault."""
        self.close()
        try:
            self._env = self._create()
        except (ConfigError, EnvironmentFault):
            raise
        except environment_errors() as error:
            raise self._fault(**raised_in("making the environment", error)) from error
        bare, limit = unwrap(self._env)
        self._bare, self._step = bare, bare.step
        self._limit = float("inf") if limit is None else float(limit)

    def close(self) -> None:
        env, self._env, self._failed = self._env, None, False
        if env is not None:
            try:
                env.close()
            except TookTooLong as error:
                raise self._fault(**raised_in("close()", error)) from error
            except environment_errors():
                pass  # it is given up anyway, and what matters of it is recorded

    # Stepping.

    def advance(self, action: Any) -> bool:
        """One step. Where the episode ends, keeps `ended`, begins the next episode, and returns True.

        Raises:
          EnvironmentFault: the environment raised, or returned something else than its spaces promise.
        """
        if self._given_up:
            return self._end_given_up()
        terminated, truncated = self.apply(action)
        if terminated or truncated:
            self.terminated, self.truncated = terminated, truncated
            self._keep_end(check=True)
            self._begin_next(1)
            return True
        return False

    def apply(self, action: Any) -> tuple[bool, bool]:
        self._last_action = action
        try:
            result = self._step(action)
        except environment_errors() as error:
            self.num_steps += 1  # counted as those are whose result is a fault
            raise self._fault(**raised_in("step()", error)) from error
        self.num_steps += 1
        if result.__class__ is not tuple or len(result) != 5 or not isinstance(result[4], dict):
            raise self._fault("api", *wrong_result("step()", "(observation, reward, terminated, truncated, info)", result))
        observation, reward, terminated, truncated, info = result
        if reward.__class__ is not float:
            reward = self._scalar(reward)
        if not _LEAST <= reward <= MOST:  # nor is NaN
            what, expected = not_fitting("reward", np.array(reward))
            raise self._fault("reward", what, "reward", expected, repr(reward))
        self.reward = reward
        self.episode_return += reward
        try:
            self._write(observation)
            if self._write_mask is not None:
                self._write_mask(info[MASK] if MASK in info else np.ones(self._spec.mask_size, np.bool_))
        except SpaceMismatch as mismatch:
            raise self._mismatch("step()", mismatch) from None
        except Exception as error:
            raise self._unreadable("step()", error) from error
        if terminated is False and truncated is False and self.num_steps < self._limit:
            return False, False
        return self._flag("terminated", terminated), self._flag("truncated", truncated) or self.num_steps >= self._limit

    def _scalar(self, reward: Any) -> float:
        if isinstance(reward, (int, float, np.integer, np.floating, np.bool_)):
            with suppress(OverflowError):  # an int beyond all floats
                return float(reward)
            return float("inf")
        if isinstance(reward, np.ndarray) and reward.shape == () and reward.dtype.kind in "fiub":
            return float(reward)
        actual = f"{type(reward).__name__} {reward!r:.60}"
        raise self._fault("reward", "the reward is no scalar", "reward", "a finite number", actual, hint="return float(reward)")

    def _flag(self, name: str, value: Any) -> bool:
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
        raise self._fault("flag", f"{name} is no bool", name, "True or False", f"{type(value).__name__} {value!r:.60}")

    def _keep_end(self, check: bool) -> None:
        final = {name: row.copy() for name, row in self._rows.items() if name != MASK}
        for name, array in final.items():
            if check and array.dtype.kind == "f" and not all_fit(array):
                raise self.not_finite(name, array)
        self.ended = Ended(self._index, final, self.seed, self.num_steps, self.episode_return)

    def _end_given_up(self) -> bool:
        self.reward, self.valid, self.terminated, self.truncated = 0.0, False, False, True
        self._keep_end(check=False)
        passed, self._given_up = self._given_up, 0
        self._begin_next(passed)
        return True

    def give_up(self) -> None:
        """End the running episode as invalid at the next step, without stepping it, and begin the next; called n times, the n-th."""
        self._given_up += 1

    def _begin_next(self, passed: int) -> None:
        self.resetting(True)
        self._begin(self.episode + passed)
        self.resetting(False)

    def _begin(self, episode: int, seed: int | None = None) -> None:
        self.episode, self.num_steps, self.episode_return = episode, 0, 0.0
        self.seed = self._seed_of(episode) if seed is None else seed
        try:
            result = self._bare.reset(seed=self.seed)
        except environment_errors() as error:
            raise self._fault(**raised_in("reset()", error)) from error
        if not is_reset(result):
            raise self._fault("api", *wrong_result("reset()", "(observation, info)", result))
        self._take("reset()", *result)

    def _take(self, where: str, observation: Any, info: Any) -> None:
        try:
            self._write(observation)
            if self._write_mask is not None:
                self._write_mask(info[MASK] if MASK in info else np.ones(self._spec.mask_size, np.bool_))
        except SpaceMismatch as mismatch:
            raise self._mismatch(where, mismatch) from None
        except Exception as error:
            raise self._unreadable(where, error) from error

    # Standing somewhere again.

    def restore(self, cursor: Array, actions: list[Any], snapshot: bytes | None, progress: Callable[[], None] = lambda: None) -> bool:
        """Stand where `cursor` (one CURSOR record) says, by `snapshot` or by re-stepping `actions` (as the environment takes them).

        progress: called before each call of the environment, so that whoever watches knows how long that one takes.
        Returns False where what came was not what was recorded: then the next episode has begun.
        """
        progress()
        if self._env is None or self._failed:
            self.open()
        self._given_up = 0
        progress()
        if snapshot is not None:
            same = self._restore_snapshot(snapshot)
            self.episode, self.seed = int(cursor["episode"]), int(cursor["seed"])
            self.num_steps, self.episode_return = int(cursor["num_steps"]), float(cursor["episode_return"])
        else:
            same = self._restep(cursor, actions, progress) or self._restep_anew(cursor, actions, progress)
        if not same:
            self._begin(int(cursor["episode"]) + 1)
        return same

    def _restep_anew(self, cursor: Array, actions: list[Any], progress: Callable[[], None]) -> bool:
        """Once more in a new environment: what came otherwise may have been an accident, such as a NaN."""
        if len(actions) != int(cursor["num_steps"]):
            return False
        progress()
        self.open()
        progress()
        return self._restep(cursor, actions, progress)

    def _restep(self, cursor: Array, actions: list[Any], progress: Callable[[], None]) -> bool:
        num_steps = int(cursor["num_steps"])
        self._begin(int(cursor["episode"]), int(cursor["seed"]) if num_steps else None)
        if len(actions) != num_steps:
            return False
        crc, reward_crc = extend_crc(0, self._spec, self._current, self._index), 0
        rows = [self._current[leaf.name("observation")][self._index : self._index + 1].data for leaf in self._spec.observation]
        for action in actions:
            progress()
            terminated, truncated = self.apply(action)
            if terminated or truncated:
                return False
            for row in rows:
                crc = zlib.crc32(row, crc)
            reward_crc = zlib.crc32(_REWARD.pack(self.reward), reward_crc)
        if not cursor["observation_crc"] or (num_steps == 0 and self.seed != int(cursor["seed"])):
            return True  # nothing was recorded, or the episode begins here with a new seed
        return bool(crc == cursor["observation_crc"] and reward_crc == cursor["reward_crc"])

    def snapshot(self) -> bytes | None:
        """The environment's snapshot after a header of our own, or None where it offers none.

        Raises:
          EnvironmentFault: it raised, gave no bytes, or more than `snapshot_bytes` of them.
        """
        if not self._spec.snapshot_bytes:
            return None
        try:
            taken = self._bare.snapshot()
        except environment_errors() as error:
            raise self._fault(**raised_in("snapshot()", error, "snapshot")) from error
        longest = self._spec.snapshot_bytes - _SNAPSHOT_HEADER.size
        if not isinstance(taken, (bytes, bytearray, memoryview)) or len(taken) > longest:
            actual = f"{len(taken)} bytes" if isinstance(taken, (bytes, bytearray, memoryview)) else f"{type(taken).__name__} {taken!r:.60}"
            hint = "return bytes, and set snapshot_bytes to an upper bound of their number"
            raise self._fault("snapshot", "snapshot() broke its promise", "snapshot", f"at most {longest} bytes", actual, hint)
        crc = extend_crc(0, self._spec, self._current, self._index)
        return _SNAPSHOT_HEADER.pack(crc) + bytes(taken)

    def _restore_snapshot(self, snapshot: bytes) -> bool:
        (crc,) = _SNAPSHOT_HEADER.unpack_from(snapshot)
        try:
            result = self._bare.restore_snapshot(snapshot[_SNAPSHOT_HEADER.size :])
        except environment_errors() as error:
            raise self._fault(**raised_in("restore_snapshot()", error, "snapshot")) from error
        if not is_reset(result):
            raise self._fault("snapshot", *wrong_result("restore_snapshot()", "(observation, info)", result))
        self._take("restore_snapshot()", *result)
        return bool(extend_crc(0, self._spec, self._current, self._index) == crc)

    # Faults.

    def not_finite(self, field: str, array: Array) -> EnvironmentFault:
        """The fault of a NaN or Inf in `field`, or of a number that float32 does not hold."""
        bad = np.flatnonzero(~which_fit(array.ravel()))
        actual = f"{array.ravel()[bad[0]]} at flat index {bad[0]} ({len(bad)} of {array.size})"
        what, expected = not_fitting("observation", array)
        return self._fault("not_finite", what, field, expected, actual)

    def check_finite(self) -> None:
        """Raise the fault of a NaN or Inf in this environment's observation (a group looks at all of its environments at once)."""
        for name, row in self._rows.items():
            if row.dtype.kind == "f" and not all_fit(row):
                raise self.not_finite(name, row)

    def _mismatch(self, where: str, mismatch: SpaceMismatch) -> EnvironmentFault:
        return self._fault(
            mismatch.kind, f"{where} returned an observation that is not in its space",
            mismatch.field, mismatch.expected, mismatch.actual, hint=mismatch.hint,
        )  # fmt: skip

    def _unreadable(self, where: str, error: Exception) -> EnvironmentFault:
        what = f"what {where} returned cannot be read: {words_of(error)}"
        return self._fault("structure", what, "observation, info", "what the spaces promise, and a dict", error=error)

    def _fault(
        self,
        kind: FaultKind,
        what: str,
        field: str = "",
        expected: str = "",
        actual: str = "",
        hint: str = "",
        error: BaseException | None = None,
    ) -> EnvironmentFault:
        self._failed = True  # closed by whoever hears of it: that may take long, or raise, or hang
        return environment_fault(
            kind, what, environment=self._spec.name, group=self._group, env=self._index, step=self.num_steps, seed=self.seed,
            last_action=self._last_action, field=field, expected=expected, actual=actual, hint=hint, error=error,
        )  # fmt: skip


def _nobody_watches(begins: bool) -> None:
    """Nothing."""


def _not_open(action: Any) -> Any:
    raise RuntimeError("restore() puts a group somewhere before it can be stepped")
