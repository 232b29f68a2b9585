"""The experience replay: steps of finished rollouts, kept for a long time and sampled again and again.

(Not the replay of a run, which is engines/replay.py: that re-executes updates from the log.)

It lives where the learner does. `insert` copies a rollout's rows (experience/placing.py says where to), `sample` draws steps by a sum tree
and makes their n-step returns there and then from the rows that follow them. Which step is drawn is a function of the rollouts in their
order of insertion and of the generator, and of nothing else: not of shards, nor of a save and a load between.

Legend: M sampled steps, n steps of a return at most, T rows of a rollout, B environments of a group, F last observations, C columns (one
for each environment of each group).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoal.config import ReplayConfig
from shoal.errors import SchemaError
from shoal.experience.nstep import n_step
from shoal.experience.placing import BEGINS, STOP, TERMINATED, TRUNCATED, VALID, Placed, place
from shoal.experience.replay_layout import Layout
from shoal.experience.replay_rows import Rows
from shoal.experience.ring import Slot
from shoal.experience.schema import Schema
from shoal.experience.sum_tree import SumTree
from shoal.types import Array, Arrays

_LEAST_PRIORITY = 1e-6  # what was found perfectly predicted is still sampled now and then


@dataclass
class Sample:
    """Sampled steps, in arrays of the caller's own.

    Attributes:
      observation: by field name, [M, ...] as the environment gave it. action_mask: bool [M, A], or None without masks.
      action: [M, ...] as stored in rollouts.
      return_M: float32, discounted rewards of the step and those after it, up to n, none beyond its episode's end.
      discount_M: float32, what the value of `next_observation` counts: gamma to the number of rewards summed; 0 where the episode terminated.
      next_observation: by field name, [M, ...]: what followed the last reward summed; of a truncated episode the true last observation.
      next_action_mask: bool [M, A] or None. All is allowed at an episode's true last observation, which comes without a mask.
      weight_M: float32, importance weights, 1 for the step that is sampled least; all 1 where sampling is uniform.
      index_M: int64, names of the steps for `update_priorities`.
      age_updates_M: int64, the learner's version at the last insertion less that of the policy that chose.
      age_steps_M: int64, env steps that were inserted after the step's own rollout.
    """

    observation: Arrays
    action_mask: Array | None
    action: Array
    return_M: Array
    discount_M: Array
    next_observation: Arrays
    next_action_mask: Array | None
    weight_M: Array
    index_M: Array
    age_updates_M: Array
    age_steps_M: Array


class Replay:
    """Steps of `num_groups` groups, the oldest of each environment making room for its newest.

    `config.prioritised` and `config.n_step` are what the run resolved; where they are None, sampling is uniform and of one step.
    Attributes:
      num_steps: steps that can be sampled. inserted_steps, evicted_steps: over all time; the difference is num_steps.
    """

    def __init__(self, schema: Schema, num_groups: int, config: ReplayConfig, *, gamma: float) -> None:
        self._schema, self._num_groups, self._config, self._gamma = schema, num_groups, config, gamma
        self._num_columns = num_groups * schema.num_envs
        self._n_step = config.n_step or 1
        self._alpha = config.alpha if config.prioritised else 0.0
        Layout.likely(schema, num_groups, config)  # refuses what could not hold anything
        self._newest_C = np.zeros(self._num_columns, np.int64)  # number of the row that holds the newest observation
        self._next_sequence_G = np.full(num_groups, -1, np.int64)
        self._most = 1.0  # the largest priority so far
        self._version = 0
        self.inserted_steps = self.evicted_steps = 0
        self._layout: Layout | None = None  # known, and memory taken, once the first rollout shows whether images are stacks

    @staticmethod
    def size_bytes(schema: Schema, num_groups: int, config: ReplayConfig) -> int:
        """Memory that it takes when full. Images whose shape looks like a stack of frames are counted as such."""
        return Layout.likely(schema, num_groups, config).size_bytes

    @property
    def num_steps(self) -> int:
        return self.inserted_steps - self.evicted_steps

    # ---- insertion -----------------------------------------------------------------------------------------------
    def insert(self, slot: Slot, version: int) -> int:
        """Copy a finished rollout; its slot is free afterwards. `version` is the learner's now. Returns the env steps that made room.

        Rollouts of a group come in the order of their sequences. Where one is missing, or where an environment stands elsewhere than
        it stood, no return is summed across the gap, and the step before it bootstraps from its own successor.
        """
        layout = self._layout or self._allocate(Layout.of(slot, self._num_groups, self._config))
        group, num_envs = int(slot.envelope["group"]), self._schema.num_envs
        columns = slice(group * num_envs, (group + 1) * num_envs)
        newest_B = self._newest_C[columns].copy()
        goes_on_B = self._goes_on(slot, group, newest_B)
        at_newest = self._rows.take("flags", self._place(group, newest_B))
        placed = place(slot, goes_on_B, newest_B, (at_newest & BEGINS) > 0, layout.stacks)

        evicted = self._make_room(group, newest_B, placed.end_B)
        if goes_on_B.any():
            self._join(slot, group, newest_B, goes_on_B)
        self.inserted_steps += int(slot.envelope["num_env_steps"])
        stored_T1B = placed.used_T1B & (placed.row_T1B > placed.end_B - layout.num_rows)
        everything = bool(stored_T1B.all())
        self._write(slot, group, placed, slice(None) if everything else stored_T1B)
        self._write_finals(slot, group, placed)
        self._newest_C[columns] = placed.end_B
        self._next_sequence_G[group] = int(slot.envelope["sequence"]) + 1
        self._version = version

        step_T1B = (placed.flags_T1B & VALID) > 0
        sampled_T1B = step_T1B & (placed.row_T1B >= placed.end_B - layout.reach)
        self._tree.set(self._place(group, placed.row_T1B)[sampled_T1B], self._most**self._alpha)
        evicted += int(step_T1B.sum()) - int(sampled_T1B.sum())
        self.evicted_steps += evicted
        return evicted

    def _allocate(self, layout: Layout) -> Layout:
        self._layout = layout
        self._rows = Rows(layout.fields, self._num_groups, self._schema.num_envs, layout.num_rows, self._config.shards)
        self._tree = SumTree(self._num_columns * layout.num_rows)
        return layout

    def _place(self, group: int, row_xB: Array) -> Array:
        """Places of numbered rows of a group, [..., B]."""
        num_rows, num_envs = self._rows.num_rows, self._schema.num_envs
        return np.asarray((group * num_envs + np.arange(num_envs)) * num_rows + row_xB % num_rows)

    def _goes_on(self, slot: Slot, group: int, newest_B: Array) -> Array:
        """Whether each environment's first observation is the newest that is stored: bool [B]."""
        same_B = np.full(len(newest_B), int(slot.envelope["sequence"]) == self._next_sequence_G[group])
        if same_B.any():
            for name, newest in self._observation(self._place(group, newest_B)).items():
                same_B &= (newest == slot.arrays[name][0]).reshape(len(newest_B), -1).all(axis=1)
        return same_B

    def _make_room(self, group: int, newest_B: Array, end_B: Array) -> int:
        """Clear what the new rows will lie on or push out of reach. Returns how many steps that were."""
        assert self._layout is not None
        reach, num_rows = self._layout.reach, self._layout.num_rows
        out_B = np.minimum(end_B - reach, newest_B)
        gone = self._place_of(group, *_ranges(np.maximum(0, newest_B - reach), np.maximum(0, out_B)))
        evicted = int(np.count_nonzero(self._rows.take("flags", gone) & VALID))
        self._tree.set(gone, 0.0)
        new = self._place_of(group, *_ranges(np.maximum(newest_B, end_B - num_rows + 1), end_B + 1))
        self._rows.put(group, "flags", new, STOP)
        return evicted

    def _place_of(self, group: int, env: Array, row: Array) -> Array:
        num_rows = self._rows.num_rows
        return np.asarray((group * self._schema.num_envs + env) * num_rows + row % num_rows)

    def _join(self, slot: Slot, group: int, newest_B: Array, goes_on_B: Array) -> None:
        """Returns may now be summed on from the last steps of the rollout before."""
        last = self._place(group, newest_B - 1)
        flags = self._rows.take("flags", last)
        first_step_B = slot.arrays["valid"][0] & (slot.rows_used() > 0)
        open_B = goes_on_B & first_step_B & ((flags & (VALID | TERMINATED | TRUNCATED)) == VALID)
        self._rows.put(group, "flags", last[open_B], flags[open_B] & np.uint8(255 - STOP))

    def _write(self, slot: Slot, group: int, placed: Placed, stored: Array | slice) -> None:
        """Every row of the rollout, and the older frames of stacks that do not go on."""
        assert self._layout is not None
        a, num_rows, stacks = slot.arrays, int(slot.envelope["num_rows"]), self._layout.stacks
        place_T1B = self._place(group, placed.row_T1B)
        place, steps = place_T1B[stored], place_T1B[:-1][stored if isinstance(stored, slice) else stored[:-1]]

        def put(name: str, value_TB: Array) -> None:
            full = len(value_TB) == num_rows + 1
            self._rows.put(group, name, place if full else steps, value_TB[stored if full or isinstance(stored, slice) else stored[:-1]])

        for name in slot.observation_names:
            array = a[name][: num_rows + 1]
            put(name, array if name not in stacks else stacks[name].frames(array, 2)[:, :, -1])
        for name in self._layout.step_fields:
            put(name, a[name][:num_rows])
        put("flags", placed.flags_T1B)
        put("gap", placed.gap_TB)
        self._rows.put(group, "inserted", steps, self.inserted_steps)
        padded = placed.padded_T1B & (True if isinstance(stored, slice) else stored)
        t, b = np.nonzero(padded)
        self._write_older_frames(group, {n: a[n][t, b] for n in stacks}, b, placed.row_T1B[t, b], placed.end_B)

    def _write_finals(self, slot: Slot, group: int, placed: Placed) -> None:
        assert self._layout is not None
        env_F = slot.arrays["final/env"][placed.final_F]
        kept_F = placed.final_row_F > placed.end_B[env_F] - self._layout.num_rows
        index_F, env_F, row_F = placed.final_F[kept_F], env_F[kept_F], placed.final_row_F[kept_F]
        place = self._place_of(group, env_F, row_F)
        stacks = self._layout.stacks
        for name in self._layout.observations:
            array = slot.arrays[f"final/{name}"][index_F]
            self._rows.put(group, name, place, array if name not in stacks else stacks[name].frames(array, 1)[:, -1])
        if self._layout.masked:
            self._rows.put(group, "action_mask", place, 1)
        padded_F = placed.final_padded_F[kept_F]
        older = {n: slot.arrays[f"final/{n}"][index_F[padded_F]] for n in stacks}
        self._write_older_frames(group, older, env_F[padded_F], row_F[padded_F], placed.end_B)

    def _write_older_frames(self, group: int, images: Arrays, env: Array, row: Array, end_B: Array) -> None:
        """The frames of stacks but the newest, each in a row before its stack's. Whatever has left the ring already is left out."""
        assert self._layout is not None
        for name, image in images.items():
            stack = self._layout.stacks[name]
            frames = stack.frames(image, 1)
            for back in range(1, stack.size):
                kept = row - back > end_B[env] - self._layout.num_rows
                self._rows.put(group, name, self._place_of(group, env[kept], row[kept] - back), frames[kept, -1 - back])

    # ---- sampling ------------------------------------------------------------------------------------------------
    def sample(self, num: int, rng: np.random.Generator, *, beta: float) -> Sample:
        """Draw `num` steps, one from each `num`-th part of the sum of priorities (stratified, with repetition).

        Args:
          beta: exponent of the importance weights.
        Raises:
          ValueError: there is no step yet.
        """
        if self.num_steps < 1:
            raise ValueError("nothing can be sampled: no env step is in the replay yet")
        rows, num_rows = self._rows, self._rows.num_rows
        place_M = self._tree.sample((np.arange(num) + rng.random(num)) * (self._tree.total / num))
        column_M, position_M = np.divmod(place_M, num_rows)
        first_M, every = column_M * num_rows, np.arange(num)
        following_Mn = first_M[:, None] + (position_M[:, None] + np.arange(self._n_step)) % num_rows
        flags_Mn = rows.take("flags", following_Mn)
        found = n_step(rows.take("reward", following_Mn), (flags_Mn & STOP) > 0, self._gamma)
        last_M = following_Mn[every, found.length_M - 1]
        goes_on_M = (flags_Mn[every, found.length_M - 1] & TERMINATED) == 0
        next_M = first_M + (position_M + found.length_M + rows.take("gap", last_M)) % num_rows
        masked = self._layout is not None and self._layout.masked
        return Sample(
            observation=self._observation(place_M),
            action_mask=rows.take("action_mask", place_M) if masked else None,
            action=rows.take("action", place_M),
            return_M=found.return_M,
            discount_M=(found.discount_M * goes_on_M).astype(np.float32),
            next_observation=self._observation(next_M),
            next_action_mask=rows.take("action_mask", next_M) if masked else None,
            weight_M=self._weight(place_M, beta),
            index_M=self._lap(column_M, position_M) * self._tree.num_leaves + place_M,
            age_updates_M=self._version - rows.take("policy_version", place_M),
            age_steps_M=self.inserted_steps - rows.take("inserted", place_M),
        )

    def _weight(self, leaf_M: Array, beta: float) -> Array:
        priority_M = self._tree.leaves[leaf_M]
        return np.asarray((priority_M / priority_M.min()) ** -beta, np.float32)

    def _lap(self, column_M: Array, position_M: Array) -> Array:
        """How often the ring of a column was gone round before the row that now lies at a position."""
        lap_M, at_M = np.divmod(self._newest_C[column_M], self._rows.num_rows)
        return np.asarray(lap_M - (position_M > at_M))

    def _observation(self, place_M: Array) -> Arrays:
        """Observations by field name, [M, ...]; the frames of a stack are gathered from its row and those before."""
        assert self._layout is not None
        out: Arrays = {}
        for name in self._layout.observations:
            stack = self._layout.stacks.get(name)
            if stack is None:
                out[name] = self._rows.take(name, place_M)
                continue
            first_M = place_M // self._rows.num_rows * self._rows.num_rows
            back_K = np.arange(1 - stack.size, 1)
            frames = self._rows.take(name, first_M[:, None] + ((place_M - first_M)[:, None] + back_K) % self._rows.num_rows)
            out[name] = frames if stack.axis == 0 else np.ascontiguousarray(np.moveaxis(frames, 1, -1))
        return out

    def update_priorities(self, index_M: Array, priority_M: Array) -> None:
        """Give sampled steps their new priorities (before the exponent alpha); those evicted meanwhile are ignored.

        Raises:
          SchemaError: a priority is negative or not finite.
        """
        priority_M = np.asarray(priority_M, np.float64)
        bad_M = ~(np.isfinite(priority_M) & (priority_M >= 0))
        if bad_M.any():
            at = int(bad_M.argmax())
            raise SchemaError(f"priority {at} of {len(bad_M)} is {priority_M[at]}; expected finite numbers >= 0: is the loss finite?")
        lap_M, place_M = np.divmod(index_M, self._tree.num_leaves)
        kept_M = (self._lap(*np.divmod(place_M, self._rows.num_rows)) == lap_M) & (self._tree.leaves[place_M] > 0)
        priority_M = np.maximum(priority_M[kept_M], _LEAST_PRIORITY)
        self._most = max(self._most, float(priority_M.max(initial=0.0)))
        self._tree.set(place_M[kept_M], priority_M**self._alpha)

    def check_valid(self) -> None:
        """Raise AssertionError where an invariant is broken."""
        assert 0 <= self.evicted_steps <= self.inserted_steps
        if self._layout is None:
            return
        self._tree.check_valid()
        assert np.count_nonzero(self._tree.leaves) == self.num_steps <= self._num_columns * self._layout.reach
        num_rows = self._layout.num_rows
        place = np.flatnonzero(self._tree.leaves)
        column, position = np.divmod(place, num_rows)
        assert ((self._rows.take("flags", place) & VALID) > 0).all()
        behind = (self._newest_C[column] - position) % num_rows
        assert ((behind >= 1) & (behind <= self._layout.reach)).all()


def _ranges(begin_B: Array, end_B: Array) -> tuple[Array, Array]:
    """All (environment, row) with begin <= row < end, environment by environment."""
    length_B = np.maximum(0, end_B - begin_B)
    env = np.repeat(np.arange(len(length_B)), length_B)
    offset = np.arange(len(env)) - np.repeat(length_B.cumsum() - length_B, length_B)
    return env, begin_B[env] + offset
