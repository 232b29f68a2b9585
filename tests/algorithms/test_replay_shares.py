"""Several learners, each with its part of a batch, make the step that one makes from all of it, up to rounding, and all the same, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from several import several
from shoal.algorithms import UpdateContext
from shoal.algorithms.off_policy import OffPolicyAlgorithm, SequenceRows, Transitions
from shoal.algorithms.ranks import Ranks, said_by_all
from shoal.config import DQNConfig, R2D2Config, SACConfig, TD3Config

from . import test_r2d2
from .transitions import BOX, CHOICES, made, rows_of, spec_of

NUM, STEPS = 12, 5


def _steps(action: Any, seed: int, *, mask: bool = False) -> Transitions:
    return rows_of(spec_of(action, mask=mask), seed, NUM)


def _sequences(algorithm: Any, seed: int) -> SequenceRows:
    """Ten of them, of which the last five have few rows to train: shares are uneven."""
    one, two = (test_r2d2.rows_of(algorithm.policy, seed + part) for part in (0, 100))
    rows = _joined([one, two])
    last = rows.valid_LM[:, len(one.weight_M) :]
    last &= torch.rand(last.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    return rows


MAKERS: dict[str, tuple[Callable[[], Any], Callable[[Any, int], Any]]] = {
    "dqn": (lambda: made(DQNConfig(target_update_steps=2, learning_rate=0.01), spec_of(CHOICES, mask=True)), lambda _, seed: _steps(CHOICES, seed, mask=True)),
    "c51": (lambda: made(DQNConfig(distribution="c51", atoms=7, value_min=-5, value_max=5), spec_of(CHOICES)), lambda _, seed: _steps(CHOICES, seed)),
    "quantile": (lambda: made(DQNConfig(distribution="quantile", atoms=5), spec_of(CHOICES)), lambda _, seed: _steps(CHOICES, seed)),
    "sac": (lambda: made(SACConfig(learning_rate=0.01), spec_of(BOX)), lambda _, seed: _steps(BOX, seed)),
    "discrete sac": (lambda: made(SACConfig(learning_rate=0.01), spec_of(CHOICES, mask=True)), lambda _, seed: _steps(CHOICES, seed, mask=True)),
    "td3": (lambda: made(TD3Config(learning_rate=0.01, policy_delay=2), spec_of(BOX)), lambda _, seed: _steps(BOX, seed)),
    "r2d2": (lambda: test_r2d2.made(R2D2Config(target_update_steps=2)), _sequences),
}  # fmt: skip


def _map(rows: Any, work: Callable[[str, Tensor], Tensor]) -> Any:
    """Every tensor of rows, through `work(name, tensor)`."""
    found: dict[str, Any] = {}
    for field in fields(rows):
        value = getattr(rows, field.name)
        if isinstance(value, dict):
            found[field.name] = {key: work(field.name, tensor) for key, tensor in value.items()}
        elif isinstance(value, Tensor):
            found[field.name] = work(field.name, value)
    return replace(rows, **found)


def _axis(rows: Any, name: str) -> int:
    return 1 if isinstance(rows, SequenceRows) and name not in ("state", "weight_M") else 0


def _joined(parts: list[SequenceRows]) -> SequenceRows:
    def join(name: str, tensor: Tensor) -> Tensor:
        def same(part: SequenceRows) -> Tensor:
            value = getattr(part, name)
            return next(v for k, v in value.items() if getattr(parts[0], name)[k] is tensor) if isinstance(value, dict) else value

        return torch.cat([same(part) for part in parts], _axis(parts[0], name))

    return _map(parts[0], join)  # type: ignore[no-any-return]


def _part(rows: Any, rank: int, size: int) -> Any:
    """What one of so many learners has of a batch."""

    def cut(name: str, tensor: Tensor) -> Tensor:
        return tensor.chunk(size, _axis(rows, name))[rank].contiguous()

    part = _map(rows, cut)
    if isinstance(part, SequenceRows):
        trained = [int(piece.valid_LM[piece.burn_in :].sum()) for piece in (_map(rows, cut), rows)]
        part = replace(part, share=trained[0] / trained[1])
    return part


def _context(step: int) -> UpdateContext:
    return UpdateContext(step, 0.0, np.random.default_rng(step))


def _state(algorithm: OffPolicyAlgorithm[Any]) -> dict[str, Tensor]:
    policy = {name: tensor.detach().clone() for name, tensor in algorithm.policy.named_parameters()}
    return {**policy, **algorithm.get_state()}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("size", [2, 3])
def test_steps_of_several_are_those_of_one_on_all_of_their_rows(name: str, size: int) -> None:
    make, draw = MAKERS[name]
    alone, ones = make(), [make() for _ in range(size)]
    begun = _state(alone)
    batches = [draw(alone, seed) for seed in range(STEPS)]
    priorities = [alone.learn(rows, _context(step))[1] for step, rows in enumerate(batches)]

    def work(ranks: Ranks) -> tuple[dict[str, Tensor], list[Tensor]]:
        one = ones[ranks.rank]
        one.join(ranks)
        found = [one.learn(_part(rows, ranks.rank, size), _context(step))[1] for step, rows in enumerate(batches)]
        return _state(one), found

    found = several(size, work)
    expected = _state(alone)
    moved = [each for each in expected if expected[each].is_floating_point() and not torch.equal(expected[each], begun[each])]
    assert len(moved) > len(list(alone.policy.parameters()))
    for state, _ in found:
        for key, value in expected.items():
            assert torch.equal(state[key], found[0][0][key]), key
            torch.testing.assert_close(state[key], value, rtol=2e-3, atol=2e-5, msg=key)
    for step, whole in enumerate(priorities):
        torch.testing.assert_close(torch.cat([said[step] for _, said in found]), whole, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_that_is_not_finite_for_one_is_refused_by_all(name: str) -> None:
    make, draw = MAKERS[name]
    ones = [make() for _ in range(2)]
    begun = _state(ones[0])
    rows = draw(ones[0], 0)
    poisoned = rows.return_LM if isinstance(rows, SequenceRows) else rows.return_M
    poisoned[..., -1] = float("nan")
    if isinstance(rows, SequenceRows):
        rows.valid_LM[:, -1] = True

    def work(ranks: Ranks) -> tuple[int, dict[str, Tensor]]:
        one = ones[ranks.rank]
        one.join(ranks)
        one.learn(_part(rows, ranks.rank, 2), _context(0))
        return one.steps[1], _state(one)

    for skipped, state in several(2, work):
        assert skipped == 1
        for key, value in begun.items():
            assert key.endswith("skipped") or torch.equal(state[key], value), key


def test_what_each_says_is_heard_by_all_exactly() -> None:
    found = several(3, lambda ranks: said_by_all(ranks, [0.1 * ranks.rank, -1e300, float(ranks.rank == 1)]))
    for said in found:
        assert said.tolist() == [[0.1 * rank, -1e300, float(rank == 1)] for rank in range(3)]
