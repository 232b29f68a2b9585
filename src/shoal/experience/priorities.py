"""Priorities of what lies in rings: drawn in proportion, changed by name, and forgotten when the ring comes round.

An entry is a place in a column's ring: column * ring_length + position. Its name adds how often the ring had been gone round, so a name
that was given out never means another entry.

Legend: M entries, C columns.
"""

from __future__ import annotations

import numpy as np

from shoal.errors import SchemaError
from shoal.experience.replay_memory import OWN, Memory
from shoal.experience.sum_tree import SumTree
from shoal.types import Array, Arrays

_LEAST = 1e-6  # what was found perfectly predicted is still sampled now and then


class Priorities:
    """Of `num_columns` rings of `ring_length` entries, none of which can be drawn in the beginning.

    alpha: exponent (Schaul et al. 2016, eq. 1). most: the largest priority so far, which new entries get.
    """

    def __init__(self, num_columns: int, ring_length: int, alpha: float, memory: Memory = OWN) -> None:
        self.tree = SumTree(num_columns * ring_length, memory)
        self.most = 1.0
        self._ring_length, self._alpha = ring_length, alpha

    def enter(self, place_M: Array) -> None:
        """From now on they can be drawn."""
        self.tree.set(place_M, self.most**self._alpha)

    def clear(self, place_M: Array) -> None:
        self.tree.set(place_M, 0.0)

    def draw(self, num: int, rng: np.random.Generator) -> Array:
        """Places, one from each `num`-th part of the sum (stratified, with repetition), int64 [num]. The sum must not be 0."""
        return self.tree.sample((np.arange(num) + rng.random(num)) * (self.tree.total / num))

    def weight(self, place_M: Array, beta: float) -> Array:
        """Importance weights (eq. 1 and 3.4 there), float32 [M], relative to the largest of these."""
        priority_M = self.tree.leaves[place_M]
        return np.asarray((priority_M / priority_M.min()) ** -beta, np.float32)

    def name(self, place_M: Array, written_C: Array) -> Array:
        """Names of the entries at places, int64 [M]. written_C: entries ever written to each column's ring."""
        return self._lap(place_M, written_C) * self.tree.num_leaves + place_M

    def update(self, index_M: Array, priority_M: Array, written_C: Array) -> None:
        """New priorities by name; of those that can no longer be drawn nothing is kept. Raises SchemaError for one that is no number >= 0."""
        priority_M = np.asarray(priority_M, np.float64)
        bad_M = ~(np.isfinite(priority_M) & (priority_M >= 0))
        if bad_M.any():
            at = int(bad_M.argmax())
            raise SchemaError(f"priority {at} of {len(bad_M)} is {priority_M[at]}; expected finite numbers >= 0: is the loss finite?")
        lap_M, place_M = np.divmod(index_M, self.tree.num_leaves)
        kept_M = (self._lap(place_M, written_C) == lap_M) & (self.tree.leaves[place_M] > 0)
        priority_M = np.maximum(priority_M[kept_M], _LEAST)
        self.most = max(self.most, float(priority_M.max(initial=0.0)))
        self.tree.set(place_M[kept_M], priority_M**self._alpha)

    def get_state(self) -> Arrays:
        return {"leaves": self.tree.leaves, "most": np.array(self.most)}

    def set_state(self, state: Arrays) -> None:
        self.most = float(state["most"])
        self.tree.load(state["leaves"])

    def go_on(self, most: float) -> None:
        """Where the leaves are those of another, in a memory that outlived it."""
        self.most = most
        self.tree.load(self.tree.leaves)

    def _lap(self, place_M: Array, written_C: Array) -> Array:
        """How often the ring had been gone round when the entry at a place was written."""
        column_M, position_M = np.divmod(place_M, self._ring_length)
        lap_M, next_M = np.divmod(written_C[column_M], self._ring_length)
        return np.asarray(lap_M - (position_M >= next_M))
