"""Where the rows of a rollout go in the replay.

Each environment has a column, a ring of rows that go on for ever in number. A row is an observation with what was done there. The
successor of a step is in the row after it:

    step   step   last observation   step   step   newest observation
                  of the episode     (the next one begins)

A true last observation that no row of the rollout holds gets a row of its own, which is no step. Where images are stacks of frames, a
row holds only the newest frame; the others are found in the rows before, and a stack that does not go on from the one before it
(an episode's first) gets rows for its older frames.

Legend: T rows of the rollout, B environments of its group, F last observations, K frames of the largest stack.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shoal.experience.ring import Slot
from shoal.experience.stacks import Stack, follows, follows_rows
from shoal.types import Array

VALID = np.uint8(1)  # a step, which can be sampled
STOP = np.uint8(2)  # nothing is summed beyond it
TERMINATED = np.uint8(4)
TRUNCATED = np.uint8(8)
BEGINS = np.uint8(16)  # an episode begins here: recurrent state is reset before it
BREAK = np.uint8(32)  # does not go on from the row before, of which nobody knows what follows


class Placed(NamedTuple):
    """Numbers of rows in their columns, and what they are.

    Attributes:
      row_T1B: int64 [T+1, B], of every observation of the rollout.
      used_T1B: bool, False beyond an environment's newest observation.
      flags_T1B: uint8, of those rows.
      gap_TB: uint8, rows between a step and its successor, which hold older frames.
      padded_T1B: bool, the stack does not go on from the row before: its older frames have rows of their own.
      final_F: indices of the rollout's last observations that are stored. final_row_F: their rows. final_padded_F: as padded_T1B.
      end_B: the row of the newest observation.
    """

    row_T1B: Array
    used_T1B: Array
    flags_T1B: Array
    gap_TB: Array
    padded_T1B: Array
    final_F: Array
    final_row_F: Array
    final_padded_F: Array
    end_B: Array


def place(slot: Slot, goes_on_B: Array, newest_B: Array, begins_B: Array, stacks: dict[str, Stack]) -> Placed:
    """Place a finished rollout behind the newest rows of its columns.

    Args:
      goes_on_B: its first row is the newest observation that is stored. Elsewhere it begins behind that, after a break.
      newest_B: rows of the newest observations that are stored.
      begins_B: an episode begins at those.
    """
    num_rows, used_B = int(slot.envelope["num_rows"]), slot.rows_used()
    a, pad = slot.arrays, max((s.size for s in stacks.values()), default=1) - 1
    valid_TB, t_T1 = a["valid"][:num_rows], np.arange(num_rows + 1)[:, None]
    ended_TB = a["terminated"][:num_rows] | a["truncated"][:num_rows]
    every = slice(int(slot.envelope["num_finals"]))
    t_all, b_all = a["final/row"][every], a["final/env"][every]
    final_F = np.flatnonzero(valid_TB[t_all, b_all])  # a last observation of an invalid row is nobody's successor
    t_F, b_F = t_all[final_F], b_all[final_F]
    final_TB = np.zeros(valid_TB.shape, np.bool_)
    final_TB[t_F, b_F] = True

    fresh_TB, padded_F = _not_following(slot, stacks, num_rows, final_F, t_F, b_F)
    fresh_TB = (fresh_TB | final_TB) if pad else fresh_TB
    own_TB = final_TB.astype(np.int64)
    own_TB[t_F, b_F] += pad * padded_F
    start_B = np.where(goes_on_B, newest_B, newest_B + 1 + pad)
    row_T1B = np.concatenate([start_B[None], start_B + (1 + own_TB + pad * fresh_TB).cumsum(axis=0)])

    begins_T1B = np.zeros((num_rows + 1, slot.schema.num_envs), np.bool_)
    begins_T1B[0] = begins_B & goes_on_B
    begins_T1B[1:] = ~valid_TB & ~ended_TB  # the reset row of a NEXT_STEP autoreset: the episode begins after it
    begins_T1B[t_all + 1, b_all] = True
    step_T1B = (t_T1 < used_B) & np.concatenate([valid_TB, np.zeros_like(valid_TB[:1])])
    straight_TB = step_T1B[1:] & ~fresh_TB  # the next row is a step too
    flags_T1B = step_T1B * VALID | begins_T1B * BEGINS
    flags_T1B[0] |= ~goes_on_B * BREAK
    flags_T1B[:-1] |= a["terminated"][:num_rows] * TERMINATED | a["truncated"][:num_rows] * TRUNCATED
    flags_T1B[:-1] |= (ended_TB | ~straight_TB) * STOP
    gap_TB = (pad * (fresh_TB & ~final_TB)).astype(np.uint8)
    gap_TB[t_F, b_F] = pad * padded_F
    return Placed(
        row_T1B=row_T1B,
        used_T1B=t_T1 <= used_B,
        flags_T1B=flags_T1B,
        gap_TB=gap_TB,
        padded_T1B=np.concatenate([~goes_on_B[None] & bool(pad), fresh_TB]),
        final_F=final_F,
        final_row_F=row_T1B[t_F, b_F] + 1 + pad * padded_F,
        final_padded_F=padded_F,
        end_B=row_T1B[used_B, np.arange(len(used_B))],
    )


def _not_following(slot: Slot, stacks: dict[str, Stack], num_rows: int, final_F: Array, t_F: Array, b_F: Array) -> tuple[Array, Array]:
    """Where a stack does not continue the row before it: bool [T, B] of rows 1 to T, and bool [F] of last observations."""
    fresh_TB = np.zeros((num_rows, slot.schema.num_envs), np.bool_)
    padded_F = np.zeros(len(final_F), np.bool_)
    for name, stack in stacks.items():
        image_T1B = slot.arrays[name][: num_rows + 1]
        fresh_TB |= ~follows_rows(image_T1B, stack)
        padded_F |= ~follows(slot.arrays[f"final/{name}"][final_F], image_T1B[t_F, b_F], stack, 1)
    return fresh_TB, padded_F
