"""A rollout's rows on their way into the replay's memory, and observations on their way out of it.

Legend: M rows that are read, T rows of a rollout, B environments of a group, F last observations.
"""

from __future__ import annotations

import numpy as np

from shoal.experience.placing import STOP, TERMINATED, TRUNCATED, VALID, Placed
from shoal.experience.replay_layout import Layout
from shoal.experience.replay_memory import OWN, Memory
from shoal.experience.replay_rows import Rows
from shoal.experience.ring import Slot
from shoal.types import Array, Arrays


class Store:
    """Rows of all columns, as `layout` says. Rows have numbers that go on for ever; `place` says where in its ring one lies."""

    def __init__(self, layout: Layout, num_groups: int, num_envs: int, num_shards: int, memory: Memory = OWN) -> None:
        self.layout = layout
        self.rows = Rows(layout.fields, num_groups, num_envs, layout.num_rows, num_shards, memory)
        self._num_envs = num_envs

    def place(self, group: int, env: Array, row: Array) -> Array:
        """Places of numbered rows of a group's environments."""
        return np.asarray((group * self._num_envs + env) * self.layout.num_rows + row % self.layout.num_rows)

    def places(self, group: int, row_xB: Array) -> Array:
        """The same for every environment, [..., B]."""
        return self.place(group, np.arange(self._num_envs), row_xB)

    def after(self, place: Array, rows: Array) -> Array:
        """Places so many rows later in the same column (earlier where negative)."""
        num_rows = self.layout.num_rows
        position = place % num_rows
        return np.asarray(place - position + (position + rows) % num_rows)

    # ---- reading -------------------------------------------------------------------------------------------------
    def observation(self, place: Array, reuse: Arrays | None = None) -> Arrays:
        """Observations by field name, [*place.shape, ...]; the frames of a stack are gathered from its row and those before.

        reuse: arrays that are written again, where their shape is right.
        """
        out: Arrays = {}
        for name in self.layout.observations:
            stack = self.layout.stacks.get(name)
            old = None if reuse is None else reuse[name]
            old = old if old is not None and old.shape[: place.ndim] == place.shape and old.flags.c_contiguous else None
            if stack is None:
                out[name] = self.rows.take(name, place, old)
                continue
            frames = self.after(place[..., None], np.arange(1 - stack.size, 1))
            if stack.axis == 0:
                out[name] = self.rows.take(name, frames, old)
            else:
                images = np.moveaxis(self.rows.take(name, frames), place.ndim, -1)
                out[name] = old if old is not None else np.empty(images.shape, images.dtype)
                np.copyto(out[name], images)
        return out

    def action_mask(self, place: Array) -> Array | None:
        return self.rows.take("action_mask", place) if self.layout.masked else None

    def goes_on(self, slot: Slot, group: int, newest_B: Array) -> Array:
        """Whether each environment's first observation is the newest that is stored: bool [B]."""
        newest = self.observation(self.places(group, newest_B))
        same_B = np.ones(len(newest_B), np.bool_)
        for name, stored in newest.items():
            same_B &= (stored == slot.arrays[name][0]).reshape(len(newest_B), -1).all(axis=1)
        return same_B

    # ---- writing -------------------------------------------------------------------------------------------------
    def make_room(self, group: int, newest_B: Array, end_B: Array) -> tuple[Array, int]:
        """Clear what rows up to `end_B` will lie on. Returns the places that they push out of reach, and how many steps were there."""
        reach = self.layout.reach
        gone = self._between(group, np.maximum(0, newest_B - reach), np.minimum(end_B - reach, newest_B))
        evicted = int(np.count_nonzero(self.rows.take("flags", gone) & VALID))
        new = self._between(group, np.maximum(newest_B, end_B - self.layout.num_rows + 1), end_B + 1)
        self.rows.touch(new)
        self.rows.put(group, "flags", new, 0)
        return gone, evicted

    def _between(self, group: int, begin_B: Array, end_B: Array) -> Array:
        """Places of all rows of each environment with begin <= row < end."""
        most = int((end_B - begin_B).max())
        row_nB = begin_B + np.arange(max(0, most))[:, None]
        place_nB = self.places(group, row_nB)
        return place_nB.ravel() if (end_B - begin_B).min() == most else place_nB[row_nB < end_B]

    def join(self, slot: Slot, group: int, newest_B: Array, goes_on_B: Array) -> None:
        """Returns may now be summed on from the last steps of the rollout before."""
        last = self.places(group, newest_B - 1)
        flags = self.rows.take("flags", last)
        first_step_B = slot.arrays["valid"][0] & (slot.rows_used() > 0)
        open_B = goes_on_B & first_step_B & ((flags & (VALID | TERMINATED | TRUNCATED)) == VALID)
        self.rows.touch(last[open_B])
        self.rows.put(group, "flags", last[open_B], flags[open_B] & ~STOP)

    def write(self, slot: Slot, group: int, placed: Placed, inserted_steps: int) -> None:
        """Every row of the rollout that does not leave the ring at once."""
        stored_T1B = placed.used_T1B & (placed.row_T1B > placed.end_B - self.layout.num_rows)
        everything = bool(stored_T1B.all())
        shown, done = (slice(None), slice(None)) if everything else (stored_T1B, stored_T1B[:-1])
        a, num_rows, stacks = slot.arrays, int(slot.envelope["num_rows"]), self.layout.stacks
        place_T1B = self.places(group, placed.row_T1B)
        place, step = place_T1B[shown], place_T1B[:-1][done]
        for name in slot.observation_names:
            array = a[name][: num_rows + 1]
            newest = array if name not in stacks else stacks[name].frames(array, 2)[:, :, -1]
            self.rows.put(group, name, place, newest[shown])
        for name in self.layout.step_fields:
            self.rows.put(group, name, step, a[name][:num_rows][done])
        self.rows.put(group, "flags", place, placed.flags_T1B[shown])
        self.rows.put(group, "gap", step, placed.gap_TB[done])
        self.rows.put(group, "inserted", step, inserted_steps)
        t, b = np.nonzero(placed.padded_T1B & stored_T1B)
        self._write_older_frames(group, {n: a[n][t, b] for n in stacks}, b, placed.row_T1B[t, b], placed.end_B)
        self._write_finals(slot, group, placed)

    def _write_finals(self, slot: Slot, group: int, placed: Placed) -> None:
        env_F = slot.arrays["final/env"][placed.final_F]
        kept_F = placed.final_row_F > placed.end_B[env_F] - self.layout.num_rows
        index_F, env_F, row_F = placed.final_F[kept_F], env_F[kept_F], placed.final_row_F[kept_F]
        if not len(index_F):
            return
        place, stacks = self.place(group, env_F, row_F), self.layout.stacks
        for name in self.layout.observations:
            array = slot.arrays[f"final/{name}"][index_F]
            self.rows.put(group, name, place, array if name not in stacks else stacks[name].frames(array, 1)[:, -1])
        if self.layout.masked:
            self.rows.put(group, "action_mask", place, 1)
        padded_F = placed.final_padded_F[kept_F]
        older = {n: slot.arrays[f"final/{n}"][index_F[padded_F]] for n in stacks}
        self._write_older_frames(group, older, env_F[padded_F], row_F[padded_F], placed.end_B)

    def _write_older_frames(self, group: int, images: Arrays, env: Array, row: Array, end_B: Array) -> None:
        """The frames of stacks but the newest, each in a row before its stack's, unless that has left the ring already."""
        for name, image in images.items():
            stack = self.layout.stacks[name]
            frames = stack.frames(image, 1)
            for back in range(1, stack.size):
                kept = row - back > end_B[env] - self.layout.num_rows
                self.rows.put(group, name, self.place(group, env[kept], row[kept] - back), frames[kept, -1 - back])
