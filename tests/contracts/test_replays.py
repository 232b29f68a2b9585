"""One suite for every replay: uniform and prioritised, one shard and several, vectors, images stored by frames and whole.

Each test says what a learner may rely on, against `Model`, a replay in lists.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from replay_world import IMAGE, LAST_AXIS, SECOND, VECTOR, Kind, Model, World, name_of
from shoal.config import ReplayConfig
from shoal.experience.replay import Replay, Sample

KINDS = {
    "vectors": Kind(mask=True),
    "reset rows": Kind(next_step=True, mask=True),
    "frames": Kind((IMAGE, VECTOR)),
    "frames, reset rows": Kind((IMAGE,), next_step=True),
    "frames on the last axis": Kind((LAST_AXIS,)),
    "frames that jump": Kind((IMAGE,), jumps=True),
    "frames that jump, reset rows": Kind((LAST_AXIS, VECTOR), jumps=True, next_step=True),
    "a vector and two images of which one jumps": Kind((VECTOR, IMAGE, SECOND), jumps=True),
    "frames that an episode carries into the next": Kind((IMAGE,), carries=True),
    "images that are no stacks": Kind((IMAGE,), stacked=False),
}
REPLAYS = {
    "uniform": ReplayConfig(prioritised=False, n_step=3),
    "prioritised": ReplayConfig(prioritised=True, n_step=3),
    "one step": ReplayConfig(prioritised=True, n_step=1),
    "as it comes": ReplayConfig(),
    "two shards": ReplayConfig(prioritised=True, n_step=3, shards=2),
    "three shards": ReplayConfig(prioritised=False, n_step=3, shards=3),
}
GAMMA = 0.9


# Every kind with two of the replays, and every replay with two of the kinds.
PAIRS = [(k, r) for k in KINDS for r in REPLAYS if r in ("prioritised", "three shards") or k in ("reset rows", "frames")]


@pytest.fixture(params=PAIRS, ids=", ".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def kind(pair: tuple[str, str]) -> Kind:
    return KINDS[pair[0]]


@pytest.fixture
def config(pair: tuple[str, str]) -> ReplayConfig:
    return REPLAYS[pair[1]]


class Both:
    """A replay and its model, fed alike."""

    def __init__(self, kind: Kind, config: ReplayConfig, capacity: int, seed: int = 0) -> None:
        self.config = config.model_copy(update={"capacity_steps": capacity})
        self.world = World(kind, seed)
        self.replay = Replay(self.world.schema, kind.groups, self.config, gamma=GAMMA)
        self.model = Model(kind, capacity // (kind.groups * kind.num_envs), n_step=config.n_step or 1, gamma=GAMMA)
        self.rng = np.random.default_rng(seed)

    def insert(self, group: int, *, drop: bool = False, **how) -> None:
        slot, events = self.world.rollout(group, **how)
        if not drop:
            before = self.replay.num_steps
            self.model.insert(slot, events)
            evicted = self.replay.insert(slot, how.get("version", 0))
            assert before + int(slot.envelope["num_env_steps"]) - evicted == self.replay.num_steps == len(self.model.steps())
        self.replay.check_valid()

    def insert_each(self, **how) -> None:
        """The next rollout of every group."""
        for group in range(self.world.kind.groups):
            self.insert(group, **how)

    def check_samples(self, times: int = 4) -> Sample:
        """Every step that the model holds is sampled, and nothing else; each with the model's numbers."""
        steps = {step.name: step for step in self.model.steps()}
        sample = self.replay.sample(times * len(steps), self.rng, beta=0.5)
        rows = [{n: v[m] for n, v in sample.observation.items()} for m in range(len(sample.index_M))]
        assert {name_of(row) for row in rows} == set(steps)
        for m, row in enumerate(rows):
            self._check_row(sample, m, steps[name_of(row)])
        return sample

    def _check_row(self, sample: Sample, m: int, step) -> None:
        total, discount, last = self.model.returns(step)
        assert sample.return_M[m] == pytest.approx(total, rel=1e-5, abs=1e-6)
        assert sample.discount_M[m] == pytest.approx(discount, rel=1e-6)
        assert name_of({n: v[m] for n, v in sample.next_observation.items()}) == name_of(last.successor)
        assert sample.action[m] == step.action
        assert sample.age_steps_M[m] == self.model.inserted - step.inserted
        if sample.action_mask is not None:
            assert (sample.action_mask[m] == step.mask).all()
            assert (sample.next_action_mask[m] == (True if last.successor_mask is None else last.successor_mask)).all()


def test_every_step_is_sampled_with_its_return_and_its_true_successor(kind, config):
    both = Both(kind, config, capacity=10_000)
    for _ in range(4):
        for group in range(kind.groups):
            both.insert(group)
            both.check_samples()


def test_the_oldest_steps_make_room_and_no_return_reaches_into_them(kind, config):
    both = Both(kind, config, capacity=66)
    for round_ in range(8):
        both.insert_each(end_share=0.5 if round_ % 2 else 0.05)
        both.check_samples()
    assert both.replay.evicted_steps > 0


def test_a_rollout_larger_than_the_replay_leaves_its_newest_steps(kind, config):
    both = Both(replace(kind, num_rows=15), config, capacity=24)
    for _ in range(3):
        both.insert_each()
        both.check_samples()


def test_no_return_is_summed_over_a_rollout_that_is_missing(kind, config):
    both = Both(kind, config, capacity=10_000)
    for round_ in range(6):
        both.insert_each(drop=round_ in (2, 3), end_share=0.0)
    both.check_samples()


