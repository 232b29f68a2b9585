"""V-trace against the paper's sum, and its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ShapeError
from shoal.ops.gae import gae
from shoal.ops.vtrace import vtrace

from . import oracles
from .test_gae import random_case, tensors


def off_policy_case(seed: int, T: int, B: int) -> dict[str, np.ndarray]:
    return {**random_case(seed, T, B), "log_rho": np.random.default_rng(seed + 1).normal(size=(T, B))}


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    T=st.integers(1, 10),
    B=st.integers(1, 3),
    clips=st.sampled_from([(1.0, 1.0), (2.0, 0.5), (0.7, 1.3), (50.0, 50.0)]),
    lambda_=st.sampled_from([0.0, 0.6, 1.0]),
)
def test_equals_the_papers_sum(seed: int, T: int, B: int, clips: tuple[float, float], lambda_: float) -> None:
    case = off_policy_case(seed, T, B)
    clip_rho, clip_c = clips
    target, advantage = oracles.vtrace(**case, clip_rho=clip_rho, clip_c=clip_c, lambda_=lambda_)
    found = vtrace(*tensors(case), clip_rho=clip_rho, clip_c=clip_c, lambda_=lambda_)
    np.testing.assert_allclose(found.target_TB.numpy(), target, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(found.advantage_TB.numpy(), advantage, rtol=2e-4, atol=2e-4)
    assert found.target_TB.dtype == found.advantage_TB.dtype == torch.float32


def test_defaults_are_the_papers() -> None:
    case = off_policy_case(11, 9, 3)
    target, advantage = oracles.vtrace(**case, clip_rho=1.0, clip_c=1.0, lambda_=1.0)
    found = vtrace(*tensors(case))
    np.testing.assert_allclose(found.target_TB.numpy(), target, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.advantage_TB.numpy(), advantage, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
def test_on_policy_it_is_gae(lambda_: float) -> None:
    case = tensors(random_case(7, 20, 4))
    found = vtrace(*case, torch.zeros(20, 4), lambda_=lambda_)
    advantage, target = gae(*case, lambda_=lambda_)
    torch.testing.assert_close(found.advantage_TB, advantage, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.target_TB, target, rtol=1e-4, atol=1e-5)


def test_by_hand() -> None:
    """Two rows, rho = 1/2 then 2 (clipped to 1), gamma 1/2: every number is exact in binary."""
    value, next_value = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]])
    reward, discount = torch.tensor([[1.0], [3.0]]), torch.full((2, 1), 0.5)
    ended, log_rho = torch.zeros(2, 1, dtype=torch.bool), torch.log(torch.tensor([[0.5], [2.0]]))
    target, advantage = vtrace(value, next_value, reward, discount, ended, log_rho)
    # delta = 1 + 1 - 1 = 1 and 3 + 2 - 2 = 3; v_1 = 2 + 3 = 5; v_0 = 1 + 0.5 * 1 + 0.5 * 0.5 * 3 = 2.25
    torch.testing.assert_close(target, torch.tensor([[2.25], [5.0]]))
    # A_0 = 0.5 * (1 + 0.5 * 5 - 1), A_1 = 3 + 0.5 * 4 - 2
    torch.testing.assert_close(advantage, torch.tensor([[1.25], [3.0]]))


def test_what_comes_after_an_end_does_not_reach_back() -> None:
    case = off_policy_case(3, 6, 2)
    case["ended"][:] = False
    case["ended"][2] = True
    before = vtrace(*tensors(case))
    case["reward"][3:] += 100.0
    after = vtrace(*tensors(case))
    assert torch.equal(before.target_TB[:3], after.target_TB[:3])
    assert torch.equal(before.advantage_TB[:3], after.advantage_TB[:3])
    assert not torch.equal(before.target_TB[3:], after.target_TB[3:])


def test_an_impossible_action_teaches_nothing() -> None:
    case = tensors(off_policy_case(5, 4, 1))
    case[-1][:] = -1e8
    target, advantage = vtrace(*case)
    assert torch.equal(target, case[0])
    assert (advantage == 0).all()


def test_a_huge_ratio_is_clipped_not_infinite() -> None:
    case = tensors(off_policy_case(5, 4, 2))
    case[-1][:] = 1e4
    clipped = vtrace(*case)
    case[-1][:] = 0.0
    torch.testing.assert_close(clipped, vtrace(*case))


def test_no_gradient_flows() -> None:
    case = tensors(off_policy_case(1, 4, 2))
    case[0].requires_grad_()
    case[-1].requires_grad_()
    result = vtrace(*case)
    assert not result.target_TB.requires_grad
    assert not result.advantage_TB.requires_grad


@pytest.mark.parametrize("place", range(6))
def test_a_wrong_shape_is_named(place: int) -> None:
    case = tensors(off_policy_case(1, 4, 2))
    case[place] = case[place][:3]
    with pytest.raises(ShapeError, match=r"value_TB \(.*next_value_TB .*reward_TB .*discount_TB .*ended_TB .*log_rho_TB \("):
        vtrace(*case)
