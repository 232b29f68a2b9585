"""How many actors the load asks for: never outside of the bounds, still where the load is, after it where it changes.

The policy is driven by models of a run: two in closed form (actors and learner take turns, or work side by side), and one that is simulated step by
step, with a queue between actors and learner and times that scatter.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shoal.engines import autoscale
from shoal.engines.autoscale import Autoscaler, Decision, Load, Sample, decide, load_between, sensible
from shoal.types import Activity, ActivityRecord

TICK_SECONDS = 0.25
BUSY, GROW, COOL_DOWN_SECONDS, LONGEST_SECONDS = autoscale.BUSY, autoscale.GROW, autoscale.COOL_DOWN_SECONDS, autoscale.LONGEST_SECONDS
SHARE = st.floats(0.0, 1.0)


# ---- what a load asks for --------------------------------------------------------------------------------------------
@given(SHARE, SHARE, st.integers(1, 40), st.integers(1, 20), st.integers(0, 20), st.integers(1, 30), st.booleans())
def test_what_is_wanted_is_within_the_bounds_and_in_the_direction_of_the_load(
    learner_waits: float, actors_wait: float, actors: int, least: int, more: int, groups: int, in_turn: bool
) -> None:
    counts = sensible(least, least + more, groups, in_turn=in_turn)
    assert counts == sorted(set(counts))
    assert min(least, groups) == counts[0]
    assert counts[-1] <= min(least + more, groups)
    wanted = decide(Load(10.0, learner_waits, actors_wait), actors, counts, in_turn=in_turn)
    if wanted is None:
        assert counts[0] <= actors <= counts[-1]
        return
    assert wanted.reason
    assert counts[0] <= wanted.actors <= counts[-1]
    assert wanted.actors != actors
    if counts[0] <= actors <= counts[-1]:
        if wanted.actors > actors:
            assert learner_waits >= GROW
            assert in_turn or 1 - actors_wait >= BUSY
        assert actors / 2 <= wanted.actors
        if wanted.actors < actors:  # those that stay can do what all did
            assert (1 - actors_wait) * actors / wanted.actors <= BUSY


@pytest.mark.parametrize(
    ("least", "most", "groups", "expected"),
    [(1, 4, 4, [1, 2, 4]), (1, 8, 4, [1, 2, 4]), (3, 4, 4, [3, 4]), (5, 8, 4, [4]), (1, 6, 6, [1, 2, 3, 6]), (2, 9, 10, [2, 3, 4, 5])],
)
def test_where_an_update_waits_for_all_groups_no_actor_has_fewer_than_another_for_nothing(
    least: int, most: int, groups: int, expected: list[int]
) -> None:
    assert sensible(least, most, groups, in_turn=True) == expected
    assert sensible(least, most, groups, in_turn=False) == list(range(min(least, groups), min(most, groups) + 1))


def test_a_reason_has_its_figures() -> None:
    more = decide(Load(8.0, 0.62, 0.0), 2, [1, 2, 3, 4, 5, 6], in_turn=False)
    assert (more and (more.actors, more.reason)) == (4, "the learner waited for data 62% of 8 s")
    fewer = decide(Load(8.0, 0.01, 0.75), 4, [1, 2, 3, 4], in_turn=True)
    assert (fewer and (fewer.actors, fewer.reason)) == (
        2,
        "data waited for the learner: actors were idle 75% of 8 s, the learner 1%",
    )
    assert decide(Load(8.0, 0.2, 0.2), 3, [1, 2, 3, 4], in_turn=False) is None
    assert decide(Load(8.0, 0.5, 0.4), 3, [1, 2, 3, 4], in_turn=False) is None  # both wait, for something else
    assert decide(Load(8.0, 0.5, 0.5), 3, [1, 2, 3, 4], in_turn=True) is not None  # for each other


# ---- a run in closed form --------------------------------------------------------------------------------------------
def in_turn(stepping: float, learning: float, groups: int) -> Callable[[int], Load]:
    """Actors step all groups, then the learner learns: seconds of one group's rollout, and of an update."""

    def load(actors: int) -> Load:
        step = stepping * -(-groups // actors)
        return Load(1.0, step / (step + learning), 1.0 - stepping * groups / actors / (step + learning))

    return load


def side_by_side(needed: float) -> Callable[[int], Load]:
    """All work at the same time; `needed` actors make exactly what the learner takes."""
    return lambda actors: Load(1.0, max(0.0, 1.0 - actors / needed), max(0.0, 1.0 - needed / actors))


class World:
    """A run whose load is known, and its autoscaler. `made`: (seconds, decision)."""

    def __init__(self, scaler: Autoscaler, actors: int, room: int = 1000) -> None:
        self.scaler, self.actors, self.room = scaler, actors, room
        self.now = self.learner = self.idle = self.spent = 0.0
        self.update = 0
        self.made: list[tuple[float, Decision]] = []

    def go_on(self, seconds: float, load_of: Callable[[int], Load], updates_per_second: float = 2.0) -> list[int]:
        """Returns the decisions in that time."""
        before = len(self.made)
        for _ in range(round(seconds / TICK_SECONDS)):
            load = load_of(self.actors)
            self.now += TICK_SECONDS
            self.learner += load.learner_waits * TICK_SECONDS
            self.idle += load.actors_wait * TICK_SECONDS * self.actors
            self.spent += TICK_SECONDS * self.actors
            self.update = int(self.now * updates_per_second)
            decision = self.scaler.look(
                Sample(self.now, self.update, self.learner, self.now, self.idle, self.spent), self.actors, self.room
            )
            if decision is not None:
                self.actors = decision.actors
                self.made.append((self.now, decision))
        return [decision.actors for _, decision in self.made[before:]]


def turns(counts: list[int]) -> int:
    """How often the direction changed."""
    signs = [b > a for a, b in pairwise(counts) if a != b]
    return sum(a != b for a, b in pairwise(signs))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 12), st.integers(1, 24), st.floats(0.01, 3.0), st.floats(0.01, 3.0))
