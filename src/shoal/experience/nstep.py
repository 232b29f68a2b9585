"""n-step returns of sampled steps, from the rewards that follow them.

numpy, and no tensors: it runs where the replay does. Legend: M sampled steps, n steps of a return at most.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shoal.types import Array


class NStep(NamedTuple):
    """return_M: float32, sum over j < k of gamma^j r_{t+j}. length_M: int64, k, from 1 to n. discount_M: float64, gamma^k."""

    return_M: Array
    length_M: Array
    discount_M: Array


def n_step(reward_nM: Array, stop_nM: Array, gamma: float) -> NStep:
    """Returns of up to n steps (Sutton and Barto 2018, eq. 7.1) that go no further than the first row that stops them.

    Args:
      reward_nM: [n, M], r_t to r_{t+n-1}; what follows the first stop means nothing.
      stop_nM: bool [n, M], nothing is summed beyond this row: its episode ends there, or what follows is not known. Whether to
        bootstrap from its successor (the true last observation of a truncated episode) is the caller's to say.
    Returns:
      NStep, of which `length_M - 1` is the last row that was summed; its successor is what to bootstrap from, with `discount_M`.
    """
    n, num = reward_nM.shape
    power_n = gamma ** np.arange(n + 1, dtype=np.float64)
    return_M, length_M, going_M = np.zeros(num), np.zeros(num, np.int64), np.ones(num, np.bool_)
    for reward_M, stop_M, power in zip(reward_nM, stop_nM, power_n, strict=False):
        np.add(return_M, power * reward_M, out=return_M, where=going_M)
        length_M += going_M
        going_M &= ~stop_M
    return NStep(return_M.astype(np.float32), length_M, power_n[length_M])
