"""A learner with a replay: what goes in, how much is learned for it, and that its state is everything.

Legend: T rows of a rollout, B environments of a group.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout_fakes import RUN_ID, poisoned_ring, scripted_spec, write_rollout
from shoal.algorithms import load_algorithm
from shoal.config import ReplayConfig, RunConfig, against_divergence
from shoal.errors import DivergedError, SchemaError
from shoal.experience.envelope import Identity
from shoal.experience.schema import rollout_schema
from shoal.learners.replay_learner import ReplayLearner
from shoal.networks.policy import build_acting, named_tensors
from shoal.weights.board import WeightBoard, WeightLayout

T, B, GROUPS = 4, 3, 2


class World:
    """A ring, a board, and a learner over them. Rollouts of the n-th update are the same in every world."""

    def __init__(self, name: str = "dqn", **replay) -> None:
        kind: Any = load_algorithm(name)
        algorithm = kind.Config(batch_size=8)
        config = RunConfig(algorithm=algorithm, seed=5)
        config.sampling.groups, config.sampling.group_size, config.sampling.rollout_length = GROUPS, B, T
        config.policy.hidden_sizes = [8]
        self.spec = scripted_spec()
        if kind.remembers:
            config.policy.memory, config.policy.memory_size = "lstm", 2
        policy = build_acting(self.spec, config.policy, seed=1, kind=kind.network(algorithm))
        self.ring = poisoned_ring(rollout_schema(self.spec, policy.fields(), T, B), GROUPS)
        layout = WeightLayout.of((n, tuple(t.shape)) for n, t in named_tensors(policy).items())
        self.size = layout.size
        self.board = WeightBoard(layout.size, np.zeros(WeightBoard.size_bytes(layout.size), np.uint8))
        self.board.reset()
        settings = ReplayConfig(**{"capacity_steps": 60, "prioritised": True, "n_step": 2, "samples_per_insert": 1.0, **replay})
        self.learner = ReplayLearner(
            config, self.spec, policy, kind(policy, algorithm), self.ring, self.board, run_id=RUN_ID, replay=settings
        )  # fmt: skip

    def rollouts(self, sequence: int, *, reward: float = 0.0, version: int | None = None) -> list[tuple[int, Identity]]:
        orders = []
        for group in range(GROUPS):
            identity = Identity(group, sequence, 0)
            slot = write_rollout(
                self.ring.slots[group], identity, version=sequence if version is None else version, tag=group + 3 * sequence
            )
            slot.arrays["reward"][:] = np.sin(sequence + np.arange(T))[:, None] + reward
            slot.envelope["checksum"] = slot.checksum()
            orders.append((group, identity))
        return orders

    def update(self, sequence: int, steps: int, **more: float) -> dict[str, float]:
        return self.learner.update(self.learner.consume(self.rollouts(sequence, **more)), steps)


def test_what_goes_in_is_counted_and_what_leaves_for_it_too() -> None:
    world = World()
    first = world.update(0, 0)
    assert (first["num_env_steps"], first["optimizer_steps"], first["replay/steps"]) == (GROUPS * B * T, 0.0, GROUPS * B * T)
    assert not any(name.startswith("evicted/") for name in first)
    metrics = [world.update(sequence, 0) for sequence in range(1, 4)]
    assert metrics[-1]["evicted/0"] == metrics[-1]["evicted/1"] > 0
    evicted = sum(count for m in metrics for name, count in m.items() if name.startswith("evicted/"))
    assert metrics[-1]["replay/steps"] == 4 * GROUPS * B * T - evicted <= 60
    world.learner.replay.check_valid()


def test_sequences_are_learned_as_soon_as_one_is_whole() -> None:
    world = World("r2d2", sequence_length=2 * T, burn_in=1, capacity_steps=120)
    first = world.update(0, 2)
    assert (first["optimizer_steps"], first["skipped_steps"]) == (0.0, 0.0)
    before = world.learner.weights_sha256
    second = world.update(1, 2)
    assert (second["optimizer_steps"], second["skipped_steps"]) == (2.0, 0.0)
    assert 0 <= second["replay/age_updates_max"] <= 1
    assert world.learner.weights_sha256 != before


def test_a_learner_of_sequences_that_was_saved_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    first, second = (World("r2d2", sequence_length=2 * T, burn_in=1, capacity_steps=120) for _ in range(2))
    for sequence in range(4):
        first.update(sequence, 2)
    arrays, facts = first.learner.get_state()
    first.learner.replay.save(tmp_path, None)
    second.learner.set_state(arrays, facts)
    second.learner.replay.load(tmp_path)
    for each in (first, second):
        assert sum(each.update(sequence, 2)["optimizer_steps"] for sequence in range(4, 7)) == 6
    assert first.learner.weights_sha256 == second.learner.weights_sha256


def test_a_sequences_state_is_what_the_actor_had_and_its_priority_changes() -> None:
    world = World("r2d2", sequence_length=2 * T, burn_in=1, capacity_steps=120)
    for sequence in range(3):
        world.update(sequence, 0)
    replay = world.learner.replay
    sample = replay.sample_sequences(8, np.random.default_rng(0), beta=1.0)
    rows = world.learner._sequences(sample)
    assert (rows.burn_in, rows.share) == (1, 1.0)
    for name, found in vars(rows).items():
        if name == "share":  # is of this learner, not of the sample
            continue
        sampled = getattr(sample, name)
        for key in sampled if isinstance(sampled, dict) else [None]:
            np.testing.assert_array_equal(found if key is None else found[key], sampled if key is None else sampled[key])
    assert sample.valid_LM.any()
    assert not sample.valid_LM.all()
    before = replay._priorities.tree.leaves.copy()
    world.update(3, 3)
    assert len(np.unique(replay._priorities.tree.leaves)) > len(np.unique(before))


def test_slots_are_free_once_they_are_consumed() -> None:
    world, undisturbed = World(), World()
    for sequence in range(3):
        consumed = world.learner.consume(world.rollouts(sequence))
        for index in range(GROUPS):
            world.ring.poison(index)
        world.learner.update(consumed, 2)
        undisturbed.update(sequence, 2)
    assert world.learner.weights_sha256 == undisturbed.learner.weights_sha256


def test_policy_lag_is_counted_and_nothing_is_too_old() -> None:
    world = World()
    world.learner.version = 9
    consumed = world.learner.consume(world.rollouts(0, version=2))
    assert consumed.dropped == {}
    assert world.learner.update(consumed)["lag/7"] == GROUPS * B * T


def test_an_update_makes_the_steps_that_it_is_told_and_a_version() -> None:
    world = World()
    before = world.learner.weights_sha256
    world.update(0, 0)
    assert (world.learner.weights_sha256, world.learner.version) == (before, 1)
    metrics = world.update(1, 3)
    assert (metrics["optimizer_steps"], metrics["skipped_steps"], world.learner.version) == (3.0, 0.0, 2)
    assert world.learner.weights_sha256 != before
    assert 0 <= metrics["replay/age_updates_mean"] <= metrics["replay/age_updates_max"] <= 1
    assert metrics["replay/age_steps_max"] <= 2 * GROUPS * B * T
    ahead = world.learner.update(world.learner.consume([]), 2)
    assert (ahead["optimizer_steps"], ahead["num_env_steps"], world.learner.version) == (2.0, 0.0, 3)
    published = np.zeros(world.size, np.float32)
    assert world.board.read(published) == 3
    assert np.array_equal(published, np.concatenate([array.ravel() for array in world.learner.policy_arrays.values()]))


def test_a_learner_that_was_saved_with_its_replay_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    world = World()
    for sequence in range(4):
        world.update(sequence, 2)
    arrays, facts = world.learner.get_state()
    world.learner.replay.save(tmp_path, None)
    other = World()
    other.learner.set_state(arrays, facts)
    other.learner.replay.load(tmp_path)
    for each in (world, other):
        for sequence in range(4, 7):
            each.update(sequence, 2)
    assert world.learner.weights_sha256 == other.learner.weights_sha256
    assert {n: a.tolist() for n, a in world.learner.get_state()[0].items()} == {
        n: a.tolist() for n, a in other.learner.get_state()[0].items()
    }


def test_what_is_sampled_depends_on_the_seed_and_the_update_only() -> None:
    found = []
    for shards in (1, 2):
        world = World(shards=shards)
        for sequence in range(4):
            world.update(sequence, 2)
        found.append(world.learner.weights_sha256)
    assert found[0] == found[1]


@pytest.mark.parametrize("between", [0, 2], ids=["a step each", "updates without a step between"])
def test_numbers_that_are_not_finite_train_nothing_and_end_the_run_in_the_end(between: int) -> None:
    world = World()
    world.update(0, 0, reward=np.inf)
    before = world.learner.weights_sha256
    for _ in range(9):
        metrics = world.learner.update(world.learner.consume([]), 1)
        assert (metrics["optimizer_steps"], metrics["skipped_steps"]) == (0.0, 1.0)
        for _ in range(between):
            assert world.learner.update(world.learner.consume([]), 0)["optimizer_steps"] == 0.0
    nothing = world.learner.consume([])
    with pytest.raises(DivergedError, match="10 updates in a row"):
        world.learner.update(nothing, 1)
    assert world.learner.weights_sha256 == before


def test_a_rollout_of_another_run_is_refused() -> None:
    world = World()
    orders = world.rollouts(0)
    world.ring.slots[1].envelope["run_id"] = np.void(bytes(16))
    with pytest.raises(SchemaError, match="slot 1: of run"):
        world.learner.consume(orders)


def test_batches_that_are_drawn_at_once_each_come_from_all_of_the_replay() -> None:
    world = World(prioritised=False, capacity_steps=600)
    for sequence in range(8):
        world.update(sequence, 0)
    sample = world.learner.replay.sample(4 * 8, np.random.default_rng(0), beta=1.0)
    assert (np.diff(sample.index_M) >= 0).all()  # one from each stratum, in order
    parts = list(world.learner._rows(sample, 4))
    for i, rows in enumerate(parts):
        np.testing.assert_array_equal(rows.return_M, sample.return_M[i::4])
        np.testing.assert_array_equal(rows.observation["observation/position"], sample.observation["observation/position"][i::4])
        np.testing.assert_array_equal(rows.action_mask, sample.action_mask[i::4])
        tags = rows.observation["observation/position"][:, 0].numpy() // 100  # names group and sequence
        assert len({int(tag) % 3 for tag in tags}) == GROUPS


SAMPLED = {"steps": ("dqn", {}), "sequences": ("r2d2", {"sequence_length": 2 * T, "burn_in": 1, "capacity_steps": 120})}


@pytest.mark.parametrize("what", SAMPLED)
def test_an_update_keeps_no_sample_and_takes_the_memory_of_the_one_before(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, replay = SAMPLED[what]
    world = World(name, **replay)
    for sequence in range(3):
        world.update(sequence, 0)
    method = "sample" if what == "steps" else "sample_sequences"
    draw, drawn, places = getattr(world.learner.replay, method), list[Any](), list[tuple[int, ...]]()

    def watched(num: int, rng: np.random.Generator, **how: Any) -> Any:
        assert sum(each() is not None for each in drawn) <= 1, "all but the last are gone"
        sample = draw(num, rng, **how)
        drawn.append(weakref.ref(sample))
        places.append(tuple(array.ctypes.data for array in sample.observation.values()))
        return sample

    monkeypatch.setattr(world.learner.replay, method, watched)
    for sequence in range(3, 5):
        assert world.update(sequence, 4)["optimizer_steps"] == 4.0
    assert (len(drawn), len(set(places))) == (8, 1)


@pytest.mark.parametrize("what", SAMPLED)
def test_what_is_learned_does_not_depend_on_memory_that_is_used_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, replay = SAMPLED[what]
    found = []
    for again in (True, False):
        world = World(name, **replay)
        if not again:
            method = "sample" if what == "steps" else "sample_sequences"
            draw = getattr(world.learner.replay, method)
            monkeypatch.setattr(world.learner.replay, method, lambda *args, draw=draw, **how: draw(*args, **{**how, "reuse": None}))
        metrics = [world.update(sequence, 3) for sequence in range(6)]
        found.append((world.learner.weights_sha256, [{k: v for k, v in m.items() if v == v} for m in metrics]))
    assert found[0] == found[1]


def test_ages_are_those_of_all_draws_of_an_update() -> None:
    world = World(prioritised=False, capacity_steps=600)
    for sequence in range(4):
        world.update(sequence, 0)
    world.learner._most_at_once = 1
    metrics = world.update(4, 40)
    assert (metrics["replay/age_updates_max"], metrics["replay/age_steps_max"]) == (4.0, 4.0 * GROUPS * B * T + B * T)
    assert 1.0 < metrics["replay/age_updates_mean"] < 3.0


@pytest.mark.parametrize("unit", ["updates", "steps"])
def test_the_99th_percentile_of_ages_is_an_age_between_mean_and_maximum(unit: str) -> None:
    world = World(prioritised=False, capacity_steps=600)
    for sequence in range(9):
        world.update(sequence, 0)
    metrics = world.update(9, 20)
    mean, p99, largest = (metrics[f"replay/age_{unit}_{name}"] for name in ("mean", "p99", "max"))
    assert mean < p99 <= largest
    assert p99.is_integer()


@pytest.mark.parametrize(
    ("capacity", "holds"), [({"capacity_steps": 60}, 60), ({"capacity_steps": 64}, 60), ({"capacity_bytes": 3000}, None)]
)
def test_how_much_the_replay_can_hold_is_told_and_is_what_it_comes_to_hold(capacity: dict[str, int], holds: int | None) -> None:
    world = World(**{"capacity_steps": 10_000, "learning_starts": 0, **capacity})
    told, held = set[float](), list[float]()
    for sequence in range(12):
        metrics = world.update(sequence, 0)
        told.add(metrics["replay/capacity_steps"])
        held.append(metrics["replay/steps"])
    (most,) = told
    assert holds in (None, most)
    assert 0.5 * most < held[-1] <= most  # last observations of episodes take rows too
    assert most < 12 * GROUPS * B * T


@pytest.mark.parametrize("found", ["in updates in a row", "in the weights"])
def test_the_advice_against_divergence_is_what_an_algorithm_with_a_replay_takes(found: str) -> None:
    world = World()
    if found == "in the weights":
        world.learner._policy.head.weight.data.fill_(np.nan)
        with pytest.raises(DivergedError) as caught:
            world.learner.publish()
    else:
        world.update(0, 0, reward=np.inf)
        for _ in range(9):
            world.learner.update(world.learner.consume([]), 1)
        nothing = world.learner.consume([])
        with pytest.raises(DivergedError) as caught:
            world.learner.update(nothing, 1)
    assert str(caught.value).endswith(against_divergence(world.learner._config, replayed=True))
    assert "normalise" not in str(caught.value)
