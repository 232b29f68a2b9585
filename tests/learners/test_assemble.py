"""From slots to a batch: nothing that was not written is ever read, and every number lands in its column."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout_fakes import NUM_ACTIONS, add_episode, observation_of, poisoned_ring, scripted_schema, write_rollout
from shoal.experience.envelope import Identity
from shoal.learners.assemble import assemble

T, B = 4, 3


def slots_of(rows: list[int], **schema):
    ring = poisoned_ring(scripted_schema(T, B, **schema), len(rows))
    for i, num_rows in enumerate(rows):
        write_rollout(ring.slots[i], Identity(i, 0, 0), num_rows=num_rows, versions=[2 * i + t for t in range(num_rows)], tag=i)
    return ring.slots


@pytest.mark.parametrize("rows", [[4, 4, 4], [4, 1, 3], [2, 2], [1], [3, 4]])
def test_each_number_stands_in_its_column_and_below_the_last_row_stand_zeros(rows):
    batch = assemble(slots_of(rows), version=9, max_lag=9)
    t_max, columns = max(rows), len(rows) * B
    assert batch.num_env_steps == sum(rows) * B
    assert batch.observation["observation/camera"].shape == (t_max + 1, columns, 2, 3)
    assert batch.observation["observation/camera"].dtype == torch.uint8
    for i, num_rows in enumerate(rows):
        for b in range(B):
            n = i * B + b
            for t in range(t_max + 1):
                number = t * 10 + b + 100 * i if t <= num_rows else 0
                assert (batch.observation["observation/camera"][t, n] == number % 256).all()
                assert (batch.observation["observation/position"][t, n] == number).all()
                mask = [t <= num_rows and number % NUM_ACTIONS != a for a in range(NUM_ACTIONS)]
                assert batch.action_mask[t, n].tolist() == mask
            for t in range(t_max):
                there = t < num_rows
                number = t * 10 + b + 100 * i if there else 0
                assert batch.action[t, n] == number % NUM_ACTIONS
                assert batch.log_prob_TN[t, n] == -number / 64
                assert batch.reward_TN[t, n] == number / 8
                assert bool(batch.valid_TN[t, n]) == there
                assert batch.policy_lag_TN[t, n] == (9 - (2 * i + t) if there else 0)
            assert batch.policy_state["policy_state/h"][n].tolist() == [b + 100 * i, b + 100 * i + 0.25]
    assert not batch.terminated_TN.any()
    assert not batch.truncated_TN.any()
    assert list(batch.policy_state) == ["policy_state/h"]
    assert list(batch.observation) == ["observation/camera", "observation/position"]
    kinds = {
        "action": torch.int64,
        "log_prob_TN": torch.float32,
        "reward_TN": torch.float32,
        "valid_TN": torch.bool,
        "policy_lag_TN": torch.int64,
    }
    assert {name: getattr(batch, name).dtype for name in kinds} == kinds


def test_true_last_observations_point_to_their_columns():
    slots = slots_of([4, 2, 4])
    add_episode(slots[0], 3, 1, truncated=True, final=observation_of(1, 7))
    add_episode(slots[2], 0, 2, final=observation_of(2, 8))
    add_episode(slots[2], 1, 0, truncated=True, final=observation_of(3, 9))
    add_episode(slots[2], 2, 0, truncated=True)  # a NEXT_STEP autoreset: row 3 holds its last observation
    batch = assemble(slots, version=20, max_lag=20)
    assert batch.final_index.tolist() == [[3, 1], [0, 6 + 2], [1, 6 + 0]]
    assert batch.final_index.dtype == torch.int64
    for i, (seed, step) in enumerate([(1, 7), (2, 8), (3, 9)]):
        for name, value in observation_of(seed, step).items():
            np.testing.assert_array_equal(batch.final_observation[name][i], value)
    assert batch.terminated_TN.nonzero().tolist() == [[0, 8]]
    assert batch.truncated_TN.nonzero().tolist() == [[1, 6], [2, 6], [3, 1]]
    assert batch.ended_TN.nonzero().tolist() == [[0, 8], [1, 6], [2, 6], [3, 1]]


def test_the_state_is_reset_where_an_episode_begins_and_not_where_a_last_observation_has_a_row_of_its_own():
    slots = slots_of([4, 2, 4])
    add_episode(slots[0], 3, 1, truncated=True, final=observation_of(1, 7))
    add_episode(slots[1], 0, 2, final=observation_of(2, 8))
    add_episode(slots[2], 1, 0, truncated=True)  # a NEXT_STEP autoreset: row 2 holds its last observation and is no step
    slots[2].arrays["valid"][2, 0] = False
    batch = assemble(slots, version=8, max_lag=6)  # the first rows of the first slot are too old to be trained, and were steps all the same
    assert not batch.valid_TN[:2, :B].any()
    assert batch.reset_T1N.dtype is torch.bool
    assert batch.reset_T1N.nonzero().tolist() == [[1, B + 2], [3, 2 * B + 0], [4, 1]]


def test_without_finals_masks_and_memory_their_places_are_empty():
    batch = assemble(slots_of([4, 4], mask=False, state=False), version=0, max_lag=0)
    assert batch.action_mask is None
    assert batch.policy_state == {}
    assert batch.reset_T1N is None
    assert batch.final_index.shape == (0, 2)
    assert {name: value.shape for name, value in batch.final_observation.items()} == {
        "observation/camera": (0, 2, 3),
        "observation/position": (0, 2),
    }


@pytest.mark.parametrize("rows", [[4, 4], [4, 2], [4]])
def test_a_batch_shares_no_memory_with_the_slots(rows):
    """The slots are free again at once, and written by the next actor while the learner computes."""
    slots = slots_of(rows)
    add_episode(slots[0], 1, 1, final=observation_of(1, 7))
    batch = assemble(slots, version=9, max_lag=9)
    before = {name: value.clone() for name, value in flat(batch).items()}
    for slot in slots:
        for array in slot.arrays.values():
            array.reshape(-1).view(np.uint8)[:] = 0xFF
    for name, value in flat(batch).items():
        assert torch.equal(value, before[name]), name


def flat(batch) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for name, value in vars(batch).items():
        out |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return out


def test_an_invalid_row_inside_has_no_lag():
    slots = slots_of([4])
    slots[0].arrays["valid"][1, 2] = False
    slots[0].arrays["policy_version"][1, 2] = -1
    batch = assemble(slots, version=9, max_lag=9)
    assert batch.policy_lag_TN[:, 2].tolist() == [9, 0, 7, 6]
    assert batch.num_env_steps == 11


def test_the_next_value_is_that_of_the_true_successor():
    slots = slots_of([2])
    add_episode(slots[0], 0, 1, truncated=True, final=observation_of(1, 7))
    batch = assemble(slots, version=9, max_lag=9)
    value_T1N = torch.arange(9.0).reshape(3, 3)
    next_value = batch.next_value_TN(value_T1N, torch.tensor([50.0]))
    assert next_value.tolist() == [[3, 50, 5], [6, 7, 8]]
    assert value_T1N.tolist() == torch.arange(9.0).reshape(3, 3).tolist()


def test_rows_that_are_too_old_are_not_valid():
    slots = slots_of([4])
    batch = assemble(slots, version=9, max_lag=7)  # the rows have versions 0 to 3
    assert batch.valid_TN[:, 0].tolist() == [False, False, True, True]
    assert batch.policy_lag_TN[:, 0].tolist() == [0, 0, 7, 6]
