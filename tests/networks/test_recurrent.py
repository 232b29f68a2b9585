"""Policies with memory: stepping and unrolling agree, and what cannot have a memory says so.

Legend: T rows, N environments.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.config import PolicyConfig
from shoal.errors import ConfigError
from shoal.networks.fast import fast_actor
from shoal.networks.policy import Policy, build_policy, named_tensors, policy_size
from shoal.networks.recurrent import RecurrentPolicy, Sequences
from shoal.types import FieldSpec, LeafSpec

from .test_policy import ACTIONS, DICT, TWO, VECTOR, Trunk, noise, raw, spec

T, N, H = 6, 4, 5
KINDS = pytest.mark.parametrize("kind", ["lstm", "gru"])


def policy_of(kind: str, observation: LeafSpec | tuple[LeafSpec, ...] = VECTOR, action: LeafSpec = TWO, **more: object) -> RecurrentPolicy:
    config = PolicyConfig.model_validate({"memory": kind, "memory_size": H, "hidden_sizes": [7], **more})
    policy = build_policy(spec(observation, action), config, seed=4)
    assert isinstance(policy, RecurrentPolicy)
    with torch.no_grad():  # a beginning's head says the same of everything
        policy.action_head.linear.weight.mul_(100)
    return policy


def stepped(policy: RecurrentPolicy, sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, torch.Tensor]]]:
    """By the slow loop: log-probabilities of the actions [T, N], values [T, N], and the states after each row."""
    state, log_probs, values, states = sequences.state, [], [], []
    for t in range(len(sequences.action)):
        observation = {name: value[t] for name, value in sequences.observation.items()}
        state = {name: torch.where(sequences.reset_TN[t, :, None], 0.0, value) for name, value in state.items()}
        values.append(policy.next_value(observation, state))
        mask = None if sequences.action_mask is None else sequences.action_mask[t]
        distribution, state = policy.next_distribution(observation, state, mask)
        log_probs.append(distribution.log_prob(sequences.action[t]))
        states.append(state)
    return torch.stack(log_probs), torch.stack(values), states


def sequences_of(policy: RecurrentPolicy, observation: LeafSpec | tuple[LeafSpec, ...], action: torch.Tensor) -> Sequences:
    rows = {name: value.unflatten(0, (T, N)) for name, value in raw(spec(observation), T * N, seed=2).items()}
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(N, H, generator=generator) for name in policy.memory.names}
    return Sequences(rows, action, None, state, torch.rand(T, N, generator=generator) < 0.3)


@KINDS
@pytest.mark.parametrize("observation", [VECTOR, DICT], ids=["vector", "dict"])
@pytest.mark.parametrize("action", ["discrete", "box"])
def test_sequences_are_evaluated_as_by_stepping_row_by_row(kind: str, observation: LeafSpec, action: str) -> None:
    policy = policy_of(kind, observation, ACTIONS[action][0])
    rng = np.random.default_rng(1)
    taken = torch.from_numpy(rng.integers(0, 2, (T, N)) if action == "discrete" else rng.normal(size=(T, N, 2, 2)).astype(np.float32))
    sequences = sequences_of(policy, observation, taken)
    log_prob, value, states = stepped(policy, sequences)
    evaluation, unrolled = policy.evaluate_sequences(sequences)
    torch.testing.assert_close(evaluation.log_prob, log_prob.flatten().detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(evaluation.value, value.flatten().detach(), rtol=1e-4, atol=1e-5)
    row, env = torch.tensor([0, 3, 5]), torch.tensor([2, 0, 3])
    for name, found in unrolled.state_after(row, env).items():
        torch.testing.assert_close(found, torch.stack([states[t][name][n] for t, n in zip(row, env, strict=True)]).detach())
    some = torch.tensor([17, 3, 8])
    part, _ = policy.evaluate_sequences(sequences, some)
    torch.testing.assert_close(part.value, evaluation.value[some])
    torch.testing.assert_close(part.log_prob, evaluation.log_prob[some])


def test_masks_lie_on_their_own_rows() -> None:
    policy = policy_of("lstm")
    sequences = sequences_of(policy, VECTOR, torch.from_numpy(np.random.default_rng(1).integers(0, 2, (T, N))))
    mask = torch.rand(T, N, 2, generator=torch.Generator().manual_seed(5)) < 0.5
    mask.scatter_(2, sequences.action.unsqueeze(2), True)
    masked = sequences._replace(action_mask=mask)
    expected = stepped(policy, masked)[0].flatten().detach()
    assert (expected == 0).any(), "where only the action taken was allowed"
    some = torch.tensor([17, 3, 8, 11])
    for rows, wanted in ((None, expected), (some, expected[some])):
        torch.testing.assert_close(policy.evaluate_sequences(masked, rows)[0].log_prob, wanted, rtol=1e-4, atol=1e-5)


@KINDS
def test_the_gradient_is_that_of_stepping(kind: str) -> None:
    policy = policy_of(kind)
    sequences = sequences_of(policy, VECTOR, torch.from_numpy(np.random.default_rng(1).integers(0, 2, (T, N))))
    parameters = list(policy.parameters())
    slopes = [torch.randn(T * N, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    evaluation, _ = policy.evaluate_sequences(sequences)
    found = evaluation.gradients(parameters, slopes[0], torch.zeros(T * N), slopes[1])
    log_prob, value, _ = stepped(policy, sequences)
    expected = torch.autograd.grad(log_prob.flatten() @ slopes[0] + value.flatten() @ slopes[1], parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@KINDS
def test_what_is_emitted_and_what_an_episode_begins_with(kind: str) -> None:
    policy = policy_of(kind)
    fields = [FieldSpec(name, "float32", (H,), "B") for name in policy.memory.names]
    assert policy.fields() == [ACTIONS["discrete"][2], FieldSpec("log_prob", "float32", (), "T"), *fields]
    beginning = policy.initial_state(3)
    assert {name: tuple(value.shape) for name, value in beginning.items()} == {field.name: (3, H) for field in fields}
    assert not any(value.any() for value in beginning.values())
    observation, draws = raw(spec(), 3), noise(policy, 3)
    first, log_prob, state = policy.step(observation, beginning, draws)
    assert list(state) == list(beginning)
    for one, other in zip(policy.act(observation, draws), (first, log_prob), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(policy.value(observation), policy.next_value(observation, beginning))
    assert not torch.equal(policy.value(observation), policy.next_value(observation, state))


@KINDS
@pytest.mark.parametrize("action", ["discrete", "box"])
def test_a_small_one_acts_in_numpy(kind: str, action: str) -> None:
    policy = policy_of(kind, VECTOR, ACTIONS[action][0])
    actor = fast_actor(policy, N)
    assert actor is not None
    state = policy.initial_state(N)
    fast_state = {name: value.numpy().copy() for name, value in state.items()}
    kept = []
    for row in range(5):
        observation, draws = raw(spec(), N, row), noise(policy, N)
        with torch.inference_mode():
            expected, log_prob, state = policy.step(observation, state, draws)
        found, found_log_prob, fast_state = actor.step(
            {name: value.numpy() for name, value in observation.items()}, fast_state, draws.numpy()
        )
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found_log_prob, log_prob.numpy(), rtol=1e-4, atol=1e-5)
        for name in state:
            np.testing.assert_allclose(fast_state[name], state[name].numpy(), rtol=1e-4, atol=1e-5)
        kept.append({name: (value, value.copy()) for name, value in fast_state.items()})
    assert all(np.array_equal(now, then) for states in kept for now, then in states.values()), "a state was written over"
    assert fast_actor(build_policy(spec(), PolicyConfig(memory=kind, memory_size=512)), 8) is None  # type: ignore[arg-type]


@KINDS
def test_units_begin_with_spans_from_one_row_to_many(kind: str) -> None:
    config = PolicyConfig.model_validate({"memory": kind, "memory_size": 16})
    policy = build_policy(spec(), config)
    assert isinstance(policy, RecurrentPolicy)
    bias = policy.memory.bias.view(-1, 16)[2 if kind == "lstm" else 1]
    spans = 1.0 / (1.0 - torch.sigmoid(bias))
    torch.testing.assert_close(spans[[0, -1]], torch.tensor([2.0, 128.0]), rtol=1e-3, atol=0.0)
    assert (spans.diff() > 0).all()
    assert policy_size(spec(), config) == sum(tensor.numel() for tensor in named_tensors(policy).values())
    plain = build_policy(spec(), config.model_copy(update={"orthogonal_init": False}))
    assert isinstance(plain, RecurrentPolicy)
    assert plain.memory.bias.abs().max() <= 0.25


@KINDS
def test_a_network_of_ones_own_gets_a_memory_and_a_whole_policy_without_one_is_refused(kind: str) -> None:
    config = PolicyConfig.model_validate({"memory": kind, "memory_size": H})
    policy = build_policy(spec(), config, Trunk)
    assert isinstance(policy, RecurrentPolicy)
    assert isinstance(policy.actor, Trunk)
    assert policy.memory.input_weight.shape[1] == Trunk.num_features

    def whole(spec: object, config: object) -> Policy:
        return build_policy(spec, PolicyConfig())  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"policy.memory: Policy, which policy.network made, is a whole policy.*num_features"):
        build_policy(spec(), config, whole)
    assert build_policy(spec(), config, lambda spec, _: policy) is policy


def test_what_does_not_go_with_a_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy.share_encoder: with policy.memory.*leave it out"):
        build_policy(spec(), PolicyConfig(memory="gru", share_encoder=False))
    with pytest.raises(ConfigError, match=r"learner.compile does not go with policy.memory"):
        policy_of("gru").compute(compile=True)


def test_in_bfloat16_the_memory_itself_is_not_rounded() -> None:
    policy, mixed = policy_of("lstm"), policy_of("lstm")
    mixed.compute(mixed=True)
    sequences = sequences_of(policy, VECTOR, torch.zeros(T, N, dtype=torch.int64))
    exact, rounded = policy.evaluate_sequences(sequences)[1], mixed.evaluate_sequences(sequences)[1]
    assert rounded.output_TNH.dtype is torch.float32
    assert not torch.equal(exact.output_TNH, rounded.output_TNH)
    torch.testing.assert_close(exact.output_TNH, rounded.output_TNH, rtol=0.05, atol=0.02)
