"""Rollouts with every shape that reaches a replay, and a replay in plain Python to compare with.

`World` plays groups whose episodes end at random: reset in the same step, or in a row of their own (next_step), or given up; images that are
stacks of frames, or not; environments that got differently far (paced); environments that were lost. `Model` keeps rows one by one, in lists.

Legend: T rows of a rollout, B environments of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shoal.experience.envelope import Identity
from shoal.experience.ring import Slot, allocate
from shoal.experience.schema import Schema, rollout_schema
from shoal.types import Array, Arrays, EnvironmentSpec, FieldSpec, LeafSpec

FRAMES, SIDES = 4, (2, 3)
VECTOR = LeafSpec(("vector",), "box", "float32", (2,), low=(-np.inf,), high=(np.inf,))
IMAGE = LeafSpec(("image",), "box", "uint8", (FRAMES, *SIDES), low=(0.0,), high=(255.0,))
LAST_AXIS = LeafSpec(("image",), "box", "uint8", (*SIDES, FRAMES), low=(0.0,), high=(255.0,))
PAIR = LeafSpec(("image",), "box", "uint8", (2, *SIDES), low=(0.0,), high=(255.0,))
SECOND = LeafSpec(("second",), "box", "uint8", (FRAMES, *SIDES), low=(0.0,), high=(255.0,))  # one frame a step, also where the others jump
ACTION = LeafSpec((), "discrete", "int64", (), nvec=(5,), start=(0,))
MEMORY = FieldSpec("policy_state/h", "float32", (2,), "B")


def frames_axis(leaf: LeafSpec) -> int:
    return -1 if leaf is LAST_AXIS else 0


@dataclass(frozen=True)
class Kind:
    """What a world's rollouts are like."""

    leaves: tuple[LeafSpec, ...] = (VECTOR,)
    next_step: bool = False
    mask: bool = False
    memory: bool = False
    num_rows: int = 4
    num_envs: int = 2
    groups: int = 3
    stacked: bool = True  # of an image: whether its planes are frames
    jumps: bool = False  # some steps add two frames, so that a stack does not continue the one before it
    carries: bool = False  # an episode's first stack continues that of the last step, as if nobody had emptied it

    @property
    def pad(self) -> int:
        """Rows that the older frames of a stack take, where it does not continue the one before it."""
        return next((leaf.shape[frames_axis(leaf)] - 1 for leaf in self.leaves if leaf is not VECTOR and self.stacked), 0)

    def schema(self) -> Schema:
        spec = EnvironmentSpec("world", self.leaves, ACTION, "observation" if self.mask else "none", 5 if self.mask else 0)
        fields = [FieldSpec("action", "int64", (), "T"), FieldSpec("log_prob", "float32", (), "T")]
        return rollout_schema(spec, [*fields, MEMORY] if self.memory else fields, self.num_rows, self.num_envs)


@dataclass
class Step:
    """One row that an environment truly made. `following` is the step after it in its episode, where that is known."""

    observation: Arrays
    mask: Array
    action: int
    reward: float
    terminated: bool
    truncated: bool
    version: int
    successor: Arrays = field(default_factory=dict)
    successor_mask: Array | None = None  # None: nobody knows
    following: Step | None = None
    inserted: int = 0  # env steps in the replay once its rollout was
    state: float = 0.0  # recurrent state before it
    begins: bool = False  # its episode's first

    @property
    def name(self) -> bytes:
        return b"".join(self.observation[n].tobytes() for n in sorted(self.observation))


@dataclass
class Column:
    """One environment: its episode and step, and its frames."""

    number: int
    clock: int = 0
    frames: list[Array] = field(default_factory=list)
    second: list[Array] = field(default_factory=list)
    over: bool = False  # next_step: the reset row is due
    memory: float = 0.0


