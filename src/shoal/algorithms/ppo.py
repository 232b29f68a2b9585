"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347). Legend: T rows, N environments, M rows of a minibatch."""

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
    explained_variance,
    normalised,
    schedule,
    values_TN,
)
from shoal.config import APPOConfig, PPOConfig
from shoal.experience.batch import Batch
from shoal.networks.policy import Policy
from shoal.ops.gae import gae


class PolicyLoss(NamedTuple):
    """The clipped objective, its derivative with respect to each row's log-probability [M], and how far the policy has moved."""

    policy_gradient_loss: Tensor
    d_log_prob: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def clipped_policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float) -> PolicyLoss:
    """-E min(r A, clip(r, 1 - eps, 1 + eps) A) with r = pi / pi_old (eq. 7), over [M].

    approx_kl is E[(r - 1) - log r], which is never negative (Schulman 2020, joschu.net/blog/kl-approx.html).
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    surrogate, bound = ratio * advantage, clipped * advantage
    loss = -torch.min(surrogate, bound).mean()
    d_log_prob = torch.where(surrogate <= bound, surrogate, 0.0).mul_(-1.0 / len(ratio))
    approx_kl = (ratio - 1.0).sub_(log_ratio).mean()
    clip_fraction = (ratio != clipped).float().mean()
    return PolicyLoss(loss, d_log_prob, approx_kl, clip_fraction)


def value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip_range_value: float | None) -> tuple[Tensor, Tensor]:
    """Mean squared error over [M], and its derivative with respect to each value [M].

    With a clip range, each row's error is the worse of its own and that of old_value + clip(value - old_value).
    """
    error = value - target
    if clip_range_value is None:
        return error.square().mean(), error.mul(2.0 / len(error))
    moved = value - old_value
    near = old_value + moved.clamp(-clip_range_value, clip_range_value) - target
    worse = near.square() > error.square()  # then the clip holds: moving the value changes nothing
    return torch.max(error.square(), near.square()).mean(), error.masked_fill(worse, 0.0).mul_(2.0 / len(error))


class Targets(NamedTuple):
    """What an update's epochs aim at: float32 [T, N] each, without gradient. log_prob_TN is that of the policy the ratio starts from."""

    log_prob_TN: Tensor
    value_TN: Tensor
    advantage_TN: Tensor
    target_TN: Tensor


def clipped_epochs(
    policy: Policy, optimizer: Optimizer, config: PPOConfig | APPOConfig, batch: Batch, context: UpdateContext, targets: Targets
) -> dict[str, float]:
    """Epochs of minibatches down the clipped objective, until they are done or `target_kl` is passed 1.5 times."""
    learning_rate = schedule(config.learning_rate, config.learning_rate_schedule, context.progress)
    clip_range = schedule(config.clip_range, config.clip_range_schedule, context.progress)
    clip_range_value = getattr(config, "clip_range_value", None)
    columns = {
        "old_log_prob": targets.log_prob_TN,
        "old_value": targets.value_TN,
        "advantage": targets.advantage_TN,
        "target": targets.target_TN,
    }
    means, steps, skipped, epochs, stop = Means(), optimizer.steps, optimizer.skipped, 0, False
    while epochs < config.epochs and not stop:
        epochs += 1
        for rows in epoch(policy, batch, config.minibatch_size, context.rng, optimizer.ranks, **columns):
            evaluation = rows.evaluate(policy)
            advantage = normalised(rows["advantage"], rows.whole["advantage"]) if config.normalise_advantage else rows["advantage"]
            actor = clipped_policy_loss(evaluation.log_prob, rows["old_log_prob"], advantage, clip_range)
            critic_loss, d_value = value_loss(evaluation.value, rows["old_value"], rows["target"], clip_range_value)
            entropy_loss = -evaluation.entropy.mean()
            loss = actor.policy_gradient_loss + config.value_coefficient * critic_loss + config.entropy_coefficient * entropy_loss
            d_entropy = torch.full_like(evaluation.entropy, -config.entropy_coefficient / len(rows))
            gradients = evaluation.gradients(optimizer.parameters, actor.d_log_prob, d_entropy, d_value.mul_(config.value_coefficient))
            found = {
                "policy_gradient_loss": actor.policy_gradient_loss,
                "approx_kl": actor.approx_kl,
                "clip_fraction": actor.clip_fraction,
                "value_loss": critic_loss,
                "entropy_loss": entropy_loss,
                "loss": loss,
            }
            gradient, found = optimizer.gather(gradients, found, rows.share)
            loss = found.pop("loss")
            means.add(found)
            if config.target_kl is not None and float(found["approx_kl"]) > 1.5 * config.target_kl:
                stop = True
                break
            means.add({"loss": loss, "grad_norm": optimizer.follow(gradient, learning_rate, loss)})
    valid_TN = batch.valid_TN
    return {
        **means.result(),
        "explained_variance": explained_variance(targets.value_TN[valid_TN], targets.target_TN[valid_TN]),
        "learning_rate": learning_rate,
        "clip_range": clip_range,
        "epochs": float(epochs),
        "optimizer_steps": float(optimizer.steps - steps),
        "skipped_steps": float(optimizer.skipped - skipped),
    }


class PPO(Algorithm[PPOConfig]):
    """On-policy: advantages by GAE, then epochs of the clipped objective. The ratio starts from the behaviour's own log-probabilities."""

    Config = PPOConfig
    modes = ("sync",)
    remembers = True
    shares = True

    def update(self, batch: Batch, context: UpdateContext) -> dict[str, float]:
        config = self.config
        value_TN, next_value_TN = values_TN(self.policy, batch, self.ranks)
        advantage_TN, target_TN = gae(
            value_TN, next_value_TN, batch.reward_TN, discount_TN(batch, config.gamma), cut_TN(batch), lambda_=config.gae_lambda
        )
        targets = Targets(batch.log_prob_TN, value_TN, advantage_TN, target_TN)
        return clipped_epochs(self.policy, self.optimizer, config, batch, context, targets)
