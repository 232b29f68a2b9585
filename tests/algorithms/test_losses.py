"""The losses by hand, and each update against its paper written out with torch's own optimizer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from shoal.algorithms import Algorithm, UpdateContext, base, build_algorithm, load_algorithm
from shoal.algorithms.appo import APPO
from shoal.algorithms.base import cut_TN, discount_TN
from shoal.algorithms.impala import IMPALA, impala_loss
from shoal.algorithms.ppo import PPO, clipped_policy_loss, value_loss
from shoal.config import AlgorithmConfig, APPOConfig, CustomConfig, ImpalaConfig, PolicyConfig, PPOConfig
from shoal.errors import ConfigError
from shoal.networks.policy import Policy, build_policy, named_tensors, weights_sha256
from shoal.ops.gae import gae
from shoal.ops.vtrace import vtrace

from .test_base import policy, random_batch

CONFIGS: list[AlgorithmConfig] = [
    PPOConfig(minibatch_size=5, entropy_coefficient=0.01, learning_rate=1e-2),
    APPOConfig(minibatch_size=5, entropy_coefficient=0.01, learning_rate=1e-2),
    ImpalaConfig(entropy_coefficient=0.01, learning_rate=1e-2),
]


def context(seed: int = 0, progress: float = 0.0) -> UpdateContext:
    return UpdateContext(update=0, progress=progress, rng=np.random.default_rng(seed))


def test_the_clipped_objective_by_hand() -> None:
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    advantage = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0])
    log_prob = ratio.log().requires_grad_()
    loss, d_log_prob, approx_kl, clip_fraction = clipped_policy_loss(log_prob, torch.zeros(5), advantage, 0.25)
    assert loss.item() == pytest.approx(-(1.0 + 1.25 - 1.5 + 0.5 - 0.75) / 5)
    assert clip_fraction.item() == pytest.approx(0.8)
    assert approx_kl.item() == pytest.approx((ratio - 1 - ratio.log()).mean().item())
    loss.backward()
    # no gradient where the clip is what counts: beyond it, in the direction of the advantage
    torch.testing.assert_close(log_prob.grad, -torch.tensor([1.0, 0.0, -1.5, 0.5, 0.0]) / 5)
    torch.testing.assert_close(d_log_prob, log_prob.grad)


def test_value_loss_by_hand() -> None:
    value, old, target = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([4.0, 1.0])
    assert value_loss(value, old, target, None)[0].item() == 1.0
    # clipped to 1.5: (1.5 - 4)^2 is worse than (3 - 4)^2
    assert value_loss(value, old, target, 0.5)[0].item() == (6.25 + 1.0) / 2
    assert value_loss(value, old, torch.tensor([1.0, 1.0]), 0.5)[0].item() == (4.0 + 1.0) / 2


def test_a_value_within_its_clip_range_keeps_its_derivative_where_the_sum_is_rounded() -> None:
    value, old, target = torch.tensor([3.3]), torch.tensor([10.0]), torch.tensor([3.0])
    assert old + (value - old) > value  # one unit of the last place
    assert value_loss(value, old, target, 7.0)[1].item() == pytest.approx(0.6)


@pytest.mark.parametrize("clip_range_value", [None, 0.3])
def test_derivatives_of_losses_equal_those_of_the_graph(clip_range_value: float | None) -> None:
    rng = torch.Generator().manual_seed(3)
    old, target, old_log_prob, advantage = (torch.randn(400, generator=rng) for _ in range(4))
    value = (old + 0.5 * torch.randn(400, generator=rng)).requires_grad_()
    log_prob = (old_log_prob + 0.5 * torch.randn(400, generator=rng)).requires_grad_()
    loss, d_value = value_loss(value, old, target, clip_range_value)
    torch.testing.assert_close(d_value, torch.autograd.grad(loss, value)[0])
    actor = clipped_policy_loss(log_prob, old_log_prob, advantage, 0.2)
    torch.testing.assert_close(actor.d_log_prob, torch.autograd.grad(actor.policy_gradient_loss, log_prob)[0])


class Given:
    """An evaluation whose parts are what the test says, with gradient."""

    def __init__(self, log_prob: list[float], entropy: list[float], value: list[float]) -> None:
        self.log_prob, self.entropy, self.value = (torch.tensor(x).requires_grad_() for x in (log_prob, entropy, value))

    def gradients(self, *_: object) -> list[torch.Tensor]:
        raise NotImplementedError


def test_the_policy_gradient_by_hand() -> None:
    given, config = (
        Given([-1.0, -2.0, -9.0], [0.5, 0.7, 9.0], [1.0, 3.0, 9.0]),
        ImpalaConfig(value_coefficient=0.5, entropy_coefficient=0.1),
    )
    weight = torch.tensor([0.5, 0.5, 0.0])  # the last row is left out
    loss = impala_loss(given, torch.tensor([2.0, 3.0, 9.0]), torch.tensor([0.0, 1.0, 0.0]), weight, config)
    assert loss.policy_gradient_loss.item() == 4.0
    assert loss.value_loss.item() == 2.5
    assert loss.entropy_loss.item() == pytest.approx(-0.6)
    total = loss.policy_gradient_loss + 0.5 * loss.value_loss + 0.1 * loss.entropy_loss
    slopes = torch.autograd.grad(total, [given.log_prob, given.entropy, given.value])
    for found, expected in zip((loss.d_log_prob, loss.d_entropy, loss.d_value), slopes, strict=True):
        torch.testing.assert_close(found, expected)


def reference_step(model: Policy, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


@pytest.mark.parametrize("masked", [False, True])
def test_one_ppo_step_equals_the_paper_written_out(masked: bool) -> None:
    batch, ours, theirs = random_batch(2, masked=masked), policy(), policy()
    config = PPOConfig(
        epochs=1,
        minibatch_size=100,
        learning_rate=1e-2,
        entropy_coefficient=0.03,
        normalise_advantage=False,
        clip_range_value=0.1,
        gae_lambda=0.8,
    )
    PPO(ours, config).update(batch, context())
    values = torch.stack([theirs.value({"observation": row}) for row in batch.observation["observation"]]).detach()
    final = theirs.value(batch.final_observation).detach()
    advantage, target = gae(
        values[:-1], batch.next_value_TN(values, final), batch.reward_TN, discount_TN(batch, 0.99), cut_TN(batch), lambda_=0.8
    )
    valid = batch.valid_TN
    mask = None if batch.action_mask is None else batch.action_mask[:-1][valid]
    distribution, value = theirs.distribution_and_value({"observation": batch.observation["observation"][:-1][valid]}, mask)
    ratio = (distribution.log_prob(batch.action[valid]) - batch.log_prob_TN[valid]).exp()
    objective = torch.min(ratio * advantage[valid], ratio.clamp(0.8, 1.2) * advantage[valid]).mean()
    near = values[:-1][valid] + (value - values[:-1][valid]).clamp(-0.1, 0.1)
    error = torch.max((value - target[valid]) ** 2, (near - target[valid]) ** 2).mean()
    loss = -objective + 0.5 * error - 0.03 * distribution.entropy().mean()
    reference_step(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-2, eps=1e-5), loss)
    for name, tensor in named_tensors(ours).items():
        torch.testing.assert_close(tensor, named_tensors(theirs)[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("kind", ["impala", "appo"])
def test_one_off_policy_step_equals_the_paper_written_out(kind: str, corrected: bool) -> None:
    batch, ours, theirs = random_batch(5), policy(), policy()
    settings = {
        "learning_rate": 1e-2,
        "entropy_coefficient": 0.03,
        "vtrace": corrected,
        "vtrace_lambda": 0.9,
        "clip_rho": 1.2,
        "clip_c": 0.8,
    }
    if kind == "impala":
        IMPALA(ours, ImpalaConfig(**settings)).update(batch, context())
    else:
        APPO(ours, APPOConfig(**settings, epochs=1, minibatch_size=100, normalise_advantage=False)).update(batch, context())
    rows = batch.observation["observation"]
    values = torch.stack([theirs.value({"observation": row}) for row in rows])
    log_prob = torch.stack([theirs.distribution({"observation": row}).log_prob(a) for row, a in zip(rows[:-1], batch.action, strict=True)])
    entropy = torch.stack([theirs.distribution({"observation": row}).entropy() for row in rows[:-1]])
    final = theirs.value(batch.final_observation).detach()
    log_rho = log_prob.detach() - batch.log_prob_TN
    target, advantage = vtrace(
        values[:-1].detach(),
        batch.next_value_TN(values.detach(), final),
        batch.reward_TN,
        discount_TN(batch, 0.99),
        cut_TN(batch),
        log_rho if corrected else 0 * log_rho,
        clip_rho=1.2,
        clip_c=0.8,
        lambda_=0.9,
    )
    valid = batch.valid_TN
    policy_objective = log_prob * advantage
    if kind == "appo":
        ratio = (log_prob - batch.log_prob_TN).exp()
        plain = advantage / log_rho.exp().clamp(max=1.2) if corrected else advantage  # r + gamma v_{t+1} - V, the ratio is the correction
        policy_objective = torch.min(ratio * plain, ratio.clamp(0.8, 1.2) * plain)
    loss = -policy_objective[valid].mean() + 0.5 * (values[:-1] - target)[valid].square().mean() - 0.03 * entropy[valid].mean()
    reference_step(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-2, eps=1e-5), loss)
    for name, tensor in named_tensors(ours).items():
        torch.testing.assert_close(tensor, named_tensors(theirs)[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_same_batch_and_context_give_the_same_bits(config: AlgorithmConfig) -> None:
    hashes = []
    for noise in range(2):
        torch.manual_seed(noise)
        np.random.seed(noise)
        model = policy()
        algorithm = build_algorithm(model, config)
        for update in range(3):
            algorithm.update(random_batch(update), context(update))
        hashes.append(weights_sha256(model))
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_rows_that_are_no_steps_do_not_train(config: AlgorithmConfig) -> None:
    hashes = []
    for junk in (0.0, 7.0):
        model, batch = policy(), random_batch(3)
        batch.reward_TN[~batch.valid_TN] += junk
        batch.log_prob_TN[~batch.valid_TN] += junk
        beyond = torch.zeros(7, 3, dtype=torch.bool)
        beyond[2:] = ~batch.valid_TN[1:]  # the row behind the last valid one bootstraps it
        batch.observation["observation"][beyond] += junk
        build_algorithm(model, config).update(batch, context())
        hashes.append(weights_sha256(model))
    assert hashes[0] == hashes[1]
    assert hashes[0] != weights_sha256(policy())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_resumed_algorithm_goes_on_with_the_same_bits(config: AlgorithmConfig) -> None:
    straight = policy()
    algorithm = build_algorithm(straight, config)
    algorithm.update(random_batch(1), context(1))
    resumed, state = copy.deepcopy(straight), algorithm.get_state()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    again = build_algorithm(resumed, config)
    again.set_state(state)
    for one in (algorithm, again):
        one.update(random_batch(2), context(2))
    assert weights_sha256(straight) == weights_sha256(resumed) != weights_sha256(policy())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_metrics_are_finite_and_named_as_in_stable_baselines3(config: AlgorithmConfig) -> None:
    metrics = build_algorithm(policy(), config).update(random_batch(1), context())
    expected = {"policy_gradient_loss", "value_loss", "entropy_loss", "loss", "approx_kl", "explained_variance", "learning_rate"}
    expected |= {"grad_norm", "optimizer_steps", "skipped_steps"}
    expected |= set() if config.name == "impala" else {"clip_range", "clip_fraction"}
    assert expected <= set(metrics)
    assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values())
    assert metrics["skipped_steps"] == 0.0
    assert metrics["entropy_loss"] == pytest.approx(-np.log(9), abs=0.1)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_poisoned_rewards_are_refused_and_reported(config: AlgorithmConfig) -> None:
    model, batch = policy(), random_batch(1)
    batch.reward_TN[0] = torch.nan
    metrics = build_algorithm(model, config).update(batch, context())
    assert metrics["skipped_steps"] > 0
    assert all(torch.isfinite(tensor).all() for tensor in named_tensors(model).values())


def test_schedules_reach_zero() -> None:
    config = PPOConfig(learning_rate_schedule="linear", clip_range_schedule="linear", learning_rate=1e-2)
    model = policy()
    assert PPO(model, config).update(random_batch(1), context(progress=0.5))["learning_rate"] == 5e-3
    before = weights_sha256(model)
    metrics = PPO(model, config).update(random_batch(1), context(progress=1.0))
    assert (metrics["learning_rate"], metrics["clip_range"]) == (0.0, 0.0)
    assert weights_sha256(model) == before


def test_epochs_stop_once_the_policy_has_moved_too_far() -> None:
    batch = random_batch(1)
    full = PPO(policy(), PPOConfig(epochs=3, minibatch_size=6)).update(batch, context())
    steps = 3 * int(np.ceil(int(batch.valid_TN.sum()) / 6))
    assert (full["epochs"], full["optimizer_steps"]) == (3.0, steps)
    model = policy()
    stopped = PPO(model, PPOConfig(epochs=3, minibatch_size=6, target_kl=1e-9)).update(batch, context())
    assert (stopped["epochs"], stopped["optimizer_steps"]) == (1.0, 0.0)
    assert weights_sha256(model) == weights_sha256(policy())


def test_short_columns_in_numpy_give_what_tensors_give(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PPOConfig(epochs=2, minibatch_size=6, entropy_coefficient=0.01, clip_range_value=0.1, target_kl=10.0)
    batch, short, long = random_batch(1), policy(), policy()
    found = PPO(short, config).update(batch, context())
    monkeypatch.setattr(base, "LIGHT_ROWS", 0)
    expected = PPO(long, config).update(batch, context())
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for name, tensor in named_tensors(short).items():
        torch.testing.assert_close(tensor, named_tensors(long)[name], rtol=1e-3, atol=1e-5)


def test_without_lag_appo_is_ppo() -> None:
    batch, ppo, appo = random_batch(1), policy(), policy()
    with torch.no_grad():
        for t, row in enumerate(batch.observation["observation"][:-1]):
            batch.log_prob_TN[t] = ppo.distribution({"observation": row}).log_prob(batch.action[t])
    PPO(ppo, PPOConfig(minibatch_size=5, gae_lambda=0.9)).update(batch, context())
    APPO(appo, APPOConfig(minibatch_size=5, vtrace_lambda=0.9)).update(batch, context())
    for name, tensor in named_tensors(ppo).items():
        torch.testing.assert_close(tensor, named_tensors(appo)[name], rtol=1e-3, atol=1e-4)


def test_rmsprop_is_another_optimizer() -> None:
    first, second = policy(), policy()
    IMPALA(first, ImpalaConfig()).update(random_batch(1), context())
    IMPALA(second, ImpalaConfig(optimizer="rmsprop")).update(random_batch(1), context())
    assert weights_sha256(first) != weights_sha256(second)


def test_algorithms_are_found_by_name_and_say_their_modes() -> None:
    assert [load_algorithm(name) for name in ("ppo", "impala", "appo")] == [PPO, IMPALA, APPO]
    assert (PPO.modes, IMPALA.modes, APPO.modes) == (("sync",), ("async", "sync"), ("async", "sync"))
    with pytest.raises(ConfigError, match=r"algorithm.name: no algorithm 'sarsa'; expected ppo, impala, appo"):
        load_algorithm("sarsa")


OWN = """
from shoal.algorithms.base import Algorithm, minibatches
from shoal.config import AlgorithmConfig

