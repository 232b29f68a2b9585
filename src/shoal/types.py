"""What the rooms of the house share: descriptions of spaces and fields, and the small protocols between roles.

No torch and no gymnasium here: the supervisor and the command line import this file.
Legend: T time (rows of a rollout), B environments of a group, N = sum of B over the rollouts of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

SpaceKind = Literal["box", "discrete", "multi_discrete", "multi_binary"]


@dataclass(frozen=True)
class LeafSpec:
    """One leaf of an observation or action space, in plain numbers (JSON-able).

    Attributes:
      path: keys from the root of the space to this leaf; () where the space itself is the leaf.
      kind: which of the four elementary spaces.
      dtype: numpy name of the stored array; discrete kinds are int64, multi_binary is int8.
      shape: shape of one element: () for discrete.
      low, high: box only, flattened bounds (one number where all are equal), in the environment's units; +-inf where unbounded.
      nvec: discrete and multi_discrete: number of choices per component.
      start: first value of each component of a discrete kind (gymnasium allows other than 0); one entry per component.
    """

    path: tuple[str | int, ...]
    kind: SpaceKind
    dtype: str
    shape: tuple[int, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    nvec: tuple[int, ...] = ()
    start: tuple[int, ...] = ()

    def name(self, prefix: str) -> str:
        """Name of this leaf's field, such as `observation` or `observation/camera/0`."""
        return "/".join([prefix, *map(str, self.path)])

    @property
    def size(self) -> int:
        """Numbers per element."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bounded(self) -> bool:
        """True for a box with finite bounds on every component."""
        return self.kind == "box" and bool(np.isfinite(self.low).all() and np.isfinite(self.high).all())

    @property
    def is_image(self) -> bool:
        """True for a uint8 box of two or three dimensions."""
        return self.kind == "box" and self.dtype == "uint8" and len(self.shape) in (2, 3)


@dataclass(frozen=True)
class EnvironmentSpec:
    """What the rest of the house knows of an environment.

    Attributes:
      name: as the user gave it (`CartPole-v1`, `file.py:factory`).
      observation: leaves in a fixed order (sorted keys for Dict), the action mask left out.
      action: the single leaf of the action space.
      action_mask: where a mask of allowed actions is found: in the observation's `action_mask` key, in `info`, or nowhere.
      mask_size: number of mask entries (sum of nvec, or n for multi_binary), 0 without a mask.
      snapshot_bytes: upper bound on one environment's snapshot (0: it offers none, and is rebuilt by re-stepping).
      exact_restore: False where neither a snapshot nor re-stepping from a seed can rebuild an instance (native vector forms).
    """

    name: str
    observation: tuple[LeafSpec, ...]
    action: LeafSpec
    action_mask: Literal["none", "observation", "info"] = "none"
    mask_size: int = 0
    snapshot_bytes: int = 0
    exact_restore: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EnvironmentSpec:
        def leaf(entry: Mapping[str, Any]) -> LeafSpec:
            plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
            return LeafSpec(**plain)

        rest = {k: v for k, v in value.items() if k not in ("observation", "action")}
        return cls(observation=tuple(map(leaf, value["observation"])), action=leaf(value["action"]), **rest)


Axis = Literal["T", "T+1", "B", "final", "header"]


@dataclass(frozen=True)
class FieldSpec:
    """One named array of a rollout.

    axis: `T` = [T, B, *shape]; `T+1` = [T+1, B, *shape] (the last row bootstraps the end); `B` = [B, *shape], once per
    rollout; `final` = [T*B, *shape], sparse: one row for each episode that ended inside; `header` = [*shape], once.
    dtype is a numpy name, or one of the structured ones: `envelope`, `cursor`, `episode`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: Axis


# One row per environment of a group: where its running episode stands. Written into every rollout, at its start and at its end.
CURSOR = np.dtype(
    [
        ("episode", np.int64),  # episodes begun before this one, in this environment
        ("seed", np.int64),  # what the running episode was reset with
        ("num_steps", np.int64),  # environment steps since that reset
        ("episode_return", np.float64),  # undiscounted sum of rewards since that reset
        ("observation_crc", np.uint32),  # crc32 over every observation since the reset, the reset's included
        ("reward_crc", np.uint32),  # crc32 over every reward (float64) since the reset
    ]
)

# One row per episode that ended inside a rollout.
EPISODE = np.dtype(
    [
        ("row", np.int32),  # t at which it ended
        ("env", np.int32),  # b
        ("num_steps", np.int64),
        ("episode_return", np.float64),
        ("seed", np.int64),
        ("terminated", np.bool_),
        ("truncated", np.bool_),
        ("invalid", np.bool_),  # given up after a fault that came again on re-stepping
    ]
)


