"""Discounted returns: per column, across rollouts, over ends and rows that are no steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ShapeError
from shoal.ops.returns import backward_sum, check_same_shape, discounted_returns


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), T=st.integers(1, 12), B=st.integers(1, 4), gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_equals_the_sum_since_the_episode_began(seed: int, T: int, B: int, gamma: float) -> None:
    rng = np.random.default_rng(seed)
    reward, ended, carry = rng.normal(size=(T, B)), rng.random((T, B)) < 0.3, rng.normal(size=B)
    found, after = discounted_returns(reward, ended, carry, gamma)
    for b in range(B):
        for t in range(T):
            begin = max([s + 1 for s in range(t) if ended[s, b]], default=0)
            expected = sum(gamma ** (t - s) * reward[s, b] for s in range(begin, t + 1))
            expected += gamma ** (t + 1) * carry[b] if begin == 0 else 0.0
            assert found[t, b] == pytest.approx(expected, abs=1e-12)
        assert after[b] == (0.0 if ended[-1, b] else found[-1, b])
    assert found.dtype == after.dtype == np.float64


def test_two_rollouts_equal_one_long_one() -> None:
    rng = np.random.default_rng(1)
    reward, ended = rng.normal(size=(10, 3)), rng.random((10, 3)) < 0.2
    whole, end = discounted_returns(reward, ended, np.zeros(3), 0.9)
    first, carry = discounted_returns(reward[:4], ended[:4], np.zeros(3), 0.9)
    second, carry = discounted_returns(reward[4:], ended[4:], carry, 0.9)
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)
    np.testing.assert_array_equal(carry, end)


def test_rows_that_are_no_steps_change_nothing() -> None:
    reward = np.array([[1.0], [50.0], [2.0], [70.0]])
    valid = np.array([[True], [False], [True], [False]])
    found, carry = discounted_returns(reward, np.zeros((4, 1), np.bool_), np.array([4.0]), 0.5, valid_TB=valid)
    assert found.flatten().tolist() == [3.0, 3.0, 3.5, 3.5]
    assert carry.tolist() == [3.5]


def test_all_valid_is_the_default() -> None:
    rng = np.random.default_rng(2)
    reward, ended, carry = rng.normal(size=(6, 2)), rng.random((6, 2)) < 0.3, rng.normal(size=2)
    for a, b in zip(
        discounted_returns(reward, ended, carry, 0.9),
        discounted_returns(reward, ended, carry, 0.9, valid_TB=np.ones((6, 2), np.bool_)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_float32_rewards_are_summed_in_float64_and_inputs_stay() -> None:
    reward, carry = np.full((3, 1), 0.1, np.float32), np.array([1.0])
    found, after = discounted_returns(reward, np.zeros((3, 1), np.bool_), carry, 1.0)
    assert found[2, 0] == 1.0 + float(np.float32(0.1)) + float(np.float32(0.1)) + float(np.float32(0.1))
    after += 1
    assert carry.tolist() == [1.0]


def test_no_rows_give_the_carry_back() -> None:
    before = np.array([1.0, 2.0])
    found, carry = discounted_returns(np.zeros((0, 2)), np.zeros((0, 2), np.bool_), before, 0.9)
    assert found.shape == (0, 2)
    assert carry.tolist() == [1.0, 2.0]
    carry += 1.0
    assert before.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("reward", "ended", "carry", "valid"),
    [((3,), (3,), (), None), ((3, 2), (3, 1), (2,), None), ((3, 2), (3, 2), (3,), None), ((3, 2), (3, 2), (2,), (3, 1))],
)
def test_a_wrong_shape_is_refused(reward: tuple, ended: tuple, carry: tuple, valid: tuple | None) -> None:
    mask = None if valid is None else np.ones(valid, np.bool_)
    with pytest.raises(ShapeError, match=r"expected .*TB.*got"):
        discounted_returns(np.zeros(reward), np.zeros(ended, np.bool_), np.zeros(carry), 0.9, valid_TB=mask)


def test_backward_sum_by_hand() -> None:
    term, decay = torch.tensor([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]), torch.tensor([[0.5, 1.0], [0.0, 1.0], [9.0, 9.0]])
    assert backward_sum(term, decay).tolist() == [[2.0, 7.0], [2.0, 6.0], [4.0, 4.0]]


def test_backward_sum_of_nothing_is_nothing() -> None:
    assert backward_sum(torch.zeros(0, 2), torch.zeros(0, 2)).shape == (0, 2)


def test_backward_sum_takes_any_memory_layout() -> None:
    rng = np.random.default_rng(3)
    term, decay = torch.from_numpy(rng.normal(size=(5, 3))), torch.from_numpy(rng.normal(size=(5, 3)))
    strided = backward_sum(term.t().contiguous().t(), decay.t().contiguous().t())
    assert torch.equal(strided, backward_sum(term, decay))


def test_same_shapes_pass_and_the_message_names_each() -> None:
    check_same_shape(a=torch.zeros(2, 3), b=torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"^expected tensors of one shape \[T, B\], got a \(2, 3\), b \(3, 2\)$"):
        check_same_shape(a=torch.zeros(2, 3), b=torch.zeros(3, 2))


def test_returns_are_float64_whatever_comes_in():
    reward_TB = np.full((3, 1), 0.1, np.float32)
    returns, carry = discounted_returns(reward_TB, np.zeros((3, 1), np.bool_), np.zeros(1, np.int64), 1.0)
    assert returns.dtype == carry.dtype == np.float64
    assert carry.tolist() == [float(np.float32(0.1)) + float(np.float32(0.1)) + float(np.float32(0.1))]
    first, _ = discounted_returns(np.ones((1, 1), np.int64), np.zeros((1, 1), np.bool_), np.zeros(1, np.float32), 0.1)
    assert first.dtype == np.float64
    _, kept = discounted_returns(np.zeros((0, 1)), np.zeros((0, 1), np.bool_), np.ones(1, np.float32), 0.1)
    assert kept.dtype == np.float64
