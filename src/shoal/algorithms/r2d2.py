"""R2D2: Q-learning with a memory, on sequences with the state that the actor had (Kapturowski et al. 2019, openreview.net/forum?id=r1lyTjAqYX).

Double, duelling, n-step and prioritised, as algorithms/dqn.py, with values learned in a scale that compresses large ones (Pohlen et al. 2018,
arXiv:1805.11593). The first rows of a sequence only bring the recurrent state up to the weights as they are now; only the rest is trained.

Legend: L rows of a sequence, R of them behind the burn-in, M sequences, A actions, H units of the memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shoal.algorithms.base import Optimizer, UpdateContext, schedule
from shoal.algorithms.dqn import epsilon_at_end, epsilon_of
from shoal.algorithms.off_policy import Beginning, Metrics, OffPolicyAlgorithm, SequenceRows, Target
from shoal.config import R2D2Config
from shoal.networks.acting import NetworkKind
from shoal.networks.off_policy import MASKED_VALUE
from shoal.networks.recurrent_q import RecurrentQPolicy


class Loss(NamedTuple):
    """The mean over trained rows, its derivative by what was predicted [R, M], and each sequence's priority [M]."""

    loss: Tensor
    gradient_RM: Tensor
    priority_M: Tensor


def rescaled(value: Tensor, epsilon: float) -> Tensor:
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + epsilon x."""
    return value.sign() * ((value.abs() + 1.0).sqrt() - 1.0) + epsilon * value


def unscaled(value: Tensor, epsilon: float) -> Tensor:
    """The inverse of `rescaled`, written without the difference of nearly equal numbers (and so for epsilon 0 too)."""
    beyond = value.abs() + (1.0 + epsilon)
    root = 2.0 * beyond / ((1.0 + 4.0 * epsilon * beyond).sqrt() + 1.0)
    return value.sign() * (root.square() - 1.0)


def r2d2_loss(value_RM: Tensor, target_RM: Tensor, trained_RM: Tensor, weight_M: Tensor, eta: float) -> Loss:
    """Half the squared temporal difference, over the rows of `trained_RM` (bool). Priority: eta max + (1 - eta) mean of its size in the sequence."""
    error = torch.where(trained_RM, value_RM - target_RM, 0.0)
    gradient = error * weight_M / trained_RM.sum().clamp(min=1)
    size = error.abs()
    mean_M = size.sum(0) / trained_RM.sum(0).clamp(min=1)
    return Loss(0.5 * (gradient * error).sum(), gradient, eta * size.amax(0) + (1.0 - eta) * mean_M)


def double_q_target(
    return_RM: Tensor,
    discount_RM: Tensor,
    successor_RM: Tensor,
    ranked_R1MA: Tensor,
    valued_R1MA: Tensor,
    action_mask_R1MA: Tensor | None,
    epsilon: float | None,
) -> Tensor:
    """n-step targets [R, M]: the action that `ranked` likes best at the successor, with the value that `valued` gives it.

    epsilon: of the scale that values are learned in; None: their own.
    """
    if action_mask_R1MA is not None:
        ranked_R1MA = ranked_R1MA.masked_fill(~action_mask_R1MA, MASKED_VALUE)
    best_R1M = ranked_R1MA.max(2, keepdim=True).indices
    next_RM = valued_R1MA.gather(2, best_R1M).squeeze(2).gather(0, successor_RM)
    if epsilon is None:
        return torch.addcmul(return_RM, discount_RM, next_RM)
    return rescaled(torch.addcmul(return_RM, discount_RM, unscaled(next_RM, epsilon)), epsilon)


@torch.no_grad()
def warmed(policy: RecurrentQPolicy, rows: SequenceRows) -> dict[str, Tensor]:
    """The state [M, H] before the first row behind the burn-in, by the weights as they are, without gradient."""
    if not rows.burn_in:
        return rows.state
    first = {name: value[: rows.burn_in] for name, value in rows.observation.items()}
    unrolled = policy.unroll(first, rows.state, rows.begins_L1M[: rows.burn_in])
    return {name: value[-1] for name, value in unrolled.states.items()}


class R2D2(OffPolicyAlgorithm[R2D2Config]):
    """The target network is part of the algorithm's state; the policy on the board is the online network. Both burn in on their own."""

    Config = R2D2Config
    remembers = shares = True
    policy: RecurrentQPolicy

    def __init__(self, policy: RecurrentQPolicy, config: R2D2Config) -> None:
        super().__init__(policy, config)
        self.optimizer = Optimizer.of(policy, config)
        self.target = Target(policy)

    @classmethod
    def network(cls, config: R2D2Config) -> NetworkKind:
        return NetworkKind("q", {"duelling": config.duelling, "epsilon": epsilon_at_end(config)})

    @classmethod
    def epsilon(cls, config: R2D2Config, beginning: Beginning) -> float:
        return epsilon_of(config, beginning)

    def learn(self, rows: SequenceRows, context: UpdateContext) -> tuple[Metrics, Tensor | None]:
        config, begin = self.config, rows.burn_in
        value_R1MA = self._values(self.policy, rows)
        ranked_R1MA = value_R1MA.detach()
        with torch.no_grad():
            valued_R1MA = self._values(self.target.module, rows)
            target_RM = double_q_target(
                rows.return_LM[begin:],
                rows.discount_LM[begin:],
                rows.successor_LM[begin:] - begin,
                ranked_R1MA if config.double else valued_R1MA,
                valued_R1MA,
                None if rows.action_mask is None else rows.action_mask[begin:],
                config.rescaling,
            )
            trained_RM = rows.valid_LM[begin:]
        chosen_RM = value_R1MA[:-1].gather(2, rows.action[begin:].unsqueeze(2)).squeeze(2)
        loss = r2d2_loss(chosen_RM.detach(), target_RM, trained_RM, rows.weight_M, config.priority_eta)
        gradients = torch.autograd.grad(chosen_RM, self.optimizer.parameters, loss.gradient_RM, allow_unused=True, materialize_grads=True)
        learning_rate = schedule(config.learning_rate, config.learning_rate_schedule, context.progress)
        grad_norm = self.optimizer.descend(gradients, learning_rate, loss.loss, rows.share)
        self.target.follow_by(config, self.optimizer)
        metrics: Metrics = {"loss": loss.loss, "grad_norm": grad_norm, "td_error": loss.priority_M, "learning_rate": learning_rate}
        metrics["q_mean"] = chosen_RM.detach()[trained_RM]
        return metrics, loss.priority_M

    @staticmethod
    def _values(policy: RecurrentQPolicy, rows: SequenceRows) -> Tensor:
        """Action values of the rows behind the burn-in and of the one after them, [R+1, M, A]."""
        begin = rows.burn_in
        rest = {name: value[begin:] for name, value in rows.observation.items()}
        unrolled = policy.unroll(rest, warmed(policy, rows), rows.begins_L1M[begin:])
        return policy.unrolled_values(unrolled.output_TNH)

    def optimizers(self) -> dict[str, Optimizer]:
        return {"": self.optimizer}

    def vectors(self) -> dict[str, Tensor]:
        return {"target": self.target.flat}
