"""Values, bootstraps and minibatches of policies with memory, against stepping every column row by row.

Legend: T rows, N environments (columns).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.algorithms import build_algorithm
from shoal.algorithms.base import Algorithm, UpdateContext, epoch, evaluate_TN, values_TN
from shoal.algorithms.sequences import SequenceMinibatch
from shoal.config import AlgorithmConfig, APPOConfig, ImpalaConfig, PolicyConfig, PPOConfig
from shoal.errors import ConfigError
from shoal.experience.batch import Batch
from shoal.networks.policy import build_policy
from shoal.networks.recurrent import RecurrentPolicy

from . import toy

T, N = 9, 6
NEXT_STEP, GIVEN_UP, CLOSED, OLD = 1, 2, 3, 4  # columns with a life of their own; the others end at random, and reset at once
CONFIGS = [
    PPOConfig(minibatch_size=20, epochs=2),
    ImpalaConfig(),
    ImpalaConfig(minibatch_size=20),
    APPOConfig(minibatch_size=20, epochs=2),
]


def policy(kind: str = "lstm") -> RecurrentPolicy:
    config = PolicyConfig.model_validate({"memory": kind, "memory_size": 5, "hidden_sizes": [8]})
    found = build_policy(toy.spec_of("box", "discrete"), config, seed=3)
    assert isinstance(found, RecurrentPolicy)
    with torch.no_grad():
        found.action_head.linear.weight.mul_(100)
    return found


def batch_of(model: RecurrentPolicy, seed: int = 0) -> Batch:
    """Columns whose episodes end and are truncated at random. One of a NEXT_STEP autoreset (the row after an end holds the last observation and is no
    step), one with an episode that was given up, one that was closed early, one whose first rows are too old to be trained."""
    rng = np.random.default_rng(seed)
    observation = rng.normal(size=(T + 1, N, 2)).astype(np.float32)
    ended, valid = rng.random((T, N)) < 0.3, np.ones((T, N), np.bool_)
    ended[:, [NEXT_STEP, GIVEN_UP, CLOSED, OLD]] = False
    ended[[2, 6], NEXT_STEP], valid[[3, 7], NEXT_STEP] = True, False
    ended[4, GIVEN_UP], valid[4, GIVEN_UP] = True, False
    ended[1, CLOSED], valid[5:, CLOSED] = True, False
    observation[6:, CLOSED] = 0.0
    ended[5, OLD] = True
    truncated = ended & (rng.random((T, N)) < 0.6)
    truncated[2, NEXT_STEP] = truncated[4, GIVEN_UP] = truncated[5, OLD] = True
    finals = [(int(t), int(n)) for t, n in np.argwhere(ended) if n != NEXT_STEP]
    resets = np.zeros((T + 1, N), np.bool_)
    resets[1:] = ~valid
    for t, n in finals:
        resets[t + 1, n] = True
    valid[:3, OLD] = False  # after the resets are known: these were steps
    batch = toy.batch_of(
        {"observation": observation}, rng.integers(0, 9, (T, N)), rng.normal(size=(T, N)).astype(np.float32) - 2, rng.normal(size=(T, N)).astype(np.float32),
        ended & ~truncated, truncated, valid, [(t, n, {"observation": rng.normal(size=2).astype(np.float32)}) for t, n in finals],
    )  # fmt: skip
    batch.reset_T1N = torch.from_numpy(resets)
    generator = torch.Generator().manual_seed(seed)
    batch.policy_state = {name: torch.randn(N, 5, generator=generator) for name in model.memory.names}
    return batch


@torch.no_grad()
def by_stepping(model: RecurrentPolicy, batch: Batch) -> tuple[dict[tuple[int, int], torch.Tensor], ...]:
    """log pi, V, and V of the true successor by (t, n), one column after the other, from what happened and not from `reset_T1N`."""
    log_prob, value, next_value = {}, {}, {}
    finals = {(int(t), int(n)): i for i, (t, n) in enumerate(batch.final_index)}
    beginning = model.initial_state(1)
    for n in range(N):
        state = {name: part[n : n + 1] for name, part in batch.policy_state.items()}
        for t in range(T + 1):
            observation = {"observation": batch.observation["observation"][t, n : n + 1]}
            value[t, n] = model.next_value(observation, state)[0]
            if t == T:
                break
            distribution, state = model.next_distribution(observation, state)
            log_prob[t, n] = distribution.log_prob(batch.action[t, n : n + 1])[0]
            is_reset_row = n == NEXT_STEP and not batch.valid_TN[t, n]
            if (t, n) in finals:
                last = {"observation": batch.final_observation["observation"][finals[t, n]][None]}
                next_value[t, n] = model.next_value(last, state)[0]
                state = beginning
            elif is_reset_row:
                state = beginning
        for t in range(T):
            next_value.setdefault((t, n), value[t + 1, n])
    return log_prob, value, next_value


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("columns_at_once", [N, 2, 1])
def test_every_row_is_seen_in_the_state_that_the_rows_before_it_lead_to(
    kind: str, columns_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.algorithms.base.CHUNK_NUMBERS", columns_at_once * 2 * (T + 1))
    model = policy(kind)
    batch = batch_of(model)
    log_prob, value, next_value = by_stepping(model, batch)
    now = evaluate_TN(model, batch)
    compared = 0
    for t, n in batch.valid_TN.nonzero().tolist():
        torch.testing.assert_close(now.log_prob_TN[t, n], log_prob[t, n], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(now.value_TN[t, n], value[t, n], rtol=1e-4, atol=1e-5)
        if not batch.terminated_TN[t, n]:
            torch.testing.assert_close(now.next_value_TN[t, n], next_value[t, n], rtol=1e-4, atol=1e-5)
            compared += int(batch.truncated_TN[t, n])
    assert compared >= 4, "truncated episodes are among them, the autoreset's included"
    for one, other in zip(values_TN(model, batch), (now.value_TN, now.next_value_TN), strict=True):
        assert torch.equal(one, other)
    whole = evaluate_TN(model, batch, for_gradient=True).whole
    assert (whole is not None) == (columns_at_once == N)


def test_what_lies_beyond_a_columns_last_row_disturbs_nothing() -> None:
    model = policy()
    batch, other = batch_of(model), batch_of(model)
    other.observation["observation"][6:, CLOSED] = 5.0
    other.action[5:, CLOSED] = 7
    assert other.reset_T1N is not None
    other.reset_T1N[6:, CLOSED] = False
    assert not batch.valid_TN[5:, CLOSED].any()
    one, two = evaluate_TN(model, batch), evaluate_TN(model, other)
    for name in ("log_prob_TN", "value_TN", "next_value_TN"):
        assert torch.equal(getattr(one, name)[batch.valid_TN], getattr(two, name)[batch.valid_TN]), name


@pytest.mark.parametrize(("size", "count"), [(None, 1), (1000, 1), (20, 3), (1, N)])
def test_an_epoch_gives_every_column_once_whole_with_its_valid_rows(size: int | None, count: int) -> None:
    model = policy()
    batch = batch_of(model)
    place_TN = torch.arange(T * N, dtype=torch.float32).view(T, N)
    now = evaluate_TN(model, batch)
    seen: list[int] = []
    parts = list(epoch(model, batch, size, np.random.default_rng(0), place=place_TN))
    assert len(parts) == count
    for rows in parts:
        assert isinstance(rows, SequenceMinibatch)
        places = rows["place"].long()
        assert len(rows) == len(places)
        assert {int(place) % N for place in places}.isdisjoint({place % N for place in seen})
        evaluation = rows.evaluate(model)
        torch.testing.assert_close(evaluation.log_prob, now.log_prob_TN.flatten()[places], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(evaluation.value, now.value_TN.flatten()[places], rtol=1e-4, atol=1e-5)
        seen += places.tolist()
    assert sorted(seen) == batch.valid_TN.flatten().nonzero().squeeze(1).tolist()
    order = [rows["place"].tolist() for rows in epoch(model, batch, size, np.random.default_rng(0), place=place_TN)]
    assert order == [rows["place"].tolist() for rows in parts]


def test_a_batch_without_valid_rows_gives_no_minibatch() -> None:
    model = policy()
    batch = batch_of(model)
    batch.valid_TN[:] = False
    assert list(epoch(model, batch, 8, np.random.default_rng(0))) == []


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_updates_are_deterministic_and_rows_that_are_no_steps_do_not_train(config: AlgorithmConfig) -> None:
    found = []
    for rubbish in (False, False, True):
        model = policy()
        batch = batch_of(model)
        if rubbish:
            batch.reward_TN[~batch.valid_TN] = 9.0
            batch.log_prob_TN[~batch.valid_TN] = -9.0
        metrics = build_algorithm(model, config).update(batch, UpdateContext(0, 0.0, np.random.default_rng(0)))
        assert all(np.isfinite(value) for value in metrics.values())
        assert metrics["optimizer_steps"] >= 1
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], policy().parameters(), strict=True))


def test_an_algorithm_that_knows_no_memory_is_refused() -> None:
    class Own(Algorithm[AlgorithmConfig]):
        pass

    with pytest.raises(ConfigError, match=r"policy.memory: own.py:Own does not train policies with memory; ppo, appo, impala and r2d2 do"):
        build_algorithm(policy(), AlgorithmConfig(name="own.py:Own"), Own)
