"""What holds of every off-policy algorithm: its state, numbers that are not finite, a user's own network, and how it acts.

Legend: M rows, A actions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.algorithms import check_actions
from shoal.algorithms.off_policy import Target
from shoal.config import APPOConfig, DQNConfig, PPOConfig, SACConfig, TD3Config
from shoal.errors import ConfigError
from shoal.networks.fast import fast_actor
from shoal.types import LeafSpec

from .transitions import BOX, CHOICES, A, M, Partly, context, made, rows_of, spec_of

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
