"""What a policy remembers: one layer of LSTM or GRU, stepped row by row while acting and unrolled over whole rollouts while learning.

The initial state, which an episode begins with, is zeros.
Legend: T rows, N environments, D features that come in, H units, G gates * H.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shoal.ops.recurrence import gru, gru_step, lstm, lstm_step

State = dict[str, Tensor]

LONGEST_SPAN = 128.0  # rows; of the spans that units are begun with
FIELDS = {"lstm": ("policy_state/h", "policy_state/c"), "gru": ("policy_state/h",)}
_GATES = {"lstm": 4, "gru": 3}


@dataclass(frozen=True)
class Unrolled:
    """Attributes:
    output_TNH: what the memory gave at each row, [T, N, H].
    states: after each row, by name [T, N, H], without gradient.
    """

    output_TNH: Tensor
    states: State

    def state_after(self, row: Tensor, env: Tensor) -> State:
        """The states [F, H] after rows (row, env), int64 [F] each: before any reset of the next row."""
        return {name: value[row, env] for name, value in self.states.items()}


class Memory(nn.Module):
    """Features -> outputs of `num_features` units.

    Args:
      size: D. num_features: H.
      orthogonal_init: orthogonal weights of each gate, and gates that keep: the units are begun with spans of 1 to LONGEST_SPAN rows, evenly in their
        logarithm (Tallec & Ollivier 2018, arXiv:1804.11188, eq. 16); torch's own initialisation where not.
    Attributes:
      names: of the fields of the state.
    """

    def __init__(self, kind: Literal["lstm", "gru"], size: int, num_features: int, orthogonal_init: bool) -> None:
        super().__init__()
        self.kind, self.num_features, self.names = kind, num_features, FIELDS[kind]
        gates = _GATES[kind] * num_features
        bound = 1.0 / math.sqrt(num_features)
        self.input_weight = nn.Parameter(torch.empty(gates, size).uniform_(-bound, bound))
        self.state_weight = nn.Parameter(torch.empty(gates, num_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(gates).uniform_(-bound, bound))
        if orthogonal_init:
            self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        H = self.num_features
        for weight in (self.input_weight, self.state_weight):
            for gate in range(0, len(weight), H):
                nn.init.orthogonal_(weight[gate : gate + H])
        self.bias.zero_()
        keep = torch.linspace(0.0, math.log(LONGEST_SPAN - 1.0), H)  # log(span - 1), for a gate of 1 - 1 / span
        if self.kind == "lstm":  # output, input, forget, cell
            self.bias[H : 2 * H] = -keep
            self.bias[2 * H : 3 * H] = keep
        else:  # reset, update (the share that stays), new
            self.bias[H : 2 * H] = keep

    def initial_state(self, num_envs: int) -> State:
        """[num_envs, H] by name."""
        return {name: self.bias.new_zeros(num_envs, self.num_features) for name in self.names}

    def step(self, features: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        """One row: features [N, D] and the state before it -> output [N, H] and the state after it."""
        from_input = torch.addmm(self.bias, features, self.input_weight.t())
        if self.kind == "gru":
            h = gru_step(from_input, self.state_weight, state["policy_state/h"])
            return h, {"policy_state/h": h}
        h, c = lstm_step(from_input, self.state_weight, state["policy_state/h"], state["policy_state/c"])
        return h, {"policy_state/h": h, "policy_state/c": c}

    def unroll(self, features: Tensor, state: Mapping[str, Tensor], reset_TN: Tensor) -> Unrolled:
        """All rows: as `step`, one row after the other, with the initial state before every row of `reset_TN`.

        Args:
          features: [T * N, D], row t of environment n at t * N + n.
          state: [N, H] by name, before row 0.
          reset_TN: bool [T, N].
        """
        from_input = torch.addmm(self.bias, features, self.input_weight.t()).view(*reset_TN.shape, -1)
        h = state["policy_state/h"]
        if self.kind == "gru":
            output, _ = gru(from_input, self.state_weight, h, reset_TN)
            return Unrolled(output, {"policy_state/h": output.detach()})
        output, cell = lstm(from_input, self.state_weight, h, state["policy_state/c"], reset_TN)
        assert cell is not None
        return Unrolled(output, {"policy_state/h": output.detach(), "policy_state/c": cell})
