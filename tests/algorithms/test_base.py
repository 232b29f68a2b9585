"""What algorithms share: bootstraps and cuts, minibatches, the optimizer against torch's own, schedules and metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from shoal.algorithms.base import (
    Means,
    Optimizer,
    cut_TN,
    discount_TN,
    evaluate_TN,
    explained_variance,
    minibatches,
    normalised,
    schedule,
    values_TN,
)
from shoal.config import PolicyConfig
from shoal.experience.batch import Batch
from shoal.networks.policy import build_policy

from . import toy


def random_batch(seed: int = 0, T: int = 6, N: int = 3, masked: bool = False) -> Batch:
    """Ends, truncations and closed rollouts at random; discrete actions out of 9."""
    rng = np.random.default_rng(seed)
    observation = {"observation": rng.normal(size=(T + 1, N, 2)).astype(np.float32)}
    ended = rng.random((T, N)) < 0.4
    terminated = ended & (rng.random((T, N)) < 0.5)
    final = [(int(t), int(n), {"observation": rng.normal(size=2).astype(np.float32)}) for t, n in np.argwhere(ended)]
    action = rng.integers(0, 9, (T, N))
    mask = rng.random((T + 1, N, 9)) < 0.5
    np.put_along_axis(mask[:T], action[..., None], True, -1)
    log_prob, reward = (rng.normal(size=(T, N)).astype(np.float32) for _ in range(2))
    valid = np.arange(T)[:, None] < rng.integers(2, T + 1, N)
    return toy.batch_of(observation, action, log_prob - 2, reward, terminated, ended & ~terminated, valid, final, mask if masked else None)


def policy() -> toy.Policy:
    return build_policy(toy.spec_of("box", "discrete"), PolicyConfig(hidden_sizes=[8]), seed=3)


def test_values_are_of_rows_and_of_their_true_successors(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = random_batch(), policy()
    finals = {(int(t), int(n)): i for i, (t, n) in enumerate(batch.final_index)}
    for chunk in (2**24, 8):
        monkeypatch.setattr("shoal.algorithms.base.CHUNK_NUMBERS", chunk)
        value, next_value = values_TN(model, batch)
        assert not value.requires_grad
        assert not next_value.requires_grad
        with torch.no_grad():
            for t in range(6):
                for n in range(3):
                    assert value[t, n].item() == pytest.approx(
                        model.value({"observation": batch.observation["observation"][t, n][None]}).item(), abs=1e-6
                    )
                    if batch.terminated_TN[t, n]:
                        continue
                    successor = batch.observation["observation"][t + 1, n]
                    if batch.truncated_TN[t, n]:
                        successor = batch.final_observation["observation"][finals[t, n]]
                    assert next_value[t, n].item() == pytest.approx(model.value({"observation": successor[None]}).item(), abs=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_evaluation_gives_log_probabilities_and_the_same_values(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = random_batch(masked=masked), policy()
    for chunk in (2**24, 8):
        monkeypatch.setattr("shoal.algorithms.base.CHUNK_NUMBERS", chunk)
        log_prob, value, next_value, whole = evaluate_TN(model, batch)
        assert whole is None
        for found, expected in zip((value, next_value), values_TN(model, batch), strict=True):
            torch.testing.assert_close(found, expected)
        for t in range(6):
            mask = None if batch.action_mask is None else batch.action_mask[t]
            expected_row = model.distribution({"observation": batch.observation["observation"][t]}, mask).log_prob(batch.action[t])
            torch.testing.assert_close(log_prob[t], expected_row.detach())
        assert not log_prob.requires_grad


def test_discounts_stop_at_termination_only() -> None:
    batch = random_batch()
    discount = discount_TN(batch, 0.9)
    assert ((discount == 0) == batch.terminated_TN).all()
    assert (discount[batch.truncated_TN] == np.float32(0.9)).all()
    assert discount.dtype == torch.float32


def test_traces_are_cut_at_ends_and_before_rows_that_are_no_steps() -> None:
    batch = random_batch()
    before = batch.ended_TN.clone()
    cut = cut_TN(batch)
    for t in range(6):
        for n in range(3):
            assert cut[t, n] == (batch.ended_TN[t, n] or (t < 5 and not batch.valid_TN[t + 1, n]))
    assert torch.equal(before, batch.ended_TN)


@pytest.mark.parametrize("size", [None, 1, 4, 5, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_an_epoch_gives_every_valid_row_once(size: int | None, masked: bool) -> None:
    batch = random_batch(4, masked=masked)
    tag = torch.arange(18.0).view(6, 3)
    seen = []
    for rows in minibatches(batch, size, np.random.default_rng(1), tag=tag, reward=batch.reward_TN):
        assert len(rows) <= (size or 18)
        for i, place in enumerate(rows["tag"].long().tolist()):
            t, n = divmod(place, 3)
            seen.append((t, n))
            assert torch.equal(rows.observation["observation"][i], batch.observation["observation"][t, n])
            assert rows.action[i] == batch.action[t, n]
            assert rows["reward"][i] == batch.reward_TN[t, n]
            assert (rows.action_mask is not None) == masked
            if rows.action_mask is not None and batch.action_mask is not None:
                assert torch.equal(rows.action_mask[i], batch.action_mask[t, n])
    assert sorted(seen) == [(int(t), int(n)) for t, n in batch.valid_TN.nonzero()]


def test_minibatches_are_of_nearly_equal_length_and_follow_the_stream() -> None:
    batch = random_batch(T=11, N=3)
    batch.valid_TN[:] = True

    def order(seed: int) -> list[list[float]]:
        tag = torch.arange(33.0).view(11, 3)
        return [rows["tag"].tolist() for rows in minibatches(batch, 16, np.random.default_rng(seed), tag=tag)]

    assert [len(rows) for rows in order(1)] == [11, 11, 11]
    assert order(1) == order(1) != order(2)


def test_a_batch_without_valid_rows_gives_no_minibatch() -> None:
    batch = random_batch()
    batch.valid_TN[:] = False
    assert list(minibatches(batch, 4, np.random.default_rng(0), reward=batch.reward_TN)) == []


def twins() -> tuple[nn.Sequential, nn.Sequential]:
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    return models[0], models[1]


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32))
    return (model(x) - x.sum(1, keepdim=True) * 3).square().mean()


@pytest.mark.parametrize("kind", ["adam", "rmsprop"])
def test_steps_equal_torchs_optimizer(kind: str) -> None:
    ours, theirs = twins()
    optimizer = Optimizer(ours, epsilon=1e-5, max_gradient_norm=0.5, kind=kind)  # type: ignore[arg-type]
    reference = (
        torch.optim.Adam(theirs.parameters(), eps=1e-5)
        if kind == "adam"
        else torch.optim.RMSprop(theirs.parameters(), alpha=0.99, eps=1e-5)
    )
    for step in range(30):
        rate = 0.01 / (step + 1)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.zero_grad()
        loss_of(theirs, step).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5 if step < 20 else 1e-3)
        reference.step()
        optimizer._max_norm = 0.5 if step < 20 else 1e-3
        assert optimizer.step(loss_of(ours, step), rate) == pytest.approx(norm.item(), rel=1e-4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (optimizer.steps, optimizer.skipped) == (30, 0)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    model, _ = twins()
    optimizer = Optimizer(model, epsilon=1e-5, max_gradient_norm=0.5)
    optimizer.step(loss_of(model, 0), 0.01)
    before, state = [p.detach().clone() for p in model.parameters()], optimizer.get_state()
    for poison in (math.nan, math.inf):
        assert not math.isfinite(optimizer.step(loss_of(model, 1) * poison, 0.01))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    after = optimizer.get_state()
    assert int(after.pop("optimizer/skipped")) == 2
    assert all(torch.equal(state[name], value) for name, value in after.items())


def test_state_goes_round_exactly() -> None:
    ours, twin = twins()
    first, second = (Optimizer(model, epsilon=1e-5, max_gradient_norm=0.5) for model in (ours, twin))
    for step in range(3):
        first.step(loss_of(ours, step), 0.01)
    state = first.get_state()
    twin.load_state_dict(ours.state_dict())
    second.set_state(state)
    first.step(loss_of(ours, 9), 0.01)
    second.step(loss_of(twin, 9), 0.01)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.get_state().values(), second.get_state().values(), strict=True))
    assert int(state["optimizer/steps"]) == 3


def test_replaced_parameters_are_noticed() -> None:
    ours, theirs = twins()
    optimizer, reference = (Optimizer(model, epsilon=1e-5, max_gradient_norm=0.5) for model in (ours, theirs))
    for parameter in ours.parameters():
        parameter.data = parameter.data.clone()
    optimizer.step(loss_of(ours, 0), 0.01)
    reference.step(loss_of(theirs, 0), 0.01)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_frozen_and_unused_parameters_stay() -> None:
    model, _ = twins()
    model[0].weight.requires_grad_(False)
    spare = nn.ModuleList([model, nn.Linear(2, 2)])
    before = [p.detach().clone() for p in (model[0].weight, *spare[1].parameters())]
    optimizer = Optimizer(spare, epsilon=1e-5, max_gradient_norm=0.5)
    optimizer.step(loss_of(model, 0), 0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, (model[0].weight, *spare[1].parameters()), strict=True))


def test_schedules() -> None:
    assert schedule(2.0, "constant", 0.75) == 2.0
    assert [schedule(2.0, "linear", progress) for progress in (0.0, 0.75, 1.0)] == [2.0, 0.5, 0.0]


def test_advantages_are_normalised_unless_alone() -> None:
    result = normalised(torch.tensor([1.0, 2.0, 6.0]))
    assert result.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert result.std().item() == pytest.approx(1.0, rel=1e-5)
    assert normalised(torch.tensor([5.0])).tolist() == [5.0]
    assert normalised(torch.full((3,), 2.0)).tolist() == [0.0, 0.0, 0.0]


def test_explained_variance() -> None:
    target = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(target + 7.0, target) == 1.0
    assert explained_variance(torch.zeros(3), target) == 0.0
    assert explained_variance(2.0 * target, target) == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(target, torch.ones(3)) == 0.0
    assert explained_variance(torch.zeros(0), torch.zeros(0)) == 0.0


def test_means_are_over_what_was_added() -> None:
    means = Means()
    means.add({"a": torch.tensor(1.0, requires_grad=True), "b": 2.0})
    means.add({"a": 4.0})
    assert means.result() == {"a": 2.5, "b": 2.0}
