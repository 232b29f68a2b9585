"""Small environments whose every number is known, and helpers to drive a group."""

from __future__ import annotations

import struct
import threading
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from shoal.environments.spaces import allocate, extend_crc
from shoal.types import CURSOR, Arrays, EnvironmentSpec, GroupState


class Walk(gymnasium.Env):
    """Observes [seed, steps since reset, position]; the episode terminates after a length that its seed decides, 3 to 9 steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Discrete(3, start=-1)

    def __init__(self, truncate: bool = False, length: int | None = None) -> None:
        self._truncate, self._fixed = truncate, length

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.seed, self.count, self.position = float(seed or 0), 0, float(self.np_random.normal())
        self.length = self._fixed or int(self.np_random.integers(3, 10))
        return self.observe(), {}

    def observe(self) -> Any:
        return np.array([self.seed, self.count, self.position])

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        self.position += float(action) + 0.1 * float(self.np_random.normal())
        over = self.count >= self.length
        return self.observe(), self.position, over and not self._truncate, over and self._truncate, {}


class SnapshotWalk(Walk):
    """Walk with snapshots; its chance does not come from the reset's seed alone, so that re-stepping could not rebuild it."""

    snapshot_bytes = 40
    lifetime = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.lifetime += 1  # a used instance differs from a fresh one
        self.position += self.lifetime
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        self.position += float(action)
        return self.observe(), self.position, self.count >= self.length, False, {}

    def snapshot(self) -> bytes:
        return struct.pack("<dqdqq", self.seed, self.count, self.position, self.length, self.lifetime)

    def restore_snapshot(self, data: bytes) -> tuple[Any, dict[str, Any]]:
        self.seed, self.count, self.position, self.length, self.lifetime = struct.unpack("<dqdqq", data)
        return self.observe(), {}


class Forgetful(Walk):
    """Every reset gives other numbers, whatever the seed."""

    resets = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        Forgetful.resets += 1
        super().reset(seed=seed)
        self.position = float(Forgetful.resets)
        return self.observe(), {}


