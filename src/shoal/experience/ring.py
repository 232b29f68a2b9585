"""Slots for rollouts in one block of memory. Actors write them, the learner reads them, only numbers of slots travel.

Who may write which slot is decided elsewhere (engines/coordinator.py leases them); here are the bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shoal.errors import SchemaError
from shoal.experience.envelope import Identity
from shoal.experience.schema import Schema
from shoal.types import Array, Arrays, FieldSpec


@dataclass
class Slot:
    """One rollout's place. `arrays[name]` are views of the shared bytes."""

    index: int
    schema: Schema
    arrays: Arrays

    @cached_property
    def observation_names(self) -> tuple[str, ...]:
        """Fields that a behaviour is shown: observations and, where there is one, the mask."""
        return tuple(f.name for f in self.schema.fields if f.axis == "T+1")

    @cached_property
    def rows(self) -> list[Arrays]:
        """What a behaviour is shown at each row, by field name: [B, ...] views for rows 0 to T."""
        return [{n: self.arrays[n][t] for n in self.observation_names} for t in range(self.schema.num_rows + 1)]

    @property
    def envelope(self) -> Any:
        """The header, a numpy structured scalar view: `slot.envelope["group"]`."""
        return self.arrays["envelope"]

    @property
    def identity(self) -> Identity:
        e = self.envelope
        return Identity(int(e["group"]), int(e["sequence"]), int(e["attempt"]))

    def rows_used(self) -> Array:
        """Rows of each environment, [B]: all of them, but for a paced group, whose environments got differently far."""
        num_rows = int(self.envelope["num_rows"])
        if not self.envelope["paced"] or num_rows == 0:
            return np.full(self.schema.num_envs, num_rows)
        valid = self.arrays["valid"][:num_rows]
        return np.where(valid.any(0), num_rows - valid[::-1].argmax(0), 0)

    def resets(self) -> Array:
        """Before which rows the recurrent state is the initial one, bool [num_rows + 1, B]; row 0 begins with the state that is stored.

        That is where an episode begins: after the row in which one ended, or, where the row after that one still holds its last observation (a
        NEXT_STEP autoreset), after that row, which is not valid. So a last observation always meets the state that its episode led to.
        """
        num_rows, num_finals = int(self.envelope["num_rows"]), int(self.envelope["num_finals"])
        resets = np.zeros((num_rows + 1, self.schema.num_envs), np.bool_)
        resets[1:] = ~self.arrays["valid"][:num_rows]
        resets[self.arrays["final/row"][:num_finals] + 1, self.arrays["final/env"][:num_finals]] = True
        return resets

    def timely(self, oldest_version: int) -> Array:
        """Valid rows that this policy version or a newer one chose, bool [num_rows, B]."""
        num_rows = int(self.envelope["num_rows"])
        timely: Array = self.arrays["valid"][:num_rows] & (self.arrays["policy_version"][:num_rows] >= oldest_version)
        return timely

    def checksum(self) -> int:
        """crc32 over all fields behind the header, of each the rows that were written, in the schema's order."""
        crc = 0
        for field, rows in written_fields(self.schema, self.envelope):
            crc = zlib.crc32(self.arrays[field.name][:rows].data, crc)
        return crc

    def check(self, run_id: bytes, identity: Identity | None = None) -> None:
        """Raise SchemaError unless this is a finished rollout of this run and schema, whose bytes are as they were written."""
        e = self.envelope
        if e["schema_hash"].tobytes() != self.schema.hash:
            raise SchemaError(f"slot {self.index}: schema hash {e['schema_hash'].tobytes().hex()}, expected {self.schema.hash.hex()}")
        if e["run_id"].tobytes() != run_id:
            raise SchemaError(f"slot {self.index}: of run {e['run_id'].tobytes().hex()}, expected {run_id.hex()}")
        if identity is not None and self.identity != identity:
            raise SchemaError(f"slot {self.index}: holds {self.identity}, expected {identity}")
        self.check_counts()
        if self.checksum() != int(e["checksum"]):
            raise SchemaError(f"slot {self.index}: it changed after {self.identity} was finished")

    def check_counts(self) -> None:
        """Raise SchemaError unless all that the header counts, and the rows that it points to, lie within the slot."""
        check_header(self.envelope, self.schema, f"slot {self.index}")
        num_rows, num_episodes, num_finals = (int(self.envelope[name]) for name in ("num_rows", "num_episodes", "num_finals"))
        ended = self.arrays["episode"][:num_episodes]
        for rows, envs in ((ended["row"], ended["env"]), (self.arrays["final/row"][:num_finals], self.arrays["final/env"][:num_finals])):
            if len(rows) and not (min(rows) >= 0 and max(rows) < num_rows and min(envs) >= 0 and max(envs) < self.schema.num_envs):
                raise SchemaError(
                    f"slot {self.index}: an episode's end lies outside its {num_rows} rows and {self.schema.num_envs} environments"
                )


def check_header(header: Any, schema: Schema, what: str) -> None:
    """Raise SchemaError unless an envelope counts no more than a slot of this schema holds."""
    most = schema.num_rows * schema.num_envs
    for name, words, least, limit in (
        ("num_rows", "rows", 1, schema.num_rows),
        ("num_env_steps", "env steps", 0, most),
        ("num_episodes", "episodes", 0, most),
        ("num_finals", "last observations", 0, most),
    ):
        if not least <= int(header[name]) <= limit:
            raise SchemaError(f"{what}: {header[name]} {words}, expected {least} to {limit}")


class Ring:
    """All slots of a run over one buffer of `Ring.size_bytes(schema, num_slots)` bytes."""

    def __init__(self, schema: Schema, num_slots: int, buffer: Array) -> None:
        self.schema = schema
        size = schema.slot_bytes
        self._buffer = buffer
        self.slots = [Slot(i, schema, schema.views(buffer[i * size : (i + 1) * size])) for i in range(num_slots)]

    @staticmethod
    def size_bytes(schema: Schema, num_slots: int) -> int:
        return schema.slot_bytes * num_slots

    def poison(self, index: int) -> None:
        """Fill a free slot with bytes that are NaN as floats, so that a test sees whoever reads what was not written."""
        size = self.schema.slot_bytes
        self._buffer[index * size : (index + 1) * size] = 0xFF


def allocate(schema: Schema, num_slots: int) -> Ring:
    """A ring in this process's own memory."""
    return Ring(schema, num_slots, np.zeros(Ring.size_bytes(schema, num_slots), np.uint8))


def written_fields(schema: Schema, header: Any) -> Iterator[tuple[FieldSpec, int]]:
    """Fields behind the header, with how many entries of their first axis are written."""
    num_rows, num_episodes, num_finals = (int(header[name]) for name in ("num_rows", "num_episodes", "num_finals"))
    for field in schema.fields:
        if field.axis == "T":
            yield field, num_rows
        elif field.axis == "T+1":
            yield field, num_rows + 1
        elif field.axis == "B":
            yield field, schema.num_envs
        elif field.axis == "final":
            yield field, num_episodes if field.name == "episode" else num_finals
