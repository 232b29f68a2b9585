"""DQN against slow oracles: losses in the papers' notation, and gradients that are written out against torch's graph.

Legend: M rows, A actions, Z atoms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shoal.algorithms.dqn import DQN, c51_loss, epsilon_annealed, epsilon_ladder, huber_loss, projected, quantile_loss
from shoal.algorithms.off_policy import Beginning, Transitions
from shoal.config import DQNConfig
from shoal.types import LeafSpec

from .transitions import CHOICES, IMAGE, VECTOR, Caught, M, context, made, rows_of, spec_of


def test_the_huber_loss_is_torchs() -> None:
    value, target, weight = (torch.randn(9, generator=torch.Generator().manual_seed(i)) * 2 for i in range(3))
    value.requires_grad_()
    expected = (weight * functional.huber_loss(value, target, reduction="none")).mean()
    found = huber_loss(value.detach(), target, weight)
    torch.testing.assert_close(found.loss, expected.detach())
    torch.testing.assert_close(found.gradient, torch.autograd.grad(expected, value)[0])
    torch.testing.assert_close(found.priority_M, (value.detach() - target).abs())


def test_a_projected_distribution_is_that_of_the_papers_loop() -> None:
    """Bellemare et al. 2017, algorithm 1, atom by atom."""
    rng = np.random.default_rng(0)
    num, low, high = 7, -2.0, 4.0
    support = np.linspace(low, high, num)
    p = rng.dirichlet(np.ones(num), 5)
    reward, discount = rng.uniform(-4, 4, 5), np.array([0.9, 0.0, 0.5, 0.99, 0.0])
    expected = np.zeros((5, num))
    for i in range(5):
        for j in range(num):
            b = (np.clip(reward[i] + discount[i] * support[j], low, high) - low) / ((high - low) / (num - 1))
            lower, upper = int(np.floor(b)), int(np.ceil(b))
            if lower == upper:
                expected[i, lower] += p[i, j]
            else:
                expected[i, lower] += p[i, j] * (upper - b)
                expected[i, upper] += p[i, j] * (b - lower)
    found = projected(*(torch.from_numpy(x.astype(np.float32)) for x in (p, support, reward, discount)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-5)


def test_the_distributional_losses_have_torchs_gradients_and_their_own_priorities() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(4, 5, generator=generator, requires_grad=True)
    weight = torch.rand(4, generator=generator)
    wanted = torch.randn(4, 5, generator=generator).softmax(1)
    crossed = -(wanted * predicted.log_softmax(1)).sum(1)
    found = c51_loss(predicted.detach(), wanted, weight)
    torch.testing.assert_close(found.gradient, torch.autograd.grad((weight * crossed).mean(), predicted)[0])
    torch.testing.assert_close(found.priority_M, functional.kl_div(predicted.detach().log_softmax(1), wanted, reduction="none").sum(1))

    target = torch.randn(4, 6, generator=generator) * 2
    slow = []
    for m in range(4):  # Dabney et al. 2018, eq. 10
        total = torch.zeros(())
        for i in range(5):
            tau = (i + 0.5) / 5
            for j in range(6):
                u = target[m, j] - predicted[m, i]
                huber = torch.where(u.abs() <= 1, 0.5 * u**2, u.abs() - 0.5)
                total = total + abs(tau - float(u < 0)) * huber / 6
        slow.append(total)
    row = torch.stack(slow)
    quantile = quantile_loss(predicted.detach(), target, weight)
    torch.testing.assert_close(quantile.priority_M, row.detach())
    torch.testing.assert_close(quantile.gradient, torch.autograd.grad((weight * row).mean(), predicted)[0])


@pytest.mark.parametrize("observation", [VECTOR, IMAGE], ids=["vector", "image"])
@pytest.mark.parametrize("distribution", ["none", "c51", "quantile"])
@pytest.mark.parametrize("duelling", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_the_gradient_of_dqn_is_that_of_the_loss_in_the_papers(
    observation: tuple[LeafSpec, ...], distribution: Any, duelling: bool, double: bool
) -> None:
    spec = spec_of(CHOICES, observation, mask=True)
    config = DQNConfig(
        target_tau=None, distribution=distribution, duelling=duelling, double=double, atoms=5, value_min=-3, value_max=3
    )  # the target stays where it is
    algorithm: DQN = made(config, spec)
    algorithm.target.flat.mul_(1.3)
    rows, online, target = rows_of(spec), algorithm.policy, algorithm.target.module
    caught: Any = Caught(algorithm.optimizer)
    algorithm.optimizer = caught
    _, priority = algorithm.learn(rows, context())

    def values(policy: Any, observed: dict[str, Tensor]) -> Tensor:
        return policy.combine(policy.head(policy.encoder(policy.inputs(observed))))

    with torch.no_grad():
        later = values(target, rows.next_observation)
        chooser = online.mean(values(online, rows.next_observation) if double else later)
        best = chooser.masked_fill(~rows.next_action_mask, -1e9).argmax(1)  # type: ignore[operator]
        nxt = later[torch.arange(M), best]
    q = values(online, rows.observation)[torch.arange(M), rows.action]
    if distribution == "none":
        expected = huber_loss(q, rows.return_M + rows.discount_M * nxt, rows.weight_M)
    elif distribution == "c51":
        expected = c51_loss(q, projected(nxt.softmax(1), online.support, rows.return_M, rows.discount_M), rows.weight_M)
    else:
        expected = quantile_loss(q, rows.return_M[:, None] + rows.discount_M[:, None] * nxt, rows.weight_M)
    caught.matches(expected.loss if distribution != "none" else _huber(q, rows, nxt))
    torch.testing.assert_close(priority, expected.priority_M.detach(), rtol=1e-4, atol=1e-5)


def _huber(q: Tensor, rows: Transitions, nxt: Tensor) -> Tensor:
    return (rows.weight_M * functional.huber_loss(q, rows.return_M + rows.discount_M * nxt, reduction="none")).mean()


def test_the_target_network_follows_at_its_steps_or_by_its_share() -> None:
    spec = spec_of(CHOICES)
    algorithm: DQN = made(DQNConfig(target_tau=None, target_update_steps=3), spec)
    start = algorithm.target.flat.clone()
    for step in range(1, 4):
        algorithm.learn(rows_of(spec, step), context())
        assert torch.equal(algorithm.target.flat, start) == (step < 3)
    assert torch.equal(algorithm.target.flat, algorithm.optimizer.flat)
    soft: DQN = made(DQNConfig(target_tau=0.25), spec)
    start = soft.target.flat.clone()
    soft.learn(rows_of(spec), context())
    torch.testing.assert_close(soft.target.flat, start + 0.25 * (soft.optimizer.flat - start))


def test_epsilon_falls_in_a_line_or_is_a_rung_of_the_ladder() -> None:
    config = DQNConfig(epsilon_initial=1.0, epsilon_final=0.1, epsilon_env_steps=100)
    assert [round(epsilon_annealed(config, steps), 6) for steps in (0, 50, 100, 1000)] == [1.0, 0.55, 0.1, 0.1]
    rungs = [epsilon_ladder(config, group, 4) for group in range(4)]
    assert rungs == pytest.approx([0.4 ** (1 + i / 3 * 7) for i in range(4)])
    assert epsilon_ladder(config, 0, 1) == pytest.approx(0.4)
    assert DQN.epsilon(DQNConfig(epsilon="ladder"), Beginning(3, 4, 10**6, 0)) == pytest.approx(rungs[3])