class OneBuffer(Walk):
    """Returns the same array at each step."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer = np.zeros(3)

    def observe(self) -> Any:
        self._buffer[:] = self.seed, self.count, self.position
        return self._buffer


class Threads(Walk):
    """Notes in which thread it is made, stepped and reset, and waits a little."""

    def __init__(self) -> None:
        super().__init__()
        self.threads = {threading.get_ident()}

    def step(self, action: Any) -> Any:
        self.threads.add(threading.get_ident())
        time.sleep(0.001 * (self.count % 3))
        return super().step(action)


class Nested(gymnasium.Env):
    """Dict of Dict, Tuple, and every elementary kind; the mask stands in the observation."""

    observation_space = spaces.Dict(
        {
            "z": spaces.Discrete(4, start=2),
            "camera": spaces.Tuple((spaces.Box(0, 255, (2, 3), np.uint8), spaces.MultiBinary(3))),
            "inner": spaces.Dict({"b": spaces.MultiDiscrete([2, 3]), "a": spaces.Box(-1, 1, (), np.float32)}),
            "action_mask": spaces.MultiBinary(5),
        }
    )
    action_space = spaces.MultiDiscrete([2, 3])

    def observe(self) -> dict[str, Any]:
        n = self.count
        return {
            "z": np.int64(2 + n % 4),
            "camera": (np.full((2, 3), n, np.uint8), np.array([n % 2, 1, 0], np.int8)),
            "inner": {"b": np.array([n % 2, n % 3]), "a": np.array(n / 10, np.float32)},
            "action_mask": np.array([1, n % 2, 0, 1, 1], np.int8),
        }

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.count = 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.count += 1
        return self.observe(), 1.0, False, self.count == 7, {}


class VectorWalk(VectorEnv):
    """B counters in any autoreset mode: observes [episode, steps], ends every `lengths[b]` steps by truncation."""

    def __init__(self, num_envs: int, mode: AutoresetMode, lengths: tuple[int, ...] = (3, 4, 5)) -> None:
        self.num_envs, self.mode, self.lengths = num_envs, mode, np.array(lengths[:num_envs])
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, np.bool_))
        if options is None:
            self.episode, self.count = np.full(self.num_envs, -1), np.zeros(self.num_envs, np.int64)
            self.ended = np.zeros(self.num_envs, np.bool_)
        self.episode[mask] += 1
        self.count[mask] = 0
        return self._observe(), {}

    def _observe(self) -> Any:
        return np.stack([self.episode, self.count], 1).astype(np.float32)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        assert actions.shape == (self.num_envs,)
        resets = self.ended if self.mode is AutoresetMode.NEXT_STEP else np.zeros(self.num_envs, np.bool_)
        self.count[~resets] += 1
        self.episode[resets] += 1
        self.count[resets] = 0
        reward = np.where(resets, 99.0, 1.0)
        ended = (self.count >= self.lengths) & ~resets
        info: dict[str, Any] = {}
        if self.mode is AutoresetMode.SAME_STEP and ended.any():
            final = np.full(self.num_envs, None, object)
            for b in np.flatnonzero(ended):
                final[b] = self._observe()[b].copy()
            info["final_obs"] = final
            self.episode[ended] += 1
            self.count[ended] = 0
        self.ended = ended
        return self._observe(), reward, np.zeros(self.num_envs, np.bool_), ended, info


def fresh_state(spec: EnvironmentSpec, num_envs: int) -> GroupState:
    dtype = {"box": np.float32, "multi_binary": np.int8}.get(spec.action.kind, np.int64)
    return GroupState(np.zeros(num_envs, CURSOR), [np.zeros((0, *spec.action.shape), dtype)] * num_envs, [None] * num_envs)


class Recorder:
    """Drives a group and keeps what an actor keeps: the actions of running episodes, checksums, and every row seen."""

    def __init__(self, group: Any) -> None:
        self.group, self.spec = group, group.spec
        self.rows: list[Arrays] = []
        self.steps: list[Any] = []
        self.actions: list[list[Any]] = [[] for _ in range(group.num_envs)]
        self.crc = [0] * group.num_envs
        self.reward_crc = [0] * group.num_envs

    def begin(self, state: GroupState | None = None) -> list[int]:
        lost = self.group.restore(state or fresh_state(self.spec, self.group.num_envs))
        row = allocate(self.spec, self.group.num_envs)
        self.group.observe(row)
        self.rows.append(row)
        for b in range(self.group.num_envs):
            self.crc[b] = extend_crc(0, self.spec, row, b)
        return lost

    def step(self, action_B: Any) -> Any:
        import zlib

        row = allocate(self.spec, self.group.num_envs)
        step = self.group.step(np.asarray(action_B), row)
        ended = {e.env for e in step.ended}
        for b in range(self.group.num_envs):
            if b in ended:
                self.actions[b], self.crc[b], self.reward_crc[b] = [], extend_crc(0, self.spec, row, b), 0
            else:
                self.actions[b].append(np.array(action_B[b]))
                self.crc[b] = extend_crc(self.crc[b], self.spec, row, b)
                self.reward_crc[b] = zlib.crc32(np.float64(step.reward_B[b]).tobytes(), self.reward_crc[b])
        self.rows.append(row)
        kept = step._replace(**{n: getattr(step, n).copy() for n in ("reward_B", "terminated_B", "truncated_B", "valid_B")})
        self.steps.append(kept)
        return kept

    def state(self, snapshots: bool = True) -> GroupState:
        cursor = self.group.cursor()
        cursor["observation_crc"], cursor["reward_crc"] = self.crc, self.reward_crc
        blank = fresh_state(self.spec, 1).actions[0]
        actions = [np.concatenate([blank, np.stack(one)]) if one else blank for one in self.actions]
        taken = self.group.snapshots() if snapshots else [None] * self.group.num_envs
        return GroupState(cursor, actions, taken)


def same_rows(one: Recorder, other: Recorder, from_row: int = 0, other_from: int = 0) -> None:
    """Assert that two recordings hold the same bits."""
    left, right = one.rows[from_row:], other.rows[other_from:]
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    for s, t in zip(one.steps[from_row:], other.steps[other_from:], strict=True):
        for x, y in zip(s[:4], t[:4], strict=True):
            np.testing.assert_array_equal(x, y)
        assert [e.env for e in s.ended] == [e.env for e in t.ended]
        for (_, x, *_), (_, y, *_) in zip(s.ended, t.ended, strict=True):
            assert (x is None) == (y is None)
            for name in x or {}:
                np.testing.assert_array_equal(x[name], y[name])
