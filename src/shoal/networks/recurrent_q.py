"""Action values that remember: observation -> inputs -> encoder -> memory -> head (R2D2).

Legend: T rows, N environments (or sequences), D features, H units of the memory, A choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shoal.networks.inputs import Inputs
from shoal.networks.memory import Memory, State, Unrolled
from shoal.networks.off_policy import MASKED_VALUE, Observation, QPolicy, at_random
from shoal.types import EnvironmentSpec, FieldSpec


class Remembering(nn.Module):
    """An encoder with a memory behind it; called as an encoder, it answers as at an episode's first row.

    encoder: prepared tensors -> features [N, D]. memory: these -> [N, H].
    """

    def __init__(self, encoder: nn.Module, memory: Memory) -> None:
        super().__init__()
        self.encoder, self.memory, self.num_features = encoder, memory, memory.num_features

    def forward(self, prepared: Mapping[str, Tensor]) -> Tensor:
        features = self.encoder(prepared)
        return self.memory.step(features, self.memory.initial_state(len(features)))[0]


class RecurrentQPolicy(QPolicy):
    """What a QPolicy answers without a state is its answer to an episode's first row.

    Args:
      encoder, memory: see Remembering. options: those of QPolicy.
    """

    encoder: Remembering

    def __init__(
        self, spec: EnvironmentSpec, inputs: Inputs, encoder: nn.Module, orthogonal_init: bool, *, memory: Memory, **options: Any
    ) -> None:
        super().__init__(spec, inputs, Remembering(encoder, memory), orthogonal_init, **options)

    @property
    def memory(self) -> Memory:
        return self.encoder.memory

    def fields(self) -> list[FieldSpec]:
        return [*super().fields(), *(FieldSpec(name, "float32", (self.memory.num_features,), "B") for name in self.memory.names)]

    def initial_state(self, num_envs: int) -> State:
        return self.memory.initial_state(num_envs)

    # ---- acting --------------------------------------------------------------------------------------------------
    def step(
        self, observation: Observation, state: Mapping[str, Tensor], noise: Tensor, action_mask: Tensor | None = None
    ) -> tuple[Tensor, None, State]:
        greedy, state = self.greedy_step(observation, state, action_mask)
        return torch.where(noise[:, 0] < 0, at_random(noise[:, 1], self.num_actions, action_mask), greedy), None, state

    def greedy_step(self, observation: Observation, state: Mapping[str, Tensor], action_mask: Tensor | None = None) -> tuple[Tensor, State]:
        output, state = self.memory.step(self._encoded(observation), state)
        value_NA = self.ranked(self.head(output))
        return (value_NA if action_mask is None else value_NA.masked_fill(~action_mask, MASKED_VALUE)).max(1).indices, state

    # ---- learning ------------------------------------------------------------------------------------------------
    def unroll(self, observation: Observation, state: Mapping[str, Tensor], reset_TN: Tensor) -> Unrolled:
        """The memory's outputs and states at rows [T, N, ...] that follow `state` [N, H], as `Memory.unroll`."""
        features = self._encoded({name: value.flatten(0, 1) for name, value in observation.items()})
        return self.memory.unroll(features, state, reset_TN)

    def unrolled_values(self, output_TNH: Tensor) -> Tensor:
        """Action values [T, N, A] of what `unroll` gave."""
        values: Tensor = self.combine(self.head(output_TNH.flatten(0, 1)))
        return values.view(*output_TNH.shape[:2], -1)

    def _encoded(self, observation: Observation) -> Tensor:
        features: Tensor = self.encoder.encoder(self.inputs.forward(observation))
        return features
