"""What a policy remembers: one layer of LSTM or GRU, stepped row by row while acting and unrolled over whole rollouts while learning.

The initial state, which an episode begins with, is zeros. An unroll cuts every environment's rows into stretches at the rows before which the state
is the initial one; stretches lie side by side in one packed sequence, so that the layer runs once for as many rows as the longest of them has,
and the state at each stretch's end, which a truncated episode bootstraps from, is found on the way.

Legend: T rows, N environments, S stretches, D features that come in, H units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

State = dict[str, Tensor]

LONGEST_SPAN = 128.0  # rows; of the spans that units are begun with
FIELDS = {"lstm": ("policy_state/h", "policy_state/c"), "gru": ("policy_state/h",)}
_GATES = {"lstm": 4, "gru": 3}


class Stretches(NamedTuple):
    """Where the rows of an unroll lie when they are packed. Flat rows are t * N + n.

    Attributes:
      order: int64 [T * N], the flat row of each packed one.
      num_alive: int64 [longest], how many stretches have a k-th row.
      env, row: int64 [S], where each stretch begins; the longest come first.
      of_row: int64 [T * N], the stretch of each flat row.
    """

    order: npt.NDArray[np.int64]
    num_alive: npt.NDArray[np.int64]
    env: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    of_row: npt.NDArray[np.int64]


def stretches(reset_TN: npt.NDArray[np.bool_]) -> Stretches:
    """The stretches of T rows of N environments, which begin at row 0 and wherever `reset_TN` is True."""
    T, N = reset_TN.shape
    begins_NT = reset_TN.T.copy()
    begins_NT[:, 0] = True
    begin = np.flatnonzero(begins_NT)  # n * T + t
    length = np.diff(np.append(begin, N * T))
    longest_first = np.argsort(-length, kind="stable")
    begin, length = begin[longest_first], length[longest_first]
    alive = np.arange(length[0])[:, None] < length  # [longest, S]
    k, stretch = np.nonzero(alive)
    env, row = np.divmod(begin[stretch] + k, T)
    order = row * N + env
    of_row = np.empty(T * N, np.int64)
    of_row[order] = stretch
    return Stretches(order, alive.sum(1), *np.divmod(begin, T), of_row)


@dataclass(frozen=True)
class Unrolled:
    """Attributes:
    output: [T * N, H], flat rows t * N + n.
    """

    output: Tensor
    _ends: State  # [S, H], after each stretch's last row
    _of_row: Tensor  # [T * N]
    _num_envs: int

    def state_after(self, row: Tensor, env: Tensor) -> State:
        """The states [F, H] after rows that end a stretch (the next one is reset, or there is none): int64 [F] each."""
        stretch = self._of_row[row * self._num_envs + env]
        return {name: value[stretch] for name, value in self._ends.items()}


class Memory(nn.Module):
    """Features -> outputs of `num_features` units.

    Args:
      size: D. num_features: H.
      orthogonal_init: orthogonal weights of each gate, and gates that keep: the units are begun with spans of 1 to LONGEST_SPAN rows, evenly in their
        logarithm (Tallec & Ollivier 2018, arXiv:1804.11188, eq. 16); torch's own initialisation where not.
    """

    def __init__(self, kind: Literal["lstm", "gru"], size: int, num_features: int, orthogonal_init: bool) -> None:
        super().__init__()
        self.kind, self.num_features = kind, num_features
        self.cell = (nn.LSTM if kind == "lstm" else nn.GRU)(size, num_features)
        self.names = FIELDS[kind]
        if orthogonal_init:
            self._initialise()

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From the input [G * H, D] and from the state [G * H, H], and their biases [G * H], for G gates."""
        cell: Any = self.cell
        return cell.weight_ih_l0, cell.weight_hh_l0, cell.bias_ih_l0, cell.bias_hh_l0

    @torch.no_grad()
    def _initialise(self) -> None:
        H, (from_input, from_state, bias, state_bias) = self.num_features, self.weights
        for weight in (from_input, from_state):
            for gate in range(0, len(weight), H):
                nn.init.orthogonal_(weight[gate : gate + H])
        bias.zero_()
        state_bias.zero_()
        keep = torch.linspace(0.0, math.log(LONGEST_SPAN - 1.0), H)  # log(span - 1), for a gate of 1 - 1 / span
        if self.kind == "lstm":  # input, forget, cell, output
            bias[:H] = -keep
        bias[H : 2 * H] = keep  # of a GRU (reset, update, new) the update gate, the share that stays

    def initial_state(self, num_envs: int) -> State:
        """[num_envs, H] by name."""
        return {name: self.weights[1].new_zeros(num_envs, self.num_features) for name in self.names}

    def step(self, features: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        """One row: features [N, D] and the state before it -> output [N, H] and the state after it."""
        before = tuple(state[name] for name in self.names)
        after: tuple[Tensor, ...]
        if self.kind == "lstm":
            after = torch.lstm_cell(features, before, *self.weights)
        else:
            after = (torch.gru_cell(features, before[0], *self.weights),)
        return after[0], dict(zip(self.names, after, strict=True))

    def unroll(self, features: Tensor, state: Mapping[str, Tensor], reset_TN: Tensor) -> Unrolled:
        """All rows: as `step`, one row after the other, with the initial state before every row of `reset_TN`.

        Args:
          features: [T * N, D], flat rows t * N + n.
          state: [N, H] by name, before row 0.
          reset_TN: bool [T, N].
        """
        device = features.device
        cut = stretches(reset_TN.cpu().numpy())
        order, of_row, env = (torch.from_numpy(index).to(device) for index in (cut.order, cut.of_row, cut.env))
        goes_on = (torch.from_numpy(cut.row == 0).to(device) & ~reset_TN[0, env]).unsqueeze(1)
        before = [torch.where(goes_on, state[name][env], 0.0).unsqueeze(0) for name in self.names]
        packed = PackedSequence(features[order], torch.from_numpy(cut.num_alive))
        after: tuple[Tensor, ...]
        if self.kind == "lstm":
            outputs, after = self.cell(packed, (before[0], before[1]))
        else:
            outputs, last = self.cell(packed, before[0])
            after = (last,)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=device)
        ends = {name: value[0] for name, value in zip(self.names, after, strict=True)}
        return Unrolled(outputs.data[place], ends, of_row, reset_TN.shape[1])
