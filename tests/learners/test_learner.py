"""The learner: what it refuses, what it drops, what it publishes, and that its state is everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout_fakes import RUN_ID, poisoned_ring, policy_fields, scripted_spec, write_rollout
from shoal.algorithms import build_algorithm
from shoal.config import PPOConfig, RunConfig
from shoal.errors import DivergedError, SchemaError
from shoal.experience.envelope import Fate, Identity
from shoal.experience.schema import rollout_schema
from shoal.learners.learner import Learner
from shoal.networks.policy import build_policy, named_tensors
from shoal.streams import Purpose, stream
from shoal.weights.board import WeightBoard, WeightLayout

T, B, GROUPS = 4, 3, 2


class NotingAlgorithm:
    """Keeps what it is given, adds one to every parameter, answers as it is told."""

    modes = ("sync", "async")

    def __init__(self, policy) -> None:
        self._policy = policy
        self.batches: list = []
        self.contexts: list = []
        self.answers: list[dict[str, float]] = []

    def update(self, batch, context):
        self.batches.append(batch)
        self.contexts.append(context)
        with torch.no_grad():
            for parameter in self._policy.parameters():
                parameter += 1
        return self.answers.pop(0) if self.answers else {"loss": 0.5}

    def get_state(self):
        return {"made": torch.tensor(float(len(self.contexts)))}

    def set_state(self, state):
        self.made = float(state["made"])


def config_of(**changes) -> RunConfig:
    config = RunConfig(algorithm=PPOConfig(minibatch_size=6, epochs=2, schedule_env_steps=100), seed=5)
    config.sampling.groups, config.sampling.group_size, config.sampling.rollout_length = GROUPS, B, T
    config.policy.hidden_sizes = [8]
    for name, value in changes.items():
        setattr(config.policy, name, value)
    return config


class World:
    """A ring, a board, and a learner over them."""

    def __init__(self, *, noting: bool = False, max_policy_lag: int = 3, num_slots: int = 4, config: RunConfig | None = None) -> None:
        self.config = config or config_of()
        self.spec = scripted_spec()
        self.policy = build_policy(self.spec, self.config.policy, None, seed=1)
        self.ring = poisoned_ring(rollout_schema(self.spec, policy_fields(), T, B), num_slots)
        self.layout = WeightLayout.of((n, tuple(t.shape)) for n, t in named_tensors(self.policy).items())
        self.board = WeightBoard(self.layout.size, np.zeros(WeightBoard.size_bytes(self.layout.size), np.uint8))
        self.board.reset()
        algorithm = NotingAlgorithm(self.policy) if noting else build_algorithm(self.policy, self.config.algorithm, None)
        self.algorithm = algorithm
        self.learner = Learner(
            self.config, self.spec, self.policy, algorithm, self.ring, self.board, run_id=RUN_ID, max_policy_lag=max_policy_lag, epoch=6
        )

    def rollouts(self, sequence: int, versions: list[int] | None = None, rows: tuple[int, ...] = (4, 3)) -> list[tuple[int, Identity]]:
        orders = []
        for group in range(GROUPS):
            identity = Identity(group, sequence, 0)
            version = self.learner.version if versions is None else versions[group]
            slot = write_rollout(self.ring.slots[group], identity, num_rows=rows[group], version=version, tag=group + 3 * sequence)
            slot.arrays["reward"][: rows[group]] += np.sin(sequence + np.arange(rows[group]))[:, None]
            slot.envelope["checksum"] = slot.checksum()
            orders.append((group, identity))
        return orders

    def published(self) -> tuple[int, dict[str, np.ndarray]]:
        out = np.zeros(self.layout.size, np.float32)
        version = self.board.read(out)
        return version, self.layout.views(out)


# ---- consume ---------------------------------------------------------------------------------------------------------
def test_rollouts_are_taken_in_the_order_given():
    world = World(noting=True)
    orders = world.rollouts(0)
    consumed = world.learner.consume(list(reversed(orders)))
    assert consumed.groups == [1, 0]
    assert consumed.dropped == {}
    assert consumed.batch.reward_TN[0, 0] == pytest.approx(100 / 8 + np.sin(0))
    assert consumed.batch.valid_TN.sum() == (4 + 3) * B
    assert all(int(world.ring.slots[g].envelope["consumed_ns"]) > 0 for g in range(GROUPS))


@pytest.mark.parametrize(("version", "dropped"), [(3, {}), (2, {0: Fate.OVER_LAG}), (0, {0: Fate.OVER_LAG})])
def test_what_is_older_than_the_bound_is_dropped_before_it_is_copied(version, dropped):
    world = World(noting=True, max_policy_lag=3)
    world.learner.version = 6
    consumed = world.learner.consume(world.rollouts(0, versions=[version, 6]))
    assert consumed.dropped == {Identity(g, 0, 0): fate for g, fate in dropped.items()}
    assert consumed.groups == [g for g in range(GROUPS) if g not in dropped]
    assert consumed.batch.policy_lag_TN.max() == (0 if dropped else 3)


def test_the_oldest_row_decides_about_the_lag():
    world = World(noting=True, max_policy_lag=1)
    world.learner.version = 5
    write_rollout(world.ring.slots[0], Identity(0, 0, 0), versions=[3, 4, 5, 5])
    assert world.learner.consume([(0, Identity(0, 0, 0))]).dropped == {Identity(0, 0, 0): Fate.OVER_LAG}


def test_of_a_rollout_whose_environments_acted_on_their_own_only_late_rows_are_left_out():
    world = World(noting=True, max_policy_lag=3)
    world.learner.version = 6
    orders = world.rollouts(0, versions=[6, 6])
    for slot, late in zip(world.ring.slots, (slice(0, 1), slice(None)), strict=False):
        slot.envelope["paced"] = True
        slot.arrays["policy_version"][late, 1 if late.stop else slice(None)] = 2
        slot.envelope["version_min"] = 2
        slot.envelope["checksum"] = slot.checksum()
    consumed = world.learner.consume(orders)
    assert consumed.dropped == {Identity(1, 0, 0): Fate.OVER_LAG}  # nothing of it was in time
    assert consumed.batch.valid_TN.tolist() == [[True, False, True], *[[True] * 3] * 3]
    assert consumed.batch.policy_lag_TN.max() == 0


def test_nothing_left_is_no_batch():
    world = World(noting=True, max_policy_lag=0)
    world.learner.version = 1
    consumed = world.learner.consume(world.rollouts(0, versions=[0, 0]))
    assert (consumed.batch, consumed.groups) == (None, [])
    assert list(consumed.dropped) == [Identity(0, 0, 0), Identity(1, 0, 0)]


def test_a_slot_that_holds_something_else_is_refused():
    world = World(noting=True)
    orders = world.rollouts(0)
    with pytest.raises(SchemaError, match="holds Identity"):
        world.learner.consume([(0, Identity(0, 1, 0))])
    world.ring.slots[1].arrays["reward"][0, 0] += 1
    with pytest.raises(SchemaError, match="slot 1: it changed after"):
        world.learner.consume(orders)


# ---- update ----------------------------------------------------------------------------------------------------------
def test_an_update_makes_and_publishes_the_next_version_and_counts():
    world = World(noting=True)
    learner = world.learner
    learner.publish()
    version, before = world.published()
    assert version == 0
    before = {n: v.copy() for n, v in before.items()}
    learner.version = 2
    orders = world.rollouts(0, versions=[0, 2])
    world.algorithm.answers = [{"loss": 0.25}]
    metrics = learner.update(learner.consume(orders))
    assert metrics == {"loss": 0.25, "lag/2": 12.0, "lag/0": 9.0, "num_env_steps": 21.0}
    assert (learner.version, learner.env_steps) == (3, 21)
    version, after = world.published()
    assert version == 3
    parameters = {name for name, _ in world.policy.named_parameters()}
    assert parameters
    for name, value in after.items():
        np.testing.assert_allclose(value, before[name] + (1 if name in parameters else 0), rtol=1e-6)
        np.testing.assert_array_equal(value, learner.policy_arrays[name])


def test_the_context_is_a_function_of_seed_version_and_epoch():
    world = World(noting=True)
    for _ in range(7):
        world.learner.update(world.learner.consume(world.rollouts(0)))
    contexts = world.algorithm.contexts
    assert [c.update for c in contexts] == list(range(7))
    assert [c.progress for c in contexts] == [min(1.0, 21 * k / 100) for k in range(7)]
    for k, context in enumerate(contexts):
        assert context.rng.integers(1 << 60) == stream(5, Purpose.MINIBATCH, index=k, epoch=6).integers(1 << 60)


@pytest.mark.parametrize(("schedule", "stop", "expected"), [(None, 42, 0.5), (None, None, 0.0), (210, 42, 0.1)])
def test_schedules_end_at_their_own_horizon_or_the_runs_end(schedule, stop, expected):
    config = config_of()
    config.algorithm.schedule_env_steps, config.stop.env_steps = schedule, stop
    world = World(noting=True, config=config)
    for _ in range(2):
        world.learner.update(world.learner.consume(world.rollouts(0)))
    assert world.algorithm.contexts[1].progress == pytest.approx(expected)


def test_ten_updates_in_a_row_without_a_finite_step_are_a_divergence():
    world = World(noting=True)
    learner = world.learner
    barren = {"optimizer_steps": 0.0, "skipped_steps": 4.0}  # the first counts finite ones only
    one_step_left = {"optimizer_steps": 1.0, "skipped_steps": 3.0}
    world.algorithm.answers = [dict(barren) for _ in range(9)] + [one_step_left] + [dict(barren) for _ in range(9)]
    for _ in range(19):
        learner.update(learner.consume(world.rollouts(0)))
    world.algorithm.answers = [dict(barren)]
    with pytest.raises(DivergedError, match=r"^diverged: .* not finite in 10 updates in a row \(update 19\)"):
        learner.update(learner.consume(world.rollouts(0)))
    assert world.published()[0] == 19  # what diverged was not published


def test_rewards_are_normalised_before_and_observations_after_the_update():
    world = World(noting=True, config=config_of(normalise_rewards=True, normalise_observations=True))
    learner = world.learner
    orders = world.rollouts(0)
    raw = world.ring.slots[0].arrays["reward"].astype(np.float32).copy()
    positions = [world.ring.slots[g].arrays["observation/position"][:rows].reshape(-1, 2) for g, rows in enumerate((4, 3))]
    everything = np.concatenate(positions).astype(np.float64)
    statistics = {n: t.clone() for n, t in named_tensors(world.policy).items() if n not in dict(world.policy.named_parameters())}
    learner.update(learner.consume(orders))
    trained = world.algorithm.batches[0].reward_TN.numpy()[:, :B]
    assert not np.allclose(trained, raw)
    np.testing.assert_allclose(trained, raw * (trained[1, 1] / raw[1, 1]), rtol=1e-5)
    arrays, _ = learner.get_state()
    np.testing.assert_allclose(arrays["observations/observation/position//mean"], everything.mean(0))
    assert float(arrays["observations/observation/position//count"]) == 21
    assert "rewards/carry" in arrays
    now = named_tensors(world.policy)
    assert any(not torch.equal(now[n], t) for n, t in statistics.items())
    assert world.published()[0] == 1
    for name in statistics:
        np.testing.assert_array_equal(world.published()[1][name], now[name].numpy())


# ---- state -----------------------------------------------------------------------------------------------------------
def test_a_learner_goes_on_exactly_from_its_state():
    config = config_of(normalise_rewards=True, normalise_observations=True)
    straight = World(config=config)
    for k in range(2):
        straight.learner.update(straight.learner.consume(straight.rollouts(k)))
    arrays, facts = straight.learner.get_state()
    assert facts == {"version": 2, "env_steps": 42}
    arrays = {name: np.array(value) for name, value in arrays.items()}
    other = World(config=config)
    assert other.learner.weights_sha256 != straight.learner.weights_sha256
    other.learner.set_state(arrays, facts)
    assert other.learner.weights_sha256 == straight.learner.weights_sha256
    assert other.board.version == -1  # nothing is published by that
    for k in range(2, 4):
        metrics = [w.learner.update(w.learner.consume(w.rollouts(k))) for w in (straight, other)]
        assert metrics[0] == metrics[1]
    assert other.learner.weights_sha256 == straight.learner.weights_sha256
    first, second = (w.learner.get_state() for w in (straight, other))
    assert first[1] == second[1] == {"version": 4, "env_steps": 84}
    assert {n: a.tobytes() for n, a in first[0].items()} == {n: a.tobytes() for n, a in second[0].items()}


def test_a_state_does_not_change_after_it_was_taken():
    world = World(config=config_of(normalise_rewards=True, normalise_observations=True))
    world.learner.update(world.learner.consume(world.rollouts(0)))
    arrays, _ = world.learner.get_state()
    before = {name: np.array(value) for name, value in arrays.items()}
    world.learner.update(world.learner.consume(world.rollouts(1)))
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
