"""What algorithms ask of a batch when the policy has memory: every row with the state that the rows before it lead to.

A rollout of one environment, a column of the batch, is unrolled as a whole, from the state that is stored at its start (networks/recurrent.py says
how stale that is). So minibatches are made of whole columns, and V of a truncated episode's last observation is computed in the state that its
episode led to.

Legend: T rows, N environments (columns), K columns of a minibatch, M valid rows of them, F episodes that ended inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.algorithms.ranks import ALONE, Ranks, share_of
from shoal.experience.batch import Batch
from shoal.networks.evaluation import Evaluation
from shoal.networks.memory import Unrolled
from shoal.networks.policy import Policy
from shoal.networks.recurrent import RecurrentPolicy, Sequences


class Evaluated(NamedTuple):
    """What the policy as it is now says of a batch: float32 [T, N] each, without gradient."""

    log_prob_TN: Tensor
    value_TN: Tensor
    next_value_TN: Tensor  # V of the true successor
    # Of all (T+1) * N rows in their order, where it was made in one piece: its gradient costs no second pass. Several learners: of one's own columns.
    whole: Evaluation | None


@dataclass(frozen=True)
class SequenceMinibatch:
    """M valid rows of K columns, in the order of rows. `rows["name"]` gives the [M] column that was passed to `sequence_minibatches`.

    Attributes:
      valid: int64 [M], which of the T * K flat rows of `sequences` they are.
      whole: of several learners, the columns over the rows of all. share: of these rows in those.
    """

    sequences: Sequences
    valid: Tensor
    columns: dict[str, Tensor]
    whole: dict[str, Tensor]
    share: float

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.valid)

    def evaluate(self, policy: Policy) -> Evaluation:
        assert isinstance(policy, RecurrentPolicy)
        return policy.evaluate_sequences(self.sequences, self.valid)[0]


def sequences_of(batch: Batch, num_rows: int, columns: Tensor | slice) -> Sequences:
    """The first `num_rows` rows of some columns. The row after the last of `batch.action` has none, and gets zeros."""
    assert batch.reset_T1N is not None
    action = batch.action
    if num_rows > len(action):
        action = torch.cat([action, torch.zeros_like(action[:1])])
    return Sequences(
        {name: value[:num_rows, columns] for name, value in batch.observation.items()},
        action[:num_rows, columns],
        None if batch.action_mask is None else batch.action_mask[:num_rows, columns],
        {name: value[columns] for name, value in batch.policy_state.items()},
        batch.reset_T1N[:num_rows, columns],
    )


def evaluate_unrolled(policy: RecurrentPolicy, batch: Batch, chunk_numbers: int, *, for_gradient: bool = False) -> Evaluated:
    """As `evaluate_TN`: in one pass over all columns, or in several of at most `chunk_numbers` observation numbers each."""
    T, N = batch.reward_TN.shape
    numbers = sum(tensor[0, 0].numel() for tensor in batch.observation.values()) * (T + 1)
    size = max(1, chunk_numbers // max(1, numbers))
    log_prob_T1N, value_T1N = batch.log_prob_TN.new_empty(2, T + 1, N)
    final_value_F = batch.log_prob_TN.new_zeros(len(batch.final_index))
    whole: Evaluation | None = None
    for begin in range(0, N, size):
        part = slice(begin, begin + size)
        with torch.set_grad_enabled(for_gradient and size >= N):
            evaluation, unrolled = policy.evaluate_sequences(sequences_of(batch, T + 1, part))
        log_prob_T1N[:, part] = evaluation.log_prob.view(T + 1, -1)
        value_T1N[:, part] = evaluation.value.view(T + 1, -1)
        _value_ends(policy, batch, unrolled, begin, begin + size, final_value_F)
        whole = evaluation if for_gradient and size >= N else None
    return Evaluated(log_prob_T1N[:-1], value_T1N[:-1], batch.next_value_TN(value_T1N, final_value_F), whole)


@torch.no_grad()
def _value_ends(policy: RecurrentPolicy, batch: Batch, unrolled: Unrolled, begin: int, end: int, final_value_F: Tensor) -> None:
    """V of the true last observations of episodes that were truncated in columns `begin` to `end`; a discount of 0 hides the others."""
    if not len(batch.final_index):
        return
    t, n = batch.final_index.unbind(1)
    truncated = batch.truncated_TN[t, n] & ~batch.terminated_TN[t, n]
    wanted = (truncated & (n >= begin) & (n < end)).nonzero().squeeze(1)
    if len(wanted):
        state = unrolled.state_after(t[wanted], n[wanted] - begin)
        final_value_F[wanted] = policy.next_value({name: value[wanted] for name, value in batch.final_observation.items()}, state)


def sequence_minibatches(
    batch: Batch, size: int | None, rng: np.random.Generator, ranks: Ranks = ALONE, **columns_TN: Tensor
) -> Iterator[SequenceMinibatch]:
    """One epoch: every column once, in random order, in as many minibatches as rows of `size` would make (None: all in one), but of whole columns.
    Of several learners each gets its part of every minibatch: some of its columns; where none of those has a valid row, all, with a share of 0.

    Args:
      columns_TN: float32 [T, N] each, such as advantages; `rows[name]` holds their valid rows.
    """
    T, N = batch.valid_TN.shape
    num_valid = batch.num_env_steps
    if not num_valid:
        return
    count = 1 if size is None else min(N, math.ceil(num_valid / size))
    order = torch.from_numpy(rng.permutation(N)).to(batch.valid_TN.device)
    for part in order.tensor_split(count):
        valid, whole = _valid_rows(batch, part, columns_TN)
        if not len(valid):
            continue
        mine, my_valid, columns, share = part, valid, whole, float(ranks.size == 1)
        if ranks.size > 1:
            own, any_left = share_of(len(part), ranks)
            own_valid, own_columns = _valid_rows(batch, part[own], columns_TN)
            if any_left and len(own_valid):
                mine, my_valid, columns, share = part[own], own_valid, own_columns, len(own_valid) / len(valid)
        yield SequenceMinibatch(sequences_of(batch, T, mine), my_valid, columns, {} if ranks.size == 1 else whole, share)


def _valid_rows(batch: Batch, part: Tensor, columns_TN: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Which of the flat rows of some columns are valid, and what is in them."""
    valid = batch.valid_TN[:, part].flatten().nonzero().squeeze(1)
    return valid, {name: value[:, part].flatten()[valid] for name, value in columns_TN.items()}
