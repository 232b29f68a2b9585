"""A rollout played back: a group and a behaviour that give what was recorded and cost next to nothing, so that recording is measured alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shoal.experience.ring import Slot
from shoal.types import Acted, Array, Arrays, Ended, EnvironmentSpec, GroupState, GroupStep


class PlayedGroup:
    """An EnvironmentGroup that says again what a slot holds; it does not write observations, since that is the environment's part."""

    def __init__(self, spec: EnvironmentSpec, num_envs: int) -> None:
        self.spec, self.num_envs = spec, num_envs
        self.resetting: Callable[[int, bool], None] = lambda b, begins: None
        self._steps: list[GroupStep] = []
        self._row = 0

    def load(self, slot: Slot) -> None:
        """What to say from now on, from the first row."""
        a, envelope = slot.arrays, slot.envelope
        finals = {
            (int(a["final/row"][f]), int(a["final/env"][f])): {
                name: a[f"final/{name}"][f].copy() for name in slot.observation_names if f"final/{name}" in a
            }
            for f in range(int(envelope["num_finals"]))
        }
        ended: dict[int, list[Ended]] = {}
        for row in a["episode"][: int(envelope["num_episodes"])]:
            t, b = int(row["row"]), int(row["env"])
            end = Ended(b, finals.get((t, b)), int(row["seed"]), int(row["num_steps"]), float(row["episode_return"]))
            ended.setdefault(t, []).append(end)
        reward, terminated, truncated, valid = (a[name].copy() for name in ("reward", "terminated", "truncated", "valid"))
        rows = range(int(envelope["num_rows"]))
        self._steps = [GroupStep(reward[t], terminated[t], truncated[t], valid[t], ended.get(t, [])) for t in rows]
        self._cursor = a["cursor/end"].copy()
        self._row = 0

    def restore(self, state: GroupState) -> list[int]:
        self._cursor = state.cursor.copy()
        return []

    def observe(self, out: Arrays) -> None:
        """Nothing."""

    def step(self, action_B: Array, out: Arrays) -> GroupStep:
        step = self._steps[self._row]
        self._row += 1
        return step

    def cursor(self) -> Array:
        return self._cursor.copy()

    def snapshots(self) -> list[bytes | None]:
        return [None] * self.num_envs

    def give_up(self, b: int) -> None:
        """Nothing."""

    def name_next_step(self, told: Callable[[int], None]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlayedBehaviour:
    """A behaviour that chooses again what a slot holds."""

    def __init__(self) -> None:
        self._acted: list[Acted] = []

    def load(self, slot: Slot) -> None:
        a = slot.arrays
        fixed = {"action", "reward", "terminated", "truncated", "valid", "policy_version"}
        outputs = [field.name for field in slot.schema.fields if field.axis == "T" and field.name not in fixed]
        version = int(slot.envelope["version_min"])
        self._acted = [
            Acted(a["action"][t].copy(), {name: a[name][t].copy() for name in outputs}, {}, version)
            for t in range(int(slot.envelope["num_rows"]))
        ]

    def begin(self, group: int, sequence: int) -> None:
        """Nothing."""

    def act(self, observation: Arrays, state: Arrays, row: int | Array) -> Acted:
        return self._acted[int(np.max(row))]
