"""A user's own algorithms for several learners: one that comes to other weights in one process than in another, and one that takes its time."""

from __future__ import annotations

import time

import torch

from shoal.algorithms.base import UpdateContext
from shoal.algorithms.ppo import PPO
from shoal.config import PPOConfig
from shoal.experience.batch import Batch


class OwnConfig(PPOConfig):
    name: str = "own"  # type: ignore[assignment]


class Drifting(PPO):
    """The second learner's memory is damaged in the fourth update."""

    Config = OwnConfig

    def update(self, batch: Batch, context: UpdateContext) -> dict[str, float]:
        metrics = super().update(batch, context)
        if self.ranks.rank == 1 and context.update == 3:
            with torch.no_grad():
                self.optimizer.flat[0] += 1e-3
        return metrics


class Slow(PPO):
    """An update takes a fifth of a second more, so that whatever happens falls into one."""

    Config = OwnConfig

    def update(self, batch: Batch, context: UpdateContext) -> dict[str, float]:
        time.sleep(0.2)
        return super().update(batch, context)