class World:
    """Fills slots, group by group, and says what truly happened."""

    def __init__(self, kind: Kind, seed: int = 0) -> None:
        self.kind, self.schema = kind, kind.schema()
        self._ring = allocate(self.schema, 1)
        self._rng = np.random.default_rng(seed)
        self._columns = [Column(c) for c in range(kind.groups * kind.num_envs)]
        self.sequence = [0] * kind.groups
        for column in self._columns:
            self._reset(column)

    def rollout(
        self,
        group: int,
        *,
        rows: int | None = None,
        used: list[int] | None = None,
        lost: tuple[int, ...] = (),
        end_share: float = 0.2,
        give_up_share: float = 0.0,
        version: int = 0,
    ) -> tuple[Slot, list[list[tuple[str, object]]]]:
        """The next rollout of a group, and for each environment what happened, in order: ("at", observation and mask), ("step", Step) ...

        Events: `at` (an observation that an environment stands at), `step`, `reset row` and `given up` (no steps), `final` (a true last
        observation).
        """
        self._ring.poison(0)
        slot, kind = self._ring.slots[0], self.kind
        rows = kind.num_rows if rows is None else rows
        used = [rows] * kind.num_envs if used is None else used
        columns = self._columns[group * kind.num_envs : (group + 1) * kind.num_envs]
        events: list[list[tuple[str, object]]] = [[] for _ in columns]
        a, finals = slot.arrays, []
        for name in slot.observation_names:
            a[name][: rows + 1] = 0
        for name in ("action", "log_prob", "reward", "terminated", "truncated", "policy_version"):
            a[name][:rows] = 0
        a["valid"][:] = False
        for b, column in enumerate(columns):
            if b in lost:
                column.over = False
                self._reset(column)
            self._play(slot, b, column, used[b], (end_share, give_up_share), version, events[b], finals)
        finals.sort(key=lambda final: (final[0], final[1]))
        for at, (t, b, observation) in enumerate(finals):
            a["final/row"][at], a["final/env"][at] = t, b
            for name, value in observation.items():
                a[f"final/{name}"][at] = value
        e = slot.envelope
        e["group"], e["sequence"], e["attempt"] = Identity(group, self.sequence[group], 0)
        e["num_rows"], e["num_finals"], e["num_episodes"] = rows, len(finals), 0
        e["num_env_steps"] = int(a["valid"][:rows].sum())
        e["paced"] = any(u != rows for u in used)
        self.sequence[group] += 1
        return slot, events

    def _play(self, slot, b, column, used, shares, version, events, finals) -> None:
        a = slot.arrays
        if self.kind.memory:
            a["policy_state/h"][b] = column.memory
            a["policy_state/h/end"][b] = column.memory
        events.append(("at", self._look(column)))
        for t in range(used):
            observation, mask = self._look(column)
            self._show(slot, t, b, observation, mask)
            action, reward = int(self._rng.integers(5)), float(self._rng.normal())
            a["action"][t, b], a["policy_version"][t, b], a["log_prob"][t, b] = action, version, -1
            if column.over:
                column.over = False
                self._reset(column)
                events.append(("reset row", None))
            elif self._rng.random() < shares[1]:
                a["truncated"][t, b] = True
                finals.append((t, b, observation))
                self._reset(column)
                events.append(("given up", None))
            else:
                ends, kind = self._rng.random() < shares[0], self._rng.random() < 0.5
                step = Step(observation, mask, action, reward, bool(ends and kind), bool(ends and not kind), version, state=column.memory)
                step.begins = column.memory == 0.0
                self._advance(column)
                a["valid"][t, b], a["reward"][t, b] = True, reward
                a["terminated"][t, b], a["truncated"][t, b] = step.terminated, step.truncated
                step.successor, step.successor_mask = self._look(column)
                events.append(("step", step))
                if ends and self.kind.next_step:
                    column.over = True
                elif ends:
                    step.successor_mask = None
                    finals.append((t, b, step.successor))
                    events.append(("final", step.successor))
                    self._reset(column)
            events.append(("at", self._look(column)))
        self._show(slot, used, b, *self._look(column))

    def _show(self, slot: Slot, t: int, b: int, observation: Arrays, mask: Array) -> None:
        for name, value in observation.items():
            slot.arrays[name][t, b] = value
        if self.kind.mask:
            slot.arrays["action_mask"][t, b] = mask

    def _reset(self, column: Column) -> None:
        column.frames, column.second = (column.frames[:-1], column.second[:-1]) if self.kind.carries else ([], [])
        column.memory = -1.0
        self._advance(column)

    def _advance(self, column: Column) -> None:
        column.memory += 1.0
        self._frame(column)
        column.second.append(column.frames[-1])
        if self.kind.jumps and len(column.frames) > 1 and self._rng.random() < 0.2:
            self._frame(column)

    def _frame(self, column: Column) -> None:
        column.clock += 1
        number = np.array([column.number, column.clock >> 8, column.clock & 255, 7, 7 * column.clock % 256, 1], np.uint8)
        column.frames.append(number.reshape(SIDES))

    def _look(self, column: Column) -> tuple[Arrays, Array]:
        out: Arrays = {}
        for leaf in self.kind.leaves:
            if leaf.path == ("vector",):
                out[leaf.name("observation")] = np.array([column.number, column.clock], np.float32)
                continue
            axis = frames_axis(leaf)
            num_frames = leaf.shape[axis]
            if self.kind.stacked:
                seen = column.second if leaf is SECOND else column.frames
                frames = ([np.zeros(SIDES, np.uint8)] * num_frames + seen)[-num_frames:]
            else:
                frames = [np.roll(column.frames[-1], plane) for plane in range(num_frames)]
            out[leaf.name("observation")] = np.stack(frames, axis=axis)
        mask = np.ones(5, np.bool_)
        mask[column.clock % 5] = False
        return out, mask