def test_under_a_load_that_stays_it_comes_to_rest_when_actors_and_learner_take_turns(
    begin: int, least: int, more: int, groups: int, stepping: float, learning: float
) -> None:
    assume(least <= groups)
    world, load = World(Autoscaler(least, least + more, groups, in_turn=True), begin), in_turn(stepping, learning, groups)
    counts = [begin, *world.go_on(400.0, load)]
    assert world.go_on(600.0, load) == []
    assert turns(counts) <= 1  # at most: into the bounds, and then where the load leads
    allowed = sensible(least, least + more, groups, in_turn=True)
    assert allowed[0] <= world.actors <= allowed[-1]
    assert load(world.actors).learner_waits < GROW or world.actors == allowed[-1]


@given(st.integers(1, 40), st.integers(1, 10), st.integers(0, 54), st.floats(0.2, 80.0))
def test_under_a_load_that_stays_it_comes_to_rest_when_all_work_side_by_side(begin: int, least: int, more: int, needed: float) -> None:
    world, load = World(Autoscaler(least, least + more, 64, in_turn=False), begin), side_by_side(needed)
    counts = [begin, *world.go_on(400.0, load)]
    assert world.go_on(600.0, load) == []
    assert turns(counts) <= 1
    assert least <= world.actors <= least + more
    found = load(world.actors)
    assert found.learner_waits < GROW or world.actors == least + more
    assert world.actors <= max(least, needed / BUSY + 1)  # no more than are needed, and room to breathe


@given(st.lists(st.tuples(SHARE, SHARE), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 6), st.integers(0, 6))
def test_whatever_the_load_does_it_stays_within_its_bounds_and_keeps_its_pauses(
    loads: list[tuple[float, float]], begin: int, least: int, more: int
) -> None:
    world = World(Autoscaler(least, least + more, 64, in_turn=False), begin)
    for shares in loads:
        world.go_on(7.0, lambda actors, shares=shares: Load(1.0, *shares))  # type: ignore[misc]
        assert world.made == [] or least <= world.actors <= least + more
    assert all(b - a >= COOL_DOWN_SECONDS for (a, _), (b, _) in pairwise(world.made))


