"""Insertion, sampling, priorities, eviction, saving and loading in any order, beside a replay in plain Python."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replay_world import IMAGE, VECTOR, Kind, Model, World, name_of
from shoal.config import ReplayConfig
from shoal.experience import replay_rows
from shoal.experience.replay import Replay

GAMMA = 0.9
KINDS = [
    Kind(mask=True),
    Kind(next_step=True),
    Kind((IMAGE, VECTOR), mask=True),
    Kind((IMAGE,), next_step=True),
    Kind((IMAGE,), jumps=True),
]


class ReplayMachine(RuleBasedStateMachine):
    """`priorities` is what each step was last given, by its name; those that left are forgotten."""

    @initialize(
        kind=st.sampled_from(KINDS),
        seed=st.integers(0, 99),
        capacity=st.integers(2, 30),
        shards=st.integers(1, 4),
        n_step=st.integers(1, 4),
    )
    def begin(self, kind, seed, capacity, shards, n_step):
        self.kind, self.world = kind, World(kind, seed)
        self.config = ReplayConfig(capacity_steps=capacity * 6, prioritised=True, n_step=n_step, shards=shards)
        self.replay = Replay(self.world.schema, kind.groups, self.config, gamma=GAMMA)
        self.model = Model(kind, capacity, n_step=n_step, gamma=GAMMA)
        self.rng = np.random.default_rng(seed)
        self.priorities: dict[bytes, float] = {}
        self.most = 1.0
        self.old_names: list[np.ndarray] = []
        self.directory = Path(tempfile.mkdtemp())
        self.saved: Path | None = None
        self.saves = 0

    def teardown(self):
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory)

    @rule(
        group=st.integers(0, 2),
        end_share=st.sampled_from([0.0, 0.1, 0.6]),
        rows=st.integers(1, 4),
        lost=st.booleans(),
        dropped=st.booleans(),
    )
    def insert(self, group, end_share, rows, lost, dropped):
        if dropped and self.model.inserted:
            self.world.rollout(group)
        slot, events = self.world.rollout(group, rows=rows, end_share=end_share, lost=(1,) if lost and rows == 3 else ())
        self.model.insert(slot, events)
        self.replay.insert(slot, 0)
        held = {step.name for step in self.model.steps()}
        self.priorities = {name: self.priorities.get(name, self.most) for name in held}

    @precondition(lambda self: self.model.inserted)
    @rule(scale=st.sampled_from([0.0, 0.3, 1.0, 5.0]))
    def sample_and_update(self, scale):
        sample = self.replay.sample(8, self.rng, beta=0.5)
        names = [name_of({n: v[m] for n, v in sample.observation.items()}) for m in range(8)]
        priority = scale * self.rng.random(8)
        self.replay.update_priorities(sample.index_M, priority)
        self.old_names.append(sample.index_M[:2])
        self.priorities |= {name: max(1e-6, p) for name, p in zip(names, priority, strict=True)}
        self.most = max(self.most, priority.max())

    @precondition(lambda self: self.model.inserted)
    @rule()
    def samples_are_as_the_model_says(self):
        steps = {step.name: step for step in self.model.steps()}
        sample = self.replay.sample(6, self.rng, beta=0.5)
        drawn = [name_of({n: v[m] for n, v in sample.observation.items()}) for m in range(6)]
        for m, name in enumerate(drawn):
            total, discount, last = self.model.returns(steps[name])
            np.testing.assert_allclose(sample.return_M[m], total, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(sample.discount_M[m], discount, rtol=1e-6)
            assert name_of({n: v[m] for n, v in sample.next_observation.items()}) == name_of(last.successor)
        weight = np.array([self.priorities[name] for name in drawn]) ** 0.6
        np.testing.assert_allclose(sample.weight_M, (weight / weight.min()) ** -0.5, rtol=1e-5)

    @precondition(lambda self: self.old_names)
    @rule(which=st.integers(0, 1000))
    def update_what_may_have_left(self, which):
        index = self.old_names[which % len(self.old_names)]
        held = {}
        sample = self.replay.sample(16 * self.replay.num_steps, np.random.default_rng(0), beta=0.0)
        for m, number in enumerate(sample.index_M):
            held[int(number)] = name_of({n: v[m] for n, v in sample.observation.items()})
        if len(held) < self.replay.num_steps:  # some are too unlikely to be drawn: nobody knows whether they are held
            return
        self.replay.update_priorities(index, np.full(len(index), 2.0))
        for number in index.tolist():
            if number in held:
                self.priorities[held[number]] = 2.0
                self.most = max(self.most, 2.0)

    @rule(shards=st.integers(1, 4))
    def save_and_load(self, shards):
        self.saves += 1
        directory = self.directory / str(self.saves)
        self.replay.save(directory, self.saved)
        self.saved = directory
        self.replay = Replay(self.world.schema, self.kind.groups, self.config.model_copy(update={"shards": shards}), gamma=GAMMA)
        self.replay.load(directory)

    @rule()
    def save(self):
        self.saves += 1
        self.replay.save(self.directory / str(self.saves), self.saved)
        self.saved = self.directory / str(self.saves)

    @precondition(lambda self: self.saved is not None)
    @rule()
    def what_was_saved_now_is_what_is_there(self):
        self.save()
        other = Replay(self.world.schema, self.kind.groups, self.config, gamma=GAMMA)
        other.load(self.saved)
        if self.model.inserted:
            one, two = (r.sample(30, np.random.default_rng(1), beta=0.5) for r in (self.replay, other))
            assert one.index_M.tobytes() == two.index_M.tobytes()
            assert one.return_M.tobytes() == two.return_M.tobytes()
            assert all(one.observation[n].tobytes() == two.observation[n].tobytes() for n in one.observation)
            assert all(one.next_observation[n].tobytes() == two.next_observation[n].tobytes() for n in one.observation)

    @invariant()
    def holds_what_the_model_holds(self):
        if not hasattr(self, "replay"):
            return
        self.replay.check_valid()
        assert self.replay.num_steps == len(self.model.steps())
        assert self.replay.inserted_steps == self.model.inserted
        if self.model.inserted:
            total = sum(p**0.6 for p in self.priorities.values())
            np.testing.assert_allclose(self.replay._priorities.tree.total, total, rtol=1e-9)


@pytest.mark.usefixtures("small_chunks")
class TestReplayMachine(ReplayMachine.TestCase):
    settings = settings(max_examples=40, stateful_step_count=30)

    @pytest.fixture
    def small_chunks(self, monkeypatch):
        monkeypatch.setattr(replay_rows, "_LEAST_CHUNK_BYTES", 256)
