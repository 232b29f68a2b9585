"""Priorities against a dictionary: entries of rings that come round, their names, and what they are drawn by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import SchemaError
from shoal.experience.priorities import Priorities

LEAST = 1e-6
Entry = tuple[int, int]  # column, and number in it; numbers go on for ever


class Rings:
    """`values` has the priority of each entry that can be drawn; `names` every name that was given out so far."""

    def __init__(self, num_columns: int, length: int, alpha: float) -> None:
        self.length, self.alpha = length, alpha
        self.priorities = Priorities(num_columns, length, alpha)
        self.written_C = np.zeros(num_columns, np.int64)
        self.values: dict[Entry, float] = {}
        self.names: dict[int, Entry] = {}
        self.most = 1.0

    def place(self, entry: Entry) -> np.ndarray:
        return np.array([entry[0] * self.length + entry[1] % self.length])

    def write(self, column: int) -> Entry:
        """The next entry, in the place of the oldest; it cannot be drawn yet."""
        entry = column, int(self.written_C[column])
        self.values.pop((column, entry[1] - self.length), None)
        self.priorities.clear(self.place(entry))
        self.written_C[column] += 1
        return entry

    def enter(self, entry: Entry) -> None:
        self.priorities.enter(self.place(entry))
        self.values[entry] = self.most

    def leave(self, entry: Entry) -> None:
        """It is still there, and can no longer be drawn."""
        self.priorities.clear(self.place(entry))
        self.values.pop(entry, None)

    def update(self, names: list[int], priorities: np.ndarray) -> None:
        self.priorities.update(np.array(names, np.int64), priorities, self.written_C)
        for name, priority in zip(names, priorities.tolist(), strict=True):
            if self.names[name] in self.values:
                self.values[self.names[name]] = max(LEAST, priority)
                self.most = max(self.most, priority)

    def check(self) -> None:
        leaves = np.zeros(self.priorities.tree.num_leaves)
        for entry, value in self.values.items():
            leaves[self.place(entry)] = value**self.alpha
        np.testing.assert_allclose(self.priorities.tree.leaves, leaves, rtol=1e-13)
        assert self.priorities.most == self.most
        self.priorities.tree.check_valid()
        for entry in self.values:
            (name,) = self.priorities.name(self.place(entry), self.written_C).tolist()
            assert self.names.setdefault(name, entry) == entry  # no name is given to two
        assert len(set(self.names.values())) == len(self.names)  # and nobody gets two


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 5), st.sampled_from([0.0, 0.6, 1.0]))
def test_a_name_is_one_entrys_for_ever_and_only_what_can_be_drawn_takes_a_priority(
    seed: int, num_columns: int, length: int, alpha: float
) -> None:
    rng, rings, waiting = np.random.default_rng(seed), Rings(num_columns, length, alpha), []
    for _ in range(50):
        what = rng.integers(4)
        if what == 0:
            waiting.append(rings.write(int(rng.integers(num_columns))))
        elif what == 1 and waiting:
            entry = waiting.pop(int(rng.integers(len(waiting))))
            if entry[1] >= rings.written_C[entry[0]] - length:  # not overwritten meanwhile
                rings.enter(entry)
        elif what == 2 and rings.values:
            rings.leave(list(rings.values)[int(rng.integers(len(rings.values)))])
        elif what == 3 and rings.names:
            names = [list(rings.names)[n] for n in rng.integers(len(rings.names), size=rng.integers(1, 4))]
            priorities = rng.choice([0.0, 0.1, 1.0, 7.3], len(names)) * rng.random(len(names))
            rings.update(names, priorities.astype(np.float32))  # as a learner has them; the tree is float64
        rings.check()


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 30), st.sampled_from([0.0, 0.4, 1.0]))
def test_one_is_drawn_from_each_part_of_the_running_sum_and_weighed_by_the_rarest(seed: int, length: int, num: int, beta: float) -> None:
    rng, priorities = np.random.default_rng(seed), Priorities(2, length, 0.6)
    entered = np.unique(rng.integers(0, 2 * length, 2 * length))
    priorities.enter(entered)
    written_C = np.full(2, length)
    priorities.update(priorities.name(entered, written_C), rng.random(len(entered)) * 3, written_C)
    leaves = priorities.tree.leaves.copy()
    place_M = priorities.draw(num, np.random.default_rng(seed))
    mass_M = (np.arange(num) + np.random.default_rng(seed).random(num)) / num * leaves.sum()
    running = 0.0
    for leaf, value in enumerate(leaves):
        inside = (mass_M >= running + 1e-9) & (mass_M < running + value - 1e-9)  # rounding may decide at the edges
        assert (place_M[inside] == leaf).all()
        running += value
    assert (leaves[place_M] > 0).all()
    assert place_M.dtype == np.int64
    weight_M = priorities.weight(place_M, beta)
    least = min(leaves[place] for place in place_M)
    np.testing.assert_allclose(weight_M, [(leaves[place] / least) ** -beta for place in place_M], rtol=1e-6)
    assert (weight_M.dtype, float(weight_M.max())) == (np.float32, 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e-300])
def test_a_priority_that_is_no_number_from_zero_on_is_named_and_none_is_taken(bad: float) -> None:
    rings = Rings(1, 3, 0.6)
    for _ in range(3):
        rings.enter(rings.write(0))
    rings.check()
    with pytest.raises(SchemaError, match=rf"priority 2 of 3 is {bad}; expected finite numbers >= 0"):
        rings.priorities.update(np.array(list(rings.names)), np.array([5.0, 0.0, bad]), rings.written_C)
    rings.check()
    rings.update(list(rings.names), np.zeros(3))
    rings.check()


def test_what_is_restored_goes_on_with_the_largest_priority_so_far() -> None:
    rings = Rings(1, 2, 0.6)
    rings.enter(rings.write(0))
    rings.check()
    rings.update(list(rings.names), np.array([9.0]))
    rings.update(list(rings.names), np.array([0.5]))
    again = Priorities(1, 2, 0.6)
    again.set_state({name: array.copy() for name, array in rings.priorities.get_state().items()})
    rings.priorities = again
    rings.check()
    rings.enter(rings.write(0))
    rings.check()
    assert rings.most == 9.0
