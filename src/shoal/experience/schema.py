"""The one list of named fields that allocates, validates and documents a rollout.

Legend: T rows, B environments of a group.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from shoal.errors import SchemaError
from shoal.experience.envelope import ENVELOPE
from shoal.types import CURSOR, EPISODE, Array, Arrays, EnvironmentSpec, FieldSpec

_STRUCTURED = {"envelope": ENVELOPE, "cursor": CURSOR, "episode": EPISODE}
_ALIGNMENT = 64  # a cache line


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a field's dtype name."""
    return _STRUCTURED.get(name) or np.dtype(name)


@dataclass(frozen=True)
class Schema:
    """Fields of one rollout of T rows and B environments, and where each lies in a slot of `slot_bytes` bytes.

    action_choices: of each component of a discrete action, how many values there are, from 0 on; empty where actions are not discrete.
    """

    fields: tuple[FieldSpec, ...]
    num_rows: int
    num_envs: int
    action_choices: tuple[int, ...] = ()

    def full_shape(self, field: FieldSpec) -> tuple[int, ...]:
        """Shape of the field's array in a slot."""
        lead = {
            "T": (self.num_rows, self.num_envs),
            "T+1": (self.num_rows + 1, self.num_envs),
            "B": (self.num_envs,),
            "final": (self.num_rows * self.num_envs,),
            "header": (),
        }[field.axis]
        return lead + field.shape

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte offset of each field in a slot; the last entry, under the empty name, is the size of a slot."""
        offsets: dict[str, int] = {}
        at = 0
        for field in self.fields:
            if field.name in offsets:
                raise SchemaError(f"field {field.name!r} is named twice")
            offsets[field.name] = at
            size = math.prod(self.full_shape(field)) * numpy_dtype(field.dtype).itemsize
            at += -(-size // _ALIGNMENT) * _ALIGNMENT
        offsets[""] = -(-at // 4096) * 4096  # slots begin on pages, so that sparse fields cost no memory until they are used
        return offsets

    @cached_property
    def state_names(self) -> tuple[str, ...]:
        """Fields of the recurrent state at a rollout's start; empty without memory."""
        return tuple(f.name for f in self.fields if f.axis == "B" and f.name.startswith("policy_state/") and not f.name.endswith("/end"))

    @property
    def slot_bytes(self) -> int:
        return self.offsets[""]

    @cached_property
    def hash(self) -> bytes:
        """16 bytes that change with any field, T or B; the first thing that a reader of foreign bytes compares."""
        text = json.dumps([[asdict(f) for f in self.fields], self.num_rows, self.num_envs], sort_keys=True)
        return hashlib.sha256(text.encode()).digest()[:16]

    def views(self, slot: Array) -> Arrays:
        """Arrays by field name over one slot's bytes (uint8 [slot_bytes])."""
        if slot.dtype != np.uint8 or slot.shape != (self.slot_bytes,):
            raise SchemaError(f"a slot is uint8 [{self.slot_bytes}], not {slot.dtype} {list(slot.shape)}")
        out: Arrays = {}
        for field in self.fields:
            dtype, shape = numpy_dtype(field.dtype), self.full_shape(field)
            size = math.prod(shape) * dtype.itemsize
            begin = self.offsets[field.name]
            out[field.name] = slot[begin : begin + size].view(dtype).reshape(shape)
        return out

    def describe(self) -> list[dict[str, object]]:
        """One row per field for `shoal show`."""
        return [{"name": f.name, "dtype": f.dtype, "shape": list(self.full_shape(f)), "axis": f.axis} for f in self.fields]


def rollout_schema(spec: EnvironmentSpec, policy_fields: Iterable[FieldSpec], num_rows: int, num_envs: int) -> Schema:
    """The schema of rollouts of an environment under a policy that emits `policy_fields` (action, log_prob, recurrent state)."""
    observations = [(leaf.name("observation"), leaf.dtype, leaf.shape) for leaf in spec.observation]
    fields = [FieldSpec("envelope", "envelope", (), "header")]
    fields += [FieldSpec(name, dtype, shape, "T+1") for name, dtype, shape in observations]
    if spec.action_mask != "none":
        fields.append(FieldSpec("action_mask", "bool", (spec.mask_size,), "T+1"))
    for field in policy_fields:
        fields.append(field)
        if field.axis == "B":  # recurrent state: at the rollout's start, and where it ends
            fields.append(FieldSpec(f"{field.name}/end", field.dtype, field.shape, "B"))
    fields += [
        FieldSpec("reward", "float64", (), "T"),
        FieldSpec("terminated", "bool", (), "T"),
        FieldSpec("truncated", "bool", (), "T"),
        FieldSpec("valid", "bool", (), "T"),
        FieldSpec("policy_version", "int64", (), "T"),
        FieldSpec("cursor/start", "cursor", (), "B"),
        FieldSpec("cursor/end", "cursor", (), "B"),
        FieldSpec("episode", "episode", (), "final"),
        FieldSpec("final/row", "int32", (), "final"),
        FieldSpec("final/env", "int32", (), "final"),
    ]
    fields += [FieldSpec(f"final/{name}", dtype, shape, "final") for name, dtype, shape in observations]
    if spec.snapshot_bytes:
        fields += [
            FieldSpec("snapshot", "uint8", (spec.snapshot_bytes,), "B"),
            FieldSpec("snapshot/size", "int64", (), "B"),  # -1: none
        ]
    choices = (2,) * spec.action.size if spec.action.kind == "multi_binary" else spec.action.nvec
    return Schema(tuple(fields), num_rows, num_envs, choices)
