"""Rollouts as bytes: the slot that they are written into equals the one that they came from, and whatever is not a rollout is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import SchemaError
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring, Slot, allocate
from shoal.experience.schema import Schema, rollout_schema
from shoal.experience.wire import HEADER_BYTES, pack, packed_bytes, unpack, unpack_part
from shoal.types import EnvironmentSpec, FieldSpec, LeafSpec

RUN = bytes(range(16))
T, B = 5, 3
NAN_PLACES = ("observation", "reward", "log_prob")


def schema(num_rows: int = T, num_envs: int = B) -> Schema:
    observation = LeafSpec((), "box", "float32", (2,), low=(-1.0, -1.0), high=(1.0, 1.0))
    spec = EnvironmentSpec("toy", (observation,), LeafSpec((), "discrete", "int64", (), nvec=(2,), start=(0,)), "none", 0)
    fields = [
        FieldSpec("action", "int64", (), "T"),
        FieldSpec("log_prob", "float32", (), "T"),
        FieldSpec("policy_state/0/h", "float32", (4,), "B"),
    ]
    return rollout_schema(spec, fields, num_rows, num_envs)


def rollout(ring: Ring, seed: int, num_rows: int = T, finals: int = 2, version: int = 7) -> Slot:
    """A finished rollout of random numbers in slot 0, poison around it."""
    rng = np.random.default_rng(seed)
    ring.poison(0)
    slot, e = ring.slots[0], ring.slots[0].envelope
    e[()] = np.zeros((), e.dtype)
    for field in ring.schema.fields:
        if field.axis in ("T", "T+1", "B"):
            rows = {"T": num_rows, "T+1": num_rows + 1, "B": B}[field.axis]
            into = slot.arrays[field.name][:rows]
            into[...] = (
                rng.integers(0, 2, into.shape) if into.dtype.kind in "ib" else 0 if into.dtype.names else rng.normal(size=into.shape)
            )
    slot.arrays["policy_version"][:num_rows] = version
    slot.arrays["valid"][:num_rows] = True
    for index in range(finals):
        slot.arrays["episode"][index] = np.zeros((), slot.arrays["episode"].dtype)
        slot.arrays["episode"][index]["row"], slot.arrays["final/row"][index] = index % num_rows, index % num_rows
        slot.arrays["episode"][index]["env"], slot.arrays["final/env"][index] = index % B, index % B
        slot.arrays["final/observation"][index] = rng.normal(size=2)
    e["schema_hash"], e["run_id"] = np.void(ring.schema.hash), np.void(RUN)
    e["group"], e["sequence"], e["attempt"] = 4, 9, 1
    e["num_rows"], e["num_env_steps"], e["num_episodes"], e["num_finals"] = num_rows, num_rows * B, finals, finals
    e["version_min"] = e["version_max"] = version
    e["checksum"] = slot.checksum()
    return slot


IDENTITY = Identity(4, 9, 1)


@given(st.integers(0, 2**32), st.integers(1, T), st.integers(0, T * B))
@settings(max_examples=40)
def test_the_bytes_that_were_written_come_back_and_no_others(seed: int, num_rows: int, finals: int) -> None:
    there = rollout(allocate(schema(), 1), seed, num_rows, finals)
    message = pack(there)
    here = allocate(schema(), 1)
    here.poison(0)
    unpack(message, here.slots[0], RUN, IDENTITY, 7)
    assert len(message) == packed_bytes(there.schema, there.envelope)
    assert here.slots[0].envelope == there.envelope
    for name, array in there.arrays.items():
        if name == "envelope":
            continue  # what lies between its fields does not count
        assert here.slots[0].arrays[name].tobytes() == array.tobytes(), name


def changed(message: bytes, at: int, by: int = 1) -> bytes:
    return message[:at] + bytes([(message[at] + by) % 256]) + message[at + 1 :]


@given(st.data())
@settings(max_examples=60)
def test_a_message_of_another_length_is_refused_and_the_slot_is_not_touched(data: st.DataObject) -> None:
    message = pack(rollout(allocate(schema(), 1), 1))
    length = data.draw(st.integers(0, len(message) + 50).filter(lambda n: n != len(message)))
    ring = allocate(schema(), 1)
    with pytest.raises(SchemaError):
        unpack((message + bytes(50))[:length], ring.slots[0], RUN, IDENTITY, 7)
    assert not ring.slots[0].arrays["reward"].any()
    assert not int(ring.slots[0].envelope["num_rows"])


def test_the_message_of_another_schema_run_or_rollout_is_refused() -> None:
    message = pack(rollout(allocate(schema(), 1), 1))
    into = allocate(schema(), 1).slots[0]
    with pytest.raises(SchemaError, match="schema hash"):
        unpack(message, allocate(schema(T + 1), 1).slots[0], RUN, IDENTITY, 7)
    with pytest.raises(SchemaError, match="of run"):
        unpack(message, into, bytes(16), IDENTITY, 7)
    with pytest.raises(SchemaError, match="expected"):
        unpack(message, into, RUN, Identity(4, 9, 2), 7)
    with pytest.raises(SchemaError, match="the newest is 6"):
        unpack(message, into, RUN, IDENTITY, 6)
    unpack(message, into, RUN, IDENTITY, 7)


def test_observations_that_changed_on_the_way_are_refused() -> None:
    message = pack(rollout(allocate(schema(), 1), 1))
    with pytest.raises(SchemaError, match="changed"):
        unpack(changed(message, HEADER_BYTES + 3), allocate(schema(), 1).slots[0], RUN, IDENTITY, 7)


@pytest.mark.parametrize("name", NAN_PLACES)
def test_numbers_that_are_not_finite_are_refused(name: str) -> None:
    slot = rollout(allocate(schema(), 1), 1)
    slot.arrays[name][1] = np.inf
    slot.envelope["checksum"] = slot.checksum()
    with pytest.raises(SchemaError, match=f"{name} is not finite"):
        unpack(pack(slot), allocate(schema(), 1).slots[0], RUN, IDENTITY, 7)


@given(st.binary(max_size=600), st.integers(0, HEADER_BYTES))
@settings(max_examples=200)
def test_any_bytes_are_refused_without_another_error(noise: bytes, kept: int) -> None:
    message = pack(rollout(allocate(schema(), 1), 1))[:kept] + noise
    with pytest.raises(SchemaError):
        unpack(message, allocate(schema(), 1).slots[0], RUN, IDENTITY, 7)
    with pytest.raises(SchemaError):
        unpack_part(message, allocate(schema(), 1).slots[0])


def test_of_a_part_come_the_header_and_which_rows_are_valid() -> None:
    there = rollout(allocate(schema(), 1), 3, num_rows=2)
    there.arrays["valid"][1, 0] = False
    here = allocate(schema(), 1).slots[0]
    unpack_part(pack(there), here)
    assert here.identity == IDENTITY
    assert here.arrays["valid"][:2].sum() == 2 * B - 1
    assert not here.arrays["reward"].any()
