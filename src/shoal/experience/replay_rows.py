"""The replay's memory: rows of named fields in columns, one column for each environment, spread over shards by group.

A place is the global number of a row, column * rows_per_column + position; columns are ordered by group, then environment. What lies
in which shard shows nowhere but here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from shoal.types import Array, Arrays

RowFields = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape of one row, by name


def row_bytes(fields: RowFields) -> int:
    """Memory of one row."""
    return sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in fields.values())


class Rows:
    """`num_groups * num_envs` columns of `num_rows` rows, all zero (memory that was never written is not there yet)."""

    def __init__(self, fields: RowFields, num_groups: int, num_envs: int, num_rows: int, num_shards: int) -> None:
        self.num_groups, self.num_envs, self.num_rows = num_groups, num_envs, num_rows
        self.fields = fields
        self._num_shards = num_shards
        self._shards: list[Arrays] = []
        for shard in range(num_shards):
            groups = len(range(shard, num_groups, num_shards))
            rows = groups * num_envs * num_rows
            self._shards.append({name: np.zeros((rows, *shape), dtype) for name, (dtype, shape) in fields.items()})
        group_G = np.arange(num_groups)
        self._shift_G = (group_G // num_shards - group_G) * (num_envs * num_rows)  # from a global place to the one in its shard

    def take(self, name: str, place: Array) -> Array:
        """The rows at these places, in an array of the caller's own: [*place.shape, ...]."""
        if self._num_shards == 1:
            return self._shards[0][name].take(place, axis=0, mode="clip")
        group = place // (self.num_envs * self.num_rows)
        local, shard = place + self._shift_G[group], group % self._num_shards
        dtype, shape = self.fields[name]
        out = np.empty((*place.shape, *shape), dtype)
        for index, part in enumerate(self._shards):
            here = shard == index
            out[here] = part[name][local[here]]
        return out

    def put(self, group: int, name: str, place: Array, value: Array | int) -> None:
        """Write rows of one group."""
        self._shards[group % self._num_shards][name][place + self._shift_G[group]] = value

    def block(self, name: str, group: int, begin: int, end: int) -> Array:
        """A view of one group's rows at positions `begin` to `end`: [num_envs, end - begin, ...]."""
        array = self._shards[group % self._num_shards][name]
        first = group // self._num_shards * self.num_envs
        columns = array.reshape(-1, self.num_rows, *array.shape[1:])
        return columns[first : first + self.num_envs, begin:end]
