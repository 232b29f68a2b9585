"""Groups on actors and actors on nodes: even, and with as few moves as can be, which brute force says for small numbers."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from shoal.engines.placement import NOBODY, shares, spread

ACTORS = st.lists(st.integers(0, 9), unique=True, max_size=5)
HOMES = st.lists(st.integers(NOBODY, 9), max_size=12)


def most_that_may_stay(homes: list[int], actors: list[int]) -> int:
    """By trying every way to say which actors have one group more."""
    share, more = divmod(len(homes), len(actors))
    have = Counter(homes)
    return max(sum(min(have[a], share + (a in larger)) for a in actors) for larger in combinations(actors, more))


@given(HOMES, ACTORS.filter(bool))
def test_groups_are_spread_evenly_and_as_many_stay_as_can(homes: list[int], actors: list[int]) -> None:
    placed = spread(homes, actors)
    counts = [placed.count(actor) for actor in actors]
    assert sum(counts) == len(homes)
    assert max(counts) - min(counts) <= 1
    assert sum(a == b for a, b in zip(homes, placed, strict=True)) == most_that_may_stay(homes, actors)
    assert spread(placed, actors) == placed


def test_at_first_they_go_round_and_without_actors_nowhere() -> None:
    assert spread([NOBODY] * 7, [4, 2, 9]) == [4, 2, 9, 4, 2, 9, 4]
    assert spread([0, 1], []) == [NOBODY, NOBODY]


def test_one_actor_more_takes_no_more_than_its_part() -> None:
    before = spread([NOBODY] * 8, [0, 1, 2])
    after = spread(before, [0, 1, 2, 3])
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 2
    assert after.count(3) == 2


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 30), st.integers(1, 6))
def test_nodes_have_what_is_wanted_and_nobody_moves_who_may_stay(have: list[int], wanted: int, most: int) -> None:
    before = dict(enumerate(have))
    after = shares(before, wanted, most)
    assert sum(after.values()) == min(wanted, most * len(have))
    assert all(0 <= count <= most for count in after.values())
    allowed = {node: min(count, most) for node, count in before.items()}
    if sum(allowed.values()) >= wanted:
        assert all(after[node] <= allowed[node] for node in before)
    else:
        assert all(after[node] >= allowed[node] for node in before)
        came = [after[node] for node in before if after[node] > allowed[node]]
        assert not came or max(came) - 1 <= min(after.values())  # one came only where the fewest were


@given(st.integers(1, 6), st.integers(0, 40), st.integers(1, 8))
def test_from_nothing_and_back_nodes_differ_by_one_at_most(nodes: int, wanted: int, most: int) -> None:
    full = shares(dict.fromkeys(range(nodes), 0), wanted, most)
    assert max(full.values()) - min(full.values()) <= 1
    fewer = shares(full, wanted // 2, most)
    assert max(fewer.values()) - min(fewer.values()) <= 1
