"""The numpy form of acting equals the torch form, follows the weights, and knows what it does not know."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from shoal.config import PolicyConfig
from shoal.networks.fast import SINGLE_THREAD_PRODUCT, Fast, fast_actor
from shoal.networks.policy import Policy, build_policy, named_tensors
from shoal.ops.moments import Moments
from shoal.types import LeafSpec

from .test_policy import ACTIONS, DICT, IMAGE, VECTOR, Trunk, noise, raw, spec

OBSERVATIONS = {
    "vector": VECTOR,
    "matrix_float64": LeafSpec((), "box", "float64", (2, 3), low=(-math.inf,), high=(math.inf,)),
    "bytes": LeafSpec((), "box", "uint8", (5,), low=(0.0,), high=(255.0,)),
    "bits": LeafSpec((), "multi_binary", "int8", (6,)),
}
CHOICES = LeafSpec((), "discrete", "int64", (), nvec=(7,), start=(0,))


def fast(policy: Policy, num_envs: int = 8) -> Fast:
    actor = fast_actor(policy, num_envs)
    assert actor is not None
    return actor


def check_equal(policy: Policy, actor: Fast, environment: object, mask: np.ndarray | None = None, seed: int = 0) -> None:
    observation, draws = raw(environment, 8, seed), noise(policy, 8)  # type: ignore[arg-type]
    with torch.inference_mode():
        action, log_prob = policy.act(observation, draws, None if mask is None else torch.from_numpy(mask))
    found_action, found_log_prob, _ = actor.step({name: value.numpy() for name, value in observation.items()}, {}, draws.numpy(), mask)
    assert found_action.shape == tuple(action.shape)
    assert str(action.dtype) == f"torch.{found_action.dtype}"
    assert found_log_prob.dtype == np.float32
    np.testing.assert_allclose(found_action, action.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found_log_prob, log_prob.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("action", [CHOICES, ACTIONS["box"][0], ACTIONS["box_of_nothing"][0]], ids=["discrete", "box", "scalar"])
@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("normalise", [False, True])
def test_equals_the_torch_form(observation: str, action: LeafSpec, activation: str, normalise: bool) -> None:
    environment = spec(OBSERVATIONS[observation], action)
    config = PolicyConfig(activation=activation, normalise_observations=normalise, log_std_init=-0.7, hidden_sizes=[24, 16])
    policy = build_policy(environment, config)
    actor = fast(policy)
    if policy.normalised:
        moments = Moments(OBSERVATIONS[observation].shape)
        moments.merge(raw(environment, 50, 1)["observation"].numpy() * 0.05)
        policy.set_statistics({"observation": moments})
    with torch.no_grad():
        policy.action_head.linear.weight.mul_(100)
    check_equal(policy, actor, environment)


def test_masks_are_kept_and_left_alone() -> None:
    environment = spec(VECTOR, CHOICES)
    policy = build_policy(environment, PolicyConfig())
    rng = np.random.default_rng(1)
    mask = rng.random((8, 7)) < 0.3
    mask[np.arange(8), rng.integers(0, 7, 8)] = True
    before = mask.copy()
    actor = fast(policy)
    check_equal(policy, actor, environment, mask)
    for u in (0.0, float(np.nextafter(np.float32(1), np.float32(0)))):
        action, _, _ = actor.step({"observation": rng.normal(size=(8, 4)).astype(np.float32)}, {}, np.full((8, 1), u, np.float32), mask)
        assert mask[np.arange(8), action].all()
    assert (mask == before).all()


def test_follows_written_weights_and_replaced_ones_after_a_refresh() -> None:
    environment = spec(VECTOR, ACTIONS["box"][0])
    policy = build_policy(environment, PolicyConfig())
    actor = fast(policy)
    with torch.no_grad():
        for tensor in named_tensors(policy).values():
            tensor.add_(0.1)
    check_equal(policy, actor, environment)
    for parameter in policy.parameters():
        parameter.data = parameter.data * 1.5
    actor.refresh()
    check_equal(policy, actor, environment)


def test_results_stay_when_it_acts_again() -> None:
    environment = spec(VECTOR, CHOICES)
    policy = build_policy(environment, PolicyConfig())
    actor = fast(policy)
    first = actor.step({"observation": np.ones((8, 4), np.float32)}, {}, np.full((8, 1), 0.5, np.float32))[:2]
    kept = [array.copy() for array in first]
    actor.step({"observation": -np.ones((8, 4), np.float32)}, {}, np.full((8, 1), 0.9, np.float32))
    assert all(np.array_equal(a, b) for a, b in zip(first, kept, strict=True))


def test_bits_do_not_depend_on_where_the_observation_lies() -> None:
    policy = build_policy(spec(VECTOR, CHOICES), PolicyConfig())
    values, draws = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32), np.full((8, 1), 0.5, np.float32)
    expected = fast(policy).step({"observation": values}, {}, draws)[:2]
    for offset in range(1, 16):
        room = np.zeros(64, np.float32)
        moved = room[offset : offset + 32].reshape(8, 4)
        moved[:] = values
        for a, b in zip(expected, fast(policy).step({"observation": moved}, {}, draws)[:2], strict=True):
            assert np.array_equal(a, b)


def test_knows_what_it_does_not_know() -> None:
    assert fast_actor(build_policy(spec(IMAGE), PolicyConfig()), 8) is None
    assert fast_actor(build_policy(spec(IMAGE), PolicyConfig(encoder="mlp")), 100) is None  # too large
    assert fast_actor(build_policy(spec(DICT), PolicyConfig()), 8) is None
    assert fast_actor(build_policy(spec(CHOICES), PolicyConfig()), 8) is None
    assert fast_actor(build_policy(spec(), PolicyConfig(activation="elu")), 8) is None
    assert fast_actor(build_policy(spec(), PolicyConfig(), Trunk), 8) is None
    for kind in ("multi_discrete", "multi_binary"):
        assert fast_actor(build_policy(spec(VECTOR, ACTIONS[kind][0]), PolicyConfig()), 8) is None
    assert fast_actor(build_policy(spec(VECTOR, ACTIONS["box"][0]), PolicyConfig(exploration="gsde")), 8) is None
    policy = build_policy(spec(), PolicyConfig(hidden_sizes=[64, 64]))
    assert fast_actor(policy, SINGLE_THREAD_PRODUCT // 64**2) is not None
    assert fast_actor(policy, SINGLE_THREAD_PRODUCT // 64**2 + 1) is None

    class Own(Policy):
        pass

    own = Own(policy.inputs, policy.actor, policy.critic, policy.action_head, nn.Linear(64, 1))
    assert fast_actor(own, 8) is None
