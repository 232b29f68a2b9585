"""Several learners make the update that one makes, up to rounding, and all of them the same, bit for bit.

Legend: T rows, N environments (columns), P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from several import several
from shoal.algorithms import UpdateContext, build_algorithm
from shoal.algorithms.base import Optimizer, epoch, evaluate_TN, minibatches, values_TN
from shoal.algorithms.ranks import Ranks, share_of
from shoal.config import AlgorithmConfig, APPOConfig, ImpalaConfig, PolicyConfig, PPOConfig
from shoal.experience.batch import Batch
from shoal.networks.policy import Policy, build_policy
from shoal.networks.recurrent import RecurrentPolicy

from . import test_base, test_sequences, toy

CONFIGS: dict[str, AlgorithmConfig] = {
    "ppo": PPOConfig(minibatch_size=14, epochs=2, entropy_coefficient=0.01, clip_range_value=0.3),
    "ppo, one minibatch": PPOConfig(minibatch_size=1000, epochs=1, normalise_advantage=False),
    "ppo, stopped": PPOConfig(minibatch_size=10, epochs=50, learning_rate=0.002, target_kl=0.01),
    "appo": APPOConfig(minibatch_size=14, epochs=2),
    "impala, one step": ImpalaConfig(entropy_coefficient=0.01, normalise_advantage=True),
    "impala": ImpalaConfig(minibatch_size=14, optimizer="rmsprop"),
}


@dataclass
class Counted:
    """One of several who adds nothing up."""

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> None:
        raise AssertionError("nothing is to be added up")


@given(num_rows=st.integers(0, 40), size=st.integers(1, 9))
def test_parts_are_disjoint_whole_and_nearly_equal(num_rows: int, size: int) -> None:
    parts = [share_of(num_rows, Counted(rank, size)) for rank in range(size)]
    mine = [range(num_rows)[rows] for rows, share in parts if share]
    assert [row for rows in mine for row in rows] == list(range(num_rows))
    assert sum(share for _, share in parts) == pytest.approx(float(num_rows > 0))
    lengths = [len(rows) for rows in mine] + [0] * (size - len(mine))
    assert max(lengths) - min(lengths) <= 1
    assert all(len(range(num_rows)[rows]) == min(1, num_rows) for rows, share in parts if not share)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("length", [1, 4, 1021, 70_001])
def test_sums_have_the_same_bits_for_all_and_every_time(size: int, length: int) -> None:
    given = [torch.randn(length, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (rank - 1) for rank in range(size)]

    def add(ranks: Ranks) -> Tensor:
        mine = given[ranks.rank].clone()
        ranks.sum(mine)
        return mine

    found = [*several(size, add), *several(size, add)]
    assert all(torch.equal(found[0], other) for other in found)
    torch.testing.assert_close(found[0], torch.stack(given).double().sum(0).float(), rtol=1e-5, atol=1e-3)  # terms are up to thousands


@pytest.mark.parametrize("size", [None, 1, 4, 7])
def test_the_parts_of_a_minibatch_are_the_minibatch(size: int | None) -> None:
    batch = test_base.random_batch(4, masked=True)
    tag = torch.arange(18.0).view(6, 3)
    whole = list(minibatches(batch, size, np.random.default_rng(1), tag=tag))
    parts = [list(minibatches(batch, size, np.random.default_rng(1), Counted(rank, 3), tag=tag)) for rank in range(3)]
    for number, rows in enumerate(whole):
        mine = [part[number] for part in parts]
        assert [tag for part in mine if part.share for tag in part["tag"].tolist()] == rows["tag"].tolist()
        assert sum(part.share for part in mine) == pytest.approx(1.0)
        for part in mine:
            assert torch.equal(part.whole["tag"], rows["tag"])
            assert len(part) == len(part["tag"]) == len(part.action) > 0
            places = part["tag"].long()
            assert torch.equal(part.observation["observation"], batch.observation["observation"][:6].flatten(0, 1)[places])
            assert torch.equal(part.action, batch.action.flatten()[places])
            assert part.action_mask is not None
            assert batch.action_mask is not None
            assert torch.equal(part.action_mask, batch.action_mask[:6].flatten(0, 1)[places])


@pytest.mark.parametrize("size", [None, 4, 20])
def test_the_parts_of_a_minibatch_of_sequences_are_the_minibatch(size: int | None) -> None:
    model = test_sequences.policy()
    batch = test_sequences.batch_of(model)
    batch.valid_TN[:, 3] = False  # a learner may be left with nothing but this column
    tag = torch.arange(float(batch.valid_TN.numel())).view(batch.valid_TN.shape)
    whole = list(epoch(model, batch, size, np.random.default_rng(1), tag=tag))
    parts = [list(epoch(model, batch, size, np.random.default_rng(1), Counted(rank, 2), tag=tag)) for rank in range(2)]
    assert [len(part) for part in parts] == [len(whole)] * 2
    for number, rows in enumerate(whole):
        mine = [part[number] for part in parts]
        assert sorted(tag for part in mine if part.share for tag in part["tag"].tolist()) == sorted(rows["tag"].tolist())
        assert sum(part.share for part in mine) == pytest.approx(1.0)
        assert all(len(part) == len(part["tag"]) > 0 and torch.equal(part.whole["tag"], rows["tag"]) for part in mine)


@pytest.mark.parametrize("size", [2, 5])
def test_values_are_put_together_from_those_of_each_learners_columns(size: int) -> None:
    for model, batch in ((test_base.policy(), test_base.random_batch()), _remembering()):
        expected = (*values_TN(model, batch), *evaluate_TN(model, batch)[:3])
        found = several(size, lambda ranks, m=model, b=batch: (*values_TN(m, b, ranks), *evaluate_TN(m, b, ranks)[:3]))  # type: ignore[misc]
        for ours in found:
            for one, other, same in zip(ours, expected, found[0], strict=True):
                torch.testing.assert_close(one, other)
                assert torch.equal(one, same)


def _remembering() -> tuple[Policy, Batch]:
    model = test_sequences.policy()
    return model, test_sequences.batch_of(model)


def _policy(memory: str, action: str) -> Policy:
    """Its weights are the same at each call."""
    if memory != "none":
        return test_sequences.policy(memory)
    return build_policy(toy.spec_of("box", action), PolicyConfig(hidden_sizes=[8]), seed=3)


def _updated_by_several(config: AlgorithmConfig, memory: str, action: str, size: int) -> list[tuple[dict[str, float], Policy]]:
    models = [_policy(memory, action) for _ in range(size)]  # here: torch has one stream of random numbers for all threads
    return several(size, lambda ranks: _update(config, models[ranks.rank], ranks))


def _update(config: AlgorithmConfig, model: Policy, ranks: Ranks | None = None) -> tuple[dict[str, float], Policy]:
    action = model.action_head.kind
    batch = test_sequences.batch_of(model) if isinstance(model, RecurrentPolicy) else test_base.random_batch(T=9, N=7)
    if action == "box":
        batch.action = torch.randn(9, 7, 2, generator=torch.Generator().manual_seed(0))
    if getattr(config, "target_kl", None) is not None:  # else it is passed before the first step
        batch.log_prob_TN = evaluate_TN(model, batch).log_prob_TN
    algorithm = build_algorithm(model, config)
    if ranks is not None:
        algorithm.join(ranks)
    return algorithm.update(batch, UpdateContext(0, 0.0, np.random.default_rng(5))), model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("memory", "action"), [("none", "discrete"), ("none", "box"), ("gru", "discrete")])
@pytest.mark.parametrize("size", [2, 3])
def test_an_update_of_several_is_that_of_one_up_to_rounding_and_the_same_for_all(name: str, memory: str, action: str, size: int) -> None:
    config = CONFIGS[name]
    expected, alone = _update(config, _policy(memory, action))
    found = _updated_by_several(config, memory, action, size)
    begin = _policy(memory, action)
    assert any(not torch.equal(one, other) for one, other in zip(begin.parameters(), alone.parameters(), strict=True))
    for metrics, model in found:
        assert metrics == found[0][0]
        assert metrics == pytest.approx(expected, rel=2e-3, abs=2e-5)
        for mine, same, one in zip(model.parameters(), found[0][1].parameters(), alone.parameters(), strict=True):
            assert torch.equal(mine, same)
            torch.testing.assert_close(mine, one, rtol=1e-3, atol=1e-5)


def test_a_stopped_update_is_stopped_by_all_at_the_same_minibatch() -> None:
    metrics = [found for found, _ in _updated_by_several(CONFIGS["ppo, stopped"], "none", "discrete", 2)]
    assert 1 < metrics[0]["epochs"] == metrics[1]["epochs"] < 50
    assert metrics[0]["optimizer_steps"] == metrics[1]["optimizer_steps"]


def test_what_is_not_finite_for_one_is_refused_by_all() -> None:
    models = [_policy("none", "discrete") for _ in range(2)]

    def step(ranks: Ranks) -> tuple[int, int, Tensor]:
        optimizer = Optimizer(models[ranks.rank], epsilon=1e-5, max_gradient_norm=0.5)
        optimizer.ranks = ranks
        slopes = [torch.ones_like(p) for p in optimizer.parameters]
        loss = torch.tensor(float("nan") if ranks.rank == 1 else 1.0)
        gradient, said = optimizer.gather(slopes, {"loss": loss}, 0.5)
        optimizer.follow(gradient, 0.1, said["loss"])
        return optimizer.steps, optimizer.skipped, optimizer.flat.clone()

    found = several(2, step)
    assert [steps[:2] for steps in found] == [(0, 1)] * 2
    assert torch.equal(found[0][2], found[1][2])


def test_a_whole_evaluation_is_made_in_one_piece_by_all_learners_or_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns differ by one between learners: one must not do in one step what another does in minibatches."""
    batch, model = test_base.random_batch(T=6, N=3), test_base.policy()
    for limit, whole in ((2 * 7 * 2, True), (2 * 7 * 1, False)):  # two columns of seven rows of two numbers, or one
        monkeypatch.setattr("shoal.algorithms.base.CHUNK_NUMBERS", limit)
        found: list[Any] = several(2, lambda ranks: evaluate_TN(model, batch, ranks, for_gradient=True).whole)
        assert [each is not None for each in found] == [whole, whole]
