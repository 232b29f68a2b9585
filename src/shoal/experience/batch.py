"""What an algorithm's update is given: rollouts of one update, side by side, as torch tensors.

Legend: T rows of the longest rollout, N environments (columns) over all rollouts, F episodes that ended inside, A mask entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """Attributes:
    observation: by field name, [T+1, N, ...] as the environment gave it (uint8 images stay uint8). Row t+1 follows row t, except
      where an episode ended at t: there row t+1 begins the next one. Rows beyond a column's last are zero.
    action_mask: [T+1, N, A] bool, True where allowed; None without masks.
    action: [T, N, ...] as stored: zero-based integers, or the policy's raw continuous action.
    log_prob_TN: float32, of the behaviour that chose.
    reward_TN: float32, normalised already where the run normalises rewards.
    terminated_TN, truncated_TN: bool. ended = either.
    valid_TN: bool. False rows neither train nor count: padding of a rollout closed early, reset rows of a NEXT_STEP autoreset.
      Contents of invalid rows are finite but meaningless.
    policy_lag_TN: int64, learner's version minus the behaviour's, per step.
    final_observation: by field name, [F, ...]: true last observations of episodes that ended where row t+1 does not hold them.
    final_index: int64 [F, 2] = (t, n) of those.
    policy_state: recurrent state by name at each column's first row, [N, ...]; empty without memory.
    reset_T1N: bool [T+1, N], where the recurrent state before a row is the initial one, see Slot.resets; None without memory.
    """

    observation: dict[str, Tensor]
    action_mask: Tensor | None
    action: Tensor
    log_prob_TN: Tensor
    reward_TN: Tensor
    terminated_TN: Tensor
    truncated_TN: Tensor
    valid_TN: Tensor
    policy_lag_TN: Tensor
    final_observation: dict[str, Tensor]
    final_index: Tensor
    policy_state: dict[str, Tensor]
    reset_T1N: Tensor | None = None

    @property
    def ended_TN(self) -> Tensor:
        return self.terminated_TN | self.truncated_TN

    @property
    def num_env_steps(self) -> int:
        return int(self.valid_TN.sum())

    def next_value_TN(self, value_T1N: Tensor, final_value_F: Tensor) -> Tensor:
        """V of the true successor of each row: the next row's, or the true last observation's where an episode ended.

        Args:
          value_T1N: [T+1, N], V of every row. final_value_F: [F], V of `final_observation`.
        """
        next_value_TN = value_T1N[1:].clone()
        if len(self.final_index):
            next_value_TN[self.final_index[:, 0], self.final_index[:, 1]] = final_value_F
        return next_value_TN

    def columns(self, columns: slice) -> Batch:
        """Some columns, from `start` up to `stop`, as a batch of their own."""
        n = self.final_index[:, 1]
        inside = (n >= columns.start) & (n < columns.stop)
        final_index = self.final_index[inside]
        final_index[:, 1] -= columns.start
        return Batch(
            observation={name: value[:, columns] for name, value in self.observation.items()},
            action_mask=None if self.action_mask is None else self.action_mask[:, columns],
            action=self.action[:, columns],
            log_prob_TN=self.log_prob_TN[:, columns],
            reward_TN=self.reward_TN[:, columns],
            terminated_TN=self.terminated_TN[:, columns],
            truncated_TN=self.truncated_TN[:, columns],
            valid_TN=self.valid_TN[:, columns],
            policy_lag_TN=self.policy_lag_TN[:, columns],
            final_observation={name: value[inside] for name, value in self.final_observation.items()},
            final_index=final_index,
            policy_state={name: value[columns] for name, value in self.policy_state.items()},
            reset_T1N=None if self.reset_T1N is None else self.reset_T1N[:, columns],
        )

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `function` of every tensor."""

        def of(value: object) -> object:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, dict):
                return {k: function(v) for k, v in value.items()}
            return value

        return Batch(**{k: of(v) for k, v in vars(self).items()})  # type: ignore[arg-type]
