"""Sequences for recurrent policies, against what truly happened: every valid row with its state, its return and its successor.

The world's recurrent state counts the steps since an episode began, so a state that was unrolled wrongly shows.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay_world import IMAGE, PAIR, VECTOR, Kind, Model, World, name_of
from shoal.config import ReplayConfig
from shoal.errors import ConfigError
from shoal.experience.placing import BEGINS, BREAK, STOP, TERMINATED, VALID
from shoal.experience.replay import Replay

LENGTH, BURN_IN, GAMMA = 10, 3, 0.9
KINDS = {
    "vectors": Kind(mask=True, memory=True),
    "reset rows": Kind(next_step=True, memory=True),
    "frames": Kind((IMAGE, VECTOR), memory=True),
    "frames, reset rows": Kind((IMAGE,), memory=True, next_step=True),
    "frames that jump": Kind((IMAGE, VECTOR), memory=True, jumps=True),
    "pairs of frames that jump": Kind((PAIR, VECTOR), memory=True, jumps=True),  # gaps of one row
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


class Watched:
    """A replay of sequences, and all that went into it."""

    def __init__(
        self,
        kind: Kind,
        *,
        capacity: int = 10_000,
        n_step: int = 3,
        shards: int = 1,
        length: int = LENGTH,
        burn_in: int = BURN_IN,
        seed: int = 0,
    ) -> None:
        config = ReplayConfig(
            capacity_steps=capacity, n_step=n_step, shards=shards, prioritised=True, sequence_length=length, burn_in=burn_in
        )
        self.length = length
        self.world = World(kind, seed)
        self.replay = Replay(self.world.schema, kind.groups, config, gamma=GAMMA)
        self.model = Model(kind, capacity // (kind.groups * kind.num_envs), n_step=n_step, gamma=GAMMA)
        self.steps: dict[bytes, object] = {}
        self.rng = np.random.default_rng(0)

    def insert(self, group: int, **how) -> None:
        slot, events = self.world.rollout(group, **how)
        self.replay.insert(slot, how.get("version", 0))
        # A first rollout of one row may not show that it is stacked.
        self.model.pad = self.world.kind.pad if self.replay._store.layout.stacks else 0
        self.model.insert(slot, events)
        self.replay.check_valid()
        assert self.replay.num_steps == len(self.model.steps())
        self.steps |= {step.name: step for happened in events for what, step in happened if what == "step"}

    def check_sequences(self, num: int = 200) -> set[bytes]:
        """Check all that is sampled; returns the names of the steps that are valid somewhere after the burn-in."""
        sample = self.replay.sample_sequences(num, self.rng, beta=0.5)
        assert sample.valid_LM.shape == (self.length, num)
        assert sample.valid_LM[BURN_IN:].any(axis=0).all()
        trained = set()
        for m in range(num):
            state = sample.state["policy_state/h"][m, 0]
            for t in range(self.length):
                if sample.begins_L1M[t, m]:
                    state = 0.0
                if sample.valid_LM[t, m]:
                    step = self.steps[name_of({n: v[t, m] for n, v in sample.observation.items()})]
                    self.check_row(sample, t, m, step, state)
                    trained |= {step.name} if t >= BURN_IN else set()
                state += 1.0
        return trained

    def check_row(self, sample, t, m, step, state) -> None:
        assert step.state == state
        assert sample.action[t, m] == step.action
        self.model.n_step, whole = min(self.model.n_step, self.length - t), self.model.n_step
        total, discount, last = self.model.returns(step)
        self.model.n_step = whole
        assert sample.return_LM[t, m] == pytest.approx(total, rel=1e-5, abs=1e-6)
        assert sample.discount_LM[t, m] == pytest.approx(discount, rel=1e-6)
        successor = sample.successor_LM[t, m]
        assert t < successor <= self.length
        if discount or not self.world.kind.jumps:  # behind rows of older frames it is not reached, nor asked for
            assert name_of({n: v[successor, m] for n, v in sample.observation.items()}) == name_of(last.successor)


@pytest.mark.parametrize(("n_step", "shards"), [(1, 1), (3, 2), (5, 3)])
def test_rows_have_the_state_the_return_and_the_successor_that_they_truly_had(kind, n_step, shards):
    watched = Watched(kind, n_step=n_step, shards=shards)
    for _ in range(10):
        for group in range(kind.groups):
            watched.insert(group, end_share=0.15)
    watched.check_sequences()


def test_every_step_is_trained_in_some_sequence_but_for_the_first_and_the_newest(kind):
    if kind.jumps:
        pytest.skip("what follows a jump is known again with the next episode only")
    watched = Watched(kind, length=20)  # with room for the rows that episodes' ends take
    for _ in range(20):
        for group in range(kind.groups):
            watched.insert(group, end_share=0.1)
    trained = watched.check_sequences(600)
    for rows in watched.model.columns:
        due = [step.name for step in rows[1 + watched.model.pad + BURN_IN : -20 - kind.num_rows] if step is not None]
        assert len(due) > 20
        assert trained.issuperset(due)


@pytest.mark.parametrize(("length", "lengths"), [(8, (3, 4)), (8, (2, 3, 4, 1)), (7, (4, 1, 1, 3)), (10, (1, 2, 1, 4, 4))])
def test_every_step_is_trained_also_where_rollouts_are_of_different_lengths(kind, length, lengths):
    """Those of environments that wait are, in async mode. No episode ends: the rows that an end takes are another matter."""
    if kind.jumps:
        pytest.skip("what follows a jump is known again with the next episode only")
    watched = Watched(kind, length=length)
    for round_ in range(40):
        for group in range(kind.groups):
            watched.insert(group, rows=lengths[(round_ + group) % len(lengths)], end_share=0.0)
    trained = watched.check_sequences(1200)
    for rows in watched.model.columns:
        due = [step.name for step in rows[1 + watched.model.pad + BURN_IN : -length - kind.num_rows] if step is not None]
        assert len(due) > 20
        assert trained.issuperset(due)


def test_whole_rollouts_begin_a_sequence_each_and_short_ones_only_where_it_takes_one():
    starts = {}
    for rows in (4, 3, 2, 1):
        watched = Watched(Kind(memory=True), length=12)
        for _ in range(24 // rows):
            watched.insert(0, rows=rows, end_share=0.0)
        starts[rows] = int(watched.replay._starts.written_C[0])
    assert starts == {4: 6, 3: 4, 2: 6, 1: 6}  # of nine trained rows each: one begins four rows behind the last at the soonest


def test_a_sequence_begins_at_the_first_row_of_a_column_and_then_where_the_next_would_come_too_late():
    watched = Watched(Kind(memory=True), length=LENGTH, burn_in=BURN_IN)
    watched.insert(0, end_share=0.0)
    made, _ = watched.world.rollout(1, end_share=0.0)
    starts, whole, envs = watched.replay._starts, made.schema.num_rows, made.schema.num_envs
    used = np.full(envs, whole)

    def begun_at(row: int) -> list[int]:
        """Sequences of each environment of group 1, once a rollout has begun there whose rows go on from those before."""
        slot = SimpleNamespace(schema=made.schema, arrays=made.arrays, rows_used=lambda: used)
        starts.add(slot, 1, np.full(envs, row), np.ones(envs, np.bool_))
        return starts.written_C[envs : 2 * envs].tolist()

    used[0] = 0  # nothing was written there
    assert begun_at(0) == [0] + [1] * (envs - 1)
    used[0] = whole
    exactly = LENGTH - BURN_IN - whole  # with a whole rollout behind it, the next start is just in time
    assert 0 < exactly < whole
    assert begun_at(exactly) == [1] * envs
    used[0] = 0
    assert begun_at(exactly + 1) == [1] + [2] * (envs - 1)
    assert begun_at(exactly + 2) == [1] + [2] * (envs - 1)
    assert begun_at(exactly + 1 + whole) == [1] + [3] * (envs - 1)


def test_what_is_drawn_does_not_depend_on_shards(kind):
    drawn = set()
    for shards in (1, 2, 3, 5):
        watched = Watched(kind, capacity=40 * 6, shards=shards)
        for _ in range(14):
            for group in range(kind.groups):
                watched.insert(group)
        sample = watched.replay.sample_sequences(60, np.random.default_rng(1), beta=0.5)
        watched.replay.update_priorities(sample.index_M, np.linspace(0.1, 3.0, 60))
        sample = watched.replay.sample_sequences(60, np.random.default_rng(2), beta=0.5)
        parts = [part for value in vars(sample).values() for part in (value.values() if isinstance(value, dict) else [value])]
        drawn.add(b"".join(np.asarray(part).tobytes() for part in parts if part is not None))
    assert len(drawn) == 1


def test_sequences_leave_with_their_rows(kind):
    watched = Watched(kind, capacity=30 * 6)
    for round_ in range(30):
        for group in range(kind.groups):
            watched.insert(group, end_share=0.3 if round_ % 3 else 0.0)
        if round_ > 4:
            newest = {step.name for step in watched.model.steps()}
            assert watched.check_sequences(40) <= newest


def test_what_follows_a_missing_rollout_or_a_lost_environment_is_not_trained_until_an_episode_begins(kind):
    watched = Watched(kind)
    for round_ in range(14):
        for group in range(kind.groups):
            if round_ == 6:
                watched.world.rollout(group)  # nobody gets it
            watched.insert(group, end_share=0.1, lost=(1,) if round_ == 9 else ())
    watched.check_sequences()


def test_rollouts_that_were_closed_early_do_not_break_sequences(kind):
    watched = Watched(kind)
    for round_ in range(24):
        for group in range(kind.groups):
            watched.insert(group, rows=1 + (round_ * 7 + group) % 4)
    watched.check_sequences()


def test_priorities_of_sequences_lead_the_draw_and_those_that_left_are_ignored(kind):
    watched = Watched(kind, capacity=30 * 6)
    for _ in range(8):
        for group in range(kind.groups):
            watched.insert(group, end_share=0.0)
    old = watched.replay.sample_sequences(300, watched.rng, beta=1.0)
    chosen = old.index_M[0]
    watched.replay.update_priorities(old.index_M, np.where(old.index_M == chosen, 1.0, 0.0))
    assert np.mean(watched.replay.sample_sequences(300, watched.rng, beta=1.0).index_M == chosen) > 0.9
    for _ in range(12):
        for group in range(kind.groups):
            watched.insert(group, end_share=0.0)
    before = watched.replay.sample_sequences(100, np.random.default_rng(3), beta=1.0).index_M
    watched.replay.update_priorities(old.index_M, np.full(300, 1e6))
    assert (watched.replay.sample_sequences(100, np.random.default_rng(3), beta=1.0).index_M == before).all()


def test_a_sequence_can_be_drawn_as_soon_as_its_last_successor_is_there():
    watched = Watched(Kind(memory=True), length=8)
    for group in range(3):
        watched.insert(group, end_share=0.0)
    with pytest.raises(ValueError, match="nothing can be sampled yet: 24 env steps"):
        watched.replay.sample_sequences(1, watched.rng, beta=1.0)
    watched.insert(1, end_share=0.0)
    assert len(np.unique(watched.replay.sample_sequences(50, watched.rng, beta=1.0).index_M)) == 2


def test_starts_that_follow_closely_after_breaks_push_the_oldest_out(kind):
    watched = Watched(kind, capacity=30 * 6, burn_in=0)
    for _ in range(60):
        watched.insert(1, rows=1, end_share=0.0, lost=(0, 1))
    sample = watched.replay.sample_sequences(50, watched.rng, beta=1.0)
    assert (sample.valid_LM.sum(axis=0) == 1).all()


def test_lengths_that_would_leave_steps_untrained_are_refused():
    kind = Kind(memory=True)
    with pytest.raises(ConfigError, match=r"replay\.sequence_length 10 is less than replay\.burn_in 8 and sampling\.rollout_length 4"):
        Replay(kind.schema(), 3, ReplayConfig(sequence_length=10, burn_in=8), gamma=0.9)
    with pytest.raises(ConfigError, match=r"which need 14 steps each"):
        Replay(kind.schema(), 3, ReplayConfig(sequence_length=10, capacity_steps=13 * 6), gamma=0.9)
    Replay(kind.schema(), 3, ReplayConfig(sequence_length=10, burn_in=6, capacity_steps=14 * 6), gamma=0.9)


def test_steps_and_sequences_are_not_drawn_from_each_others_replay():
    kind = Kind(memory=True)
    with pytest.raises(ValueError, match="call sample_sequences"):
        Replay(kind.schema(), 3, ReplayConfig(sequence_length=10), gamma=0.9).sample(1, np.random.default_rng(0), beta=1.0)
    with pytest.raises(ValueError, match=r"set replay\.sequence_length"):
        Replay(kind.schema(), 3, ReplayConfig(), gamma=0.9).sample_sequences(1, np.random.default_rng(0), beta=1.0)


def test_a_capacity_in_bytes_bounds_rows_and_starts_together():
    schema = Kind(memory=True).schema()
    for capacity_bytes in (30_000, 33_333, 40_001):
        config = ReplayConfig(sequence_length=10, capacity_bytes=capacity_bytes)
        assert 0.95 * capacity_bytes < Replay.size_bytes(schema, 3, config) <= capacity_bytes


def drawable(replay: Replay, n_step: int) -> set[tuple[int, int]]:
    """(column, first row) of every sequence that may be drawn: whole, within reach, with a step behind its burn-in that can be trained. Row by row."""
    store, starts = replay._store, replay._starts
    num_starts, num_rows, num_envs = starts.rows.num_rows, store.layout.num_rows, starts.rows.num_envs
    found = set()
    for column, newest in enumerate(replay._newest_C.tolist()):
        group, env = divmod(column, num_envs)
        begun = starts.rows.block("row", group, 0, num_starts)[env, : starts.written_C[column]].tolist()
        for row in begun:
            place = column * num_rows + np.arange(row, row + starts.length) % num_rows
            flags, gap = (store.rows.take(name, place).tolist() for name in ("flags", "gap"))
            if row >= newest - store.layout.reach and row + starts.length <= newest and trained_rows(flags, gap, starts.burn_in, n_step):
                found.add((column, row))
    return found


def trained_rows(flags: list[int], gap: list[int], burn_in: int, n_step: int) -> list[int]:
    """Rows behind the burn-in whose recurrent state is known and whose return ends at a step with a row of the sequence, or nothing, behind it."""
    found, lost = [], False
    for t in range(len(flags)):
        if t and flags[t] & BREAK:
            lost = True
        if t and flags[t] & BEGINS:
            lost = False
        last = t
        while last < t + n_step - 1 and last < len(flags) - 1 and not flags[last] & STOP:
            last += 1
        bootstraps = gap[last] == 0 or flags[last] & TERMINATED
        if t >= burn_in and flags[t] & VALID and not lost and bootstraps:
            found.append(t)
        lost = lost or gap[t] > 0
    return found


@given(st.integers(0, 2**32), st.sampled_from(list(KINDS)), st.integers(4, 12), st.integers(0, 8), st.integers(0, 12), st.integers(1, 4))
def test_exactly_the_sequences_that_are_whole_and_have_something_to_train_are_drawn(
    seed: int, kind: str, length: int, burn_in: int, more: int, n_step: int
) -> None:
    burn_in = min(burn_in, length - 4)
    watched = Watched(KINDS[kind], capacity=6 * (length + 4 + more), n_step=n_step, length=length, burn_in=burn_in, seed=seed)
    rng, replay = np.random.default_rng(seed), watched.replay
    for _ in range(25):
        group, rows = int(rng.integers(2)), int(rng.integers(1, 5))
        if rng.random() < 0.1:
            watched.world.rollout(group)  # nobody gets it
        watched.insert(group, rows=rows, end_share=float(rng.choice([0.0, 0.2, 0.7])), lost=(1,) if rng.random() < 0.2 else ())
        starts, place = replay._starts, np.flatnonzero(replay._priorities.tree.leaves)
        drawn = set(zip((place // starts.rows.num_rows).tolist(), starts.rows.take("row", place).tolist(), strict=True))
        assert drawn == drawable(replay, n_step)
        assert replay.can_sample == bool(drawn)


def test_ages_weights_and_masks_of_sequences_are_those_of_their_rows():
    kind = Kind(mask=True, memory=True)
    watched = Watched(kind)
    for version in range(8):
        for group in range(kind.groups):
            watched.insert(group, version=version, end_share=0.0)
    replay, names = watched.replay, {}
    sample = replay.sample_sequences(300, watched.rng, beta=0.0)
    for m in range(300):
        names[int(sample.index_M[m])] = step = watched.steps[name_of({n: v[0, m] for n, v in sample.observation.items()})]
        assert sample.age_updates_M[m] == 7 - step.version
        assert sample.age_steps_M[m] == watched.model.inserted - step.inserted
        for t in range(LENGTH):
            step = watched.steps[name_of({n: v[t, m] for n, v in sample.observation.items()})]
            np.testing.assert_array_equal(sample.action_mask[t, m], step.mask)
    assert len(set(sample.age_updates_M.tolist())) > 2
    priorities = dict(zip(names, np.linspace(0.2, 3.0, len(names)), strict=True))
    replay.update_priorities(np.array(list(priorities)), np.array(list(priorities.values())))
    again = replay.sample_sequences(40, watched.rng, beta=0.7, reuse=replay.sample_sequences(40, watched.rng, beta=0.7))
    drawn = np.array([priorities[int(name)] for name in again.index_M]) ** 0.6
    np.testing.assert_allclose(again.weight_M, (drawn / drawn.min()) ** -0.7, rtol=1e-6)


def test_sequences_in_memory_that_is_used_again_are_the_same_and_have_the_promised_types():
    kind = KINDS["frames"]
    watched = Watched(kind)
    for _ in range(8):
        for group in range(kind.groups):
            watched.insert(group)
    fresh, old = (watched.replay.sample_sequences(20, np.random.default_rng(seed), beta=0.5) for seed in (1, 2))
    memory = dict(old.observation)
    again = watched.replay.sample_sequences(20, np.random.default_rng(1), beta=0.5, reuse=old)
    assert all(again.observation[name] is memory[name] for name in memory)
    for name, value in vars(fresh).items():
        parts = value if isinstance(value, dict) else {"": value}
        for part, array in parts.items():
            other = vars(again)[name][part] if isinstance(value, dict) else vars(again)[name]
            np.testing.assert_array_equal(array, other)
    types = {name: str(value.dtype) for name, value in vars(again).items() if isinstance(value, np.ndarray)}
    assert types == {
        "action": "int64", "begins_L1M": "bool", "valid_LM": "bool",
        "return_LM": "float32", "discount_LM": "float32", "successor_LM": "int64", "weight_M": "float32", "index_M": "int64",
        "age_updates_M": "int64", "age_steps_M": "int64",
    }  # fmt: skip
    assert again.burn_in == BURN_IN
