"""R2D2 against slow oracles: the scale of its values, its loss in loops, and its gradient by stepping row by row with torch's graph.

Legend: L rows of a sequence, R of them behind the burn-in, M sequences, A actions, H units.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.algorithms import load_algorithm
from shoal.algorithms.off_policy import Beginning, SequenceRows
from shoal.algorithms.r2d2 import R2D2, double_q_target, r2d2_loss, rescaled, unscaled, warmed
from shoal.config import PolicyConfig, R2D2Config
from shoal.networks.fast import fast_actor
from shoal.networks.policy import build_acting
from shoal.networks.recurrent_q import RecurrentQPolicy

from .transitions import CHOICES, IMAGE, VECTOR, A, Caught, Partly, context, spec_of

L, M, BURN_IN = 9, 5, 3
MEMORIES = ("lstm", "gru")


def made(
    config: R2D2Config, memory: str = "lstm", *, observation: Any = VECTOR, mask: bool = False, size: int = 6, network: Any = None
) -> R2D2:
    networks = PolicyConfig.model_validate({"hidden_sizes": [8], "activation": "relu", "memory": memory, "memory_size": size})
    kind: Any = load_algorithm("r2d2")
    spec = spec_of(CHOICES, observation, mask=mask)
    algorithm: R2D2 = kind.make(build_acting(spec, networks, network, seed=1, kind=kind.network(config)), config, spec, networks, 2)
    return algorithm


def rows_of(policy: RecurrentQPolicy, seed: int = 0, *, burn_in: int = BURN_IN, images: bool = False, mask: bool = False) -> SequenceRows:
    """Episodes begin here and there, some rows are no steps, and states are not those of the weights as they are now."""
    rng = np.random.default_rng(seed)

    def floats(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    ahead = np.arange(L)[:, None] + rng.integers(1, 4, (L, M))
    allowed = rng.random((L + 1, M, A)) < 0.6
    allowed[..., 1] = True
    return SequenceRows(
        burn_in=burn_in,
        observation={"observation": torch.from_numpy(rng.integers(0, 256, (L + 1, M, 6, 6, 1)).astype(np.uint8)) if images else floats(L + 1, M, 4)},
        action_mask=torch.from_numpy(allowed) if mask else None,
        action=torch.from_numpy(rng.integers(0, A, (L, M))),
        begins_L1M=torch.from_numpy(rng.random((L + 1, M)) < 0.2),
        valid_LM=torch.from_numpy(rng.random((L, M)) < 0.7),
        return_LM=10 * floats(L, M),
        discount_LM=torch.from_numpy((rng.random((L, M)) * (rng.random((L, M)) < 0.8)).astype(np.float32)),
        successor_LM=torch.from_numpy(np.minimum(ahead, L)),
        state={name: floats(*value.shape) for name, value in policy.initial_state(M).items()},
        weight_M=torch.from_numpy(rng.uniform(0.1, 1, M).astype(np.float32)),
    )  # fmt: skip


def stepped(policy: RecurrentQPolicy, rows: SequenceRows, m: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Action values [A] at each row of one sequence, and the states before it: row by row, without gradient in the burn-in."""
    state, values, states = {name: value[m : m + 1] for name, value in rows.state.items()}, [], []
    for t in range(L + 1):
        if rows.begins_L1M[t, m]:
            state = policy.initial_state(1)
        states.append(state)
        features = policy.encoder.encoder(policy.inputs({name: value[t, m : m + 1] for name, value in rows.observation.items()}))
        with torch.set_grad_enabled(t >= rows.burn_in):
            output, state = policy.memory.step(features, state)
        head = policy.head(output)[0]
        values.append(head[0] + head[1:] - head[1:].mean() if policy.duelling else head)
    return values, states


def h(x: float, epsilon: float) -> float:
    return float(np.sign(x) * (np.sqrt(abs(x) + 1) - 1) + epsilon * x)


def h_inverse(x: float, epsilon: float) -> float:
    """Kapturowski et al. 2019, as it stands there (proposition A.2 of Pohlen et al. 2018), in float64."""
    return float(np.sign(x) * (((np.sqrt(1 + 4 * epsilon * (abs(x) + 1 + epsilon)) - 1) / (2 * epsilon)) ** 2 - 1))


# ---- the scale of values ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epsilon", [1e-3, 1e-2, 1.0])
def test_values_are_scaled_as_in_the_paper_and_back(epsilon: float) -> None:
    value = np.concatenate([-np.logspace(-4, 6, 60), [0.0], np.logspace(-4, 6, 60)])
    there = rescaled(torch.from_numpy(value.astype(np.float32)), epsilon)
    np.testing.assert_allclose(there, [h(x, epsilon) for x in value], rtol=1e-5, atol=2e-7)
    np.testing.assert_allclose(unscaled(there, epsilon), value, rtol=1e-5, atol=1e-6)
    scaled = torch.linspace(-300, 300, 61)
    np.testing.assert_allclose(unscaled(scaled, epsilon), [h_inverse(float(x), epsilon) for x in scaled], rtol=1e-5, atol=1e-6)


