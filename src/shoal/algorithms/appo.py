"""Asynchronous PPO: the clipped objective around the behaviour, on V-trace advantages (Petrenko et al. 2020, arXiv:2006.11751, section 3).

V-trace corrects targets and advantages from the behaviour mu to the policy with which the update begins; the ratio is pi / mu, and the clip
bounds how far pi moves from the mu that took the samples, over the epochs of this update and over the updates since. (A ratio to the update's
own first policy bounds one update only: samples that lag by k updates then push k times in the direction in which mu was already left, entropy
collapses, and CartPole takes two to four times the samples at a lag of 2.) Without lag this is PPO with gae_lambda = vtrace_lambda.
"""

from __future__ import annotations

from shoal.algorithms.base import Algorithm, UpdateContext
from shoal.algorithms.impala import vtrace_of_batch
from shoal.algorithms.ppo import Targets, clipped_epochs
from shoal.config import APPOConfig
from shoal.experience.batch import Batch

_SMALLEST_RHO = 1e-6  # below it, an action that pi no longer takes counts for less than its share


class APPO(Algorithm[APPOConfig]):
    """V-trace once per update, then epochs of the clipped objective."""

    Config = APPOConfig
    modes = ("async", "sync")
    remembers = True
    shares = True

    def update(self, batch: Batch, context: UpdateContext) -> dict[str, float]:
        corrected, metrics = vtrace_of_batch(self.policy, batch, self.config, self.ranks)
        advantage_TN = corrected.advantage_TN
        if self.config.vtrace:  # the ratio brings pi / mu itself
            rho_TN = (corrected.now.log_prob_TN - batch.log_prob_TN).exp()
            advantage_TN = advantage_TN / rho_TN.clamp(_SMALLEST_RHO, self.config.clip_rho)
        targets = Targets(batch.log_prob_TN, corrected.now.value_TN, advantage_TN, corrected.target_TN)
        epochs = clipped_epochs(self.policy, self.optimizer, self.config, batch, context, targets)
        return {**epochs, **metrics}
