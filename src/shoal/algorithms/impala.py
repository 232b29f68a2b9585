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
    epoch,
    evaluate_TN,
    explained_variance,
    normalised,
    schedule,
)
from shoal.algorithms.ranks import ALONE, Ranks, share_of
from shoal.algorithms.sequences import Evaluated
from shoal.config import ImpalaConfig, VTraceConfig
from shoal.experience.batch import Batch
from shoal.networks.evaluation import Evaluation
from shoal.networks.policy import Policy
from shoal.ops.vtrace import vtrace


class Corrected(NamedTuple):
    """V-trace of a batch under the policy as it is now: float32 [T, N] each, without gradient."""

    now: Evaluated
    advantage_TN: Tensor
    target_TN: Tensor


def vtrace_of_batch(
    policy: Policy, batch: Batch, config: VTraceConfig, ranks: Ranks = ALONE, *, for_gradient: bool = False
) -> tuple[Corrected, dict[str, float]]:
    """Targets and advantages, and how far the policy is from the behaviours: approx_kl, rho_clipped (share of rows with rho above clip_rho)."""
    now = evaluate_TN(policy, batch, ranks, for_gradient=for_gradient)
    log_rho_TN = now.log_prob_TN - batch.log_prob_TN
    target_TN, advantage_TN = vtrace(
        now.value_TN,
        now.next_value_TN,
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
        "explained_variance": explained_variance(now.value_TN[batch.valid_TN], target_TN[batch.valid_TN]),
    }
    return Corrected(now, advantage_TN, target_TN), metrics


class Loss(NamedTuple):
    """Weighted sums over rows, and the derivative with respect to each row's log-probability, entropy and value [M]."""

    policy_gradient_loss: Tensor
    value_loss: Tensor
    entropy_loss: Tensor
    d_log_prob: Tensor
    d_entropy: Tensor
    d_value: Tensor


def impala_loss(evaluation: Evaluation, advantage: Tensor, target: Tensor, weight: Tensor, config: ImpalaConfig) -> Loss:
    """-log pi(a|x) rho (r + gamma v' - V), (V - v)^2 and -H (section 4.2), each row by its weight; weights [M] sum to 1, 0 leaves a row out.

    `advantage` holds rho. The derivatives are those of the sum of the three, by their coefficients.
    """
    error, weighted = evaluation.value - target, weight * advantage
    return Loss(
        policy_gradient_loss=-torch.dot(evaluation.log_prob, weighted),
        value_loss=torch.dot(error * error, weight),
        entropy_loss=-torch.dot(evaluation.entropy, weight),
        d_log_prob=-weighted,
        d_entropy=weight * -config.entropy_coefficient,
        d_value=(error * weight).mul_(2.0 * config.value_coefficient),
    )


class IMPALA(Algorithm[ImpalaConfig]):
    """One pass over each batch, in one optimizer step or in minibatches."""

    Config = ImpalaConfig
    modes = ("async", "sync")
    remembers = True
    shares = True

    def __init__(self, policy: Policy, config: ImpalaConfig) -> None:
        super().__init__(policy, config)
        self.optimizer = Optimizer.of(policy, config, config.optimizer)

    def update(self, batch: Batch, context: UpdateContext) -> dict[str, float]:
        config, steps, skipped = self.config, self.optimizer.steps, self.optimizer.skipped
        one_step = config.minibatch_size is None or config.minibatch_size >= batch.valid_TN.numel()
        corrected, metrics = vtrace_of_batch(self.policy, batch, config, self.ranks, for_gradient=one_step)
        learning_rate = schedule(config.learning_rate, config.learning_rate_schedule, context.progress)
        means = Means()
        if one_step and corrected.now.whole is not None:
            self._step_on_all(corrected.now.whole, batch, corrected, learning_rate, means)
        else:
            columns = {"advantage": corrected.advantage_TN, "target": corrected.target_TN}
            for rows in epoch(self.policy, batch, config.minibatch_size, context.rng, self.ranks, **columns):
                evaluation = rows.evaluate(self.policy)
                advantage = normalised(rows["advantage"], rows.whole.get("advantage")) if config.normalise_advantage else rows["advantage"]
                weight = torch.full_like(advantage, 1.0 / len(rows))
                self._step(evaluation, advantage, rows["target"], weight, rows.share, learning_rate, means)
        return {
            **means.result(),
            **metrics,
            "approx_kl": metrics["behaviour_kl"],
            "learning_rate": learning_rate,
            "optimizer_steps": float(self.optimizer.steps - steps),
            "skipped_steps": float(self.optimizer.skipped - skipped),
        }

    def _step_on_all(self, whole: Evaluation, batch: Batch, corrected: Corrected, learning_rate: float, means: Means) -> None:
        """The evaluation that V-trace was made from, of this learner's columns, serves the gradient too. Its last rows only bootstrap."""
        valid_TN = batch.valid_TN
        T, N = valid_TN.shape
        advantage = corrected.advantage_TN[valid_TN]
        rows = corrected.advantage_TN.new_zeros(3, T + 1, N)
        rows[0, :T][valid_TN] = normalised(advantage) if self.config.normalise_advantage else advantage
        rows[1, :T][valid_TN] = corrected.target_TN[valid_TN]
        rows[2, :T] = valid_TN / max(1, len(advantage))
        mine, share = share_of(N, self.ranks)
        advantage, target, weight = rows[:, :, mine].flatten(1)
        self._step(
            whole, advantage, target, weight, float(share > 0), learning_rate, means
        )  # weights are shares of the whole batch already

    def _step(
        self,
        evaluation: Evaluation,
        advantage: Tensor,
        target: Tensor,
        weight: Tensor,
        share: float,
        learning_rate: float,
        means: Means,
    ) -> None:
        parts = impala_loss(evaluation, advantage, target, weight, self.config)
        loss = parts.policy_gradient_loss + self.config.value_coefficient * parts.value_loss
        loss = loss + self.config.entropy_coefficient * parts.entropy_loss
        optimizer = self.optimizer
        gradients = evaluation.gradients(optimizer.parameters, parts.d_log_prob, parts.d_entropy, parts.d_value, optimizer.gradients)
        found = {
            "policy_gradient_loss": parts.policy_gradient_loss,
            "value_loss": parts.value_loss,
            "entropy_loss": parts.entropy_loss,
            "loss": loss,
        }
        gradient, said = optimizer.gather(gradients, found, share)
        means.add({**said, "grad_norm": optimizer.follow(gradient, learning_rate, said["loss"])})
