"""The gradient that is written out by hand equals that of torch's graph, and what it does not know goes the ordinary way."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from shoal.algorithms.base import Optimizer
from shoal.config import PolicyConfig
from shoal.networks.encoders import Encoder
from shoal.networks.evaluation import GraphEvaluation, SmallEvaluation, small_network
from shoal.networks.policy import Policy, build_policy
from shoal.types import LeafSpec

from .test_policy import ACTIONS, DICT, IMAGE, VECTOR, noise, raw, spec

CHOICES = LeafSpec((), "discrete", "int64", (), nvec=(7,), start=(0,))
MATRIX = LeafSpec((), "box", "float64", (2, 3), low=(-math.inf,), high=(math.inf,))


def by_graph(policy: Policy, observation: dict[str, torch.Tensor], action: torch.Tensor, mask: torch.Tensor | None) -> GraphEvaluation:
    distribution, value = policy.distribution_and_value(observation, mask)
    return GraphEvaluation(distribution.log_prob(action), distribution.entropy(), value)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("activation", "hidden_sizes"), [("tanh", [24, 16]), ("relu", [16]), ("tanh", []), ("tanh", [40, 24])])
@pytest.mark.parametrize(
    ("action", "masked"),
    [(CHOICES, False), (CHOICES, True), (ACTIONS["box"][0], False), (ACTIONS["box_of_nothing"][0], False)],
    ids=["discrete", "masked", "box", "scalar"],
)
@pytest.mark.parametrize("observation", [VECTOR, MATRIX], ids=["vector", "matrix"])
def test_equals_the_graph(
    observation: LeafSpec, action: LeafSpec, masked: bool, activation: str, hidden_sizes: list[int], share: bool
) -> None:
    environment = spec(observation, action)
    config = PolicyConfig(activation=activation, hidden_sizes=hidden_sizes, share_encoder=share, log_std_init=-0.3, orthogonal_init=False)
    policy = build_policy(environment, config, seed=1)
    rows, draws = raw(environment, 50, 0), noise(policy, 50)
    mask = None
    if masked:
        mask = torch.rand(50, 7, generator=torch.Generator().manual_seed(2)) < 0.6
        mask[0] = False  # padding
        mask[1:, 3] = True
    with torch.no_grad():
        taken, _ = policy.act(rows, draws, mask)
    found, expected = policy.evaluate(rows, taken, mask), by_graph(policy, rows, taken, mask)
    assert isinstance(found, SmallEvaluation)
    parameters = list(policy.parameters())
    slopes = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    for name in ("log_prob", "entropy", "value"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    pairs = zip(found.gradients(parameters, *slopes), expected.gradients(parameters, *slopes), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("observation", "action", "settings"),
    [
        (IMAGE, CHOICES, {}),
        (DICT, CHOICES, {}),
        (VECTOR, ACTIONS["multi_discrete"][0], {}),
        (VECTOR, CHOICES, {"activation": "elu"}),
        (VECTOR, ACTIONS["box"][0], {"exploration": "gsde"}),
    ],
    ids=["image", "dict", "multi_discrete", "elu", "gsde"],
)
def test_everything_else_goes_through_the_graph(observation: LeafSpec, action: LeafSpec, settings: dict[str, object]) -> None:
    environment = spec(observation, action)
    policy = build_policy(environment, PolicyConfig(hidden_sizes=[8], **settings))  # type: ignore[arg-type]
    rows = raw(environment, 4, 0)
    with torch.no_grad():
        taken, _ = policy.act(rows, noise(policy, 4))
    evaluation = policy.evaluate(rows, taken)
    assert isinstance(evaluation, GraphEvaluation)
    parameters = list(policy.parameters())
    gradients = evaluation.gradients(parameters, *torch.ones(3, 4))
    assert [g.shape for g in gradients] == [p.shape for p in parameters]
    assert any(bool(g.any()) for g in gradients)


class Doubled(Encoder):
    """An encoder that does more than its layers say."""

    def forward(self, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return 2.0 * super().forward(prepared)


def test_towers_that_do_something_else_or_differ_in_their_activation_go_by_the_graph() -> None:
    known = build_policy(spec(VECTOR, CHOICES), PolicyConfig(hidden_sizes=[8]), seed=1)
    other = build_policy(spec(VECTOR, CHOICES), PolicyConfig(hidden_sizes=[8], activation="relu"), seed=1)
    assert isinstance(known.actor, Encoder)
    assert small_network(known.actor, known.critic, known.action_head, known.value_head) is not None
    assert small_network(known.actor, other.critic, known.action_head, known.value_head) is None
    known.actor.__class__ = Doubled
    assert small_network(known.actor, known.critic, known.action_head, known.value_head) is None


def test_gradients_are_written_where_the_optimizer_keeps_them_and_do_not_add_up() -> None:
    environment = spec(VECTOR, CHOICES)
    policy = build_policy(environment, PolicyConfig(hidden_sizes=[40, 24]), seed=1)
    optimizer = Optimizer(policy, epsilon=1e-5, max_gradient_norm=0.5)
    slopes = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    for seed in (0, 1):
        rows = raw(environment, 50, seed)
        with torch.no_grad():
            taken, _ = policy.act(rows, noise(policy, 50), None)
        found = policy.evaluate(rows, taken).gradients(optimizer.parameters, *slopes, optimizer.gradients)
        expected = by_graph(policy, rows, taken, None).gradients(optimizer.parameters, *slopes)
        assert found is optimizer.gradients
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
