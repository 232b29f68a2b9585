"""Deep Q-learning (Mnih et al. 2015, doi:10.1038/nature14236), with what Rainbow found worth its place (Hessel et al. 2018, arXiv:1710.02298).

Double (arXiv:1509.06461), duelling (arXiv:1511.06581), n-step and prioritised (arXiv:1511.05952) by default; C51 (arXiv:1707.06887) or quantile
regression (arXiv:1710.10044) as options. With async actors and one epsilon for each group it is Ape-X (Horgan et al. 2018, arXiv:1803.00933).

Legend: M rows, A actions, Z atoms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.algorithms.base import Optimizer, UpdateContext, schedule
from shoal.algorithms.off_policy import Beginning, Metrics, OffPolicyAlgorithm, Target, Transitions
from shoal.config import DQNConfig, QConfig
from shoal.networks.acting import NetworkKind
from shoal.networks.off_policy import MASKED_VALUE, QPolicy


class Loss(NamedTuple):
    """The mean over rows, its derivative by what was predicted (as that is shaped), and each row's priority [M]."""

    loss: Tensor
    gradient: Tensor
    priority_M: Tensor


def huber_loss(value_M: Tensor, target_M: Tensor, weight_M: Tensor) -> Loss:
    """Squared temporal difference, linear beyond 1 (the clipped error of Mnih et al. 2015). Priority: the difference's size."""
    error = value_M - target_M
    clipped = error.clamp(-1.0, 1.0)
    gradient = (weight_M * clipped).mul_(1.0 / len(error))
    loss = torch.dot(gradient, error.sub(clipped, alpha=0.5))  # clipped * (error - clipped / 2)
    return Loss(loss, gradient, error.abs_())


def projected(probability_MZ: Tensor, support: Tensor, return_M: Tensor, discount_M: Tensor) -> Tensor:
    """The distribution of return + discount * Z on the atoms of `support` (evenly spaced), [M, Z] (Bellemare et al. 2017, algorithm 1)."""
    low, high = support[0], support[-1]
    shifted = (return_M.unsqueeze(1) + discount_M.unsqueeze(1) * support).clamp(low, high)
    place = (shifted - low) * ((len(support) - 1) / (high - low))
    near = (1.0 - (place.unsqueeze(1) - torch.arange(len(support), device=place.device).view(1, -1, 1)).abs()).clamp_(min=0.0)
    return (near * probability_MZ.unsqueeze(1)).sum(2)


def c51_loss(logits_MZ: Tensor, target_MZ: Tensor, weight_M: Tensor) -> Loss:
    """Cross entropy to the projected distribution. Priority: the Kullback-Leibler divergence."""
    log_probability = torch.log_softmax(logits_MZ, 1)
    entropy_M = -torch.special.xlogy(target_MZ, target_MZ).sum(1)
    crossed_M = -(target_MZ * log_probability).sum(1)
    gradient = (log_probability.exp() - target_MZ) * (weight_M / len(weight_M)).unsqueeze(1)
    return Loss((weight_M * crossed_M).mean(), gradient, (crossed_M - entropy_M).clamp_(min=0.0))


def quantile_loss(quantile_MZ: Tensor, target_MZ: Tensor, weight_M: Tensor) -> Loss:
    """Quantile Huber loss with threshold 1 (Dabney et al. 2018, eq. 10): summed over quantiles, mean over the target's. Priority: each row's."""
    num = quantile_MZ.shape[1]
    error = target_MZ.unsqueeze(1) - quantile_MZ.unsqueeze(2)  # [M, quantile, target's]
    midpoint = ((torch.arange(num, device=error.device) + 0.5) / num).view(1, -1, 1)
    side, clipped = (midpoint - (error < 0).float()).abs(), error.clamp(-1.0, 1.0)
    row_M = (side * clipped * (error - 0.5 * clipped)).mean(2).sum(1)
    gradient = -(side * clipped).mean(2) * (weight_M / len(weight_M)).unsqueeze(1)
    return Loss((weight_M * row_M).mean(), gradient, row_M)


def epsilon_annealed(config: QConfig, env_steps: int) -> float:
    """From epsilon_initial to epsilon_final in a line over epsilon_env_steps."""
    done = min(1.0, env_steps / config.epsilon_env_steps)
    return config.epsilon_initial + done * (config.epsilon_final - config.epsilon_initial)


def epsilon_ladder(config: QConfig, group: int, num_groups: int) -> float:
    """Group i of N: epsilon_base ^ (1 + i / (N - 1) * epsilon_exponent) (Horgan et al. 2018, section 4.1)."""
    place = group / (num_groups - 1) if num_groups > 1 else 0.0
    return float(config.epsilon_base ** (1.0 + place * config.epsilon_exponent))