class ReinforceConfig(AlgorithmConfig):
    baseline: float = 0.0

class Reinforce(Algorithm[ReinforceConfig]):
    Config = ReinforceConfig

    def update(self, batch, context):
        for rows in minibatches(batch, None, context.rng, reward=batch.reward_TN):
            log_prob = self.policy.distribution(rows.observation, rows.action_mask).log_prob(rows.action)
            loss = -(log_prob * (rows["reward"] - self.config.baseline)).mean()
            self.optimizer.step(loss, self.config.learning_rate)
        return {"loss": loss.item()}

class Half:
    modes = ("sync",)
"""


def test_an_algorithm_of_ones_own_by_path(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "own.py").write_text(OWN)
    path = f"{tmp_path / 'own.py'}:Reinforce"
    model = policy()
    algorithm = build_algorithm(model, CustomConfig(name=path, baseline=0.5))  # type: ignore[call-arg]
    assert algorithm.config.baseline == 0.5
    before = weights_sha256(model)
    assert np.isfinite(algorithm.update(random_batch(1), context())["loss"])
    assert weights_sha256(model) != before
    assert "optimizer/first" in algorithm.get_state()
    with pytest.raises(ConfigError, match=r"algorithm.bas: Extra inputs are not permitted"):
        build_algorithm(model, CustomConfig(name=path, bas=1))  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"is a class without Config, update, get_state, set_state"):
        load_algorithm(f"{tmp_path / 'own.py'}:Half")
    with pytest.raises(ConfigError, match=r"is a str"):
        load_algorithm(f"{tmp_path / 'own.py'}:__name__")


CHECKED = """
from pydantic import model_validator
from shoal.algorithms.base import Algorithm
from shoal.config import AlgorithmConfig

