"""Soft actor-critic (Haarnoja et al. 2018, arXiv:1812.05905), and for discrete actions its variant (Christodoulou 2019, arXiv:1910.07207).

Legend: M rows, A action dimensions or choices, K = 2 critics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from shoal.algorithms.base import Optimizer, UpdateContext, schedule
from shoal.algorithms.off_policy import Metrics, OffPolicyAlgorithm, Target, Transitions
from shoal.config import PolicyConfig, SACConfig
from shoal.networks.acting import NetworkKind
from shoal.networks.off_policy import LOG_STD_MAX, LOG_STD_MIN, MASKED_VALUE, CategoricalPolicy, Critics, GaussianPolicy, build_critics
from shoal.ops.distributions import HALF_LOG_2PI
from shoal.types import EnvironmentSpec

DISCRETE_ENTROPY = 0.3  # share of log A that is aimed at: 0.98, which the paper took, leaves little to be gained


class Squashed(NamedTuple):
    """tanh of a Gaussian: action [M, A], its exact log-density [M], and what the way back needs."""

    action: Tensor
    log_prob: Tensor
    deviation: Tensor  # standard deviation times noise
    free: Tensor  # where log_std is not clamped


def squash(output: Tensor, noise: Tensor) -> Squashed:
    """From the actor's output [M, 2A] (mean, log_std) and standard normal noise [M, A] (appendix C, eq. 26).

    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which stays exact where tanh is 1 in float32.
    """
    mean, raw = output.chunk(2, 1)
    log_std = raw.clamp(LOG_STD_MIN, LOG_STD_MAX)
    deviation = log_std.exp().mul_(noise)
    u = mean + deviation
    correction = (math.log(2.0) - u - functional.softplus(-2.0 * u)).mul_(2.0)
    log_prob = (noise.square().mul_(-0.5) - log_std - HALF_LOG_2PI - correction).sum(1)
    return Squashed(torch.tanh(u), log_prob, deviation, (raw > LOG_STD_MIN) & (raw < LOG_STD_MAX))


def squash_gradient(squashed: Squashed, d_action: Tensor, d_log_prob: Tensor) -> Tensor:
    """The derivative by the actor's output [M, 2A], from those by action [M, A] and log-density [M]: d log p / du = 2 tanh(u)."""
    action, slope = squashed.action, d_log_prob.unsqueeze(1)
    d_u = d_action * (1.0 - action.square()) + slope * action.mul(2.0)
    d_log_std = (d_u * squashed.deviation - slope) * squashed.free
    return torch.cat([d_u, d_log_std], 1)