def test_without_its_linear_term_the_scale_has_an_inverse_too() -> None:
    value = torch.tensor([-50.0, -0.5, 0.0, 3.0, 1e4])
    torch.testing.assert_close(unscaled(rescaled(value, 0.0), 0.0), value, rtol=1e-5, atol=1e-6)


# ---- loss and targets ------------------------------------------------------------------------------------------------
def test_loss_gradient_and_priorities_are_those_of_loops_over_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    value, target = torch.randn(6, 4, generator=generator, requires_grad=True), torch.randn(6, 4, generator=generator)
    trained, weight = torch.rand(6, 4, generator=generator) < 0.6, torch.rand(4, generator=generator)
    trained[:, 2] = False
    total, priorities = torch.zeros(()), []
    for m in range(4):
        sizes = [abs(float(value.detach()[t, m] - target[t, m])) for t in range(6) if trained[t, m]]
        priorities.append(0.7 * max(sizes, default=0.0) + 0.3 * (sum(sizes) / max(1, len(sizes))))
        for t in range(6):
            if trained[t, m]:
                total = total + weight[m] * 0.5 * (value[t, m] - target[t, m]) ** 2
    expected = total / int(trained.sum())
    found = r2d2_loss(value.detach(), target, trained, weight, 0.7)
    torch.testing.assert_close(found.loss, expected.detach())
    torch.testing.assert_close(found.gradient_RM, torch.autograd.grad(expected, value)[0])
    torch.testing.assert_close(found.priority_M, torch.tensor(priorities))


def test_rows_that_are_not_trained_may_hold_anything() -> None:
    value, trained = torch.ones(3, 2), torch.tensor([[True, False], [True, False], [True, True]])
    target = torch.where(trained, 0.5, torch.inf)
    found = r2d2_loss(value, target, trained, torch.ones(2), 0.9)
    assert float(found.loss) == 0.125
    torch.testing.assert_close(found.priority_M, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("epsilon", [None, 1e-2])
def test_targets_are_double_and_keep_to_masks(epsilon: float | None) -> None:
    rng = np.random.default_rng(3)
    R = 6
    ranked, valued = (rng.standard_normal((R + 1, M, A)).astype(np.float32) * 3 for _ in range(2))
    allowed = rng.random((R + 1, M, A)) < 0.5
    allowed[..., 2] = True
    returns, discount = rng.standard_normal((R, M)).astype(np.float32) * 9, rng.random((R, M)).astype(np.float32)
    successor = rng.integers(1, R + 1, (R, M))
    expected = np.zeros((R, M))
    for t in range(R):
        for m in range(M):
            s = successor[t, m]
            best = max((a for a in range(A) if allowed[s, m, a]), key=lambda a: ranked[s, m, a])
            nxt = float(valued[s, m, best])
            plain = returns[t, m] + discount[t, m] * (nxt if epsilon is None else h_inverse(nxt, epsilon))
            expected[t, m] = plain if epsilon is None else h(float(plain), epsilon)
    found = double_q_target(*(torch.from_numpy(x) for x in (returns, discount, successor, ranked, valued, allowed)), epsilon)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# ---- burn-in ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("burn_in", [0, 1, BURN_IN])
def test_the_state_after_the_burn_in_is_that_of_stepping(memory: str, burn_in: int) -> None:
    policy = made(R2D2Config(), memory).policy
    rows = rows_of(policy, burn_in=burn_in)
    rows.begins_L1M[burn_in] = False
    found = warmed(policy, rows)
    assert not any(value.requires_grad for value in found.values())
    for m in range(M):
        before = stepped(policy, rows, m)[1][burn_in]
        for name, value in found.items():
            torch.testing.assert_close(value[m], before[name][0].detach(), rtol=1e-4, atol=1e-6)
    stored = rows.state["policy_state/h"]
    assert (burn_in == 0) == torch.equal(found["policy_state/h"], stored)


# ---- a whole step ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("memory", "more", "how"),
    [
        ("lstm", {}, {}),
        ("gru", {}, {}),
        ("lstm", {"double": False, "duelling": False, "rescaling": None}, {"mask": True}),
        ("gru", {"priority_eta": 0.3}, {"burn_in": 0, "mask": True}),
        ("lstm", {}, {"images": True}),
    ],
)
def test_the_gradient_is_that_of_the_papers_loss_by_stepping(memory: str, more: dict[str, Any], how: dict[str, Any]) -> None:
    config = R2D2Config(**more)
    algorithm = made(config, memory, observation=IMAGE if how.get("images") else VECTOR, mask=how.get("mask", False))
    algorithm.target.flat.add_(0.1 * torch.randn(algorithm.target.flat.shape, generator=torch.Generator().manual_seed(5)))
    policy, rows = algorithm.policy, rows_of(algorithm.policy, **how)
    caught, target_network = Caught(algorithm.optimizer), copy.deepcopy(algorithm.target.module)
    algorithm.optimizer = caught  # type: ignore[assignment]
    metrics, priority_M = algorithm.learn(rows, context())
    total, count, priorities = torch.zeros(()), 0, []
    for m in range(M):
        online, target = stepped(policy, rows, m)[0], stepped(target_network, rows, m)[0]
        known, sizes = [value.detach() for value in (online if config.double else target)], []
        for t in range(rows.burn_in, L):
            if not rows.valid_LM[t, m]:
                continue
            s = int(rows.successor_LM[t, m])
            allowed = range(A) if rows.action_mask is None else [a for a in range(A) if rows.action_mask[s, m, a]]
            best = max(allowed, key=known[s].tolist().__getitem__)
            nxt, total_return = float(target[s][best].detach()), float(rows.return_LM[t, m])
            if config.rescaling is None:
                aim = total_return + float(rows.discount_LM[t, m]) * nxt
            else:
                aim = h(total_return + float(rows.discount_LM[t, m]) * h_inverse(nxt, config.rescaling), config.rescaling)
            error = online[t][rows.action[t, m]] - aim
            total, count = total + rows.weight_M[m] * 0.5 * error**2, count + 1
            sizes.append(abs(float(error.detach())))
        priorities.append(config.priority_eta * max(sizes) + (1 - config.priority_eta) * float(np.mean(sizes)))
    caught.matches(total / count)
    assert priority_M is not None
    np.testing.assert_allclose(priority_M, priorities, rtol=1e-4)
    assert metrics["learning_rate"] == config.learning_rate


