"""GAE against the paper's sum, and its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ShapeError
from shoal.ops.gae import gae

from . import oracles


def random_case(seed: int, T: int, B: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    ended = rng.random((T, B)) < 0.25
    terminated = ended & (rng.random((T, B)) < 0.5)
    value = rng.normal(size=(T, B))
    follows = np.concatenate([value[1:], rng.normal(size=(1, B))])
    return {
        "value": value,
        "next_value": np.where(ended, rng.normal(size=(T, B)), follows),
        "reward": rng.normal(size=(T, B)),
        "discount": np.where(terminated, 0.0, 0.97),
        "ended": ended,
    }


def tensors(case: dict[str, np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(v if v.dtype == np.bool_ else v.astype(np.float32)) for v in case.values()]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), T=st.integers(1, 12), B=st.integers(1, 4), lambda_=st.sampled_from([0.0, 0.3, 0.95, 1.0]))
def test_equals_the_papers_sum(seed: int, T: int, B: int, lambda_: float) -> None:
    case = random_case(seed, T, B)
    advantage, target = oracles.gae(**case, lambda_=lambda_)
    found = gae(*tensors(case), lambda_=lambda_)
    np.testing.assert_allclose(found.advantage_TB.numpy(), advantage, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.target_TB.numpy(), target, rtol=1e-5, atol=1e-5)
    assert found.advantage_TB.dtype == found.target_TB.dtype == torch.float32


def test_by_hand() -> None:
    """gamma 1/2, lambda 1/2: every number is exact in binary."""
    column = [torch.tensor(x)[:, None] for x in ([1.0, 2.0, 4.0], [2.0, 4.0, 8.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5])]
    ended = torch.zeros(3, 1, dtype=torch.bool)
    advantage, target = gae(*column, ended, lambda_=0.5)
    # delta = 1 + next / 2 - value = 1, 1, 1
    assert advantage.flatten().tolist() == [1.3125, 1.25, 1.0]
    assert target.flatten().tolist() == [2.3125, 3.25, 5.0]


def test_what_comes_after_an_end_does_not_reach_back() -> None:
    case = random_case(3, 6, 2)
    case["ended"][:] = False
    case["ended"][2] = True
    before = gae(*tensors(case), lambda_=0.9).advantage_TB[:3]
    case["reward"][3:] += 100.0
    after = gae(*tensors(case), lambda_=0.9).advantage_TB
    assert torch.equal(before, after[:3])
    case["ended"][2] = False
    assert not torch.equal(before, gae(*tensors(case), lambda_=0.9).advantage_TB[:3])


def test_truncation_bootstraps_and_termination_does_not() -> None:
    one = torch.ones(1, 1)
    ended = torch.ones(1, 1, dtype=torch.bool)
    truncated, _ = gae(0 * one, 10 * one, one, 0.9 * one, ended, lambda_=0.95)
    terminated, _ = gae(0 * one, 10 * one, one, 0.0 * one, ended, lambda_=0.95)
    assert truncated.item() == pytest.approx(10.0)
    assert terminated.item() == 1.0


def test_a_perfect_critic_leaves_no_advantage() -> None:
    """V = sum of discounted rewards to the end."""
    reward = torch.arange(1.0, 6.0)[:, None]
    value = torch.zeros(6, 1)
    for t in range(4, -1, -1):
        value[t] = reward[t] + 0.9 * value[t + 1]
    ended = torch.tensor([[False]] * 4 + [[True]])
    discount = torch.where(ended, 0.0, 0.9)
    for lambda_ in (0.0, 0.5, 1.0):
        advantage, target = gae(value[:-1], value[1:], reward, discount, ended, lambda_=lambda_)
        assert advantage.abs().max() < 1e-5
        torch.testing.assert_close(target, value[:-1])


def test_columns_do_not_mix() -> None:
    case = random_case(5, 7, 3)
    together = gae(*tensors(case), lambda_=0.8)
    for b in range(3):
        alone = gae(*tensors({k: v[:, b : b + 1] for k, v in case.items()}), lambda_=0.8)
        assert torch.equal(alone.advantage_TB[:, 0], together.advantage_TB[:, b])


def test_no_gradient_flows_and_inputs_stay() -> None:
    case = tensors(random_case(1, 4, 2))
    case[0].requires_grad_()
    copies = [tensor.detach().clone() for tensor in case]
    result = gae(*case, lambda_=0.9)
    assert not result.advantage_TB.requires_grad
    assert not result.target_TB.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(case, copies, strict=True))


@pytest.mark.parametrize("place", range(5))
def test_a_wrong_shape_is_named(place: int) -> None:
    case = tensors(random_case(1, 4, 2))
    case[place] = case[place][:, :1]
    with pytest.raises(ShapeError, match=r"one shape \[T, B\], got value_TB \(4, .*next_value_TB .*reward_TB .*discount_TB .*ended_TB \(4"):
        gae(*case, lambda_=0.9)


def test_rank_must_be_two() -> None:
    with pytest.raises(ShapeError):
        gae(*[tensor[0] for tensor in tensors(random_case(1, 4, 2))], lambda_=0.9)
