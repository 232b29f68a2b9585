"""Running statistics of observations and rewards: one stream per run, kept by the learner in float64.

Statistics of observations are part of the policy (its buffers), so they are frozen inside each policy version and travel with the
weights; rewards are scaled here, before an algorithm sees them. Both merge rollouts in the order in which they are consumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shoal.experience.batch import Batch
from shoal.ops.moments import Moments
from shoal.ops.returns import discounted_returns
from shoal.types import Array, Arrays, EnvironmentSpec

_CLIP = 10.0


class RewardNormaliser:
    """Divides rewards by the running deviation of the discounted return (Engstrom et al. 2020, arXiv:2005.12729, section 3)."""

    def __init__(self, num_groups: int, num_envs: int, gamma: float) -> None:
        self._gamma = gamma
        self._carry = np.zeros((num_groups, num_envs))
        self._moments = Moments(())

    def __call__(self, batch: Batch, groups: Sequence[int]) -> None:
        """Merge the batch's returns, then have `batch.reward_TN` be another tensor, of scaled rewards. `groups`: of each rollout, in the batch's order."""
        num_envs = self._carry.shape[1]
        reward, ended, valid = batch.reward_TN.numpy(), batch.ended_TN.numpy(), batch.valid_TN.numpy()
        for i, group in enumerate(groups):
            columns = slice(i * num_envs, (i + 1) * num_envs)
            mine = valid[:, columns]
            returns, self._carry[group] = discounted_returns(
                reward[:, columns], ended[:, columns], self._carry[group], self._gamma, valid_TB=mine
            )
            self._moments.merge(returns[mine])
        scale = 1.0 / np.sqrt(float(self._moments.variance) + 1e-8) if self._moments.count > 1 else 1.0
        batch.reward_TN = torch.from_numpy(np.clip(reward * np.float32(scale), -_CLIP, _CLIP).astype(np.float32))

    def get_state(self) -> Arrays:
        return {"carry": self._carry.copy(), **{f"moments/{k}": v for k, v in self._moments.get_state().items()}}

    def set_state(self, state: Arrays) -> None:
        self._carry = np.array(state["carry"])
        self._moments.set_state({k.removeprefix("moments/"): v for k, v in state.items() if k.startswith("moments/")})


class ObservationNormaliser:
    """Running mean and variance of every observation that is a float box."""

    def __init__(self, spec: EnvironmentSpec, names: Sequence[str]) -> None:
        """names: the fields to normalise, see Policy.normalised."""
        shapes = {leaf.name("observation"): leaf.shape for leaf in spec.observation}
        self.moments = {name: Moments(shapes[name]) for name in names}

    def merge(self, batch: Batch) -> None:
        """Add the observations that were acted on."""
        valid: Array = batch.valid_TN.numpy()
        for name, moments in self.moments.items():
            moments.merge(batch.observation[name].numpy()[:-1][valid].astype(np.float64))

    def get_state(self) -> Arrays:
        return {f"{n}//{k}": v for n, m in self.moments.items() for k, v in m.get_state().items()}

    def set_state(self, state: Arrays) -> None:
        for name, moments in self.moments.items():
            mine: dict[str, Any] = {k.split("//")[1]: v for k, v in state.items() if k.split("//")[0] == name}
            moments.set_state(mine)
