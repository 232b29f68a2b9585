"""IMPALA (Espeholt et al. 2018, arXiv:1802.01561): actor-critic on samples of older policies, corrected by V-trace.

Legend: T rows, N environments, M rows of a minibatch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shoal.algorithms.base import (
    Algorithm,
    Means,
    Optimizer,
    UpdateContext,
    cut_TN,
    discount_TN,
    evaluate_TN,
    explained_variance,
    minibatches,
    normalised,
    schedule,
)
from shoal.config import ImpalaConfig, VTraceConfig
from shoal.experience.batch import Batch
from shoal.networks.policy import Policy
from shoal.ops.vtrace import vtrace


class Corrected(NamedTuple):
    """V-trace of a batch under the policy as it is now: float32 [T, N] each, without gradient."""

    log_prob_TN: Tensor
    value_TN: Tensor
    advantage_TN: Tensor
    target_TN: Tensor


def impala_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """-E[log pi(a|x) rho (r + gamma v' - V)] over [M]; `advantage` holds rho and carries no gradient (section 4.2)."""
    return -(log_prob * advantage).mean()


def vtrace_of_batch(policy: Policy, batch: Batch, config: VTraceConfig) -> tuple[Corrected, dict[str, float]]:
    """Targets and advantages, and how far the policy is from the behaviours: approx_kl, rho_clipped (share of rows with rho above clip_rho)."""
    log_prob_TN, value_TN, next_value_TN = evaluate_TN(policy, batch)
    log_rho_TN = log_prob_TN - batch.log_prob_TN
    target_TN, advantage_TN = vtrace(
        value_TN,
        next_value_TN,
        batch.reward_TN,
        discount_TN(batch, config.gamma),
        cut_TN(batch),
        log_rho_TN if config.vtrace else torch.zeros_like(log_rho_TN),
        clip_rho=config.clip_rho,
        clip_c=config.clip_c,
        lambda_=config.vtrace_lambda,
    )
    log_rho = log_rho_TN[batch.valid_TN]
    rho = log_rho.exp()
    metrics = {
        "behaviour_kl": float((rho - 1.0 - log_rho).mean()),
        "rho_clipped": float((rho > config.clip_rho).float().mean()),
        "explained_variance": explained_variance(value_TN[batch.valid_TN], target_TN[batch.valid_TN]),
    }
    return Corrected(log_prob_TN, value_TN, advantage_TN, target_TN), metrics


class IMPALA(Algorithm[ImpalaConfig]):
    """One pass over each batch, in one optimizer step or in minibatches."""

    Config = ImpalaConfig
    modes = ("async", "sync")

    def __init__(self, policy: Policy, config: ImpalaConfig) -> None:
        super().__init__(policy, config)
        self.optimizer = Optimizer(policy, epsilon=config.adam_epsilon, max_gradient_norm=config.max_gradient_norm, kind=config.optimizer)

    def update(self, batch: Batch, context: UpdateContext) -> dict[str, float]:
        config = self.config
        corrected, metrics = vtrace_of_batch(self.policy, batch, config)
        learning_rate = schedule(config.learning_rate, config.learning_rate_schedule, context.progress)
        means, steps, skipped = Means(), self.optimizer.steps, self.optimizer.skipped
        columns = {"advantage": corrected.advantage_TN, "target": corrected.target_TN}
        for rows in minibatches(batch, config.minibatch_size, context.rng, **columns):
            distribution, value = self.policy.distribution_and_value(rows.observation, rows.action_mask)
            advantage = normalised(rows["advantage"]) if config.normalise_advantage else rows["advantage"]
            policy_gradient_loss = impala_loss(distribution.log_prob(rows.action), advantage)
            value_loss = (value - rows["target"]).square().mean()
            entropy_loss = -distribution.entropy().mean()
            loss = policy_gradient_loss + config.value_coefficient * value_loss + config.entropy_coefficient * entropy_loss
            grad_norm = self.optimizer.step(loss, learning_rate)
            means.add({"policy_gradient_loss": policy_gradient_loss, "value_loss": value_loss, "entropy_loss": entropy_loss})
            means.add({"loss": loss, "grad_norm": grad_norm})
        return {
            **means.result(),
            **metrics,
            "approx_kl": metrics["behaviour_kl"],
            "learning_rate": learning_rate,
            "optimizer_steps": float(self.optimizer.steps - steps),
            "skipped_steps": float(self.optimizer.skipped - skipped),
        }
