"""The same mathematics as slowly and literally as the papers write it: python floats, double loops, no recursion.

Legend: T time, B environments.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def segment_end(ended: Array, t: int) -> int:
    """Last row that belongs to the trace of row t."""
    for s in range(t, len(ended)):
        if ended[s]:
            return s
    return len(ended) - 1


def gae(value: Array, next_value: Array, reward: Array, discount: Array, ended: Array, lambda_: float) -> tuple[Array, Array]:
    """A_t = sum_l (prod of lambda * discount) delta_{t+l} (Schulman et al. 2015, eq. 16), one column after another."""
    advantage = np.zeros(value.shape)
    for b in range(value.shape[1]):
        for t in range(value.shape[0]):
            for s in range(t, segment_end(ended[:, b], t) + 1):
                delta = reward[s, b] + discount[s, b] * next_value[s, b] - value[s, b]
                weight = math.prod(lambda_ * discount[i, b] for i in range(t, s))
                advantage[t, b] += weight * delta
    return advantage, advantage + value


def vtrace(
    value: Array,
    next_value: Array,
    reward: Array,
    discount: Array,
    ended: Array,
    log_rho: Array,
    clip_rho: float,
    clip_c: float,
    lambda_: float,
) -> tuple[Array, Array]:
    """v_s = V(x_s) + sum_t gamma^{t-s} (prod c_i) rho_t delta_t (Espeholt et al. 2018, eq. 1), advantages as in section 4.2 and rlax."""
    T, B = value.shape
    target, advantage = np.zeros((T, B)), np.zeros((T, B))
    for b in range(B):
        for s in range(T):
            target[s, b] = value[s, b]
            for t in range(s, segment_end(ended[:, b], s) + 1):
                rho = min(clip_rho, math.exp(log_rho[t, b]))
                delta = rho * (reward[t, b] + discount[t, b] * next_value[t, b] - value[t, b])
                trace = math.prod(discount[i, b] * lambda_ * min(clip_c, math.exp(log_rho[i, b])) for i in range(s, t))
                target[s, b] += trace * delta
        for s in range(T):
            follows = s + 1 < T and not ended[s, b]
            # the successor's target in place of its value, as far as the trace goes
            successor = next_value[s, b] + (lambda_ * (target[s + 1, b] - value[s + 1, b]) if follows else 0.0)
            rho = min(clip_rho, math.exp(log_rho[s, b]))
            advantage[s, b] = rho * (reward[s, b] + discount[s, b] * successor - value[s, b])
    return target, advantage


def softmax(logits: Array, mask: Array) -> Array:
    """Probabilities of one row; 0 where masked."""
    weights = [math.exp(x) if allowed else 0.0 for x, allowed in zip(logits, mask, strict=True)]
    return np.array(weights) / sum(weights)


def entropy(probabilities: Array) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)
