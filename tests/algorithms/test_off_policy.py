"""Off-policy algorithms against slow oracles: losses in the papers' notation, and every gradient that is written out against torch's graph.

Legend: M rows, A actions, Z atoms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform
from torch.nn import Linear, Module, functional

from shoal.algorithms import UpdateContext, check_actions, load_algorithm
from shoal.algorithms.dqn import DQN, c51_loss, epsilon_annealed, epsilon_ladder, huber_loss, projected, quantile_loss
from shoal.algorithms.off_policy import Beginning, Target, Transitions
from shoal.algorithms.sac import SAC, squash, squash_gradient
from shoal.algorithms.td3 import TD3, smoothed
from shoal.config import APPOConfig, DQNConfig, OffPolicyConfig, PolicyConfig, PPOConfig, SACConfig, TD3Config
from shoal.errors import ConfigError
from shoal.networks.fast import fast_actor
from shoal.networks.policy import build_acting
from shoal.types import EnvironmentSpec, LeafSpec

M, A = 6, 3
VECTOR = (LeafSpec((), "box", "float32", (4,), low=(-1.0,), high=(1.0,)),)
IMAGE = (LeafSpec((), "box", "uint8", (6, 6, 1), low=(0.0,), high=(255.0,)),)
CHOICES = LeafSpec((), "discrete", "int64", (), nvec=(A,), start=(0,))
BOX = LeafSpec((), "box", "float32", (2,), low=(-2.0,), high=(2.0,))
NETWORKS = PolicyConfig(hidden_sizes=[8, 8], activation="tanh")


def spec_of(action: LeafSpec, observation: tuple[LeafSpec, ...] = VECTOR, *, mask: bool = False) -> EnvironmentSpec:
    return EnvironmentSpec("toy", observation, action, "info" if mask else "none", A if mask else 0)


def rows_of(spec: EnvironmentSpec, seed: int = 0, num: int = M) -> Transitions:
    rng = np.random.default_rng(seed)

    def observation() -> dict[str, Tensor]:
        if spec.observation == IMAGE:
            return {"observation": torch.from_numpy(rng.integers(0, 256, (num, 6, 6, 1)).astype(np.uint8))}
        return {"observation": torch.from_numpy(rng.standard_normal((num, 4)).astype(np.float32))}

    def numbers(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, num).astype(np.float32))

    def mask() -> Tensor | None:
        allowed = rng.random((num, A)) < 0.6
        allowed[:, 1] = True
        return torch.from_numpy(allowed) if spec.mask_size else None

    discrete = spec.action.kind == "discrete"
    action = rng.integers(0, A, num) if discrete else rng.uniform(-1, 1, (num, 2)).astype(np.float32)
    return Transitions(
        observation(), mask(), torch.from_numpy(action), numbers(-3, 3), numbers(0, 1), observation(), mask(), numbers(0.1, 1)
    )  # fmt: skip


class Partly(Module):
    """A user's own network: one layer of it is frozen, and a buffer counts the calls that were learned from, and weighs in."""

    calls: Tensor

    def __init__(self, spec: EnvironmentSpec, config: PolicyConfig) -> None:
        super().__init__()
        self.frozen, self.layer, self.num_features = Linear(4, 8), Linear(8, 8), 8
        self.frozen.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, prepared: dict[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            self.calls += 1
        return torch.tanh(self.layer(torch.tanh(self.frozen(prepared["observation"])))) * (1 + self.calls / 10)


def made(config: OffPolicyConfig, spec: EnvironmentSpec, networks: PolicyConfig = NETWORKS, network: Any = None) -> Any:
    algorithm: Any = load_algorithm(config.name)
    policy = build_acting(spec, networks, network, seed=1, kind=algorithm.network(config))
    return algorithm.make(policy, config, spec, networks, 2)


def context(seed: int = 0) -> UpdateContext:
    return UpdateContext(0, 0.0, np.random.default_rng(seed))


class Caught:
    """In an optimizer's place: keeps the gradients, and changes nothing."""

    def __init__(self, optimizer: Any) -> None:
        self.parameters, self.flat, self.steps, self.skipped = optimizer.parameters, optimizer.flat, 1, 0

    def descend(self, gradients: Any, learning_rate: float, loss: Tensor, share: float | None = None) -> float:
        self.gradients, self.loss = [g.clone() for g in gradients], loss
        return 0.0

    def matches(self, loss: Tensor) -> None:
        expected = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        assert float(self.loss) == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
        assert any(float(e.abs().max()) > 0 for e in expected)
        for mine, theirs in zip(self.gradients, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


# ---- DQN -------------------------------------------------------------------------------------------------------------
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


# ---- SAC and TD3 -----------------------------------------------------------------------------------------------------
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


# ---- all -------------------------------------------------------------------------------------------------------------
CONFIGS = {
    "dqn": (DQNConfig(target_tau=None, target_update_steps=2), CHOICES),
    "c51": (DQNConfig(distribution="c51", target_tau=0.1), CHOICES),
    "sac": (SACConfig(), BOX),
    "discrete sac": (SACConfig(), CHOICES),
    "td3": (TD3Config(), BOX),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_algorithm_that_was_saved_goes_on_with_the_same_bits(name: str) -> None:
    config, action = CONFIGS[name]
    spec = spec_of(action)
    first = made(config, spec)
    for step in range(3):
        first.learn(rows_of(spec, step), context(step))
    second = made(config, spec)
    second.policy.load_state_dict(first.policy.state_dict())
    second.set_state({key: value.clone() for key, value in first.get_state().items()})
    for algorithm in (first, second):
        for step in range(3, 6):
            algorithm.learn(rows_of(spec, step), context(step))
    assert all(torch.equal(a, b) for a, b in zip(first.policy.state_dict().values(), second.policy.state_dict().values(), strict=True))
    assert {k: v.tolist() for k, v in first.get_state().items()} == {k: v.tolist() for k, v in second.get_state().items()}
    assert first.steps == (6, 0)


def test_the_state_of_an_algorithm_has_the_names_that_checkpoints_have() -> None:
    adam = {f"optimizer/{name}" for name in ("first", "second", "steps", "skipped")}
    both = {f"{who}/{name}" for who in ("actor", "critics") for name in adam}
    wanted = {
        "dqn": adam | {"target"},
        "sac": both | {f"temperature/{name}" for name in adam} | {"critics/flat", "temperature/flat", "target"},
        "td3": both | {"critics/flat", "target/critics", "target/policy"},
    }
    for name, names in wanted.items():
        config, action = CONFIGS[name]
        assert set(made(config, spec_of(action)).get_state()) == names


def test_a_state_that_was_taken_does_not_change_with_the_next_step() -> None:
    for config, action in CONFIGS.values():
        algorithm = made(config, spec_of(action))
        state = algorithm.get_state()
        before = {name: value.tolist() for name, value in state.items()}
        algorithm.learn(rows_of(spec_of(action)), context())
        algorithm.learn(rows_of(spec_of(action)), context())
        assert {name: value.tolist() for name, value in state.items()} == before
        changed = {name for name, value in algorithm.get_state().items() if value.tolist() != before[name]}
        assert changed == set(state) - {name for name in state if name.endswith("/skipped")}
        assert algorithm.steps == (2, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_that_are_not_finite_are_refused_and_change_nothing(name: str) -> None:
    config, action = CONFIGS[name]
    spec = spec_of(action)
    algorithm = made(config, spec)
    rows = rows_of(spec)
    rows.return_M[2] = np.nan
    good = 0 if config.name == "dqn" else 2  # td3: at its turn to train the policy
    for step in range(good):
        algorithm.learn(rows_of(spec, step), context(step))
    before = everything(algorithm)
    for step in range(1, 4):
        metrics, _ = algorithm.learn(rows, context())
        assert algorithm.steps == (good, step)
        assert not np.isfinite(float(metrics.get("critic_loss", metrics.get("loss"))))
    after = everything(algorithm)
    assert {key for key, value in before.items() if not torch.equal(value, after[key])} == set()


def everything(algorithm: Any) -> dict[str, Tensor]:
    """All that an algorithm is, but for how many steps were refused."""
    state = {**{f"policy/{key}": value for key, value in algorithm.policy.state_dict().items()}, **algorithm.get_state()}
    return {key: value.clone() for key, value in state.items() if not key.endswith("optimizer/skipped")}


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_steps_of_the_policy_that_are_refused_are_counted(name: str) -> None:
    config, action = CONFIGS[name]
    spec = spec_of(action)
    algorithm = made(config.model_copy(update={"policy_delay": 1}) if name == "td3" else config, spec)
    algorithm.critics.action_gradient = lambda *given: torch.full((M, 2), torch.nan)
    before = algorithm.actor_optimizer.flat.clone()
    algorithm.learn(rows_of(spec), context())
    assert algorithm.steps == (1, 1)
    assert torch.equal(algorithm.actor_optimizer.flat, before)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_that_is_frozen_in_part_is_trained_and_its_buffers_are_followed_and_saved(name: str) -> None:
    config, action = CONFIGS[name]
    spec = spec_of(action)
    first, second = (made(config, spec, network=Partly) for _ in range(2))
    before = {key: value.clone() for key, value in first.policy.encoder.state_dict().items()}
    for step in range(3):
        first.learn(rows_of(spec, step), context(step))
    after = first.policy.encoder.state_dict()
    assert first.steps == (3, 0)
    assert {key for key in before if torch.equal(before[key], after[key])} == {"frozen.weight", "frozen.bias"}
    (follower,) = followers(first) if config.name != "sac" else [first.policy.encoder]  # the critics' targets have none of it
    assert 0 < follower.calls <= first.policy.encoder.calls
    second.policy.load_state_dict(first.policy.state_dict())
    second.set_state({key: value.clone() for key, value in first.get_state().items()})
    for each, same in zip(followers(first), followers(second), strict=True):
        assert torch.equal(each.calls, same.calls)
    for algorithm in (first, second):
        for step in range(3, 6):
            algorithm.learn(rows_of(spec, step), context(step))
    one, other = everything(first), everything(second)
    assert {key for key, value in one.items() if not torch.equal(value, other[key])} == set()


def followers(algorithm: Any) -> list[Partly]:
    """The user's network in target networks."""
    targets = [each.module for each in vars(algorithm).values() if isinstance(each, Target)]
    return [module.encoder for module in targets if isinstance(module.encoder, Partly)]


def test_an_action_space_that_an_algorithm_cannot_serve_is_refused_with_those_that_can() -> None:
    bits = LeafSpec((), "multi_binary", "int8", (3,))
    unbounded = LeafSpec((), "box", "float32", (1,), low=(-np.inf,), high=(np.inf,))
    for config, action, able in (
        (DQNConfig(), BOX, "ppo, impala, appo, sac, td3 can"),
        (TD3Config(), CHOICES, "ppo, impala, appo, dqn, r2d2, sac can"),
        (SACConfig(), bits, "ppo, impala, appo can"),
        (SACConfig(), unbounded, "ppo, impala, appo can"),
    ):
        with pytest.raises(ConfigError, match=f"algorithm: {config.name} chooses among .*{able}"):
            check_actions(config, action)
    for on_policy in (PPOConfig(), APPOConfig()):
        check_actions(on_policy, unbounded)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["dqn", "sac", "td3"])
def test_fast_acting_chooses_what_the_policy_does(name: str, masked: bool) -> None:
    config, action = CONFIGS[name]
    if masked and action is BOX:
        return
    spec = spec_of(action, mask=masked)
    policy = made(config, spec).policy
    if name == "td3":
        policy.exploration_noise = 0.4
    fast = fast_actor(policy, M)
    assert fast is not None
    rows = rows_of(spec)
    for epsilon in (0.0, 0.5, 1.0):
        noise = policy.noise.draw((M,), np.random.default_rng(3), epsilon)
        with torch.inference_mode():
            slow, none = policy.act(rows.observation, torch.from_numpy(noise), rows.action_mask)
        mask = None if rows.action_mask is None else rows.action_mask.numpy()
        found, _, _ = fast.step({"observation": rows.observation["observation"].numpy()}, {}, noise, mask)
        np.testing.assert_allclose(found, slow.numpy(), rtol=1e-4, atol=1e-5)
        assert none is None
        if mask is not None:
            assert mask[np.arange(M), found].all()


@pytest.mark.parametrize("name", ["dqn", "sac", "td3"])
def test_a_state_passes_through_a_policy_without_memory(name: str) -> None:
    config, action = CONFIGS[name]
    spec = spec_of(action)
    policy, rows = made(config, spec).policy, rows_of(spec)
    noise, state = torch.from_numpy(policy.noise.draw((M,), np.random.default_rng(3), 0.5)), {"kept": torch.ones(M)}
    with torch.inference_mode():
        chosen, log_prob, after = policy.step(rows.observation, state, noise, rows.action_mask)
        best, same = policy.greedy_step(rows.observation, state, rows.action_mask)
        assert torch.equal(chosen, policy.act(rows.observation, noise, rows.action_mask)[0])
        assert torch.equal(best, policy.greedy(rows.observation, rows.action_mask))
    assert log_prob is None
    assert after == same == state
    assert not torch.equal(chosen, best)


def test_actions_at_random_are_as_many_as_epsilon_says_and_uniform() -> None:
    num = 20_000
    policy = made(DQNConfig(), spec_of(CHOICES)).policy
    noise = torch.from_numpy(policy.noise.draw((num,), np.random.default_rng(0), 0.3))
    observation = {"observation": torch.zeros(num, 4)}
    with torch.inference_mode():
        greedy, acted = policy.greedy(observation), policy.act(observation, noise)[0]
    others = float((acted != greedy).float().mean())
    assert others == pytest.approx(0.3 * (A - 1) / A, abs=0.01)
    box = made(SACConfig(), spec_of(BOX)).policy
    noise = torch.from_numpy(box.noise.draw((num,), np.random.default_rng(0), 1.0))
    with torch.inference_mode():
        drawn = box.act(observation, noise)[0]
    counts = np.histogram(drawn[:, 0].numpy(), 8, (-1, 1))[0] / num
    np.testing.assert_allclose(counts, 1 / 8, atol=0.01)


def test_without_an_epsilon_nothing_is_done_at_random() -> None:
    policy = made(DQNConfig(), spec_of(CHOICES)).policy
    rows = rows_of(spec_of(CHOICES), num=200)
    noise = torch.from_numpy(policy.noise.draw((200,), np.random.default_rng(0)))
    with torch.inference_mode():
        assert torch.equal(policy.act(rows.observation, noise)[0], policy.greedy(rows.observation))
