"""Running statistics against one pass over everything that was ever seen."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from shoal.experience.batch import Batch
from shoal.learners.normaliser import ObservationNormaliser, RewardNormaliser
from shoal.types import EnvironmentSpec, LeafSpec

GROUPS, B, GAMMA = 3, 2, 0.9


def random_batch(rng: np.random.Generator, num_rollouts: int, num_rows: int = 7) -> Batch:
    shape = (num_rows, num_rollouts * B)
    valid = rng.random(shape) < 0.85
    ended = (rng.random(shape) < 0.2) & valid
    terminated = ended & (rng.random(shape) < 0.5)
    return Batch(
        observation={
            "observation/a": torch.from_numpy(rng.normal(3, 2, (num_rows + 1, shape[1], 2)).astype(np.float32)),
            "observation/b": torch.from_numpy(rng.normal(size=(num_rows + 1, shape[1]))),
        },
        action_mask=None,
        action=torch.zeros(shape, dtype=torch.int64),
        log_prob_TN=torch.zeros(shape),
        reward_TN=torch.from_numpy(rng.normal(1, 5, shape).astype(np.float32)),
        terminated_TN=torch.from_numpy(terminated),
        truncated_TN=torch.from_numpy(ended & ~terminated),
        valid_TN=torch.from_numpy(valid),
        policy_lag_TN=torch.zeros(shape, dtype=torch.int64),
        final_observation={},
        final_index=torch.zeros((0, 2), dtype=torch.int64),
        policy_state={},
    )


class OnePass:
    """The discounted return of every step that was ever made, in a list."""

    def __init__(self) -> None:
        self.carry = {(g, b): 0.0 for g in range(GROUPS) for b in range(B)}
        self.returns: list[float] = []

    def scaled(self, batch: Batch, groups: list[int]) -> np.ndarray:
        reward = batch.reward_TN.numpy().astype(np.float64)
        for i, group in enumerate(groups):
            for b in range(B):
                n = i * B + b
                for t in range(len(reward)):
                    if batch.valid_TN[t, n]:
                        self.carry[group, b] = reward[t, n] + GAMMA * self.carry[group, b]
                        self.returns.append(self.carry[group, b])
                    if batch.ended_TN[t, n]:
                        self.carry[group, b] = 0.0
        deviation = np.sqrt(np.var(self.returns) + 1e-8) if len(self.returns) > 1 else 1.0
        return np.clip(reward / deviation, -10, 10)


def test_rewards_are_divided_by_the_deviation_of_all_returns_so_far():
    rng = np.random.default_rng(0)
    normaliser, oracle = RewardNormaliser(GROUPS, B, GAMMA), OnePass()
    for groups in ([0, 1, 2], [2, 0], [1], [1, 2, 0], [2, 2]):
        batch = random_batch(rng, len(groups))
        expected = oracle.scaled(batch, groups)
        normaliser(batch, groups)
        np.testing.assert_allclose(batch.reward_TN.numpy(), expected, rtol=2e-6)
        assert batch.reward_TN.dtype == torch.float32


def test_a_reward_is_clipped_at_ten_deviations():
    normaliser = RewardNormaliser(1, 1, 0.0)
    batch = one_column([0.0] * 999 + [1000.0, -1000.0])
    normaliser(batch, [0])
    assert batch.reward_TN[-2:, 0].tolist() == [10.0, -10.0]


def one_column(rewards: list[float]) -> Batch:
    batch = random_batch(np.random.default_rng(0), 1, len(rewards))
    columns = {name: value[:, :1] for name, value in vars(batch).items() if name.endswith("_TN")}
    batch = Batch(**{**vars(batch), **columns})
    batch.reward_TN = torch.tensor(rewards)[:, None]
    batch.valid_TN = torch.ones_like(batch.valid_TN)
    batch.terminated_TN = batch.truncated_TN = torch.zeros_like(batch.valid_TN)
    return batch


def test_one_reward_alone_is_not_scaled():
    normaliser = RewardNormaliser(1, 1, 0.5)
    batch = one_column([3.0])
    normaliser(batch, [0])
    assert batch.reward_TN.tolist() == [[3.0]]
    batch = one_column([3.5])  # returns 3 and 5: deviation 1
    normaliser(batch, [0])
    assert batch.reward_TN[0, 0].item() == pytest.approx(3.5, rel=1e-6)
    batch = one_column([0.5])  # returns 3, 5 and 3: deviation sqrt(8)/3
    normaliser(batch, [0])
    assert batch.reward_TN[0, 0].item() == pytest.approx(0.5 * 3 / np.sqrt(8), rel=1e-6)


def test_reward_statistics_go_on_exactly_from_their_state():
    rng = np.random.default_rng(1)
    straight, before = RewardNormaliser(GROUPS, B, GAMMA), RewardNormaliser(GROUPS, B, GAMMA)
    for _ in range(3):
        batch = random_batch(rng, GROUPS)
        straight(copy.deepcopy(batch), [0, 1, 2])
        before(batch, [0, 1, 2])
    state = before.get_state()
    kept = {name: np.array(value) for name, value in state.items()}
    before(random_batch(rng, GROUPS), [0, 1, 2])
    for name, value in state.items():
        np.testing.assert_array_equal(value, kept[name], err_msg=f"{name} changed after it was handed out")
    after = RewardNormaliser(GROUPS, B, GAMMA)
    after.set_state(kept)
    for _ in range(2):
        batch = random_batch(rng, GROUPS)
        other = copy.deepcopy(batch)
        straight(batch, [0, 1, 2])
        after(other, [0, 1, 2])
        assert torch.equal(batch.reward_TN, other.reward_TN)
    assert {n: v.tolist() for n, v in after.get_state().items()} == {n: v.tolist() for n, v in straight.get_state().items()}
    assert sorted(state) == ["carry", "moments/count", "moments/m2", "moments/mean"]
    assert kept["carry"].shape == (GROUPS, B)


SPEC = EnvironmentSpec(
    "two",
    (
        LeafSpec(("a",), "box", "float32", (2,), low=(-1.0,), high=(1.0,)),
        LeafSpec(("b",), "box", "float64", (), low=(-1.0,), high=(1.0,)),
    ),
    LeafSpec((), "discrete", "int64", (), nvec=(2,), start=(0,)),
)
NAMES = ["observation/a", "observation/b"]


def test_observations_that_were_acted_on_make_the_statistics():
    rng = np.random.default_rng(2)
    normaliser = ObservationNormaliser(SPEC, NAMES)
    seen: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    for rollouts in (1, 3, 2):
        batch = random_batch(rng, rollouts)
        normaliser.merge(batch)
        for name in NAMES:
            for t, n in batch.valid_TN.nonzero().tolist():
                seen[name].append(batch.observation[name][t, n].numpy().astype(np.float64))
    for name in NAMES:
        moments, everything = normaliser.moments[name], np.stack(seen[name])
        assert moments.count == len(everything)
        np.testing.assert_allclose(moments.mean, everything.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.variance, everything.var(0), rtol=1e-12)
        assert moments.mean.dtype == np.float64


def test_only_the_fields_that_are_named_are_kept():
    normaliser = ObservationNormaliser(SPEC, ["observation/b"])
    normaliser.merge(random_batch(np.random.default_rng(3), 1))
    assert list(normaliser.moments) == ["observation/b"]
    assert sorted(normaliser.get_state()) == ["observation/b//count", "observation/b//m2", "observation/b//mean"]


def test_observation_statistics_go_on_exactly_from_their_state():
    rng = np.random.default_rng(4)
    one, other = ObservationNormaliser(SPEC, NAMES), ObservationNormaliser(SPEC, NAMES)
    one.merge(random_batch(rng, 2))
    other.set_state(one.get_state())
    batch = random_batch(rng, 2)
    one.merge(batch)
    other.merge(batch)
    first, second = one.get_state(), other.get_state()
    assert first.keys() == second.keys()
    for name in first:
        assert np.asarray(first[name]).tobytes() == np.asarray(second[name]).tobytes()
