"""Rollouts as bytes: the slot that they are written into equals the one that they came from, and whatever is not a rollout is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import SchemaError
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring, Slot, allocate
from shoal.experience.schema import Schema, numpy_dtype, rollout_schema
from shoal.experience.wire import HEADER_BYTES, pack, packed_bytes, unpack, unpack_part
from shoal.types import EnvironmentSpec, FieldSpec, LeafSpec

RUN = bytes(range(16))
T, B = 5, 3


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


@given(st.integers(0, 2**20), st.integers(1, 255))
@settings(max_examples=60)
def test_no_byte_behind_the_header_may_change_on_the_way(at: int, by: int) -> None:
    message = pack(rollout(allocate(schema(), 1), 1))
    at = HEADER_BYTES + at % (len(message) - HEADER_BYTES)
    with pytest.raises(SchemaError, match=r"it changed after|episode's end"):
        unpack(changed(message, at, by), allocate(schema(), 1).slots[0], RUN, IDENTITY, 7)


def float_places() -> list[tuple[str, str]]:
    """Every field of the schema that has floats, and within one of records the part that is."""
    return [
        (field.name, part)
        for field in schema().fields
        for dtype in [numpy_dtype(field.dtype)]
        for part in dtype.names or [""]
        if (dtype[part] if part else dtype).kind == "f"
    ]


def test_the_places_of_floats_are_all_of_them() -> None:
    assert {name for name, _ in float_places()} == {
        "observation", "log_prob", "policy_state/0/h", "policy_state/0/h/end", "reward", "cursor/start", "cursor/end", "episode", "final/observation",
    }  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "part"), float_places())
def test_numbers_that_are_not_finite_are_refused(name: str, part: str, value: float) -> None:
    slot = rollout(allocate(schema(), 1), 1)
    array = slot.arrays[name][part] if part else slot.arrays[name]
    array[1] = value
    slot.envelope["checksum"] = slot.checksum()
    with pytest.raises(SchemaError, match=f"{name}.*is not finite"):
        unpack(pack(slot), allocate(schema(), 1).slots[0], RUN, IDENTITY, 7)


@pytest.mark.parametrize("action", [-1, 2, 999])
def test_actions_that_there_are_not_are_refused(action: int) -> None:
    slot = rollout(allocate(schema(), 1), 1)
    slot.arrays["action"][2, 1] = action
    slot.envelope["checksum"] = slot.checksum()
    with pytest.raises(SchemaError, match="actions of"):
        unpack(pack(slot), allocate(schema(), 1).slots[0], RUN, IDENTITY, 7)


@pytest.mark.parametrize(
    ("leaf", "least", "most"),
    [
        (LeafSpec((), "multi_discrete", "int64", (3,), nvec=(2, 5, 3), start=(0, 7, 0)), [0, 0, 0], [1, 4, 2]),
        (LeafSpec((), "multi_binary", "int8", (3,)), [0, 0, 0], [1, 1, 1]),
    ],
)
def test_each_component_of_an_action_has_its_own_range(leaf: LeafSpec, least: list[int], most: list[int]) -> None:
    spec = EnvironmentSpec("toy", (LeafSpec((), "box", "float32", (2,)),), leaf, "none", 0)
    made = rollout_schema(spec, [FieldSpec("action", leaf.dtype, leaf.shape, "T")], T, B)
    slot, into = rollout(allocate(made, 1), 1), allocate(made, 1).slots[0]
    for row, allowed in ((0, least), (1, most)):
        slot.arrays["action"][row, 0] = allowed
        slot.envelope["checksum"] = slot.checksum()
    unpack(pack(slot), into, RUN, IDENTITY, 7)
    for component in range(3):
        for outside in (least[component] - 1, most[component] + 1):
            slot.arrays["action"][1, 0] = most
            slot.arrays["action"][1, 0, component] = outside
            slot.envelope["checksum"] = slot.checksum()
            with pytest.raises(SchemaError, match="actions of"):
                unpack(pack(slot), into, RUN, IDENTITY, 7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version_min", -5),
        ("version_min", 6),
        ("version_max", 10**9),
        ("version_max", 6),
        ("num_env_steps", 0),
        ("num_env_steps", T * B - 1),
    ],
)
def test_a_header_that_says_what_the_rows_do_not_is_refused(name: str, value: int) -> None:
    slot = rollout(allocate(schema(), 1), 1)
    slot.envelope[name] = value
    with pytest.raises(SchemaError, match="its header says"):
        unpack(pack(slot), allocate(schema(), 1).slots[0], RUN, IDENTITY, 7)


@pytest.mark.parametrize(("row", "version"), [(0, -1), (T - 1, 8)])
def test_versions_of_rows_that_are_not_valid_are_looked_at_too(row: int, version: int) -> None:
    slot = rollout(allocate(schema(), 1), 1)
    slot.arrays["policy_version"][row, 0], slot.arrays["valid"][row, 0] = version, False
    slot.envelope["version_min"], slot.envelope["version_max"] = min(7, version), max(7, version)
    slot.envelope["num_env_steps"] = T * B - 1
    slot.envelope["checksum"] = slot.checksum()
    with pytest.raises(SchemaError, match="the newest is 7"):
        unpack(pack(slot), allocate(schema(), 1).slots[0], RUN, IDENTITY, 7)


@given(st.binary(max_size=600), st.integers(0, HEADER_BYTES))
@settings(max_examples=200)
def test_any_bytes_are_refused_without_another_error(noise: bytes, kept: int) -> None:
    message = pack(rollout(allocate(schema(), 1), 1))[:kept] + noise
    with pytest.raises(SchemaError):
        unpack(message, allocate(schema(), 1).slots[0], RUN, IDENTITY, 7)
    with pytest.raises(SchemaError):
        unpack_part(message, allocate(schema(), 1).slots[0], RUN, IDENTITY)


def test_of_a_part_come_the_header_and_which_rows_are_valid() -> None:
    there = rollout(allocate(schema(), 1), 3, num_rows=2)
    there.arrays["valid"][1, 0] = False
    here = allocate(schema(), 1).slots[0]
    unpack_part(pack(there), here, RUN, IDENTITY)
    assert here.identity == IDENTITY
    assert here.arrays["valid"][:2].sum() == 2 * B - 1
    assert not here.arrays["reward"].any()


@pytest.mark.parametrize(("run", "identity"), [(bytes(16), IDENTITY), (RUN, Identity(4, 9, 2)), (RUN, Identity(5, 9, 1))])
def test_a_part_of_another_run_or_rollout_is_refused_and_nothing_is_written(run: bytes, identity: Identity) -> None:
    message = pack(rollout(allocate(schema(), 1), 3, num_rows=2))
    here = allocate(schema(), 1).slots[0]
    with pytest.raises(SchemaError, match="expected"):
        unpack_part(message, here, run, identity)
    assert not here.arrays["valid"].any()
    assert not int(here.envelope["num_rows"])