def test_the_target_network_is_copied_now_and_then_or_follows() -> None:
    algorithm = made(R2D2Config(target_tau=None, target_update_steps=2))
    same = []
    for step in range(4):
        algorithm.learn(rows_of(algorithm.policy, step), context())
        same.append(torch.equal(algorithm.target.flat, algorithm.optimizer.flat))
    assert same == [False, True, False, True]
    soft = made(R2D2Config(target_tau=0.25))
    before = soft.target.flat.clone()
    soft.learn(rows_of(soft.policy), context())
    torch.testing.assert_close(soft.target.flat, before + 0.25 * (soft.optimizer.flat - before))


def test_a_network_that_is_frozen_in_part_is_trained_and_its_buffers_are_followed_and_saved() -> None:
    config = R2D2Config(target_tau=None, target_update_steps=2)
    first, second = (made(config, network=Partly) for _ in range(2))
    mine, theirs = (algorithm.policy.encoder.encoder for algorithm in (first, second))
    assert isinstance(mine, Partly)
    assert isinstance(theirs, Partly)
    frozen, layer = mine.frozen.weight.clone(), mine.layer.weight.clone()
    for step in range(3):
        first.learn(rows_of(first.policy, step), context())
    assert first.steps == (3, 0)
    assert torch.equal(mine.frozen.weight, frozen)
    assert not torch.equal(mine.layer.weight, layer)
    second.policy.load_state_dict(first.policy.state_dict())
    second.set_state({key: value.clone() for key, value in first.get_state().items()})
    copied = [algorithm.target.module.encoder.encoder for algorithm in (first, second)]
    assert [float(each.calls) for each in copied if isinstance(each, Partly)] == [2.0, 2.0]
    for algorithm in (first, second):
        algorithm.learn(rows_of(algorithm.policy, 3), context())
    assert torch.equal(first.optimizer.flat, second.optimizer.flat)
    assert torch.equal(first.target.flat, second.target.flat)


def test_one_that_was_saved_goes_on_with_the_same_bits() -> None:
    first = made(R2D2Config())
    for step in range(3):
        first.learn(rows_of(first.policy, step), context())
    second = made(R2D2Config())
    second.policy.load_state_dict(first.policy.state_dict())
    second.set_state({key: value.clone() for key, value in first.get_state().items()})
    for algorithm in (first, second):
        for step in range(3, 6):
            algorithm.learn(rows_of(algorithm.policy, step), context())
    assert torch.equal(first.optimizer.flat, second.optimizer.flat)
    assert {k: v.tolist() for k, v in first.get_state().items()} == {k: v.tolist() for k, v in second.get_state().items()}
    assert first.steps == (6, 0)


def test_numbers_that_are_not_finite_are_refused_and_change_nothing() -> None:
    algorithm = made(R2D2Config())
    rows, before = rows_of(algorithm.policy), algorithm.optimizer.flat.clone()
    rows.valid_LM[:] = True
    rows.return_LM[-1, 0] = np.nan
    algorithm.learn(rows, context())
    assert torch.equal(algorithm.optimizer.flat, before)
    assert algorithm.steps == (0, 1)