def test_no_return_is_summed_into_an_environment_that_was_lost(kind, config):
    both = Both(kind, config, capacity=10_000)
    for round_ in range(4):
        both.insert_each(lost=(1,) if round_ == 2 else (), end_share=0.0)
    both.check_samples()


def test_environments_that_got_differently_far_go_on_where_they_stood(kind, config):
    both = Both(replace(kind, next_step=False), config, capacity=60)
    for used in ([4, 2], [1, 4], [0, 3], [4, 4], [2, 0]):
        both.insert_each(rows=max(used), used=used)
        both.check_samples()


def test_an_episode_that_was_given_up_ends_before_its_invalid_row(kind, config):
    both = Both(replace(kind, next_step=False), config, capacity=90)
    for _ in range(8):
        both.insert_each(give_up_share=0.2)
        both.check_samples()


def test_a_rollout_that_was_closed_early_is_continued(kind, config):
    both = Both(kind, config, capacity=10_000)
    for rows in (4, 1, 3, 2, 4):
        both.insert_each(rows=rows)
    both.check_samples()


def bytes_of(sample: Sample) -> list[bytes]:
    arrays = [a for v in vars(sample).values() if v is not None for a in (v.values() if isinstance(v, dict) else [v])]
    return [array.tobytes() for array in arrays]


def filled(kind: Kind, config: ReplayConfig, *, capacity: int = 66, rounds: int = 6) -> Both:
    both = Both(kind, config, capacity)
    for _ in range(rounds):
        for group in range(kind.groups):
            both.insert(group)
            sample = both.replay.sample(16, both.rng, beta=0.5)
            both.replay.update_priorities(sample.index_M, np.abs(sample.return_M))
    return both


def test_what_is_sampled_does_not_depend_on_shards(kind, config):
    samples = [
        bytes_of(filled(kind, config.model_copy(update={"shards": shards})).replay.sample(200, np.random.default_rng(1), beta=0.5))
        for shards in (1, 2, 3, 5)
    ]
    assert all(sample == samples[0] for sample in samples[1:])


def test_a_restored_replay_goes_on_bit_for_bit_with_any_number_of_shards(kind, config, tmp_path):
    kept = filled(kind, config)
    kept.replay.save(tmp_path, None)
    shards = 3 - config.shards if config.shards < 3 else 1
    restored = Replay(kept.world.schema, kind.groups, kept.config.model_copy(update={"shards": shards}), gamma=GAMMA)
    restored.load(tmp_path)
    restored.check_valid()
    rng = np.random.default_rng(2), np.random.default_rng(2)
    for round_ in range(6):
        slot, _ = kept.world.rollout(round_ % kind.groups, version=round_)
        assert kept.replay.insert(slot, round_) == restored.insert(slot, round_)
        one, other = kept.replay.sample(32, rng[0], beta=0.7), restored.sample(32, rng[1], beta=0.7)
        assert bytes_of(one) == bytes_of(other)
        kept.replay.update_priorities(one.index_M, np.abs(one.return_M))
        restored.update_priorities(other.index_M, np.abs(other.return_M))
    assert (restored.num_steps, restored.inserted_steps, restored.evicted_steps) == (
        kept.replay.num_steps, kept.replay.inserted_steps, kept.replay.evicted_steps,
    )  # fmt: skip


def test_memory_that_is_used_again_holds_the_same_sample(kind, config):
    replay = filled(kind, config).replay
    fresh = replay.sample(40, np.random.default_rng(1), beta=0.5)
    old = replay.sample(40, np.random.default_rng(2), beta=0.5)
    smaller = replay.sample(30, np.random.default_rng(2), beta=0.5)
    again = replay.sample(40, np.random.default_rng(1), beta=0.5, reuse=old)
    assert bytes_of(again) == bytes_of(fresh) == bytes_of(replay.sample(40, np.random.default_rng(1), beta=0.5, reuse=smaller))
    for kept, used in ((again.observation, old.observation), (again.next_observation, old.next_observation)):
        assert all(kept[name] is used[name] for name in used)


def test_what_is_sampled_has_the_types_that_are_promised(kind, config):
    both = filled(kind, config)
    sample = both.replay.sample(7, np.random.default_rng(1), beta=0.5)
    types = {name: str(value.dtype) for name, value in vars(sample).items() if isinstance(value, np.ndarray)}
    masks = dict.fromkeys(("action_mask", "next_action_mask"), "bool") if kind.mask else {}
    assert types == masks | {
        "action": "int64", "return_M": "float32", "discount_M": "float32", "weight_M": "float32", "index_M": "int64",
        "age_updates_M": "int64", "age_steps_M": "int64",
    }  # fmt: skip
    schema = {f.name: (f.dtype, f.shape) for f in both.world.schema.fields}
    for observed in (sample.observation, sample.next_observation):
        assert {name: (str(array.dtype), array.shape[1:]) for name, array in observed.items()} == {name: schema[name] for name in observed}


def test_the_size_that_is_told_is_the_size_that_is_taken(kind, config):
    both = filled(kind, config)
    rows = both.replay._store.rows
    taken = sum(array.nbytes for shard in rows._shards for array in shard.values())
    told = Replay.size_bytes(both.world.schema, kind.groups, both.config)
    if kind.stacked:  # by the shape alone the others are counted as if they were
        assert taken <= told <= taken + 9 * rows.num_rows * rows.num_groups * rows.num_envs
    capped = both.config.model_copy(update={"capacity_bytes": told // 2})
    assert told // 3 < Replay.size_bytes(both.world.schema, kind.groups, capped) <= told // 2