class Bounds(AlgorithmConfig):
    low: float
    high: float = 1.0

    @model_validator(mode="after")
    def _in_order(self):
        if self.low >= self.high:
            raise ValueError("low is not below high")
        return self

class Bounded(Algorithm[Bounds]):
    Config = Bounds
"""


def test_settings_of_an_algorithm_of_ones_own_are_refused_in_the_words_of_the_others(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "checked.py").write_text(CHECKED)
    path = f"{tmp_path / 'checked.py'}:Bounded"
    for settings, message in (
        ({"low": 2}, "algorithm: low is not below high"),
        ({}, "algorithm.low: is to be given, since it has no default"),
        ({"low": "x"}, "algorithm.low: should be a number, got 'x'"),
    ):
        with pytest.raises(ConfigError) as caught:
            build_algorithm(policy(), CustomConfig(name=path, **settings))  # type: ignore[arg-type]
        assert str(caught.value) == f"{message} (settings of {path})"


def test_one_that_learns_from_a_replay_without_being_a_subclass_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rest = "  def learn(self, rows, context): ...\n  def get_state(self): ...\n  def set_state(self, state): ...\n"
    head = "from shoal.config import OffPolicyConfig\nfrom shoal.algorithms import OffPolicyAlgorithm\n"
    own = tmp_path / "replayed.py"
    own.write_text(f"{head}class Alone:\n  Config, modes = OffPolicyConfig, ('sync',)\n{rest}class Both(Alone, OffPolicyAlgorithm): pass\n")
    with pytest.raises(
        ConfigError, match=r"Alone is a class without update; expected .* a subclass of shoal.algorithms.OffPolicyAlgorithm"
    ):
        load_algorithm(f"{own}:Alone")
    assert load_algorithm(f"{own}:Both").__name__ == "Both"


def test_an_algorithm_without_update_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"Algorithm.update"):
        Algorithm(policy(), PPOConfig()).update(random_batch(1), context())


def test_images_and_masks_go_through_an_update() -> None:
    from . import toy

    model = build_policy(toy.spec_of("dict", "multi_discrete"), PolicyConfig())
    world = toy.Identity("dict", "multi_discrete", 4, np.random.default_rng(1))
    batch = world.rollout(model, 5)
    batch.action_mask = torch.ones(6, 4, 6, dtype=torch.bool)
    batch.action_mask[-1] = False
    for config in CONFIGS:
        metrics = build_algorithm(model, config).update(batch, context())
        assert metrics["skipped_steps"] == 0.0
