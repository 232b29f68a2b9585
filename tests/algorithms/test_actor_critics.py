"""SAC and TD3 against slow oracles: losses in the papers' notation, and gradients that are written out against torch's graph.

Legend: M rows, A actions, K critics.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from shoal.algorithms.sac import SAC, squash, squash_gradient
from shoal.algorithms.td3 import TD3, smoothed
from shoal.config import PolicyConfig, SACConfig, TD3Config
from shoal.types import LeafSpec

from .transitions import BOX, CHOICES, IMAGE, VECTOR, Caught, M, context, made, rows_of, spec_of


def test_the_density_of_a_squashed_action_is_exact_also_where_tanh_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    output, noise = (
        torch.randn(50, 4, generator=generator, dtype=torch.float64),
        torch.randn(50, 2, generator=generator, dtype=torch.float64),
    )
    found = squash(output, noise)
    mean, log_std = output.chunk(2, 1)
    exact = TransformedDistribution(Normal(mean, log_std.clamp(max=2.0).exp()), [TanhTransform()])
    torch.testing.assert_close(found.log_prob, exact.log_prob(found.action).sum(1), rtol=1e-6, atol=1e-6)
    far = squash(torch.tensor([[30.0, 0.0]]), torch.zeros(1, 1))  # 1 - tanh(30)^2 is 0 in float32; its logarithm is 2 log 2 - 60
    assert float(far.log_prob) == pytest.approx(-0.9189385 + 60 - 2 * np.log(2), rel=1e-5)


def test_the_gradient_of_a_squashed_action_is_torchs() -> None:
    generator = torch.Generator().manual_seed(1)
    output = torch.randn(8, 4, generator=generator)
    output[0, 2] = 5.0  # beyond the bound of log_std: no gradient there
    output.requires_grad_()
    noise, d_action, d_log_prob = (torch.randn(shape, generator=generator) for shape in ((8, 2), (8, 2), (8,)))
    mean, log_std = output[:, :2], output[:, 2:].clamp(-20, 2)
    u = mean + log_std.exp() * noise
    log_prob = (Normal(mean, log_std.exp()).log_prob(u) - TanhTransform().log_abs_det_jacobian(u, torch.tanh(u))).sum(1)
    loss = (torch.tanh(u) * d_action).sum() + (log_prob * d_log_prob).sum()
    found = squash_gradient(squash(output.detach(), noise), d_action, d_log_prob)
    torch.testing.assert_close(found, torch.autograd.grad(loss, output)[0], rtol=1e-3, atol=1e-4)


def q_values(critics: Any, policy: Any, observed: dict[str, Tensor], action: Tensor | None) -> Tensor:
    """[K, M, outputs] by torch's graph."""
    features = critics.encoder(policy.inputs(observed))
    value = (features if action is None else torch.cat([features, action], 1)).expand(2, -1, -1)
    for place, (weight, bias) in enumerate(zip(critics.twins.weights, critics.twins.biases, strict=True)):
        value = value @ weight + bias
        value = value if place == len(critics.twins.weights) - 1 else torch.tanh(value)
    return value


