"""What actors, the board, a bundle and evaluation ask of a policy, whatever it learns by. Legend: N batch (environments of a group)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from shoal.networks.heads import NoiseSpec
from shoal.networks.inputs import Inputs
from shoal.ops.moments import Moments
from shoal.types import FieldSpec


@dataclass(frozen=True)
class NetworkKind:
    """Which policy an algorithm learns, and what else it is made with (`options`: plain values, which a bundle keeps)."""

    name: Literal["actor_critic", "q", "stochastic", "deterministic"] = "actor_critic"
    options: Mapping[str, Any] = field(default_factory=dict)


ACTOR_CRITIC = NetworkKind()


class Acting(nn.Module):
    """Attributes:
    inputs: raw fields -> prepared tensors.
    noise: what one environment's acting needs, see NoiseSpec.
    epsilon: share of random actions where a trained policy that `explores` is asked to draw; in training it is a matter of each rollout.
    """

    inputs: Inputs
    noise: NoiseSpec
    epsilon: float = 0.0

    def fields(self) -> list[FieldSpec]:
        """What acting emits into a rollout besides observations."""
        raise NotImplementedError(f"{type(self).__name__}.fields")

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        """Recurrent state at an episode's start, by name, zeros [num_envs, ...]: empty without memory."""
        return {}

    def act(self, observation: Mapping[str, Tensor], noise: Tensor, action_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The actors' hot path, to be called under `torch.inference_mode()`: actions as stored [N, ...], and their log-probabilities [N] where
        the policy has the field `log_prob`.

        Args:
          noise: float32 [N, noise.size].
        """
        raise NotImplementedError(f"{type(self).__name__}.act")

    def step(
        self, observation: Mapping[str, Tensor], state: Mapping[str, Tensor], noise: Tensor, action_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """As `act`, with the recurrent state before this row; and the state after it. Without memory it passes through."""
        return *self.act(observation, noise, action_mask), dict(state)

    def greedy_step(
        self, observation: Mapping[str, Tensor], state: Mapping[str, Tensor], action_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `greedy`, with the recurrent state before this row; and the state after it."""
        return self.greedy(observation, action_mask), dict(state)

    def greedy(self, observation: Mapping[str, Tensor], action_mask: Tensor | None = None) -> Tensor:
        """The best action as the policy knows it (the most probable one, or that of the highest value), as stored [N, ...]."""
        raise NotImplementedError(f"{type(self).__name__}.greedy")

    def compute(self, *, mixed: bool = False, compile: bool = False) -> None:
        """From now on compute as the learner is configured to. Raises ConfigError where this policy cannot."""
        raise NotImplementedError(f"{type(self).__name__}.compute")

    @property
    def normalised(self) -> tuple[str, ...]:
        """Names of the observation fields whose running statistics the policy carries; empty without normalisation."""
        return self.inputs.normalised

    def set_statistics(self, moments: Mapping[str, Moments]) -> None:
        """Freeze observation statistics into the buffers, for every field of `normalised`."""
        self.inputs.set_statistics(moments)
