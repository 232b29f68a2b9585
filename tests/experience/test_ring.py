"""Slots: whose bytes are whose, and what a reader refuses."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from rollout_fakes import RUN_ID, poisoned_ring, scripted_schema, write_rollout
from shoal.errors import SchemaError
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring, allocate

ME = Identity(2, 5, 1)


def finished(num_rows: int | None = None, num_slots: int = 1, index: int = 0, **schema):
    ring = poisoned_ring(scripted_schema(**schema), num_slots)
    return write_rollout(ring.slots[index], ME, num_rows=num_rows)


def test_slots_lie_one_after_the_other():
    schema = scripted_schema()
    size = schema.slot_bytes
    assert Ring.size_bytes(schema, 3) == 3 * size
    buffer = np.zeros(3 * size, np.uint8)
    ring = Ring(schema, 3, buffer)
    assert ring.schema is schema
    assert [slot.index for slot in ring.slots] == [0, 1, 2]
    assert all(slot.schema is schema for slot in ring.slots)
    for i, slot in enumerate(ring.slots):
        for name, array in slot.arrays.items():
            address = array.__array_interface__["data"][0] - buffer.__array_interface__["data"][0]
            assert address == i * size + schema.offsets[name]


def test_own_memory_begins_at_zero():
    ring = allocate(scripted_schema(), 2)
    assert len(ring.slots) == 2
    assert all(not array.view(np.uint8).any() for slot in ring.slots for array in slot.arrays.values() if array.ndim)
    assert int(ring.slots[0].envelope["num_rows"]) == 0


def test_poison_is_nan_and_stays_in_its_slot():
    ring = allocate(scripted_schema(), 3)
    ring.poison(1)
    before, poisoned, after = (slot.arrays for slot in ring.slots)
    assert np.isnan(poisoned["reward"]).all()
    assert np.isnan(poisoned["observation/position"]).all()
    assert (poisoned["policy_version"] == -1).all()
    assert (poisoned["observation/camera"] == 255).all()
    for untouched in (before, after):
        assert not any(array.reshape(-1).view(np.uint8).any() for array in untouched.values())
    assert np.asarray(ring._buffer).reshape(3, -1)[1].min() == 255


def test_a_slot_shows_a_behaviour_its_observations_and_mask_row_by_row():
    slot = finished()
    assert slot.observation_names == ("observation/camera", "observation/position", "action_mask")
    assert len(slot.rows) == 5
    for t, row in enumerate(slot.rows):
        assert set(row) == set(slot.observation_names)
        for name, view in row.items():
            np.testing.assert_array_equal(view, slot.arrays[name][t])
            assert np.shares_memory(view, slot.arrays[name])


def test_a_slot_knows_whom_it_holds():
    assert finished().identity == ME
    assert all(type(part) is int for part in finished().identity)


def written(slot):
    """Of each field behind the header, the rows that were written, by the counts of the header and the words of the design."""
    e = slot.envelope
    rows, episodes, finals = int(e["num_rows"]), int(e["num_episodes"]), int(e["num_finals"])
    for field in slot.schema.fields:
        if field.name != "envelope":
            last = episodes if field.name == "episode" else finals
            yield field.name, {"T": rows, "T+1": rows + 1, "B": slot.schema.num_envs, "final": last}[field.axis]


@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_the_checksum_goes_over_the_written_rows_of_all_fields_in_their_order(num_rows):
    slot = finished(num_rows)
    assert slot.checksum() == zlib.crc32(b"".join(slot.arrays[name][:rows].tobytes() for name, rows in written(slot)))
    slot.check(RUN_ID, ME)
    slot.check(RUN_ID)


def test_every_written_row_of_every_field_is_under_the_checksum():
    slot, changed = finished(2), set()
    for name, rows in written(slot):
        for t in range(rows):
            raw = slot.arrays[name][t : t + 1].view(np.uint8).reshape(-1)
            raw[-1] ^= 1
            with pytest.raises(
                SchemaError, match=r"^slot 0: (it changed after Identity\(group=2, sequence=5, attempt=1\)|an episode's end)"
            ):
                slot.check(RUN_ID, ME)
            raw[-1] ^= 1
            changed.add(name)
    slot.check(RUN_ID, ME)
    assert {"action", "log_prob", "reward", "terminated", "truncated", "valid", "policy_version", "cursor/start", "cursor/end"} < changed


def test_rows_that_were_not_written_are_not_under_the_checksum():
    slot = finished(2)
    for name, rows in written(slot):
        slot.arrays[name][rows:] = np.zeros((), slot.arrays[name].dtype)
    slot.check(RUN_ID, ME)


def test_check_refuses_another_schema():
    slot = finished(index=1, num_slots=2)
    slot.envelope["schema_hash"] = np.void(bytes(15) + b"\x01")
    expected = slot.schema.hash.hex()
    with pytest.raises(SchemaError, match=rf"^slot 1: schema hash {'00' * 15}01, expected {expected}$"):
        slot.check(RUN_ID, ME)


def test_check_refuses_another_run():
    other = bytes(15) + b"\x02"
    with pytest.raises(SchemaError, match=rf"^slot 0: of run {RUN_ID.hex()}, expected {other.hex()}$"):
        finished().check(other, ME)


@pytest.mark.parametrize("other", [Identity(3, 5, 1), Identity(2, 6, 1), Identity(2, 5, 0)])
def test_check_refuses_another_identity(other):
    slot = finished()
    with pytest.raises(SchemaError, match=r"^slot 0: holds Identity\(group=2, sequence=5, attempt=1\), expected Identity\(group="):
        slot.check(RUN_ID, other)
    slot.check(RUN_ID)


@pytest.mark.parametrize("num_rows", [0, -1, 5])
def test_check_refuses_a_number_of_rows_that_cannot_be(num_rows):
    slot = finished()
    slot.envelope["num_rows"] = num_rows
    with pytest.raises(SchemaError, match=rf"^slot 0: {num_rows} rows, expected 1 to 4$"):
        slot.check(RUN_ID, ME)


def test_every_environment_used_all_rows_unless_the_group_is_paced():
    slot = finished(3)
    slot.arrays["valid"][1:, 0] = False
    assert slot.rows_used().tolist() == [3, 3, 3]
    slot.envelope["paced"] = True
    slot.arrays["valid"][:] = False
    slot.arrays["valid"][:3] = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 0]])
    slot.arrays["valid"][3] = True  # beyond the rows that were written
    assert slot.rows_used().tolist() == [3, 0, 2]
    slot.arrays["valid"][:3] = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    assert slot.rows_used().tolist() == [1, 2, 2]


@pytest.mark.parametrize("num_rows", [1, 4])
def test_one_row_and_all_rows_are_rollouts(num_rows):
    finished(num_rows).check(RUN_ID, ME)


def with_end(kind: str, row: int, env: int):
    """A finished slot of 3 rows and its environments, with one end (or last observation) noted at a place."""
    slot = finished(3)
    slot.envelope[kind] = 1
    if kind == "num_episodes":
        slot.arrays["episode"]["row"][0], slot.arrays["episode"]["env"][0] = row, env
    else:
        slot.arrays["final/row"][0], slot.arrays["final/env"][0] = row, env
    return slot


@pytest.mark.parametrize("kind", ["num_episodes", "num_finals"])
def test_check_refuses_ends_outside_the_rollout(kind):
    last = finished(3).schema.num_envs - 1
    for row, env in ((0, 0), (2, 0), (0, last), (2, last)):
        with_end(kind, row, env).check_counts()
    for row, env in ((-1, 0), (3, 0), (0, -1), (0, last + 1)):
        slot = with_end(kind, row, env)
        with pytest.raises(SchemaError, match=rf"^slot 0: an episode's end lies outside its 3 rows and {last + 1} environments$"):
            slot.check_counts()


@pytest.mark.parametrize(
    ("name", "said"), [("num_env_steps", "env steps"), ("num_episodes", "episodes"), ("num_finals", "last observations")]
)
def test_check_refuses_counts_that_cannot_be(name, said):
    most = finished().schema.num_rows * finished().schema.num_envs
    for count in (-1, most + 1):
        slot = finished()
        slot.envelope[name] = count
        with pytest.raises(SchemaError, match=rf"^slot 0: {count} {said}, expected 0 to {most}$"):
            slot.check_counts()


def test_a_paced_rollout_of_one_row_tells_who_used_it():
    slot = finished(1)
    slot.envelope["paced"] = True
    slot.arrays["valid"][0] = [True, False, True]
    assert slot.rows_used().tolist() == [1, 0, 1]
