"""Losses and networks together learn to give the action that the observation names."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.algorithms import build_algorithm
from shoal.config import AlgorithmConfig, APPOConfig, ImpalaConfig, PolicyConfig, PPOConfig
from shoal.networks.policy import build_policy

from .toy import Identity, spec_of, train

ALGORITHMS: dict[str, AlgorithmConfig] = {
    "ppo": PPOConfig(learning_rate=2e-3, minibatch_size=64, gamma=0.5),
    "appo": APPOConfig(learning_rate=2e-3, minibatch_size=64, gamma=0.5),
    "impala": ImpalaConfig(learning_rate=2e-3, minibatch_size=32, normalise_advantage=True, gamma=0.5, entropy_coefficient=0.01),
}


# Without an engine, on-policy: quick to run while an algorithm is changed. tests/learning has the whole matrix, through the engine.
SAMPLE = [
    ("box", "discrete", "ppo"),
    ("box_matrix_float64", "multi_discrete", "impala"),
    ("image", "discrete", "appo"),  # images and continuous actions together take long: `make soak`
    ("discrete", "box", "appo"),
    ("multi_discrete", "multi_discrete", "ppo"),
    ("multi_binary", "multi_binary", "impala"),
]


def learn(observation: str, action: str, algorithm: str, policy_config: PolicyConfig, *, mixed: bool = False) -> float:
    policy = build_policy(spec_of(observation, action), policy_config, seed=1)
    policy.compute(mixed=mixed)
    config = ALGORITHMS[algorithm]
    if action == "box":
        config = config.model_copy(update={"learning_rate": 1e-3, "entropy_coefficient": 0.0})
    if "image" in observation or observation == "dict":
        config = config.model_copy(update={"learning_rate": 5e-4})
    world = Identity(observation, action, 16, np.random.default_rng(1))
    train(world, build_algorithm(policy, config), 400, 20, lambda: world.score(policy) >= 0.96)
    return world.score(policy)


@pytest.mark.parametrize(("observation", "action", "algorithm"), SAMPLE)
def test_learns_the_action_that_the_observation_names(observation: str, action: str, algorithm: str) -> None:
    assert learn(observation, action, algorithm, PolicyConfig(log_std_init=-1.0)) >= 0.95


def test_learns_with_state_dependent_exploration() -> None:
    assert learn("box", "box", "ppo", PolicyConfig(exploration="gsde", log_std_init=-2.0)) >= 0.95


def test_learns_with_a_shared_encoder() -> None:
    assert learn("multi_binary", "multi_discrete", "ppo", PolicyConfig(share_encoder=True, activation="relu")) >= 0.95


def test_learns_in_bfloat16() -> None:
    assert learn("multi_binary", "multi_discrete", "ppo", PolicyConfig(), mixed=True) >= 0.95
    assert learn("box", "discrete", "impala", PolicyConfig(), mixed=True) >= 0.95