def critic_loss(value_KM: Tensor, target_M: Tensor, weight_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half the squared error of both critics, its derivative [K, M], and each row's priority [M] (eq. 5)."""
    error = value_KM - target_M
    gradient = error * (weight_M / len(weight_M))
    return 0.5 * (gradient * error).sum(), gradient, error.abs().mean(0)


class Temperature(nn.Module):
    """The logarithm of the weight of the entropy."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor([math.log(initial)]))


class SAC(OffPolicyAlgorithm[SACConfig]):
    """The policy on the board is the actor; critics, their targets and the temperature are the algorithm's state."""

    Config = SACConfig
    shares = True
    policy: GaussianPolicy | CategoricalPolicy

    def __init__(self, policy: GaussianPolicy | CategoricalPolicy, config: SACConfig, critics: Critics) -> None:
        super().__init__(policy, config)
        self.continuous = isinstance(policy, GaussianPolicy)
        self.critics, self.target = critics, Target(critics)
        self.actor_optimizer = Optimizer.of(policy, config)
        self.critic_optimizer = Optimizer.of(critics, config)
        self.temperature = Temperature(1.0).to(next(policy.parameters()).device)
        self.temperature_optimizer = Optimizer.of(self.temperature, config)
        default = -float(policy.size) if isinstance(policy, GaussianPolicy) else DISCRETE_ENTROPY * math.log(policy.num_actions)
        self.target_entropy = default if config.target_entropy is None else config.target_entropy

    @classmethod
    def make(cls, policy: Any, config: SACConfig, spec: EnvironmentSpec, networks: PolicyConfig, seed: int) -> SAC:
        return cls(policy, config, build_critics(spec, networks, policy, seed))

    @classmethod
    def network(cls, config: SACConfig) -> NetworkKind:
        return NetworkKind("stochastic")

    @property
    def alpha(self) -> float:
        """Weight of the entropy now."""
        if self.config.temperature is not None:
            return self.config.temperature
        return math.exp(self.temperature.log_alpha.item())

    @torch.no_grad()
    def learn(self, rows: Transitions, context: UpdateContext) -> tuple[Metrics, Tensor | None]:
        rate = schedule(self.config.learning_rate, self.config.learning_rate_schedule, context.progress)
        critic_rate = rate * (self.config.critic_learning_rate or self.config.learning_rate) / self.config.learning_rate
        found: dict[Tensor, Tensor] = {}
        step = self._continuous if self.continuous else self._discrete
        taken = self.critic_optimizer.steps
        metrics, priority_M = step(rows, context, rate, critic_rate, found)
        if self.critic_optimizer.steps > taken:
            self.target.follow(self.critic_optimizer.flat, self.config.target_tau)
        return {**metrics, "learning_rate": rate}, priority_M

    def _continuous(
        self, rows: Transitions, context: UpdateContext, rate: float, critic_rate: float, found: dict[Tensor, Tensor]
    ) -> tuple[Metrics, Tensor]:
        policy, critics, num = self.policy, self.critics, len(rows)
        assert isinstance(policy, GaussianPolicy)
        now, later = policy.inputs.forward(rows.observation), policy.inputs.forward(rows.next_observation)
        output, backward = policy.trunk.trace({name: torch.cat([value, later[name]]) for name, value in now.items()})
        noise = self.noise(context, num, policy.size, draws=2).to(output.device)
        next_action = squash(output[num:], noise[num:])
        chosen = squash(output[:num], noise[:num])
        alpha, refused = self.alpha, self.critic_optimizer.skipped
        next_value = self.target.module.layers(later, next_action.action)[1][-1].squeeze(2).amin(0)
        target_M = torch.addcmul(rows.return_M, rows.discount_M, next_value.sub_(next_action.log_prob, alpha=alpha))
        priority_M, metrics = self._fit(now, rows, rows.action.view(num, -1), target_M, critic_rate, found)
        if self.critic_optimizer.skipped > refused:  # nobody learns from values that are not to be trusted
            return metrics, priority_M
        value_KM = (outputs := critics.layers(now, chosen.action)[1])[-1]
        least = value_KM[0] <= value_KM[1]
        slope = torch.stack([least, ~least]).float().mul_(-1.0 / num)
        d_action = critics.action_gradient(slope, outputs)
        backward(squash_gradient(chosen, d_action, torch.full_like(chosen.log_prob, alpha / num)), found)
        loss = (alpha * chosen.log_prob - value_KM.squeeze(2).amin(0)).mean()
        self.actor_optimizer.descend([found[p] for p in self.actor_optimizer.parameters], rate, loss)
        return {**metrics, **self._warm(chosen.log_prob.mean(), rate), "actor_loss": loss}, priority_M

    def _discrete(
        self, rows: Transitions, context: UpdateContext, rate: float, critic_rate: float, found: dict[Tensor, Tensor]
    ) -> tuple[Metrics, Tensor]:
        policy, critics, num = self.policy, self.critics, len(rows)
        now, later = policy.inputs.forward(rows.observation), policy.inputs.forward(rows.next_observation)
        output, backward = policy.trunk.trace({name: torch.cat([value, later[name]]) for name, value in now.items()})
        if rows.action_mask is not None and rows.next_action_mask is not None:
            output = output.masked_fill(~torch.cat([rows.action_mask, rows.next_action_mask]), MASKED_VALUE)
        log_prob = torch.log_softmax(output, 1)
        prob = log_prob.exp()
        alpha, refused = self.alpha, self.critic_optimizer.skipped
        next_value = self.target.module.layers(later)[1][-1].amin(0) - alpha * log_prob[num:]
        target_M = torch.addcmul(rows.return_M, rows.discount_M, (prob[num:] * next_value).sum(1))
        priority_M, metrics = self._fit(now, rows, None, target_M, critic_rate, found)
        if self.critic_optimizer.skipped > refused:
            return metrics, priority_M
        cost = alpha * log_prob[:num] - critics.layers(now)[1][-1].amin(0)
        expected = (prob[:num] * cost).sum(1, keepdim=True)
        backward((prob[:num] * (cost - expected)).div_(num), found)
        loss = expected.mean()
        self.actor_optimizer.descend([found[p] for p in self.actor_optimizer.parameters], rate, loss)
        mean_log_prob = (prob[:num] * log_prob[:num]).sum(1).mean()
        return {**metrics, **self._warm(mean_log_prob, rate), "actor_loss": loss}, priority_M

    def _warm(self, mean_log_prob: Tensor, rate: float) -> Metrics:
        """One step of the temperature, towards the entropy that is aimed at (eq. 18)."""
        metrics: Metrics = {"entropy": -mean_log_prob}
        if self.config.temperature is None:
            gradient = -(mean_log_prob + self.target_entropy).reshape(1)
            loss = self.temperature.log_alpha.detach() * gradient
            self.temperature_optimizer.descend([gradient], rate, loss)
            metrics["ent_coef_loss"] = loss
        return {**metrics, "ent_coef": self.alpha}

    def _fit(
        self,
        now: Mapping[str, Tensor],
        rows: Transitions,
        action_MA: Tensor | None,
        target_M: Tensor,
        rate: float,
        found: dict[Tensor, Tensor],
    ) -> tuple[Tensor, Metrics]:
        """One step of the critics. Returns priorities and metrics."""
        features, outputs = self.critics.layers(now, action_MA)
        value, place = outputs[-1], None
        if action_MA is None:
            place = rows.action.view(1, -1, 1).expand(2, -1, 1)
            value = value.gather(2, place)
        loss, gradient, priority_M = critic_loss(value.squeeze(2), target_M, rows.weight_M)
        slope = gradient.unsqueeze(2)
        if place is not None:
            slope = torch.zeros_like(outputs[-1]).scatter_(2, place, slope)
        self.critics.backward(slope, features, outputs, found)
        grad_norm = self.critic_optimizer.descend([found[p] for p in self.critic_optimizer.parameters], rate, loss)
        return priority_M, {"critic_loss": loss, "grad_norm": grad_norm, "q_mean": value.mean()}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"critics/": self.critic_optimizer, "actor/": self.actor_optimizer, "temperature/": self.temperature_optimizer}

    def vectors(self) -> dict[str, Tensor]:
        critics, temperature = self.critic_optimizer.flat, self.temperature_optimizer.flat
        return {"critics/flat": critics, "temperature/flat": temperature, "target": self.target.flat}
