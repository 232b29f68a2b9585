"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347). Legend: T rows, N environments, M rows of a minibatch."""

from __future__ import annotations

from typing import Generic, NamedTuple

from torch import Tensor

from shoal.algorithms.base import (
    Algorithm,
    Column,
    Means,
    Optimizer,
    UpdateContext,
    cut_TN,
    discount_TN,
    epoch,
    explained_variance,
    heavy,
    library,
    light,
    normalised,
    schedule,
    values_TN,
)
from shoal.config import APPOConfig, PPOConfig
from shoal.experience.batch import Batch
from shoal.networks.policy import Policy
from shoal.ops.gae import gae


class PolicyLoss(NamedTuple, Generic[Column]):
    """The clipped objective, its derivative with respect to each row's log-probability [M], and how far the policy has moved."""

    policy_gradient_loss: float | Tensor
    d_log_prob: Column
    approx_kl: float | Tensor
    clip_fraction: float | Tensor


def clipped_policy_loss(log_prob: Column, old_log_prob: Column, advantage: Column, clip_range: float) -> PolicyLoss[Column]:
    """-E min(r A, clip(r, 1 - eps, 1 + eps) A) with r = pi / pi_old (eq. 7), over [M].

    approx_kl is E[(r - 1) - log r], which is never negative (Schulman 2020, joschu.net/blog/kl-approx.html).
    """
    lib, num_rows = library(log_prob), len(log_prob)
    log_ratio = log_prob - old_log_prob
    ratio = lib.exp(log_ratio)
    clipped = lib.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    surrogate, bound = ratio * advantage, clipped * advantage
    loss = -lib.minimum(surrogate, bound).sum() / num_rows
    d_log_prob = lib.where(surrogate <= bound, surrogate, 0.0) * (-1.0 / num_rows)
    approx_kl = ((ratio - 1.0) - log_ratio).sum() / num_rows
    clip_fraction = lib.count_nonzero(ratio != clipped) / num_rows
    return PolicyLoss(loss, d_log_prob, approx_kl, clip_fraction)


def value_loss(value: Column, old_value: Column, target: Column, clip_range_value: float | None) -> tuple[float | Tensor, Column]:
    """Mean squared error over [M], and its derivative with respect to each value [M].

    With a clip range, each row's error is the worse of its own and that of old_value + clip(value - old_value).
    """
    lib, num_rows = library(value), len(value)
    error = value - target
    if clip_range_value is None:
        return (error * error).sum() / num_rows, error * (2.0 / num_rows)
    near = old_value + lib.clip(value - old_value, -clip_range_value, clip_range_value) - target
    square, near_square = error * error, near * near
    worse = (near_square > square) & (abs(value - old_value) > clip_range_value)  # then the clip holds: moving the value changes nothing
    return lib.maximum(square, near_square).sum() / num_rows, lib.where(worse, 0.0, error) * (2.0 / num_rows)


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
            log_prob, entropy, value, old_log_prob, old_value, advantage, target = light(
                evaluation.log_prob, evaluation.entropy, evaluation.value, *(rows[name] for name in columns)
            )
            advantage = normalised(advantage, rows.whole.get("advantage")) if config.normalise_advantage else advantage
            actor = clipped_policy_loss(log_prob, old_log_prob, advantage, clip_range)
            critic_loss, d_value = value_loss(value, old_value, target, clip_range_value)
            entropy_loss = -entropy.sum() / len(rows)
            loss = actor.policy_gradient_loss + config.value_coefficient * critic_loss + config.entropy_coefficient * entropy_loss
            d_entropy = library(entropy).full_like(entropy, -config.entropy_coefficient / len(rows))
            d_value = d_value * config.value_coefficient
            gradients = evaluation.gradients(
                optimizer.parameters, heavy(actor.d_log_prob), heavy(d_entropy), heavy(d_value), optimizer.gradients
            )
            found = {
                "policy_gradient_loss": actor.policy_gradient_loss,
                "approx_kl": actor.approx_kl,
                "clip_fraction": actor.clip_fraction,
                "value_loss": critic_loss,
                "entropy_loss": entropy_loss,
            }
            gradient, said = optimizer.gather(gradients, {**found, "loss": loss}, rows.share)
            means.add({name: said[name] for name in found})
            if config.target_kl is not None and float(said["approx_kl"]) > 1.5 * config.target_kl:
                stop = True
                break
            means.add({"loss": said["loss"], "grad_norm": optimizer.follow(gradient, learning_rate, said["loss"])})
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
