"""V-trace. Legend: T time, B environments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shoal.ops.returns import backward_sum, check_same_shape


class VTrace(NamedTuple):
    """Value targets v_t and policy-gradient advantages (clipped rho included): float32 [T, B], without gradient."""

    target_TB: Tensor
    advantage_TB: Tensor


def vtrace(
    value_TB: Tensor,
    next_value_TB: Tensor,
    reward_TB: Tensor,
    discount_TB: Tensor,
    ended_TB: Tensor,
    log_rho_TB: Tensor,
    *,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
    lambda_: float = 1.0,
) -> VTrace:
    """V-trace targets and policy-gradient advantages (Espeholt et al. 2018, arXiv:1802.01561, eq. 1).

    With rho = c = 1 (on-policy, lambda as in remark 2) the advantages are those of `gae` and the targets its lambda-returns: the successor's
    value in the advantage is lambda * v_{t+1} + (1 - lambda) * V(x_{t+1}), as in rlax; lambda = 1 is the paper's.

    Args:
      value_TB: [T, B] float32, V(x_t) of the current policy, in return units.
      next_value_TB: [T, B] float32, V of the true successor of x_t: the last observation of an episode that was truncated there.
      reward_TB: [T, B] float32.
      discount_TB: [T, B] float32, gamma * (1 - terminated_t); 0 stops the bootstrap.
      ended_TB: [T, B] bool, terminated or truncated at t (or the rollout was closed there): cuts the trace, since row t + 1 does not follow.
      log_rho_TB: [T, B] float32, log pi(a|x) - log mu(a|x).
      clip_rho: the paper's rho-bar, of the temporal difference and of the advantage: sets what the targets converge to.
      clip_c: the paper's c-bar: how far corrections travel back in time.
      lambda_: factor of c.
    Returns:
      VTrace(target_TB, advantage_TB), both float32 [T, B], without gradient.
    Raises:
      ShapeError: if shapes differ.
    """
    check_same_shape(
        value_TB=value_TB,
        next_value_TB=next_value_TB,
        reward_TB=reward_TB,
        discount_TB=discount_TB,
        ended_TB=ended_TB,
        log_rho_TB=log_rho_TB,
    )
    with torch.no_grad():
        ratio_TB = log_rho_TB.exp()
        rho_TB, c_TB = ratio_TB.clamp(max=clip_rho), lambda_ * ratio_TB.clamp(max=clip_c)
        delta_TB = reward_TB + discount_TB * next_value_TB - value_TB
        error_TB = backward_sum(rho_TB * delta_TB, (discount_TB * c_TB).masked_fill(ended_TB, 0.0))  # v_t - V(x_t)
        later_TB = torch.zeros_like(error_TB)
        later_TB[:-1] = error_TB[1:].masked_fill(ended_TB[:-1], 0.0)  # v_{t+1} - V(x_{t+1})
        advantage_TB = rho_TB * (delta_TB + discount_TB * lambda_ * later_TB)
        return VTrace(error_TB + value_TB, advantage_TB)
