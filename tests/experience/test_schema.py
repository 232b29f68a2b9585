"""Where each field of a rollout lies, and that foreign bytes are told from our own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_fakes import policy_fields, scripted_schema, scripted_spec
from shoal.errors import SchemaError
from shoal.experience.envelope import ENVELOPE
from shoal.experience.schema import Schema, numpy_dtype, rollout_schema
from shoal.types import CURSOR, EPISODE, FieldSpec


def bytes_field(name: str, size: int) -> FieldSpec:
    return FieldSpec(name, "uint8", (size,), "header")


def test_a_rollout_has_exactly_these_fields_in_this_order():
    schema = rollout_schema(scripted_spec(snapshot_bytes=9), policy_fields(), 4, 3)
    assert [(f.name, f.dtype, f.shape, f.axis) for f in schema.fields] == [
        ("envelope", "envelope", (), "header"),
        ("observation/camera", "uint8", (2, 3), "T+1"),
        ("observation/position", "float32", (2,), "T+1"),
        ("action_mask", "bool", (5,), "T+1"),
        ("action", "int64", (), "T"),
        ("log_prob", "float32", (), "T"),
        ("policy_state/h", "float32", (2,), "B"),
        ("policy_state/h/end", "float32", (2,), "B"),
        ("reward", "float64", (), "T"),
        ("terminated", "bool", (), "T"),
        ("truncated", "bool", (), "T"),
        ("valid", "bool", (), "T"),
        ("policy_version", "int64", (), "T"),
        ("cursor/start", "cursor", (), "B"),
        ("cursor/end", "cursor", (), "B"),
        ("episode", "episode", (), "final"),
        ("final/row", "int32", (), "final"),
        ("final/env", "int32", (), "final"),
        ("final/observation/camera", "uint8", (2, 3), "final"),
        ("final/observation/position", "float32", (2,), "final"),
        ("snapshot", "uint8", (9,), "B"),
        ("snapshot/size", "int64", (), "B"),
    ]
    assert (schema.num_rows, schema.num_envs) == (4, 3)


def test_what_an_environment_or_policy_does_not_have_takes_no_field():
    names = {f.name for f in scripted_schema(mask=False, state=False).fields}
    assert not names & {"action_mask", "snapshot", "snapshot/size", "policy_state/h", "policy_state/h/end"}
    assert "action_mask" in {f.name for f in rollout_schema(replace(scripted_spec(), action_mask="info"), [], 1, 1).fields}


def test_each_axis_has_its_leading_dimensions():
    schema = Schema((), 4, 3)
    shapes = {axis: schema.full_shape(FieldSpec("x", "int8", (7, 2), axis)) for axis in ("T", "T+1", "B", "final", "header")}
    assert shapes == {"T": (4, 3, 7, 2), "T+1": (5, 3, 7, 2), "B": (3, 7, 2), "final": (12, 7, 2), "header": (7, 2)}


def test_structured_dtypes_go_by_their_names():
    assert [numpy_dtype(n) for n in ("envelope", "cursor", "episode", "float32")] == [ENVELOPE, CURSOR, EPISODE, np.dtype("float32")]


def test_fields_begin_on_cache_lines_and_slots_on_pages():
    fields = (bytes_field("a", 64), bytes_field("b", 65), FieldSpec("c", "float64", (), "T"), bytes_field("d", 1))
    schema = Schema(fields, 3, 3)
    assert schema.offsets == {"a": 0, "b": 64, "c": 192, "d": 320, "": 4096}
    assert schema.slot_bytes == 4096
    assert Schema((bytes_field("a", 4096),), 1, 1).slot_bytes == 4096
    assert Schema((bytes_field("a", 4097),), 1, 1).slot_bytes == 8192


@given(
    st.lists(st.tuples(st.sampled_from(["uint8", "float32", "cursor", "bool"]), st.integers(0, 5), st.sampled_from(["T", "T+1", "B", "final", "header"])), max_size=8),
    st.integers(1, 5),
    st.integers(1, 4),
)  # fmt: skip
def test_fields_never_overlap_and_stay_inside(drawn, num_rows, num_envs):
    fields = tuple(FieldSpec(f"f{i}", dtype, (size,), axis) for i, (dtype, size, axis) in enumerate(drawn))
    schema = Schema(fields, num_rows, num_envs)
    slot = np.zeros(schema.slot_bytes, np.uint8)
    owner = np.zeros(schema.slot_bytes, np.int64)
    views = schema.views(slot)
    for i, field in enumerate(fields, 1):
        slot[:] = 0
        view = views[field.name]
        assert view.shape == schema.full_shape(field)
        assert view.dtype == numpy_dtype(field.dtype)
        view.view(np.uint8)[...] = 1
        assert not owner[slot == 1].any()
        owner[slot == 1] = i
        assert (slot == 1).sum() == view.nbytes
        assert schema.offsets[field.name] % 64 == 0
    assert schema.slot_bytes % 4096 == 0


def test_a_name_twice_is_refused():
    schema = Schema((bytes_field("a", 1), bytes_field("b", 1), bytes_field("a", 2)), 1, 1)
    with pytest.raises(SchemaError, match=r"^field 'a' is named twice$"):
        _ = schema.offsets


@pytest.mark.parametrize(
    ("slot", "what"),
    [
        (np.zeros(4096, np.int8), r"int8 \[4096\]"),
        (np.zeros(4095, np.uint8), r"uint8 \[4095\]"),
        (np.zeros((2, 4096), np.uint8), r"uint8 \[2, 4096\]"),
    ],
)
def test_views_refuse_what_is_no_slot(slot, what):
    with pytest.raises(SchemaError, match=rf"^a slot is uint8 \[4096\], not {what}$"):
        Schema((bytes_field("a", 1),), 1, 1).views(slot)


def test_the_hash_is_sixteen_bytes_that_other_builds_agree_on():
    assert Schema((FieldSpec("x", "int8", (7, 2), "T"),), 4, 3).hash.hex() == "cdf58523843e478436cd89de418c883a"
    assert scripted_schema().hash == scripted_schema().hash
    assert len(scripted_schema().hash) == 16


def test_the_hash_changes_with_any_field_and_with_t_and_b():
    base = scripted_schema()
    first, *rest = base.fields
    variants = [
        base,
        replace(base, num_rows=5),
        replace(base, num_envs=4),
        replace(base, num_rows=3, num_envs=4),
        replace(base, fields=(*base.fields[1:], first)),
        replace(base, fields=tuple(rest)),
    ]
    for i, field in enumerate(base.fields):
        for change in (
            {"name": field.name + "x"},
            {"dtype": "int16"},
            {"shape": (*field.shape, 1)},
            {"axis": "B" if field.axis != "B" else "T"},
        ):
            changed = list(base.fields)
            changed[i] = replace(field, **change)
            variants.append(replace(base, fields=tuple(changed)))
    assert len({v.hash for v in variants}) == len(variants)


def test_a_schema_describes_itself_in_full_shapes():
    schema = Schema((FieldSpec("x", "int8", (7,), "T"), FieldSpec("y", "cursor", (), "B")), 4, 3)
    assert schema.describe() == [
        {"name": "x", "dtype": "int8", "shape": [4, 3, 7], "axis": "T"},
        {"name": "y", "dtype": "cursor", "shape": [3], "axis": "B"},
    ]
