"""A bare loop stands beside shoal's network only where it is the same network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from shoal.benching.costs import _references
from shoal.benching.references import BareNetwork
from shoal.config import RunConfig
from shoal.engines.roles import Blueprint, UserObjects
from shoal.environments.probe import probe
from shoal.networks.acting import ACTOR_CRITIC
from shoal.networks.policy import build_acting
from shoal.settings import resolve
from shoal.types import EnvironmentSpec, LeafSpec

VECTOR = LeafSpec((), "box", "float32", (6,), low=(-np.inf,), high=(np.inf,))
MATRIX = LeafSpec((), "box", "float32", (2, 3), low=(-np.inf,), high=(np.inf,))
FLOAT_IMAGE = LeafSpec((), "box", "float32", (4, 84, 84), low=(0.0,), high=(1.0,))
IMAGE = LeafSpec((), "box", "uint8", (4, 84, 84), low=(0.0,), high=(255.0,))
BITS = LeafSpec((), "multi_binary", "int8", (6,))
CHOICE = LeafSpec((), "discrete", "int64", (), nvec=(500,), start=(0,))
CHOICES = LeafSpec((), "multi_discrete", "int64", (2,), nvec=(3, 5), start=(0, 0))
DISCRETE = LeafSpec((), "discrete", "int64", (), nvec=(3,), start=(0,))
BOX = LeafSpec((), "box", "float32", (3,), low=(-1.0,), high=(1.0,))


def bare(observation: LeafSpec, action: LeafSpec = DISCRETE, device: str = "cpu", **policy: Any) -> tuple[BareNetwork, int]:
    """The bare network, and how many weights shoal's own has."""
    config = RunConfig(policy={"hidden_sizes": [16, 8], **policy})
    spec = EnvironmentSpec("any", (observation,), action)
    own = build_acting(spec, config.policy, None, seed=0, kind=ACTOR_CRITIC)
    return BareNetwork(spec, config, device), sum(tensor.numel() for tensor in own.parameters())


@pytest.mark.parametrize("action", [DISCRETE, BOX], ids=lambda leaf: leaf.kind)
@pytest.mark.parametrize(
    ("observation", "policy"),
    [
        (VECTOR, {}),
        (VECTOR, {"share_encoder": False, "activation": "relu"}),
        (MATRIX, {"encoder": "mlp"}),
        (BITS, {}),
        (IMAGE, {}),
        (IMAGE, {"share_encoder": True, "encoder": "nature_cnn"}),
        (IMAGE, {"encoder": "compact_cnn"}),
    ],
)
def test_a_bare_network_has_as_many_weights_as_shoals(observation: LeafSpec, action: LeafSpec, policy: dict[str, Any]) -> None:
    network, own = bare(observation, action, **policy)
    unused = network.num_actions if network.discrete else 0  # log_std, which discrete actions do not need
    assert sum(math.prod(tensor.shape) for tensor in network.parameters) - unused == own
    assert network.actor(network.features(network.rows(5))).shape == (5, 3)


@pytest.mark.parametrize(
    ("observation", "policy", "device", "reason"),
    [
        (VECTOR, {"memory": "lstm"}, "cpu", "memory"),
        (VECTOR, {"memory": "gru", "memory_size": 8}, "cpu", "memory"),
        (VECTOR, {"share_encoder": True}, "cpu", "share the encoder"),
        (IMAGE, {"share_encoder": False}, "cpu", "share the encoder"),
        (CHOICE, {}, "cpu", "one-hot"),
        (CHOICES, {}, "cpu", "one-hot"),
        (VECTOR, {}, "cuda", "device of its own"),
        (IMAGE, {"encoder": "mlp"}, "cpu", "CNN"),
        (FLOAT_IMAGE, {"encoder": "nature_cnn"}, "cpu", "CNN"),
    ],
)
def test_another_network_has_no_bare_loop(observation: LeafSpec, policy: dict[str, Any], device: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        bare(observation, device=device, **policy)


def test_a_learner_on_a_device_of_its_own_has_no_bare_loop_beside_it() -> None:
    class OnADevice(Blueprint):
        def device(self) -> torch.device:
            return torch.device("cuda")

    config, _ = resolve("CartPole-v1", {"preset": "none", "sampling.group_size": 2})
    parts: Any = None  # not looked at
    blueprint = OnADevice(config, probe(config.env).spec, UserObjects(), bytes(16))
    found, _ = _references(blueprint, {"step_wall_us": 1.0, "step_cpu_us": 1.0}, parts, 0.0)
    assert (found["inference"], found["learning"]) == (None, None)
    assert "device of its own" in found["missing"]
    assert found["environment"]["times"] > 0