def test_every_group_explores_by_its_rung() -> None:
    config = R2D2Config()
    rungs = [R2D2.epsilon(config, Beginning(group, 3, 0, 0)) for group in range(3)]
    assert rungs == pytest.approx([0.4, 0.4**4.5, 0.4**8])
    falling = R2D2Config(epsilon="annealed", epsilon_env_steps=100, epsilon_final=0.1)
    assert R2D2.epsilon(falling, Beginning(1, 3, 50, 0)) == pytest.approx(0.55)


# ---- acting ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
def test_acting_row_by_row_is_greedy_by_the_unrolled_values_in_torch_and_in_numpy(memory: str, masked: bool) -> None:
    policy = made(R2D2Config(), memory, mask=masked).policy
    rows = rows_of(policy, mask=masked)
    fast = fast_actor(policy, M)
    assert fast is not None
    state = {name: value.clone() for name, value in rows.state.items()}
    quick: dict[str, Any] = {name: value.numpy() for name, value in state.items()}
    with torch.inference_mode():
        never = torch.zeros(L + 1, M, dtype=torch.bool)
        values = policy.unrolled_values(policy.unroll(rows.observation, rows.state, never).output_TNH)
        if rows.action_mask is not None:
            values = values.masked_fill(~rows.action_mask, -torch.inf)
        for t in range(L + 1):
            seen = {name: value[t] for name, value in rows.observation.items()}
            noise = policy.noise.draw((M,), np.random.default_rng(t), 0.5)
            allowed = None if rows.action_mask is None else rows.action_mask[t]
            best, _ = policy.greedy_step(seen, state, allowed)
            assert torch.equal(best, values[t].argmax(1))
            chosen, log_prob, state = policy.step(seen, state, torch.from_numpy(noise), allowed)
            assert log_prob is None
            random = noise[:, 0] < 0
            assert torch.equal(chosen[~torch.from_numpy(random)], best[~torch.from_numpy(random)])
            found, _, quick = fast.step(
                {"observation": seen["observation"].numpy()}, quick, noise, None if allowed is None else allowed.numpy()
            )
            np.testing.assert_array_equal(found, chosen)
    for name, value in state.items():
        np.testing.assert_allclose(quick[name], value, rtol=1e-4, atol=1e-5)


def test_without_a_state_it_answers_as_at_an_episodes_first_row() -> None:
    policy = made(R2D2Config()).policy
    seen = {"observation": torch.randn(M, 4, generator=torch.Generator().manual_seed(0))}
    with torch.inference_mode():
        assert torch.equal(policy.greedy(seen), policy.greedy_step(seen, policy.initial_state(M))[0])
    assert [field.name for field in policy.fields()] == ["action", "policy_state/h", "policy_state/c"]


# ---- learning --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", MEMORIES)
def test_it_learns_to_answer_what_was_shown_rows_before(memory: str) -> None:
    """A cue at an episode's first row, asked for at its fourth; actions are random, and states are stored at any of its rows."""
    algorithm = made(R2D2Config(learning_rate=5e-3, target_tau=0.1), memory, size=16)
    policy, rng, num, length = algorithm.policy, np.random.default_rng(0), 32, 4

    def lit(cue: np.ndarray[Any, Any]) -> Tensor:
        rows = np.zeros((length, len(cue), 4), np.float32)
        rows[0, np.arange(len(cue)), cue] = rows[-1, :, 3] = 1.0
        return torch.from_numpy(rows)

    for _ in range(250):
        cue = rng.integers(0, A, (3, num))
        seen = torch.cat([lit(each) for each in cue])[: L + 1]
        action = rng.integers(0, A, (L, num))
        ask = np.arange(L) % length == length - 1
        right = (action == cue.repeat(length, 0)[:L]) & ask[:, None]
        begins = np.repeat((np.arange(L + 1) % length == 0)[:, None], num, 1)
        rows = SequenceRows(
            BURN_IN, {"observation": seen}, None, torch.from_numpy(action), torch.from_numpy(begins), torch.ones(L, num, dtype=torch.bool),
            torch.from_numpy(right.astype(np.float32)), torch.from_numpy(np.where(ask, 0.0, 0.9).astype(np.float32))[:, None].repeat(1, num),
            torch.arange(1, L + 1)[:, None].repeat(1, num), policy.initial_state(num), torch.ones(num),
        )  # fmt: skip
        algorithm.learn(rows, context())
    cue, state = np.arange(A), policy.initial_state(A)
    with torch.inference_mode():
        for row in lit(cue):
            answer, state = policy.greedy_step({"observation": row}, state)
    assert answer.tolist() == cue.tolist()
