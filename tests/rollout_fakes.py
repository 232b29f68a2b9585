"""A scripted world whose every number can be computed by hand, for the tests of ring, actor, learner and engines.

Legend: T rows of a rollout, B environments of a group.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from shoal.environments.spaces import MASK, mask_writer, observation_writer
from shoal.environments.spaces import allocate as allocate_observation
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring, Slot, allocate
from shoal.experience.schema import Schema, rollout_schema
from shoal.types import CURSOR, Acted, Array, Arrays, Ended, EnvironmentSpec, FieldSpec, GroupState, GroupStep, LeafSpec

RUN_ID = bytes(range(16))
NUM_ACTIONS = 5

POSITION = LeafSpec(("position",), "box", "float32", (2,), low=(-np.inf,), high=(np.inf,))
CAMERA = LeafSpec(("camera",), "box", "uint8", (2, 3), low=(0.0,), high=(255.0,))
ACTION = LeafSpec((), "discrete", "int64", (), nvec=(NUM_ACTIONS,), start=(0,))


def scripted_spec(mask: bool = True, snapshot_bytes: int = 0, exact_restore: bool = True) -> EnvironmentSpec:
    return EnvironmentSpec(
        "scripted", (CAMERA, POSITION), ACTION, "observation" if mask else "none", NUM_ACTIONS if mask else 0, snapshot_bytes, exact_restore
    )


def policy_fields(state: bool = True) -> list[FieldSpec]:
    fields = [FieldSpec("action", "int64", (), "T"), FieldSpec("log_prob", "float32", (), "T")]
    return [*fields, FieldSpec("policy_state/h", "float32", (2,), "B")] if state else fields


def scripted_schema(num_rows: int = 4, num_envs: int = 3, *, state: bool = True, **spec: Any) -> Schema:
    return rollout_schema(scripted_spec(**spec), policy_fields(state), num_rows, num_envs)


def flatten_observation(spec: EnvironmentSpec, observation: Any, info: Mapping[str, Any] | None = None) -> Arrays:
    """One (nested) observation as arrays by field name, [*shape], with `action_mask` [A] where the spec has one.

    Raises:
      SpaceMismatch: the observation is not what the spec says.
    """
    rows = allocate_observation(spec)
    observation_writer(spec, rows)(observation)
    if spec.action_mask == "info" and info is not None and MASK in info:
        mask_writer(spec, rows[MASK])(info[MASK])
    return rows


def poisoned_ring(schema: Schema, num_slots: int) -> Ring:
    """A ring whose memory shows wherever something is read that nobody wrote."""
    ring = allocate(schema, num_slots)
    for index in range(num_slots):
        ring.poison(index)
    return ring


def seed_of(group: int, env: int, episode: int) -> int:
    return 1_000_000 * (group + 1) + 1_000 * env + episode


def reward_of(seed: int, step: int, action: int) -> float:
    return seed % 7 + step / 8 + action / 16


def observation_of(seed: int, step: int) -> Arrays:
    return {
        "observation/camera": np.full((2, 3), (seed * 31 + step) % 256, np.uint8),
        "observation/position": np.array([seed, step], np.float32),
    }


def mask_of(seed: int, step: int) -> Array:
    mask = np.ones(NUM_ACTIONS, np.bool_)
    mask[(seed + step) % NUM_ACTIONS] = False
    return mask


def length_of(seed: int) -> int:
    return 2 + seed % 4


def truncates(seed: int) -> bool:
    return seed % 2 == 1


class ScriptedGroup:
    """An environment group without an environment: everything follows from (group, env, episode, step, action).

    Episodes last 2 to 5 steps; those of odd seeds are truncated. It keeps what it was asked (`calls`). next_step: the reset takes a row
    of its own. lost: environments that `restore` says it could not rebuild. fault: (num of step calls, exception) to raise.
    """

    def __init__(
        self,
        group: int,
        num_envs: int,
        *,
        next_step: bool = False,
        snapshots: bool = False,
        lost: tuple[int, ...] = (),
        fault: tuple[int, Exception] | None = None,
        mask: bool = True,
    ) -> None:
        self.spec, self.num_envs = scripted_spec(mask), num_envs
        self._group, self._next_step, self._snapshots, self._lost, self._fault = group, next_step, snapshots, lost, fault
        self._mask = mask
        self.episode = [0] * num_envs
        self.count = [0] * num_envs
        self.total = [0.0] * num_envs
        self._over = [False] * num_envs
        self._giving_up: set[int] = set()
        self.restored: GroupState | None = None
        self.num_steps = 0
        self.given_up: list[tuple[int, int]] = []
        self.closed = 0

    def seed(self, b: int) -> int:
        return seed_of(self._group, b, self.episode[b])

    def restore(self, state: GroupState) -> list[int]:
        self.restored = state
        for b in range(self.num_envs):
            row = state.cursor[b]
            if b in self._lost:
                self.episode[b], self.count[b], self.total[b] = int(row["episode"]) + 1, 0, 0.0
            else:
                self.episode[b], self.count[b], self.total[b] = int(row["episode"]), int(row["num_steps"]), float(row["episode_return"])
        return list(self._lost)

    def observe(self, out: Arrays) -> None:
        for b in range(self.num_envs):
            for name, value in observation_of(self.seed(b), self.count[b]).items():
                out[name][b] = value
            if self._mask:
                out["action_mask"][b] = mask_of(self.seed(b), self.count[b])

    def step(self, action_B: Array, out: Arrays) -> GroupStep:
        if self._fault is not None and self.num_steps == self._fault[0]:
            raise self._fault[1]
        self.num_steps += 1
        reward, terminated = np.zeros(self.num_envs), np.zeros(self.num_envs, np.bool_)
        truncated, valid = np.zeros(self.num_envs, np.bool_), np.ones(self.num_envs, np.bool_)
        ended: list[Ended] = []
        for b in range(self.num_envs):
            if self._over[b]:
                self._begin(b)
                valid[b] = False
                continue
            if b in self._giving_up:
                ended.append(self._end_of(b, observation_of(self.seed(b), self.count[b])))
                truncated[b], valid[b] = True, False
                self._begin(b)
                continue
            self.count[b] += 1
            reward[b] = reward_of(self.seed(b), self.count[b], int(action_B[b]))
            self.total[b] += reward[b]
            if self.count[b] == length_of(self.seed(b)):
                terminated[b], truncated[b] = not truncates(self.seed(b)), truncates(self.seed(b))
                ended.append(self._end_of(b, None if self._next_step else observation_of(self.seed(b), self.count[b])))
                if self._next_step:
                    self._over[b] = True
                else:
                    self._begin(b)
        self._giving_up.clear()
        self.observe(out)
        return GroupStep(reward, terminated, truncated, valid, ended)

    def _end_of(self, b: int, final: Arrays | None) -> Ended:
        return Ended(b, final, self.seed(b), int(self.count[b]), float(self.total[b]))

    def _begin(self, b: int) -> None:
        self.episode[b] += 1
        self.count[b], self.total[b], self._over[b] = 0, 0.0, False

    def cursor(self) -> Array:
        cursor = np.zeros(self.num_envs, CURSOR)
        for b in range(self.num_envs):
            if self._over[b]:  # as a native form counts: the next episode has begun, though its reset is yet to come
                cursor[b]["episode"], cursor[b]["seed"] = self.episode[b] + 1, seed_of(self._group, b, self.episode[b] + 1)
                continue
            cursor[b]["episode"], cursor[b]["seed"] = self.episode[b], self.seed(b)
            cursor[b]["num_steps"], cursor[b]["episode_return"] = self.count[b], self.total[b]
        return cursor

    def snapshots(self) -> list[bytes | None]:
        if not self._snapshots:
            return [None] * self.num_envs
        return [None if b == 1 else bytes([b, self.count[b], 7][: 2 + b % 2]) for b in range(self.num_envs)]

    def give_up(self, b: int) -> None:
        self.given_up.append((self.num_steps, b))
        self._giving_up.add(b)

    def name_next_step(self, told: Callable[[int], None]) -> None:
        for b in range(self.num_envs):
            told(b)

    def close(self) -> None:
        self.closed += 1


class ScriptedBehaviour:
    """Chooses (group + sequence + row + b) mod 5; its state counts rows; `version` may be changed between rows."""

    def __init__(self, version: int = 0, *, state: bool = True) -> None:
        self.version = version
        self._state = state
        self.begun: list[tuple[int, int]] = []
        self.seen: list[Arrays] = []
        self.states: list[Arrays] = []

    def begin(self, group: int, sequence: int) -> None:
        self.begun.append((group, sequence))

    def act(self, observation: Arrays, state: Arrays, row: int) -> Acted:
        self.seen.append({name: value.copy() for name, value in observation.items()})
        self.states.append({name: value.copy() for name, value in state.items()})
        group, sequence = self.begun[-1]
        num_envs = len(next(iter(observation.values())))
        action = np.array([action_of(group, sequence, row, b) for b in range(num_envs)])
        log_prob = np.array([log_prob_of(int(a), row) for a in action], np.float32)
        after = {name: value + np.float32(1) for name, value in state.items()}
        return Acted(action, {"log_prob": log_prob}, after, self.version)


def action_of(group: int, sequence: int, row: int, b: int) -> int:
    return (group + sequence + row + b) % NUM_ACTIONS


def log_prob_of(action: int, row: int) -> float:
    return -(action + 1) / 4 - row / 64


def fresh_state(num_envs: int, *, state: bool = True) -> GroupState:
    memory = {"policy_state/h": np.zeros((num_envs, 2), np.float32)} if state else {}
    return GroupState(np.zeros(num_envs, CURSOR), [np.zeros(0, np.int64)] * num_envs, [None] * num_envs, memory)


def crc_of(seed: int, steps: int, names: tuple[str, ...] = ("observation/camera", "observation/position")) -> int:
    """crc32 over every observation of an episode from its reset to `steps`, field after field."""
    crc = 0
    for step in range(steps + 1):
        for name in names:
            crc = zlib.crc32(observation_of(seed, step)[name].tobytes(), crc)
    return crc


def write_rollout(
    slot: Slot, identity: Identity, *, num_rows: int | None = None, version: int = 0, versions: list[int] | None = None, tag: float = 0.0
) -> Slot:
    """Fill a slot by hand with numbers that name (field, row, environment), and finish its envelope; nothing ends in it."""
    a, e, schema = slot.arrays, slot.envelope, slot.schema
    rows = schema.num_rows if num_rows is None else num_rows
    number = np.arange(rows + 1)[:, None] * 10 + np.arange(schema.num_envs) + 100 * tag
    for name in slot.observation_names:
        if name == "action_mask":
            a[name][: rows + 1] = number[..., None] % NUM_ACTIONS != np.arange(NUM_ACTIONS)
        else:
            extra = (1,) * (a[name].ndim - 2)
            a[name][: rows + 1] = number.reshape(*number.shape, *extra)
    a["action"][:rows] = number[:rows] % NUM_ACTIONS
    if "log_prob" in a:  # of a policy that says it
        a["log_prob"][:rows] = -number[:rows] / 64
    a["reward"][:rows] = number[:rows] / 8
    a["terminated"][:rows] = a["truncated"][:rows] = False
    a["valid"][:rows], a["valid"][rows:] = True, False
    a["policy_version"][:rows] = np.array(versions if versions is not None else [version] * rows)[:, None]
    for name in a:
        if name.startswith("policy_state/") and not name.endswith("/end"):
            a[name][:] = number[0][:, None] + np.arange(2) / 4
            a[f"{name}/end"][:] = number[-1][:, None] + np.arange(2) / 4
    for name, place in (("cursor/start", identity.sequence), ("cursor/end", identity.sequence + 1)):
        a[name][:] = np.zeros(schema.num_envs, CURSOR)
        a[name]["episode"], a[name]["seed"], a[name]["episode_return"] = place, place + 10, place / 4
    e["schema_hash"], e["run_id"] = np.void(schema.hash), np.void(RUN_ID)
    e["group"], e["sequence"], e["attempt"] = identity
    e["num_rows"], e["num_env_steps"] = rows, rows * schema.num_envs
    e["num_episodes"] = e["num_finals"] = 0
    e["paced"] = False
    written = a["policy_version"][:rows]
    e["version_min"], e["version_max"] = written.min(), written.max()
    e["begun_ns"], e["finished_ns"], e["consumed_ns"] = 5, 6, 0
    e["checksum"] = slot.checksum()
    return slot


def add_episode(slot: Slot, row: int, env: int, *, truncated: bool = False, final: Arrays | None = None, **facts: Any) -> None:
    """Let an episode end in a slot that was written by hand, with the observation that it truly ended with."""
    a, e = slot.arrays, slot.envelope
    episode = a["episode"][int(e["num_episodes"])]
    facts = {"num_steps": 1, "episode_return": 0.0, "seed": 0, "invalid": False, **facts}
    for name, value in {"row": row, "env": env, "terminated": not truncated, "truncated": truncated, **facts}.items():
        episode[name] = value
    a["terminated" if not truncated else "truncated"][row, env] = True
    e["num_episodes"] += 1
    if final is not None:
        at = int(e["num_finals"])
        a["final/row"][at], a["final/env"][at] = row, env
        for name, value in final.items():
            a[f"final/{name}"][at] = value
        e["num_finals"] = at + 1


SMALL_DQN: dict[str, Any] = {  # settings with which a run on `Drift` fills its replay, and learns, within a few updates
    "sampling": {"groups": 2, "group_size": 2, "rollout_length": 8},
    "policy": {"hidden_sizes": [8]},
    "algorithm": {"name": "dqn", "batch_size": 8},
    "replay": {"learning_starts": 40, "capacity_steps": 400, "samples_per_insert": 1.0},
    "checkpoint": {"every_updates": 1},
    "preset": "none",
}


class Drift(gymnasium.Env[Any, Any]):
    """A real environment of the smallest kind: a walk with noise, whose episodes last 3 to 9 steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(NUM_ACTIONS)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count, self.place = 0, float(self.np_random.normal())
        self.length = int(self.np_random.integers(3, 10))
        return self._observe(), {}

    def _observe(self) -> Any:
        return np.array([self.place, self.count, self.length], np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        self.place += float(action) / 8 + float(self.np_random.normal())
        over = self.count >= self.length
        return self._observe(), self.place, over and self.length % 2 == 0, over and self.length % 2 == 1, {}


class SnapshotDrift(Drift):
    """Drift with snapshots: place, count, length and the random state as text."""

    snapshot_bytes = 400

    def snapshot(self) -> bytes:
        state = self.np_random.bit_generator.state
        numbers = [state["state"]["state"], state["state"]["inc"], state["has_uint32"], state["uinteger"], self.count, self.length]
        return " ".join([*map(str, numbers), self.place.hex()]).encode()

    def restore_snapshot(self, data: bytes) -> tuple[Any, dict[str, Any]]:
        *numbers, place = data.decode().split()
        inner, increment, has, uinteger, self.count, self.length = map(int, numbers)
        self.place = float.fromhex(place)
        state = {"state": inner, "inc": increment}
        gymnasium.Env.reset(self, seed=0)
        self.np_random.bit_generator.state = {"bit_generator": "PCG64", "state": state, "has_uint32": has, "uinteger": uinteger}
        return self._observe(), {}


def same_rollout(one: Slot, other: Slot, *, but: Callable[[str], bool] = lambda name: False) -> None:
    """Assert that two slots hold the same rollout, bit for bit: everything that was written but times and who wrote it."""
    assert int(one.envelope["num_rows"]) == int(other.envelope["num_rows"])
    header = [
        name
        for name in one.envelope.dtype.names
        if not name.endswith("_ns") and name not in ("attempt", "actor", "incarnation", "fate", "padding")
    ]
    assert [one.envelope[name].tobytes() for name in header] == [other.envelope[name].tobytes() for name in header]
    rows, finals, episodes = (int(one.envelope[name]) for name in ("num_rows", "num_finals", "num_episodes"))
    for field in one.schema.fields:
        if field.name == "envelope" or but(field.name):
            continue
        until: dict[str, int | None] = {"T": rows, "T+1": rows + 1, "B": None, "final": finals, "header": None}
        end = episodes if field.name == "episode" else until[field.axis]
        if field.name == "snapshot":
            continue
        np.testing.assert_array_equal(one.arrays[field.name][:end], other.arrays[field.name][:end], err_msg=field.name)