def epsilon_of(config: QConfig, beginning: Beginning) -> float:
    """Of a rollout, as the configuration says."""
    if config.epsilon == "ladder":
        return epsilon_ladder(config, beginning.group, beginning.num_groups)
    return epsilon_annealed(config, beginning.env_steps)


def epsilon_at_end(config: QConfig) -> float:
    """What training ends with, and a trained policy draws with; of the ladder its last step, that of the greediest group."""
    return epsilon_ladder(config, 1, 2) if config.epsilon == "ladder" else config.epsilon_final


class DQN(OffPolicyAlgorithm[DQNConfig]):
    """The target network is part of the algorithm's state; the policy on the board is the online network."""

    Config = DQNConfig
    shares = True
    policy: QPolicy

    def __init__(self, policy: QPolicy, config: DQNConfig) -> None:
        super().__init__(policy, config)
        self.optimizer = Optimizer.of(policy, config)
        self.target = Target(policy)

    @classmethod
    def network(cls, config: DQNConfig) -> NetworkKind:
        names = ("duelling", "distribution", "atoms", "value_min", "value_max")
        return NetworkKind("q", {name: getattr(config, name) for name in names} | {"epsilon": epsilon_at_end(config)})

    @classmethod
    def epsilon(cls, config: DQNConfig, beginning: Beginning) -> float:
        return epsilon_of(config, beginning)

    @torch.no_grad()
    def learn(self, rows: Transitions, context: UpdateContext) -> tuple[Metrics, Tensor | None]:
        policy, config, num = self.policy, self.config, len(rows)
        now, later = policy.inputs.forward(rows.observation), policy.inputs.forward(rows.next_observation)
        both = config.double and policy.trunk.by_hand  # one pass of twice the length costs less than two
        output, backward = policy.trunk.trace({name: torch.cat([now[name], later[name]]) for name in now} if both else now)
        combined = policy.combine(output[:num])  # [M, A] or [M, A, Z]
        target = self._target(rows, later, output[num:] if both else None)
        place = rows.action.view(-1, *[1] * (combined.ndim - 1))
        place = place.expand(-1, 1, *combined.shape[2:])
        chosen = combined.gather(1, place).squeeze(1)
        loss = _LOSSES[config.distribution](chosen, target, rows.weight_M)
        gradient = torch.zeros_like(combined).scatter_(1, place, loss.gradient.unsqueeze(1))
        found: dict[Tensor, Tensor] = {}
        backward(policy.split(gradient), found)
        learning_rate = schedule(config.learning_rate, config.learning_rate_schedule, context.progress)
        grad_norm = self.optimizer.descend([found[p] for p in self.optimizer.parameters], learning_rate, loss.loss)
        self.target.follow_by(config, self.optimizer)
        metrics: Metrics = {"loss": loss.loss, "grad_norm": grad_norm, "td_error": loss.priority_M, "learning_rate": learning_rate}
        metrics["q_mean"] = chosen if config.distribution == "none" else policy.mean(chosen.unsqueeze(1)).squeeze(1)
        return metrics, loss.priority_M

    def _target(self, rows: Transitions, later: Mapping[str, Tensor], online: Tensor | None) -> Tensor:
        """What the chosen action's value is to become: [M], or [M, Z] of its distribution.

        online: the online network's output for `later`, where it is known.
        """
        policy, target = self.policy, self.target.module
        valued = target.combine(target.trunk.forward(later))
        if not self.config.double:
            expected = policy.mean(valued)
        else:
            expected = policy.ranked(policy.trunk.forward(later) if online is None else online)
        if rows.next_action_mask is not None:
            expected = expected.masked_fill(~rows.next_action_mask, MASKED_VALUE)
        action = expected.max(1, keepdim=True).indices  # argmax takes ten times as long for few actions
        if self.config.distribution == "none":
            return torch.addcmul(rows.return_M, rows.discount_M, valued.gather(1, action).squeeze(1))
        next_MZ = valued.gather(1, action.unsqueeze(2).expand(-1, 1, valued.shape[2])).squeeze(1)
        if self.config.distribution == "c51":
            return projected(next_MZ.softmax(1), policy.support, rows.return_M, rows.discount_M)
        return rows.return_M.unsqueeze(1) + rows.discount_M.unsqueeze(1) * next_MZ

    def optimizers(self) -> dict[str, Optimizer]:
        return {"": self.optimizer}

    def vectors(self) -> dict[str, Tensor]:
        return {"target": self.target.flat}


_LOSSES = {"none": huber_loss, "c51": c51_loss, "quantile": quantile_loss}
