"""A rollout as bytes, for a way that is no shared memory: its header, and of each field the rows that were written, in the schema's order.

What comes back out is what went in, byte for byte; what was never written does not travel. A reader compares the schema's hash first, then all
counts, then the length, then the checksum, then the numbers: whether they are finite, actions that there are, and what the header says of them.
It has written nothing of a message that fails before the last two.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shoal.errors import SchemaError
from shoal.experience.envelope import ENVELOPE, Identity
from shoal.experience.ring import Slot, check_header, written_fields
from shoal.experience.schema import Schema, numpy_dtype
from shoal.types import Array, FieldSpec

HEADER_BYTES = ENVELOPE.itemsize


def pack(slot: Slot) -> bytes:
    """The rollout in `slot`, finished or as far as it is; its header must hold (Slot.check_counts)."""
    return b"".join([slot.envelope.tobytes(), *(slot.arrays[f.name][:rows].data for f, rows in written_fields(slot.schema, slot.envelope))])


def packed_bytes(schema: Schema, header: np.void) -> int:
    """Length of a packed rollout with this header."""
    return HEADER_BYTES + sum(_row_bytes(schema, field) * rows for field, rows in written_fields(schema, header))


def unpack(message: bytes, slot: Slot, run_id: bytes, identity: Identity, newest_version: int) -> None:
    """Write a packed rollout into `slot`, which nobody else reads or writes meanwhile.

    Args:
      identity: whose rollout is expected. newest_version: no row can have been chosen by a later policy.
    Raises:
      SchemaError: it is not a whole, finite rollout of this run, schema and identity, whose header is true.
    """
    header = _header(message, slot.schema)
    check_header(header, slot.schema, "a rollout that came")
    expected = packed_bytes(slot.schema, header)
    if len(message) != expected:
        raise SchemaError(f"a rollout of {len(message):,} bytes came, its header says {expected:,}")
    at = HEADER_BYTES
    for field, rows in written_fields(slot.schema, header):
        size = _row_bytes(slot.schema, field) * rows
        into = slot.arrays[field.name][:rows]
        into[...] = np.frombuffer(message, into.dtype, into.size, at).reshape(into.shape)
        at += size
    slot.arrays["envelope"][()] = header
    slot.check(run_id, identity)
    _check_numbers(slot, newest_version)


def unpack_part(message: bytes, slot: Slot, run_id: bytes, identity: Identity) -> None:
    """Of a rollout that was never finished: its header, and which rows are valid, for whoever counts them. Raises SchemaError as `unpack`, and has
    then written nothing."""
    header = _header(message, slot.schema)
    if header["run_id"].tobytes() != run_id:
        raise SchemaError(f"a part of a rollout of run {header['run_id'].tobytes().hex()} came, expected {run_id.hex()}")
    came = Identity(*(int(header[name]) for name in Identity._fields))
    if came != identity:
        raise SchemaError(f"a part of a rollout came ({came}), expected {identity}")
    check_header(header, slot.schema, "a part of a rollout that came")
    if len(message) != packed_bytes(slot.schema, header):
        raise SchemaError(f"a part of a rollout of {len(message):,} bytes came, its header says {packed_bytes(slot.schema, header):,}")
    at = HEADER_BYTES
    for field, rows in written_fields(slot.schema, header):
        size = _row_bytes(slot.schema, field) * rows
        if field.name == "valid":
            into = slot.arrays["valid"][:rows]
            into[...] = np.frombuffer(message, into.dtype, into.size, at).reshape(into.shape)
        at += size
    slot.arrays["envelope"][()] = header


def _header(message: bytes, schema: Schema) -> np.void:
    if len(message) < HEADER_BYTES:
        raise SchemaError(f"a rollout has at least {HEADER_BYTES} bytes, got {len(message)}")
    header: np.void = np.frombuffer(message, ENVELOPE, 1)[0]
    if header["schema_hash"].tobytes() != schema.hash:
        raise SchemaError(f"a rollout with schema hash {header['schema_hash'].tobytes().hex()} came, expected {schema.hash.hex()}")
    return header


def _row_bytes(schema: Schema, field: FieldSpec) -> int:
    return int(np.prod(schema.full_shape(field)[1:], dtype=np.int64)) * numpy_dtype(field.dtype).itemsize


def _check_numbers(slot: Slot, newest_version: int) -> None:
    e = slot.envelope
    for field, rows in written_fields(slot.schema, e):
        values = slot.arrays[field.name][:rows]
        for name, numbers in _floats(field.name, values):
            if not np.isfinite(numbers).all():
                raise SchemaError(f"a rollout came ({slot.identity}) whose {name} is not finite")
        if field.name == "action" and slot.schema.action_choices:
            choices = np.array(slot.schema.action_choices).reshape(field.shape)
            if ((values < 0) | (values >= choices)).any():
                raise SchemaError(
                    f"a rollout came ({slot.identity}) with actions of {values.min()} to {values.max()}, of {choices.tolist()} there are"
                )
    num_rows = int(e["num_rows"])
    versions, num_env_steps = slot.arrays["policy_version"][:num_rows], int(slot.arrays["valid"][:num_rows].sum())
    oldest, newest = int(versions.min()), int(versions.max())
    if oldest < 0 or newest > newest_version:
        raise SchemaError(f"a rollout came ({slot.identity}) of policy versions {oldest} to {newest}; the newest is {newest_version}")
    said = tuple(int(e[name]) for name in ("version_min", "version_max", "num_env_steps"))
    if said != (oldest, newest, num_env_steps):
        raise SchemaError(
            f"a rollout came ({slot.identity}) of policy versions {oldest} to {newest} and {num_env_steps} env steps, "
            f"its header says {said[0]} to {said[1]} and {said[2]}"
        )


def _floats(name: str, values: Array) -> Iterator[tuple[str, Array]]:
    """What of a field are floats, by name: all of it, or some parts of its entries."""
    if values.dtype.names is not None:
        yield from ((f"{name} {part}", values[part]) for part in values.dtype.names if values.dtype[part].kind == "f")
    elif values.dtype.kind == "f":
        yield name, values
