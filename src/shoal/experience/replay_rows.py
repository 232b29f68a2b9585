"""The replay's memory: rows of named fields in columns, one column for each environment, spread over shards by group.

A place is the global number of a row, column * num_rows + position; columns are ordered by group, then environment. What lies in which
shard shows nowhere but here. Positions are cut into chunks, the same for all columns: whoever saves them asks which were touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from shoal.experience.replay_memory import OWN, Memory
from shoal.types import Array, Arrays

RowFields = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape of one row, by name

_MOST_CHUNKS, _LEAST_CHUNK_BYTES = 64, 2**20


def row_bytes(fields: RowFields) -> int:
    """Memory of one row."""
    return sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in fields.values())


class Rows:
    """`num_groups * num_envs` columns of `num_rows` rows, all zero at first, in `memory`.

    touched: bool by chunk, whether it was written since whoever saves it has cleared this. used: whether it ever was.
    """

    def __init__(self, fields: RowFields, num_groups: int, num_envs: int, num_rows: int, num_shards: int, memory: Memory = OWN) -> None:
        self.num_groups, self.num_envs, self.num_rows = num_groups, num_envs, num_rows
        self.fields = fields
        self._num_shards, self._memory = num_shards, memory
        self._shards: list[Arrays] = []
        for shard in range(num_shards):
            groups = len(range(shard, num_groups, num_shards))
            rows = groups * num_envs * num_rows
            self._shards.append({name: memory.array((rows, *shape), dtype) for name, (dtype, shape) in fields.items()})
        group_G = np.arange(num_groups)
        self._shift_G = (group_G // num_shards - group_G) * (num_envs * num_rows)  # from a global place to the one in its shard
        size = num_groups * num_envs * num_rows * row_bytes(fields)
        self.chunk_rows = math.ceil(num_rows / min(_MOST_CHUNKS, max(1, size // _LEAST_CHUNK_BYTES)))
        num_chunks = math.ceil(num_rows / self.chunk_rows)
        self.touched, self.used = np.zeros(num_chunks, np.bool_), np.zeros(num_chunks, np.bool_)

    def take(self, name: str, place: Array, out: Array | None = None) -> Array:
        """The rows at these places, in an array of the caller's own, or in `out`: [*place.shape, ...]."""
        if self._num_shards == 1:
            return np.take(self._shards[0][name], place, axis=0, out=out, mode="clip")
        group = place // (self.num_envs * self.num_rows)
        local, shard = place + self._shift_G[group], group % self._num_shards
        dtype, shape = self.fields[name]
        found = np.empty((*place.shape, *shape), dtype) if out is None else out
        for index, part in enumerate(self._shards):
            here = shard == index
            found[here] = part[name][local[here]]
        return found

    def put(self, group: int, name: str, place: Array, value: Array | int) -> None:
        """Write rows of one group, whose positions `touch` was told."""
        self._shards[group % self._num_shards][name][place + self._shift_G[group]] = value

    def touch(self, place: Array) -> None:
        """These are about to be written."""
        self.touched[place % self.num_rows // self.chunk_rows] = True
        if self._memory.journals:
            group = place // (self.num_envs * self.num_rows)
            local, shard = place + self._shift_G[group], group % self._num_shards
            for index, part in enumerate(self._shards):
                self._memory.changing([*part.values()], local[shard == index])

    def block(self, name: str, group: int, begin: int, end: int) -> Array:
        """A view of one group's rows at positions `begin` to `end`: [num_envs, end - begin, ...]."""
        array = self._shards[group % self._num_shards][name]
        first = group // self._num_shards * self.num_envs
        columns = array.reshape(-1, self.num_rows, *array.shape[1:])
        return columns[first : first + self.num_envs, begin:end]

    def chunk(self, index: int) -> list[tuple[str, list[Array]]]:
        """Views of all that lies in one chunk: field by field, group by group."""
        begin, end = index * self.chunk_rows, min(self.num_rows, (index + 1) * self.chunk_rows)
        return [(name, [self.block(name, group, begin, end) for group in range(self.num_groups)]) for name in self.fields]
