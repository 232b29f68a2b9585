"""Sequences of rows for recurrent policies (Kapturowski et al. 2019, R2D2): where they begin, and what is returned of them.

A sequence begins at the first row of a rollout, since there the recurrent state is recorded, and goes on for L rows, into the rollouts
that follow: with rollouts shorter than that, sequences overlap. Rollouts of environments that wait may be shorter than sampling.rollout_length
in async mode: one that begins close behind the last start begins no sequence, unless the steps behind it would come too late for the next.

A sequence may go past the ends of episodes: the state is reset where the next one begins. Rows that are no steps (true last observations,
reset rows) are part of it, so the successor of a step is a later row of the same sequence, with the recurrent state that belongs to it. Such
rows take room: where there is none left between one start and the next, as many steps behind an episode's end are left out of the trained part.

Legend: L rows of a sequence, M sequences, n steps of a return at most, B environments of a group, Z starts that a column keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoal.config import ReplayConfig
from shoal.experience.nstep import n_step
from shoal.experience.placing import BEGINS, BREAK, STOP, TERMINATED, VALID
from shoal.experience.priorities import Priorities
from shoal.experience.replay_layout import Layout
from shoal.experience.replay_memory import Memory
from shoal.experience.replay_rows import Rows
from shoal.experience.ring import Slot
from shoal.types import Array, Arrays


@dataclass
class SequenceSample:
    """Sampled sequences, in arrays of the caller's own. The first `burn_in` rows are there to warm the recurrent state up.

    Attributes:
      observation: by field name, [L+1, M, ...]. action_mask: bool [L+1, M, A] or None. action: [L, M, ...].
      begins_L1M: bool, the recurrent state is reset before this row.
      valid_LM: bool, a step, whose recurrent state and successor are known. Other rows are finite and mean nothing.
      return_LM: float32, n-step returns as in `Sample`, which go no further than the sequence.
      discount_LM: float32, what the value at row `successor_LM` counts; 0 where the episode terminated.
      successor_LM: int64, from 1 to L, the row to bootstrap from; a truncated episode's true last observation has one. Any where the discount is 0.
      state: recurrent state by name at the first row, [M, ...], as the actor had it; empty without memory.
      weight_M, index_M, age_updates_M, age_steps_M: as in `Sample`, of the first row.
    """

    burn_in: int
    observation: Arrays
    action_mask: Array | None
    action: Array
    begins_L1M: Array
    valid_LM: Array
    return_LM: Array
    discount_LM: Array
    successor_LM: Array
    state: Arrays
    weight_M: Array
    index_M: Array
    age_updates_M: Array
    age_steps_M: Array


@dataclass
class Window:
    """What the flags of L rows and the one after them come to, see SequenceSample."""

    valid_LM: Array
    return_LM: Array
    discount_LM: Array
    successor_LM: Array


def window(flags_L1M: Array, gap_LM: Array, reward_LM: Array, n: int, gamma: float) -> Window:
    """Returns, successors and which rows count, inside of sequences of rows.

    Args:
      flags_L1M: uint8 [L+1, M]. gap_LM: uint8, rows between a step and its successor. reward_LM: float32.
    """
    length, num = reward_LM.shape
    row_L = np.arange(length)
    ahead_nL = row_L + np.arange(n)[:, None]
    inside_nL = np.minimum(ahead_nL, length - 1)
    stop_LM = (flags_L1M[:-1] & STOP) > 0
    stop_nLM = stop_LM[inside_nL] | (ahead_nL >= length - 1)[..., None]
    found = n_step(reward_LM[inside_nL].reshape(n, -1), stop_nLM.reshape(n, -1), gamma)
    length_LM = found.length_M.reshape(length, num)
    last_LM = row_L[:, None] + length_LM - 1
    every_M = np.arange(num)
    terminated_LM = (flags_L1M[last_LM, every_M] & TERMINATED) > 0
    gap_at_last_LM = gap_LM[last_LM, every_M]
    valid_LM = _known(flags_L1M, gap_LM) & (terminated_LM | (gap_at_last_LM == 0))
    return Window(
        valid_LM=valid_LM,
        return_LM=found.return_M.reshape(length, num),
        discount_LM=(found.discount_M.reshape(length, num) * ~terminated_LM).astype(np.float32),
        successor_LM=last_LM + 1,
    )


def _known(flags_L1M: Array, gap_LM: Array) -> Array:
    """Steps whose recurrent state is known: not those after a break or after rows of older frames, until an episode begins."""
    lost_M = np.zeros(gap_LM.shape[1], np.bool_)
    known_LM = (flags_L1M[:-1] & VALID) > 0
    for t, (flags_M, gap_M) in enumerate(zip(flags_L1M, gap_LM, strict=False)):
        if t:
            lost_M = (lost_M | ((flags_M & BREAK) > 0)) & ((flags_M & BEGINS) == 0)
        known_LM[t] &= ~lost_M
        lost_M = lost_M | (gap_M > 0)
    return known_LM


class Starts:
    """Where sequences may begin: for each column a ring of the last Z, with their recurrent states.

    `priorities` is over these, not over rows. Starts lie a whole rollout's rows apart or more, so that Z of them reach as far back as the rows do.
    They lie closer after a break, where one always begins, and where a rollout was closed early and the next start, a whole rollout on, would
    come too late for its first rows. Then the oldest are pushed out before their rows.
    """

    def __init__(self, layout: Layout, num_groups: int, num_envs: int, config: ReplayConfig, alpha: float, memory: Memory) -> None:
        self.rows = Rows(layout.start_fields, num_groups, num_envs, layout.num_starts, config.shards, memory)
        self.priorities = Priorities(num_groups * num_envs, layout.num_starts, alpha, memory)
        self.written_C = np.zeros(num_groups * num_envs, np.int64)
        self.length, self.burn_in = config.sequence_length or 1, config.burn_in
        self._names = layout.state_fields
        self._newest_C = np.full(num_groups * num_envs, -1, np.int64)  # row of the last start, -1 before the first

    def add(self, slot: Slot, group: int, row_B: Array, goes_on_B: Array) -> None:
        """A rollout begins at these rows."""
        num_envs = self.rows.num_envs
        columns = slice(group * num_envs, (group + 1) * num_envs)
        newest_B = self._newest_C[columns]
        whole, since_B = slot.schema.num_rows, row_B - newest_B
        due_B = (since_B >= whole) | (since_B + whole > self.length - self.burn_in)
        begins_B = (slot.rows_used() > 0) & (~goes_on_B | (newest_B < 0) | due_B)
        (env,) = np.nonzero(begins_B)
        written_B = self.written_C[columns]
        place = (group * num_envs + env) * self.rows.num_rows + written_B[env] % self.rows.num_rows
        self.priorities.clear(place)
        self.rows.touch(place)
        for name in self._names:
            self.rows.put(group, name, place, slot.arrays[name][env])
        self.rows.put(group, "row", place, row_B[env])
        self.rows.put(group, "seen", place, 0)
        newest_B[env] = row_B[env]
        written_B[env] += 1

    def waiting(self, group: int, newest_B: Array, reach: int) -> tuple[Array, Array]:
        """Places of starts, and their rows, whose sequences have become whole; those that are no longer are cleared."""
        num_starts = self.rows.num_rows
        row_BZ = self.rows.block("row", group, 0, num_starts)
        written_B = self.written_C[group * len(newest_B) : (group + 1) * len(newest_B)]
        place_BZ = (group * len(newest_B) + np.arange(len(newest_B)))[:, None] * num_starts + np.arange(num_starts)
        there_BZ = (np.arange(num_starts) < written_B[:, None]) & (row_BZ >= newest_B[:, None] - reach)
        self.priorities.clear(place_BZ[~there_BZ & (self.priorities.tree.leaves[place_BZ] > 0)])
        seen_BZ = self.rows.block("seen", group, 0, num_starts)
        whole_BZ = there_BZ & (row_BZ + self.length <= newest_B[:, None]) & (seen_BZ == 0)
        self.rows.touch(place_BZ[whole_BZ])
        seen_BZ[whole_BZ] = 1
        return place_BZ[whole_BZ], row_BZ[whole_BZ]

    def state(self, place_M: Array) -> Arrays:
        """Recurrent states recorded there, [M, ...]."""
        return {name: self.rows.take(name, place_M) for name in self._names}

    def get_state(self) -> Arrays:
        """Everything but the rows and the priorities."""
        return {"starts_C": self.written_C, "newest_start_C": self._newest_C}

    def set_state(self, state: Arrays) -> None:
        self.written_C[:], self._newest_C[:] = state["starts_C"], state["newest_start_C"]
