"""The unroll equals stepping row by row, and its gradients those of torch's graph; torch's own cells are the oracle of a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.ops.recurrence import gru, gru_step, lstm, lstm_step

T, N, H = 7, 5, 3
KINDS = ("lstm", "gru")


def numbers(kind: str, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """[input, weight, h] and the LSTM's c, float64 with gradient, and resets: one environment's in no row, one's in all."""
    generator = torch.Generator().manual_seed(seed)
    gates = {"lstm": 4, "gru": 3}[kind] * H
    shapes = [(T, N, gates), (gates, H), (N, H)] + ([(N, H)] if kind == "lstm" else [])
    given = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    reset_TN = torch.rand(T, N, generator=generator) < 0.3
    reset_TN[:, 0], reset_TN[:, 1] = False, True
    return given, reset_TN


def unrolled(kind: str, given: list[Tensor], reset_TN: Tensor) -> tuple[Tensor, Tensor | None]:
    return (lstm if kind == "lstm" else gru)(*given, reset_TN)


def stepped(kind: str, given: list[Tensor], reset_TN: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same by the slow loop."""
    input_TNG, weight, *state = given
    outputs, cells = [], []
    for t in range(T):
        state = [torch.where(reset_TN[t, :, None], 0.0, value) for value in state]
        if kind == "lstm":
            state = list(lstm_step(input_TNG[t], weight, *state))
            cells.append(state[1])
        else:
            state = [gru_step(input_TNG[t], weight, *state)]
        outputs.append(state[0])
    return torch.stack(outputs), torch.stack(cells) if cells else None


@pytest.mark.parametrize("kind", KINDS)
def test_an_unroll_equals_stepping_row_by_row_and_so_do_its_gradients(kind: str) -> None:
    given, reset_TN = numbers(kind)
    output, cell = unrolled(kind, given, reset_TN)
    expected, expected_cell = stepped(kind, given, reset_TN)
    torch.testing.assert_close(output, expected)
    if expected_cell is not None:
        torch.testing.assert_close(cell, expected_cell.detach())
    slope = torch.randn(T, N, H, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = torch.autograd.grad(output, given, slope)
    for one, other in zip(found, torch.autograd.grad(expected, given, slope), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_before_a_reset_changes_what_comes_after(kind: str) -> None:
    given, reset_TN = numbers(kind)
    reset_TN[3] = True
    output, _ = unrolled(kind, given, reset_TN)
    other = [given[0].detach().clone(), *given[1:]]
    other[0][:3] += 1.0
    changed, _ = unrolled(kind, other, reset_TN)
    assert torch.equal(output[3:], changed[3:])
    assert not torch.equal(output[2, 0], changed[2, 0])
    assert (torch.autograd.grad(output[3:].sum(), given[0])[0][:3] == 0).all()


def test_a_step_of_the_lstm_is_torchs_with_the_gates_in_our_order() -> None:
    (input_TNG, weight, h, c), _ = numbers("lstm")
    order = [slice(H, 2 * H), slice(2 * H, 3 * H), slice(3 * H, 4 * H), slice(0, H)]  # torch: input, forget, cell, output
    theirs = torch.cat([input_TNG[0][:, part] for part in order], 1)
    eye, nothing = torch.eye(4 * H, dtype=torch.float64), torch.zeros(4 * H, dtype=torch.float64)
    expected = torch.lstm_cell(theirs, (h, c), eye, torch.cat([weight[part] for part in order]), nothing, nothing)
    for one, other in zip(lstm_step(input_TNG[0], weight, h, c), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_of_the_gru_is_torchs() -> None:
    (input_TNG, weight, h), _ = numbers("gru")
    eye, nothing = torch.eye(3 * H, dtype=torch.float64), torch.zeros(3 * H, dtype=torch.float64)
    torch.testing.assert_close(gru_step(input_TNG[0], weight, h), torch.gru_cell(input_TNG[0], h, eye, weight, nothing, nothing))