@pytest.mark.parametrize("observation", [VECTOR, IMAGE], ids=["vector", "image"])
def test_the_gradients_of_sac_are_those_of_its_losses(observation: tuple[LeafSpec, ...]) -> None:
    spec = spec_of(BOX, observation)
    algorithm: SAC = made(SACConfig(temperature=0.3), spec)
    algorithm.target.flat.mul_(1.2)
    policy, rows = algorithm.policy, rows_of(spec)
    actor, critic = Caught(algorithm.actor_optimizer), Caught(algorithm.critic_optimizer)
    algorithm.actor_optimizer, algorithm.critic_optimizer = actor, critic  # type: ignore[assignment]
    algorithm.learn(rows, context(7))
    noise = torch.from_numpy(np.random.default_rng(7).standard_normal((2 * M, 2), np.float32))

    def drawn(observed: dict[str, Tensor], eps: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = policy.head(policy.encoder(policy.inputs(observed))).chunk(2, 1)
        u = mean + log_std.exp() * eps
        return torch.tanh(u), (Normal(mean, log_std.exp()).log_prob(u) - TanhTransform().log_abs_det_jacobian(u, torch.tanh(u))).sum(1)

    with torch.no_grad():
        action, log_prob = drawn(rows.next_observation, noise[M:])
        nxt = q_values(algorithm.target.module, policy, rows.next_observation, action).squeeze(2).amin(0) - 0.3 * log_prob
        target = rows.return_M + rows.discount_M * nxt
    q = q_values(algorithm.critics, policy, rows.observation, rows.action).squeeze(2)
    critic.matches(0.5 * (rows.weight_M * (q - target) ** 2).mean(1).sum())
    action, log_prob = drawn(rows.observation, noise[:M])
    actor.matches((0.3 * log_prob - q_values(algorithm.critics, policy, rows.observation, action).squeeze(2).amin(0)).mean())


def test_the_gradients_of_discrete_sac_are_those_of_its_losses() -> None:
    spec = spec_of(CHOICES, mask=True)
    algorithm: SAC = made(SACConfig(temperature=0.3), spec)
    algorithm.target.flat.mul_(1.2)
    policy, rows = algorithm.policy, rows_of(spec)
    actor, critic = Caught(algorithm.actor_optimizer), Caught(algorithm.critic_optimizer)
    algorithm.actor_optimizer, algorithm.critic_optimizer = actor, critic  # type: ignore[assignment]
    algorithm.learn(rows, context())

    def probabilities(observed: dict[str, Tensor], mask: Any) -> tuple[Tensor, Tensor]:
        logits = policy.head(policy.encoder(policy.inputs(observed))).masked_fill(~mask, -1e30)
        return logits.softmax(1), logits.log_softmax(1)

    with torch.no_grad():
        p, log_p = probabilities(rows.next_observation, rows.next_action_mask)
        nxt = (p * (q_values(algorithm.target.module, policy, rows.next_observation, None).amin(0) - 0.3 * log_p)).sum(1)
        target = rows.return_M + rows.discount_M * nxt
    q = q_values(algorithm.critics, policy, rows.observation, None)
    critic.matches(0.5 * (rows.weight_M * (q[:, torch.arange(M), rows.action] - target) ** 2).mean(1).sum())
    p, log_p = probabilities(rows.observation, rows.action_mask)
    actor.matches((p * (0.3 * log_p - q.detach().amin(0))).sum(1).mean())


def test_the_temperature_goes_up_where_the_entropy_is_too_low_and_down_where_it_is_too_high() -> None:
    spec = spec_of(BOX)
    for aim, sign in ((50.0, 1), (-50.0, -1)):
        algorithm: SAC = made(SACConfig(target_entropy=aim, learning_rate=0.01), spec)
        before = algorithm.alpha
        algorithm.learn(rows_of(spec), context())
        assert np.sign(algorithm.alpha - before) == sign


def test_the_gradients_of_td3_are_those_of_its_losses_and_the_policy_waits_its_turn() -> None:
    spec = spec_of(BOX)
    algorithm: TD3 = made(TD3Config(policy_delay=2), spec)
    algorithm.target_critics.flat.mul_(1.2)
    policy, rows = algorithm.policy, rows_of(spec)
    algorithm.actor_optimizer.flat.mul_(8.0)  # so that tanh bends
    actor, critic = Caught(algorithm.actor_optimizer), Caught(algorithm.critic_optimizer)
    algorithm.actor_optimizer, algorithm.critic_optimizer = actor, critic  # type: ignore[assignment]
    critic.steps = 1
    algorithm.learn(rows, context(7))
    assert not hasattr(actor, "gradients")
    with torch.no_grad():
        noise = torch.from_numpy(np.random.default_rng(7).standard_normal((M, 2), np.float32))
        target_policy = algorithm.target_policy.module
        raw = torch.tanh(target_policy.head(target_policy.encoder(policy.inputs(rows.next_observation))))
        action = (raw + (0.2 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)
        torch.testing.assert_close(smoothed(raw, noise, 0.2, 0.5), action)
        nxt = q_values(algorithm.target_critics.module, policy, rows.next_observation, action).squeeze(2).amin(0)
    q = q_values(algorithm.critics, policy, rows.observation, rows.action).squeeze(2)
    critic.matches(0.5 * (rows.weight_M * (q - rows.return_M - rows.discount_M * nxt) ** 2).mean(1).sum())
    critic.steps = 2
    algorithm.learn(rows, context(7))
    action = torch.tanh(policy.head(policy.encoder(policy.inputs(rows.observation))))
    actor.matches(-q_values(algorithm.critics, policy, rows.observation, action)[0].mean())


@pytest.mark.parametrize("action", [BOX, CHOICES], ids=["box", "discrete"])
def test_the_target_critics_of_sac_follow_by_their_share(action: LeafSpec) -> None:
    spec = spec_of(action)
    algorithm: SAC = made(SACConfig(target_tau=0.25), spec)
    for step in range(2):
        start = algorithm.target.flat.clone()
        algorithm.learn(rows_of(spec, step), context())
        torch.testing.assert_close(algorithm.target.flat, start + 0.25 * (algorithm.critic_optimizer.flat - start))
        assert not torch.equal(algorithm.target.flat, start)


def test_both_target_networks_of_td3_follow_by_their_share_when_the_policy_learns() -> None:
    spec = spec_of(BOX)
    algorithm: TD3 = made(TD3Config(target_tau=0.25, policy_delay=2), spec)
    pairs = (algorithm.target_critics, algorithm.critic_optimizer), (algorithm.target_policy, algorithm.actor_optimizer)
    for step in range(1, 5):
        before = [(target.flat.clone(), optimizer.flat.clone()) for target, optimizer in pairs]
        algorithm.learn(rows_of(spec, step), context(step))
        for (target, optimizer), (start, learned) in zip(pairs, before, strict=True):
            follows = step % 2 == 0
            if follows:
                torch.testing.assert_close(target.flat, start + 0.25 * (optimizer.flat - start))
            assert torch.equal(target.flat, start) != follows
            assert torch.equal(optimizer.flat, learned) == (optimizer is algorithm.actor_optimizer and not follows)


def test_critics_of_images_have_the_encoder_that_the_policy_was_given() -> None:
    large = (LeafSpec((), "box", "uint8", (40, 40, 1), low=(0.0,), high=(255.0,)),)
    for encoder, features in (("auto", 512), ("compact_cnn", 256)):
        networks = PolicyConfig.model_validate({"hidden_sizes": [8], "encoder": encoder})
        for config in (SACConfig(), TD3Config()):
            algorithm = made(config, spec_of(BOX, large), networks)
            assert algorithm.critics.encoder.num_features == algorithm.policy.encoder.num_features == features