def test_a_load_that_cannot_be_met_between_two_numbers_is_followed_less_and_less_often() -> None:
    """One actor is too few, two are too many: each turn doubles the time to the next."""
    world = World(Autoscaler(1, 2, 4, in_turn=False), 1)
    world.go_on(7200.0, lambda actors: Load(1.0, 0.9, 0.0) if actors == 1 else Load(1.0, 0.0, 0.9))
    times = [at for at, _ in world.made]
    gaps = [int(b - a) for a, b in pairwise(times)]
    assert gaps[:6] == [10, 20, 40, 80, 160, 320]
    assert all(gap >= LONGEST_SECONDS for gap in gaps[6:])


def test_a_quiet_time_lets_it_forget_that_it_turned_back() -> None:
    world = World(Autoscaler(1, 2, 4, in_turn=False), 1)
    world.go_on(500.0, lambda actors: Load(1.0, 0.9, 0.0) if actors == 1 else Load(1.0, 0.0, 0.9))
    assert world.scaler.cool_down_seconds > COOL_DOWN_SECONDS
    world.go_on(world.scaler.cool_down_seconds + 10.0, lambda actors: Load(1.0, 0.2, 0.2))
    assert world.scaler.cool_down_seconds == COOL_DOWN_SECONDS


def test_it_follows_a_load_that_changes_up_and_down() -> None:
    world = World(Autoscaler(1, 32, 32, in_turn=False), 2)
    for needed in (20.0, 3.0, 11.0):
        world.go_on(240.0, side_by_side(needed))
        assert 0.7 * needed < world.actors <= needed / BUSY + 1


def test_no_more_are_asked_for_than_there_is_room_for() -> None:
    world = World(Autoscaler(1, 32, 32, in_turn=False), 1, room=5)
    assert world.go_on(300.0, side_by_side(20.0)) == [2, 4, 5]
    world.room = 3  # a node is gone
    assert world.go_on(60.0, side_by_side(20.0)) == [3]


# ---- what it is decided on -------------------------------------------------------------------------------------------
def test_what_one_window_shows_and_the_next_does_not_is_no_reason() -> None:
    world = World(Autoscaler(1, 8, 8, in_turn=False), 4)
    for _ in range(30):
        assert world.go_on(5.0, side_by_side(8.0)) == []
        assert world.go_on(5.0, lambda actors: Load(1.0, 0.2, 0.2)) == []


def test_nothing_is_decided_while_somebody_comes_or_goes_nor_within_an_update() -> None:
    world = World(Autoscaler(1, 8, 8, in_turn=False), 1)
    for _ in range(20):
        assert world.go_on(4.5, side_by_side(8.0)) == []
        world.scaler.disturbed()
    assert world.go_on(60.0, side_by_side(8.0), updates_per_second=0.0) == []
    assert world.go_on(20.0, side_by_side(8.0)) != []


def test_a_measurement_covers_whole_updates_however_long_they_are() -> None:
    """In sync mode an update of half a minute: within it all learning is seen, or all stepping."""
    world = World(Autoscaler(1, 4, 4, in_turn=True), 2)
    stepped = 0.8

    def load(actors: int) -> Load:
        learning = (world.now % 30.0) > 30.0 * stepped
        return Load(1.0, 0.0, 1.0) if learning else Load(1.0, 1.0, 0.0)

    world.go_on(200.0, load, updates_per_second=1 / 30)
    ((_, first), *_) = world.made
    assert first.load is not None
    assert first.load.learner_waits == pytest.approx(stepped, abs=0.02)
    assert first.load.seconds == pytest.approx(180.0, abs=1.0)


def record(**seconds: float) -> ActivityRecord:
    spent = dict.fromkeys(Activity, 0.0) | {Activity[name]: value for name, value in seconds.items()}
    return ActivityRecord(Activity.STEPPING, 0, -1, -1, -1, 0.0, 1, spent)


