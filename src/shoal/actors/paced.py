"""Rollouts of a group whose environments wait (a simulator behind a socket, a sleep): each acts as soon as it is ready.

Every environment has its own row; those that are ready are answered together, with one inference over the whole group, so that the
numbers do not depend on who was ready with whom.

    whole (sync)    each environment makes all T rows, and the rollout is what stepping the group row by row gives, bit for bit
    else (async)    it is closed once the first environment has filled its rows, or when the caller says so. Steps that are under way
                    then are not waited for: their rows are taken over as the first rows of the next rollout, with the action, the
                    outputs and the version they were begun with. A step so slow that its version grew too old costs its own row
                    (learners/learner.py leaves it out), and never closes the rollout of the others

Legend: T rows, B environments of the group.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from shoal.actors.recording import record_ends
from shoal.errors import EnvironmentFault
from shoal.experience.ring import Slot
from shoal.types import Activity, ActivityRecorder, Array, Arrays, Behaviour, Ended

READY_SECONDS = 0.05  # between two looks at the caller's wishes while nobody is ready
_NONE_YET = 1 << 62  # in place of a version


@runtime_checkable
class Paced(Protocol):
    """What a paced group adds to an EnvironmentGroup, see environments.threads.PacedGroup."""

    def observe(self, out: Arrays) -> None: ...
    def cursor(self) -> Array: ...
    def give_up(self, b: int) -> None: ...
    def send(self, envs: Sequence[int], action_N: Array) -> None: ...
    def ready(self, timeout_seconds: float) -> list[int]: ...
    def call_began(self, b: int) -> float: ...
    def take(self, envs: Sequence[int]) -> list[Any]: ...
    def observed(self, envs: Sequence[int]) -> Arrays: ...


@dataclass(frozen=True)
class Carried:
    """A step that was begun in one rollout and ends in the next."""

    observation: Arrays  # by field name, [*shape]
    action: Array
    outputs: Arrays
    state: Arrays  # recurrent, after it
    version: int
    begun: float  # monotonic clock


@dataclass
class _Memory:
    """The recurrent state of each environment, by name [B, ...]: before its row, and after it for those whose step is under way."""

    before: Arrays
    after: Arrays

    @classmethod
    def of(cls, state: Arrays, carried: dict[int, Carried]) -> _Memory:
        before = {name: value.copy() for name, value in state.items()}
        after = {name: value.copy() for name, value in state.items()}
        for b, step in carried.items():
            for name, value in step.state.items():
                after[name][b] = value
        return cls(before, after)

    def answered(self, ready: list[int], state: Arrays) -> None:
        for name, value in self.after.items():
            value[ready] = state[name][ready]

    def taken(self, b: int, ended: bool) -> None:
        """The step is done. The next row begins an episode where one has `ended`."""
        for name, value in self.before.items():
            value[b] = 0 if ended else self.after[name][b]


@dataclass(frozen=True)
class Pace:
    """How a paced rollout is made.

    Attributes:
      whole: the rollout ends when every environment has filled its rows.
      step_timeout_seconds: a step, or the reset after it, that is under way for longer hangs.
      give_up: (row of that environment, env), or (env, episode, step), at which so many episodes are passed over as invalid.
      careful: one environment is stepped at a time, and named to the recorder before it.
    """

    recorder: ActivityRecorder
    whole: bool = False
    step_timeout_seconds: float = float("inf")
    give_up: Counter[tuple[int, ...]] = field(default_factory=Counter)
    careful: bool = False


def fill_paced(
    slot: Slot,
    group: Paced,
    behaviour: Behaviour,
    state: Arrays,
    carried: dict[int, Carried],
    between_rows: Callable[[int], bool] | None,
    how: Pace,
) -> Arrays:
    """Fill the rows of a slot. `carried` is what the rollout before left under way, and holds at the end what this one leaves.

    state: recurrent, by name [B, ...], before each environment's row 0. Returns that before the next rollout's.
    """
    num_envs, num_rows = slot.schema.num_envs, slot.schema.num_rows
    slot.envelope["paced"] = True
    slot.arrays["valid"][:] = False
    row_B = np.zeros(num_envs, np.int64)
    began, memory = _begin(slot, group, carried), _Memory.of(state, carried)
    outputs = _output_names(slot)
    to_answer = [b for b in range(num_envs) if b not in began]
    index, closing = int(slot.envelope["group"]), False
    ends: list[tuple[int, Ended]] = []
    first_version, furthest, look = _NONE_YET, 0, 0.0
    carried.clear()
    while True:
        if to_answer:
            how.recorder.enter(Activity.INFERRING, index, -1, furthest)
            version = _answer(slot, behaviour, memory, to_answer, row_B, outputs)
            if not how.careful:  # said first: a step that takes the interpreter's lock leaves nobody to say it
                how.recorder.enter(Activity.STEPPING, index, -1, furthest)
            _send(slot, group, to_answer, row_B, how)
            first_version = min(first_version, version)
            began.update(dict.fromkeys(to_answer, time.monotonic()))
            slot.envelope["num_rows"] = max(int(slot.envelope["num_rows"]), int(row_B[to_answer].max()) + 1)
        elif not how.careful:
            how.recorder.enter(Activity.STEPPING, index, -1, furthest)
        if ready := group.ready(0.0 if closing else READY_SECONDS):
            _take(slot, group, memory, ready, row_B, ends)
            for b in ready:
                del began[b]
            furthest = int(row_B.max())
        if (now := time.monotonic()) >= look:
            look = now + READY_SECONDS
            _refuse_hangs(slot, group, began, row_B, how.step_timeout_seconds)
        if closing or (furthest == num_rows and not (how.whole and (row_B < num_rows).any())):
            break
        closing = bool(between_rows is not None and furthest and between_rows(first_version))
        to_answer = [] if closing else [b for b in ready if row_B[b] < num_rows]
    carried.update((b, _carry(slot, memory, b, int(row_B[b]), outputs, since)) for b, since in began.items())
    _blank(slot, row_B)
    slot.envelope["paced"] = not (how.whole and (row_B == num_rows).all())
    record_ends(slot, sorted(ends, key=lambda end: (end[0], end[1].env)))
    return memory.before


def _output_names(slot: Slot) -> list[str]:
    fixed = {"action", "reward", "terminated", "truncated", "valid", "policy_version"}
    return [f.name for f in slot.schema.fields if f.axis == "T" and f.name not in fixed]


def _begin(slot: Slot, group: Paced, carried: dict[int, Carried]) -> dict[int, float]:
    """Row 0: where every environment stands, and the steps that are under way. Returns since when, of those."""
    a = slot.arrays
    group.observe(slot.rows[0])
    for b, step in carried.items():
        for name, value in step.observation.items():
            a[name][0, b] = value
        a["action"][0, b], a["policy_version"][0, b] = step.action, step.version
        for name, value in step.outputs.items():
            a[name][0, b] = value
    if carried:
        slot.envelope["num_rows"] = 1
    return {b: step.begun for b, step in carried.items()}


def _carry(slot: Slot, memory: _Memory, b: int, t: int, outputs: list[str], since: float) -> Carried:
    a = slot.arrays
    return Carried(
        {n: a[n][t, b].copy() for n in slot.observation_names},
        a["action"][t, b].copy(),
        {n: a[n][t, b].copy() for n in outputs},
        {n: value[b].copy() for n, value in memory.after.items()},
        int(a["policy_version"][t, b]),
        since,
    )


def _answer(slot: Slot, behaviour: Behaviour, memory: _Memory, ready: list[int], row_B: Array, outputs: list[str]) -> int:
    """One inference over the whole group, each environment at its own row; only those that are ready are told."""
    a, every, ready_N = slot.arrays, np.arange(slot.schema.num_envs), np.array(ready)
    observation = {n: a[n][row_B, every] for n in slot.observation_names}
    acted = behaviour.act(observation, memory.before, np.minimum(row_B, slot.schema.num_rows - 1))
    memory.answered(ready, acted.state)
    place = row_B[ready_N], ready_N
    a["action"][place] = acted.action_B[ready_N]
    a["policy_version"][place] = acted.version
    for name in outputs:
        a[name][place] = acted.outputs[name][ready_N]
    return acted.version


def _send(slot: Slot, group: Paced, ready: list[int], row_B: Array, how: Pace) -> None:
    """Begin the steps of those that were answered: all at once, or carefully one after the other."""
    if how.give_up:
        for b in ready:
            stands = group.cursor()[b]
            step = (b, int(stands["episode"]), int(stands["num_steps"]))
            for _ in range(how.give_up[int(row_B[b]), b] + how.give_up[step]):
                group.give_up(b)
    action_N = slot.arrays["action"][row_B[ready], ready]
    if not how.careful:
        group.send(ready, action_N)
        return
    for n, b in enumerate(ready):
        how.recorder.enter(Activity.STEPPING, int(slot.envelope["group"]), b, int(row_B[b]))
        group.send([b], action_N[n : n + 1])
        while b not in group.ready(READY_SECONDS):
            pass  # bounded: whoever supervises sees how long this activity lasts


def _refuse_hangs(slot: Slot, group: Paced, began: dict[int, float], row_B: Array, limit_seconds: float) -> None:
    """Others go on while one hangs, so that no activity tells of it."""
    now = time.monotonic()
    for b, sent in began.items():
        then = max(sent, group.call_began(b))
        if now - then > limit_seconds:
            stands = group.cursor()[b]
            episode, step, seed = int(stands["episode"]), int(stands["num_steps"]), int(stands["seed"])
            raise EnvironmentFault(
                f"environment {b} of group {int(slot.envelope['group'])} has been in one step for {now - then:.1f} s (step {step + 1} of its "
                f"episode, seed {seed}), allowed are {limit_seconds:g} s (--env.step-timeout-seconds)",
                {"kind": "hang", "env": b, "row": int(row_B[b]), "step": step + 1, "seed": seed, "paced": [episode, step]},
            )


def _take(slot: Slot, group: Paced, memory: _Memory, ready: list[int], row_B: Array, ends: list[tuple[int, Ended]]) -> None:
    """Write what the steps of those that are ready gave, each behind its own row, which is counted."""
    a = slot.arrays
    try:
        steps = group.take(ready)
    except EnvironmentFault as fault:
        failed = next(b for b in ready if b == fault.report["env"])
        fault.report.setdefault("row", int(row_B[failed]))
        raise
    for b, t, step in zip(ready, row_B[ready].tolist(), steps, strict=True):
        a["reward"][t, b], a["terminated"][t, b], a["truncated"][t, b] = step.reward, step.terminated, step.truncated
        a["valid"][t, b] = step.valid
        memory.taken(b, step.ended is not None)
        if step.ended is not None:
            ends.append((t, step.ended))
    row_B[ready] += 1
    place = row_B[ready], ready
    for name, value in group.observed(ready).items():
        a[name][place] = value


def _blank(slot: Slot, row_B: Array) -> None:
    """Whatever lies beyond an environment's last row is finite and means nothing."""
    a = slot.arrays
    num_rows = max(1, int(row_B.max()))
    slot.envelope["num_rows"] = num_rows
    late = np.arange(num_rows)[:, None] >= row_B  # [num_rows, B]
    for spec in slot.schema.fields:
        if spec.axis == "T":
            a[spec.name][:num_rows][late] = 0
        elif spec.axis == "T+1":
            a[spec.name][1 : num_rows + 1][late] = 0
    fastest = a["policy_version"][:num_rows]
    fastest[late] = fastest[~late].max(initial=0)
