"""Every off-policy algorithm learns a toy world where the observation names the action that is rewarded, from actions chosen at random.

Legend: M rows of a sample.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from shoal.algorithms import UpdateContext, load_algorithm
from shoal.algorithms.off_policy import Transitions
from shoal.config import DQNConfig, OffPolicyConfig, PolicyConfig, SACConfig, TD3Config
from shoal.networks.policy import build_acting

from .toy import CHOICES, COMPONENTS, correct, observe, spec_of

M = 128
NETWORKS = PolicyConfig(hidden_sizes=[64, 64], activation="relu")
ALGORITHMS: dict[str, tuple[OffPolicyConfig, str, str, int]] = {
    "dqn": (DQNConfig(learning_rate=3e-3), "box", "discrete", 300),
    "dqn, images": (DQNConfig(learning_rate=1e-3), "image", "discrete", 80),
    "c51": (DQNConfig(learning_rate=3e-3, distribution="c51", atoms=11, value_min=-1, value_max=2), "box", "discrete", 300),
    "quantile": (DQNConfig(learning_rate=3e-3, distribution="quantile", atoms=11), "box", "discrete", 300),
    "sac": (SACConfig(learning_rate=3e-3, temperature=0.01), "box", "box", 400),
    "sac, choices": (SACConfig(learning_rate=3e-3, temperature=0.05), "multi_discrete", "discrete", 300),
    "td3": (TD3Config(learning_rate=3e-3), "box", "box", 400),
}


def rows_of(observation: str, action: str, rng: np.random.Generator) -> Transitions:
    """Episodes of one step each."""
    target = rng.integers(0, CHOICES, (M, COMPONENTS))
    chosen = rng.integers(0, CHOICES**COMPONENTS, M) if action == "discrete" else rng.uniform(-1, 1, (M, COMPONENTS)).astype(np.float32)
    seen = {name: torch.from_numpy(value) for name, value in observe(observation, target).items()}
    reward = torch.from_numpy(correct(action, chosen, target))
    return Transitions(seen, None, torch.from_numpy(chosen), reward, torch.zeros(M), seen, None, torch.ones(M))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_finds_the_action_that_the_observation_names(name: str) -> None:
    config, observation, action, steps = ALGORITHMS[name]
    spec, kind = spec_of(observation, action), load_algorithm(config.name)
    assert hasattr(kind, "learn")
    algorithm: Any = kind
    policy = build_acting(spec, NETWORKS, seed=1, kind=algorithm.network(config))
    learns = algorithm.make(policy, config, spec, NETWORKS, 2)
    rng = np.random.default_rng(0)
    for step in range(steps):
        learns.learn(rows_of(observation, action, rng), UpdateContext(step, 0.0, rng))
    target = np.array(list(product(range(CHOICES), repeat=COMPONENTS)))
    with torch.inference_mode():
        best = policy.greedy({field: torch.from_numpy(value) for field, value in observe(observation, target).items()})
    assert float(correct(action, best.numpy(), target).mean()) > 0.9
