"""The weight board: two copies of a flat float32 array and their versions, in memory that one writer and many readers share.

The writer publishes version v into copy v % 2, so a reader of the newest version is disturbed only when two more are published
while it copies; it sees that by the header and takes the newer one. Nobody waits for anybody, and no torn mix is ever used.
The version also travels in the message that tells of it, and that message orders the memory on every processor.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from shoal.errors import SchemaError
from shoal.types import Array, Arrays

_HEADER_BYTES = 4096  # begin, end per copy as int64; a page, so that the copies are aligned
_NONE = -1


@dataclass(frozen=True)
class WeightLayout:
    """Where each tensor of a policy lies in the flat array: (name, shape) in a fixed order."""

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> WeightLayout:
        """The layout of named shapes, sorted by name."""
        return cls(tuple(sorted((name, tuple(shape)) for name, shape in tensors)))

    @property
    def size(self) -> int:
        """float32 numbers in all."""
        return sum(math.prod(shape) for _, shape in self.entries)

    @property
    def hash(self) -> str:
        return hashlib.sha256(repr(self.entries).encode()).hexdigest()[:16]

    def views(self, flat: Array) -> Arrays:
        """The tensors as views of `flat` (float32 [size])."""
        if flat.dtype != np.float32 or flat.shape != (self.size,):
            raise SchemaError(f"weights are float32 [{self.size}], not {flat.dtype} {list(flat.shape)}")
        out: Arrays = {}
        at = 0
        for name, shape in self.entries:
            size = math.prod(shape)
            out[name] = flat[at : at + size].reshape(shape)
            at += size
        return out


class WeightBoard:
    """The board over `size_bytes(size)` bytes of memory (uint8 array). One process publishes, any number read."""

    def __init__(self, size: int, buffer: Array) -> None:
        self._size = size
        self._header = buffer[:32].view(np.int64).reshape(2, 2)  # [copy] = (begun, ended)
        body = buffer[_HEADER_BYTES : _HEADER_BYTES + 8 * size].view(np.float32)
        self._copies = body.reshape(2, size)
        self._fence = threading.Lock()

    @staticmethod
    def size_bytes(size: int) -> int:
        return -(-(_HEADER_BYTES + 8 * size) // 4096) * 4096

    def reset(self) -> None:
        """Forget what is there; the writer does this before its first version, also after a death in mid-publish."""
        self._header[:] = _NONE

    def begin(self, version: int) -> Array:
        """The copy that is to hold `version`, for the writer to fill; `commit` makes it visible."""
        copy = version % 2
        self._header[copy] = (version, _NONE)
        self._order()
        return self._copies[copy]  # type: ignore[no-any-return]

    def commit(self, version: int) -> None:
        self._order()
        self._header[version % 2, 1] = version

    def publish(self, version: int, flat: Array) -> None:
        """Make `flat` (float32 [size]) version `version`."""
        np.copyto(self.begin(version), flat)
        self.commit(version)

    @property
    def version(self) -> int:
        """The newest whole version; -1 before the first, and where a look fell between two publications so that neither copy seems whole."""
        return max((end for begun, end in self._header.tolist() if begun == end), default=_NONE)

    def read(self, out: Array) -> int:
        """Copy the newest whole version into `out` and return it. Never blocks; raises LookupError before the first one."""
        while True:
            version = self.version
            if version == _NONE:
                if (self._header[:, 0] == _NONE).all():
                    raise LookupError("no version was published on the weight board yet")
                continue  # the writer is between two stores of its header
            self._order()
            np.copyto(out, self._copies[version % 2])
            self._order()
            if int(self._header[version % 2, 0]) == version:
                return version

    def _order(self) -> None:
        """A full memory barrier where the processor needs one: an uncontended lock of this process."""
        with self._fence:
            pass
