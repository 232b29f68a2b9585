"""Asynchronous PPO: the clipped objective on V-trace advantages (after Luo et al. 2019, arXiv:1912.00167).

Two corrections, each for its own distance (as in Hilton et al. 2021, arXiv:2110.00641): V-trace's rho, inside the advantage, corrects from the
behaviour mu to the policy pi_0 with which the update begins; the clipped ratio pi / pi_0 bounds how far the epochs move from there. Without
lag rho is 1 and this is PPO with gae_lambda = vtrace_lambda. (Luo et al. use a slower target network as pi_0; here it is the learner's own.)
"""

from __future__ import annotations

from shoal.algorithms.base import Algorithm, UpdateContext
from shoal.algorithms.impala import vtrace_of_batch
from shoal.algorithms.ppo import Targets, clipped_epochs
from shoal.config import APPOConfig
from shoal.experience.batch import Batch


class APPO(Algorithm[APPOConfig]):
    """V-trace once per update, then epochs of the clipped objective."""

    Config = APPOConfig
    modes = ("async", "sync")

    def update(self, batch: Batch, context: UpdateContext) -> dict[str, float]:
        corrected, metrics = vtrace_of_batch(self.policy, batch, self.config)
        epochs = clipped_epochs(self.policy, self.optimizer, self.config, batch, context, Targets(*corrected))
        return {**epochs, **metrics}
