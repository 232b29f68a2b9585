"""The sum tree against a list of priorities and its running sum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.experience.sum_tree import SumTree

SIZES = [1, 5, 64, 65, 4096, 4097, 300_000]


def slow_leaf(priorities, mass):
    """The first leaf at which the running sum passes `mass`."""
    running = 0.0
    for leaf, priority in enumerate(priorities):
        running += priority
        if priority > 0 and mass < running:
            return leaf
    return max(leaf for leaf, priority in enumerate(priorities) if priority > 0)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=200).filter(any), st.integers(0, 2**32))
def test_a_leaf_is_found_by_its_share_of_the_running_sum(priorities, seed):
    tree = SumTree(len(priorities))
    tree.load(np.array(priorities, float))
    mass = np.random.default_rng(seed).random(50) * sum(priorities)
    assert tree.total == sum(priorities)
    assert tree.sample(mass).tolist() == [slow_leaf(priorities, m) for m in mass]


@pytest.mark.parametrize("size", SIZES)
def test_trees_of_every_height_find_leaves_as_one_running_sum_does(size):
    rng = np.random.default_rng(size)
    priorities = rng.integers(0, 3, size) * (rng.random(size) < 0.5) * 1.0  # whole numbers: sums are exact in any order
    priorities[size // 2] = 1.0
    tree = SumTree(size)
    tree.load(priorities)
    mass = np.sort(rng.random(500) * priorities.sum())
    assert (tree.sample(mass) == np.cumsum(priorities).searchsorted(mass, side="right")).all()


@pytest.mark.parametrize("size", SIZES)
def test_leaves_that_are_set_in_any_order_make_the_tree_that_is_loaded(size):
    rng = np.random.default_rng(1)
    tree, loaded = SumTree(size), SumTree(size)
    for _ in range(20):
        tree.set(rng.integers(0, size, 30), rng.random(30))
        tree.check_valid()
    loaded.load(tree.leaves)
    mass = rng.random(1000) * tree.total
    assert tree.total == loaded.total
    assert (tree.sample(mass) == loaded.sample(mass)).all()


@pytest.mark.parametrize("size", [70, 5000])
def test_an_empty_leaf_is_never_found_not_even_where_rounding_reaches_past_the_end(size):
    rng = np.random.default_rng(0)
    tree = SumTree(size)
    for _ in range(50):
        leaves = rng.random(size) * (rng.random(size) < 0.05)
        leaves[3] = 1e-9
        tree.load(leaves)
        edges = np.concatenate([[0.0, tree.total, np.nextafter(tree.total, 0)], np.cumsum(leaves), tree.total + rng.random(20)])
        assert (leaves[tree.sample(edges)] > 0).all()


def test_of_a_leaf_that_is_set_twice_the_last_counts():
    tree = SumTree(10)
    tree.set(np.array([4, 2, 4]), np.array([1.0, 5.0, 3.0]))
    assert tree.leaves.tolist() == [0, 0, 5, 0, 3, 0, 0, 0, 0, 0]
    assert tree.total == 8.0


@pytest.mark.parametrize(
    ("level", "node", "value"), [(0, 3, 7.0), (0, 3, -1.0), (0, 3, np.nan), (0, 5001, 1.0), (1, 2, 0.0), (1, 319, 1.0)]
)
def test_a_tree_that_is_none_any_more_is_found(level, node, value):
    tree = SumTree(5000)
    tree.set(np.arange(5000), 1.0)
    tree.check_valid()
    tree._levels[level][node] = value
    with pytest.raises(AssertionError):
        tree.check_valid()


@pytest.mark.parametrize(("leaf", "value"), [(3, -1.0), (3, np.nan), (3, np.inf), (5001, 1.0)])
def test_leaves_that_are_no_priorities_are_found_where_their_sums_are_right(leaf, value):
    tree = SumTree(5000)
    tree.set(np.array([leaf]), value)
    with pytest.raises(AssertionError):
        tree.check_valid()
