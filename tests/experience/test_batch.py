"""What an update is given: successors' values, counts, and a function of all of it."""

from __future__ import annotations

import torch

from shoal.experience.batch import Batch


def batch_of(final_index: list[tuple[int, int]], mask: torch.Tensor | None = None) -> Batch:
    shape = (2, 3)
    valid = torch.tensor([[True, True, False], [True, False, True]])
    return Batch(
        observation={"observation": torch.arange(9, dtype=torch.uint8).reshape(3, 3)},
        action_mask=mask,
        action=torch.zeros(shape, dtype=torch.int64),
        log_prob_TN=torch.zeros(shape),
        reward_TN=torch.zeros(shape),
        terminated_TN=torch.tensor([[True, False, False], [False, False, False]]),
        truncated_TN=torch.tensor([[False, True, False], [False, False, False]]),
        valid_TN=valid,
        policy_lag_TN=torch.zeros(shape, dtype=torch.int64),
        final_observation={"observation": torch.zeros(len(final_index), dtype=torch.uint8)},
        final_index=torch.tensor(final_index, dtype=torch.int64).reshape(-1, 2),
        policy_state={},
    )


def test_the_next_value_is_the_next_rows_or_the_true_last_observations():
    value_T1N = torch.arange(9.0).reshape(3, 3)
    assert batch_of([]).next_value_TN(value_T1N, torch.zeros(0)).tolist() == [[3, 4, 5], [6, 7, 8]]
    next_value = batch_of([(0, 2), (1, 0)]).next_value_TN(value_T1N, torch.tensor([50.0, 60.0]))
    assert next_value.tolist() == [[3, 4, 50], [60, 7, 8]]
    assert value_T1N.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_an_episode_ended_where_it_was_terminated_or_truncated_and_valid_rows_are_steps():
    batch = batch_of([])
    assert batch.ended_TN.tolist() == [[True, True, False], [False, False, False]]
    assert batch.num_env_steps == 4
    assert isinstance(batch.num_env_steps, int)


def test_every_tensor_is_mapped_and_nothing_else_changes():
    batch = batch_of([(0, 1)], mask=torch.ones((3, 3, 2), dtype=torch.bool))
    batch.reset_T1N = torch.zeros((3, 3), dtype=torch.bool)
    moved = batch.mapped(lambda tensor: tensor.to("meta"))
    for name, value in vars(batch).items():
        found = getattr(moved, name)
        pairs = [(value[k], found[k]) for k in value] if isinstance(value, dict) else [(value, found)]
        for before, after in pairs:
            assert after.device.type == "meta", name
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert batch_of([]).mapped(lambda tensor: tensor.to("meta")).action_mask is None
    assert batch_of([]).mapped(lambda tensor: tensor.to("meta")).reset_T1N is None
    same = batch.mapped(torch.Tensor.clone)
    assert same.observation["observation"].tolist() == batch.observation["observation"].tolist()
    assert same.valid_TN.tolist() == batch.valid_TN.tolist()