class Ended(NamedTuple):
    """An episode that ended in a step: its environment, seed, and what it came to."""

    env: int
    final: Arrays | None  # true last observation by field name; None where row t+1 holds it already
    seed: int
    num_steps: int
    episode_return: float


class GroupStep(NamedTuple):
    """What one step of a group gives besides observations (which are written in place). Arrays belong to the group until its next step."""

    reward_B: Array  # float64 [B]
    terminated_B: Array  # bool [B]
    truncated_B: Array  # bool [B]
    valid_B: Array  # bool [B]; False on the reset row of a NEXT_STEP autoreset, which is no environment step
    ended: Sequence[Ended]


@dataclass
class GroupState:
    """All that is needed to put a group where it stood at a rollout's start.

    Attributes:
      cursor: CURSOR [B].
      actions: per environment, the actions as stored since its episode began: [num_steps, *action shape].
      snapshots: per environment, the bytes that the environment gave, or None.
      policy_state: recurrent state by name, [B, ...]; empty without memory.
    """

    cursor: Array
    actions: list[Array]
    snapshots: list[bytes | None]
    policy_state: Arrays = field(default_factory=dict)


class EnvironmentGroup(Protocol):
    """B environments that step together. Observations go straight into the arrays that the caller passes (rows of a slot).

    `restore` puts the group at `state` (a state with num_steps 0 everywhere begins fresh episodes) by snapshot or by reset and
    re-stepping; it returns the environments (by index) whose checksums did not agree, which then begin a fresh episode.
    """

    spec: EnvironmentSpec
    num_envs: int
    resetting: Callable[[int, bool], None]  # called with (b, True) before environment b is reset in `step`, with (b, False) after it

    def restore(self, state: GroupState) -> list[int]: ...
    def observe(self, out: Arrays) -> None:
        """Write the current observation (and mask) of every environment: `out[name]` is [B, *shape]."""

    def step(self, action_B: Array, out: Arrays) -> GroupStep:
        """Step every environment, write the next observations, reset those that ended (their reset observation is what is written)."""

    def cursor(self) -> Array:
        """CURSOR [B] without the checksums, which whoever records the rollout keeps."""

    def snapshots(self) -> list[bytes | None]: ...
    def give_up(self, b: int) -> None:
        """At the next step, end environment b's episode as an invalid row instead of stepping it. Asked n times before one step, it passes
        over n episodes."""

    def name_next_step(self, told: Callable[[int], None]) -> None:
        """At the next step only, call `told(b)` right before environment b is stepped, one after the other."""

    def close(self) -> None: ...


class Acted(NamedTuple):
    """A behaviour's answer for one step of a group."""

    action_B: Array
    outputs: Arrays  # by field name, such as log_prob [B]
    state: Arrays  # recurrent state by name, [B, ...]; empty without memory
    version: int  # of the policy that chose


class Behaviour(Protocol):
    """Whatever chooses actions: a local copy of the policy, a batched server, an opponent. Actors know only this."""

    def begin(self, group: int, sequence: int) -> None:
        """Draw the exploration noise of one rollout from the stream of (run seed, group, sequence)."""

    def act(self, observation: Arrays, state: Arrays, row: int | Array) -> Acted:
        """Choose actions for row `row` of the rollout begun last (or one row per environment, [B]); `observation[name]` is [B, *shape]."""


class Activity(IntEnum):
    """What a role does at a moment; time by role is summed over these."""

    STARTING = 0
    STEPPING = 1
    INFERRING = 2
    WAITING_FOR_LEASE = 3
    WAITING_FOR_BATCH = 4
    LEARNING = 5
    SAVING = 6
    RESTORING = 7
    PUBLISHING = 8
    SHARING = 9  # waiting until all learners have added up what they found


CLOSING = -1  # in place of RESTORING's row, which is 0: the group is being closed


class ActivityRecorder(Protocol):
    """Where a role says what it does now; called at every step, so it costs well under a microsecond."""

    def enter(self, activity: int, group: int = -1, env: int = -1, row: int = -1) -> None: ...


@dataclass(frozen=True)
class ActivityRecord:
    """One role at one moment. -1 where group, env or row say nothing. `age_seconds`: since it entered this activity.

    seconds: by activity, over all incarnations, the running stretch included.
    pid: of its process; 0 before it has begun.
    whole: False where the role kept writing while it was read, or was killed in the middle: group and row may be of another moment,
      and the age is 0. Whoever hangs in an environment is read whole.
    """

    activity: Activity
    incarnation: int
    group: int
    env: int
    row: int
    age_seconds: float
    num_beats: int
    seconds: dict[Activity, float]
    whole: bool = True
    pid: int = 0


class NullRecorder:
    """Nobody watches (one process, or a test)."""

    def enter(self, activity: int, group: int = -1, env: int = -1, row: int = -1) -> None:
        pass
