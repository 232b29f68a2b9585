"""Policies with memory: observation -> inputs -> encoder -> memory -> action head and value head.

Acting goes a row at a time (`step`), learning unrolls whole rollouts from the state that each began with (`evaluate_sequences`). That state was
computed while acting: by the policy that the update begins with in sync mode, by an older one in async mode; and later minibatches and epochs of
an update move on from it. All rows after it are computed anew, so it is stale by what the weights changed since, and the less so the longer ago
a row lies behind it ("stored state" of Kapturowski et al. 2019, R2D2, section 3).

Legend: T rows, N environments, M rows that are asked for, D features, H units of the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from shoal.errors import ConfigError
from shoal.networks.evaluation import GraphEvaluation
from shoal.networks.heads import ActionHead
from shoal.networks.inputs import Inputs
from shoal.networks.memory import Memory, State, Unrolled
from shoal.networks.policy import Policy
from shoal.ops.distributions import Distribution
from shoal.types import FieldSpec


class Sequences(NamedTuple):
    """Rows that follow each other, of N environments side by side.

    Attributes:
      observation: by field name, [T, N, ...]. action: as stored, [T, N, ...]. action_mask: bool [T, N, A] or None.
      state: by name, [N, H], before row 0.
      reset_TN: bool, the state before this row is the initial one.
    """

    observation: dict[str, Tensor]
    action: Tensor
    action_mask: Tensor | None
    state: dict[str, Tensor]
    reset_TN: Tensor


class RecurrentPolicy(Policy):
    """Actor and critic share the encoder and the memory. What a Policy answers without a state is its answer to an episode's first row.

    Args:
      encoder: prepared tensors -> features [N, D].
      memory: features -> features of the heads [N, H].
    """

    def __init__(self, inputs: Inputs, encoder: nn.Module, memory: Memory, action_head: ActionHead, value_head: nn.Linear) -> None:
        super().__init__(inputs, encoder, None, action_head, value_head)
        self.memory = memory

    def compute(self, *, mixed: bool = False, compile: bool = False) -> None:
        if compile:
            raise ConfigError("learner.compile does not go with policy.memory: leave one of them at its default")
        super().compute(mixed=mixed)

    def fields(self) -> list[FieldSpec]:
        return [*super().fields(), *(FieldSpec(name, "float32", (self.memory.num_features,), "B") for name in self.memory.names)]

    def initial_state(self, num_envs: int) -> State:
        return self.memory.initial_state(num_envs)

    # ---- acting --------------------------------------------------------------------------------------------------
    def step(
        self, observation: Mapping[str, Tensor], state: Mapping[str, Tensor], noise: Tensor, action_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        distribution, state = self.next_distribution(observation, state, action_mask)
        action = distribution.sample(noise)
        return action, distribution.log_prob(action), state

    def greedy_step(
        self, observation: Mapping[str, Tensor], state: Mapping[str, Tensor], action_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        distribution, state = self.next_distribution(observation, state, action_mask)
        return distribution.mode(), state

    def next_distribution(
        self, observation: Mapping[str, Tensor], state: Mapping[str, Tensor], action_mask: Tensor | None = None
    ) -> tuple[Distribution, State]:
        """As `distribution`, in this state; and the state after it."""
        output, state = self.memory.step(self._encoded(observation), state)
        return self.action_head.forward(output, action_mask), state

    # ---- learning ------------------------------------------------------------------------------------------------
    def evaluate_sequences(self, sequences: Sequences, rows: Tensor | None = None) -> tuple[GraphEvaluation, Unrolled]:
        """As `evaluate`, of rows t * N + n, or of those in `rows` (int64 [M]): each with the state that the rows before it lead to."""
        features = self._encoded({name: value.flatten(0, 1) for name, value in sequences.observation.items()})
        unrolled = self.memory.unroll(features, sequences.state, sequences.reset_TN)
        output, action = unrolled.output_TNH.flatten(0, 1), sequences.action.flatten(0, 1)
        mask = None if sequences.action_mask is None else sequences.action_mask.flatten(0, 1)
        if rows is not None:
            output, action, mask = output[rows], action[rows], None if mask is None else mask[rows]
        distribution = self.action_head.forward(output, mask)
        return GraphEvaluation(distribution.log_prob(action), distribution.entropy(), self._value(output)), unrolled

    def next_value(self, observation: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Tensor:
        """V of observations [N, ...] that are seen in `state`: [N]."""
        return self._value(self.memory.step(self._encoded(observation), state)[0])

    def _encoded(self, observation: Mapping[str, Tensor]) -> Tensor:
        return super()._features(self.actor, self.inputs.forward(observation))

    def _features(self, encoder: nn.Module, prepared: Mapping[str, Tensor]) -> Tensor:
        features = super()._features(encoder, prepared)
        return self.memory.step(features, self.initial_state(len(features)))[0]
