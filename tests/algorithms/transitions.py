"""Toy transitions for off-policy algorithms, networks to learn from them, and what catches an update's gradients.

Legend: M rows, A actions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Linear, Module

from shoal.algorithms import UpdateContext, load_algorithm
from shoal.algorithms.off_policy import Transitions
from shoal.config import OffPolicyConfig, PolicyConfig
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