def test_what_is_measured_is_waiting_and_what_is_left_out_is_starting() -> None:
    def sample(at: float, learner: ActivityRecord, *actors: ActivityRecord) -> Sample:
        return Sample.of(at, int(at), learner, actors)

    learner = record(STARTING=5.0, WAITING_FOR_BATCH=1.0)
    before = sample(10.0, learner, record(STARTING=3.0), record(STARTING=2.0))
    after = sample(
        20.0,
        record(STARTING=5.0, WAITING_FOR_BATCH=4.0, LEARNING=6.0, SHARING=1.0),
        record(STARTING=3.0, STEPPING=8.0, WAITING_FOR_LEASE=2.0),
        record(STARTING=7.0, INFERRING=1.0, WAITING_FOR_LEASE=4.0),
    )
    load = load_between(before, after)
    assert (load.seconds, load.learner_waits, load.actors_wait) == (10.0, pytest.approx(0.3), pytest.approx(6.0 / 15.0))
    assert load_between(after, after) == Load(0.0, 0.0, 0.0)
    assert load_between(after, before).learner_waits <= 1.0  # an actor that moved to another node counts anew


# ---- a run that is simulated -----------------------------------------------------------------------------------------
class Queue:
    """Actors fill a queue, from which the learner takes batches; all times scatter."""

    STEP_SECONDS = 0.05

    def __init__(self, scaler: Autoscaler, actors: int, batch: int, seed: int) -> None:
        self.scaler, self.batch, self.random = scaler, batch, random.Random(seed)
        self.left: list[float] = [0.0] * actors  # seconds of each actor's rollout; 0: it waits for an order
        self.ready, self.learning = 0, 0.0
        self.now = self.waited = self.idle = self.spent = 0.0
        self.update, self.history = 0, [actors]

    def scattered(self, seconds: float) -> float:
        return seconds * self.random.uniform(0.5, 1.5)

    def go_on(self, seconds: float, making: float, learning: float) -> None:
        """making: seconds of a rollout; learning: of an update."""
        end = self.now + seconds
        while self.now < end:
            self.step(making, learning)
            if round(self.now / self.STEP_SECONDS) % 5 == 0:
                sample = Sample(self.now, self.update, self.waited, self.now, self.idle, self.spent)
                if (decision := self.scaler.look(sample, len(self.left), 1000)) is not None:
                    self.left = [*self.left, *[0.0] * decision.actors][: decision.actors]
                    self.history.append(decision.actors)

    def step(self, making: float, learning: float) -> None:
        dt = self.STEP_SECONDS
        self.now += dt
        outstanding = self.ready + sum(left > 0 for left in self.left)
        for actor in range(len(self.left)):
            if self.left[actor] <= 0 and outstanding < 2 * self.batch:
                self.left[actor] = self.scattered(making)
                outstanding += 1
            left = self.left[actor]
            self.idle += dt * (left <= 0)
            self.spent += dt
            self.ready += 0 < left <= dt
            self.left[actor] = max(0.0, left - dt)
        if self.learning <= 0 and self.ready >= self.batch:
            self.ready -= self.batch
            self.update += 1
            self.learning = self.scattered(learning)
        self.waited += dt * (self.learning <= 0)
        self.learning -= dt


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("begin", [1, 24])
def test_a_simulated_run_comes_to_rest_near_what_is_needed_and_follows_when_that_changes(begin: int, seed: int) -> None:
    queue = Queue(Autoscaler(1, 24, 32, in_turn=False), begin, batch=8, seed=seed)
    queue.go_on(240.0, making=1.0, learning=1.0)  # eight actors make what the learner takes
    assert 6 <= len(queue.left) <= 11
    settled = len(queue.history)
    queue.go_on(400.0, making=1.0, learning=1.0)
    assert len(queue.history) <= settled + 1, queue.history
    queue.go_on(300.0, making=1.0, learning=4.0)  # two do
    assert 2 <= len(queue.left) <= 4
    queue.go_on(300.0, making=2.0, learning=1.0)  # sixteen do
    assert 11 <= len(queue.left) <= 22


def test_the_limits_leave_a_band_between_more_and_fewer() -> None:
    assert autoscale.SETTLED < GROW
    assert BUSY < 1
