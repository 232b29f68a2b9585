"""Small environments and policies for the tests of evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from shoal.algorithms import OffPolicyAlgorithm, load_algorithm
from shoal.config import EnvConfig, OffPolicyConfig, PolicyConfig
from shoal.environments.make import environment_spec
from shoal.evaluation import save_bundle
from shoal.networks.acting import Acting
from shoal.networks.policy import Policy, build_acting, build_policy, named_tensors


class Spaces(gymnasium.Env[Any, Any]):
    """Observations and actions of any kind; an episode's length is drawn from its seed, the reward of each step is 1."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self, observation: spaces.Space[Any], action: spaces.Space[Any], longest: int = 40, mask: Any = None, render_mode: str | None = None
    ) -> None:
        self.observation_space, self.action_space, self.longest, self.mask = observation, action, longest, mask
        self.render_mode = render_mode

    def _info(self) -> dict[str, Any]:
        return {} if self.mask is None else {"action_mask": self.mask}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.left = int(self.np_random.integers(1, self.longest + 1))
        return self.observation_space.sample(), self._info()

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        if self.mask is not None:
            assert self.mask[action]
        self.left -= 1
        return self.observation_space.sample(), 1.0, self.left <= 0, False, self._info()

    def render(self) -> Any:
        return np.full((15, 21, 3), self.left, np.uint8) if self.render_mode == "rgb_array" else None


def bundle(
    directory: Path,
    factory: Callable[..., Any] | None = None,
    env: EnvConfig | None = None,
    config: PolicyConfig | None = None,
    seed: int = 0,
) -> Policy:
    """Save an untrained policy; returns the module."""
    env, config = env or EnvConfig(id="test"), config or PolicyConfig()
    spec = environment_spec(env, factory)
    policy = build_policy(spec, config, seed=seed)
    save_bundle(directory, {name: tensor.detach().numpy() for name, tensor in named_tensors(policy).items()}, spec, config, env)
    return policy


def learned_bundle(directory: Path, factory: Callable[..., Any], algorithm: OffPolicyConfig, policy: PolicyConfig | None = None) -> Acting:
    """Save an untrained policy as an algorithm that learns from a replay has it; returns the module."""
    env, policy, kind = EnvConfig(id="test"), policy or PolicyConfig(hidden_sizes=[8]), load_algorithm(algorithm.name)
    assert issubclass(kind, OffPolicyAlgorithm)
    network, spec = kind.network(algorithm), environment_spec(env, factory)
    module = build_acting(spec, policy, seed=0, kind=network)
    save_bundle(directory, {name: tensor.detach().numpy() for name, tensor in named_tensors(module).items()}, spec, policy, env, network)
    return module