class Model:
    """A replay as lists: each column's rows in order, of which the newest `reach` before its last observation can be sampled."""

    def __init__(self, kind: Kind, reach: int, *, n_step: int, gamma: float) -> None:
        self.kind, self.reach, self.n_step, self.gamma = kind, reach, n_step, gamma
        self.pad = kind.pad
        self.columns: list[list[Step | None]] = [[] for _ in range(kind.groups * kind.num_envs)]
        self.last: list[Step | None] = [None] * len(self.columns)
        self.stood: list[bytes | None] = [None] * len(self.columns)
        self.next_sequence = [-1] * kind.groups
        self.inserted = 0

    def insert(self, slot: Slot, events: list[list[tuple[str, object]]]) -> None:
        group, sequence = int(slot.envelope["group"]), int(slot.envelope["sequence"])
        in_order = sequence == self.next_sequence[group]
        self.next_sequence[group] = sequence + 1
        self.inserted += int(slot.envelope["num_env_steps"])
        for b, happened in enumerate(events):
            self._insert(group * self.kind.num_envs + b, in_order, happened)

    def _insert(self, c: int, in_order: bool, happened: list[tuple[str, object]]) -> None:
        rows = self.columns[c]
        before = happened[0][1][0]
        if not in_order or self.stood[c] != name_of(before):
            rows += [None] * (1 + self.pad)  # the newest observation stays, as a row that is no step
            self.last[c] = None
        for at, (what, value) in enumerate(happened[1:], 1):
            if what == "step":
                if self.last[c] is not None:
                    self.last[c].following = value
                value.inserted = self.inserted
                rows.append(value)
                self.last[c] = None if value.terminated or value.truncated else value
            elif what == "final":
                rows += [None] * (self._between(before, value) + 1)
            elif what in ("reset row", "given up"):
                rows.append(None)
                self.last[c] = None
            else:
                after_end = happened[at - 1][0] == "final"
                between = self.pad if after_end else self._between(before, value[0])
                rows += [None] * between
                if between:  # what follows lies apart: nothing is summed across
                    self.last[c] = None
                before = value[0]
        self.stood[c] = name_of(before)

    def _between(self, older: Arrays, newer: Arrays) -> int:
        """Rows for older frames, where a stack does not begin as the one before it goes on."""
        for leaf in self.kind.leaves:
            if leaf is not VECTOR and self.pad:
                planes = [np.moveaxis(o[leaf.name("observation")], frames_axis(leaf), 0) for o in (older, newer)]
                if (planes[1][:-1] != planes[0][1:]).any():
                    return self.pad
        return 0

    def steps(self) -> list[Step]:
        """All that can be sampled."""
        return [step for rows in self.columns for step in rows[-self.reach :] if step is not None]

    def returns(self, step: Step) -> tuple[float, float, Step]:
        """The n-step return, what it bootstraps with, and the last step of it."""
        total, discount = 0.0, 1.0
        for k in range(self.n_step):
            total += discount * step.reward
            discount *= self.gamma
            if step.terminated:
                return total, 0.0, step
            if step.following is None or k == self.n_step - 1:
                return total, discount, step
            step = step.following
        raise AssertionError


def name_of(observation: Arrays) -> bytes:
    return b"".join(observation[n].tobytes() for n in sorted(observation))
