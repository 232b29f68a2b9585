"""Generalised advantage estimation. Legend: T time, B environments."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from shoal.ops.returns import backward_sum, check_same_shape


class GAE(NamedTuple):
    """advantage_TB and target_TB = advantage + value (the lambda-return): float32 [T, B], without gradient."""

    advantage_TB: Tensor
    target_TB: Tensor


def gae(value_TB: Tensor, next_value_TB: Tensor, reward_TB: Tensor, discount_TB: Tensor, ended_TB: Tensor, *, lambda_: float) -> GAE:
    """Advantages as an exponential average of n-step advantages (Schulman et al. 2015, arXiv:1506.02438, eq. 16).

    Args:
      value_TB: [T, B] float32, V(x_t), in return units.
      next_value_TB: [T, B] float32, V of the true successor of x_t: the last observation of an episode that was truncated there.
      reward_TB: [T, B] float32.
      discount_TB: [T, B] float32, gamma * (1 - terminated_t); 0 stops the bootstrap.
      ended_TB: [T, B] bool, terminated or truncated at t (or the rollout was closed there): cuts the trace, since row t + 1 does not follow.
      lambda_: 0 gives one-step advantages, 1 those of the whole return.
    Returns:
      GAE(advantage_TB, target_TB).
    Raises:
      ShapeError: if shapes differ.
    """
    check_same_shape(value_TB=value_TB, next_value_TB=next_value_TB, reward_TB=reward_TB, discount_TB=discount_TB, ended_TB=ended_TB)
    delta_TB = reward_TB + discount_TB * next_value_TB - value_TB
    decay_TB = (lambda_ * discount_TB).masked_fill(ended_TB, 0.0)
    advantage_TB = backward_sum(delta_TB, decay_TB)
    return GAE(advantage_TB, advantage_TB + value_TB.detach())
