"""Where a replay's arrays lie: in its process alone, or in a file that outlives it, with a journal of what the update under way overwrote.

A learner that is killed leaves its rows and priorities in the middle of an update. Before they are changed, what was there goes into the journal;
so whoever comes next undoes the update, or goes on from its end where the others had made it too. The order counts: a record, then the length that makes
it part of the journal, then the change. A process that is killed has done all that it did before, and nothing after.

    a journal   base version int64, bytes of records int64, then records
    a record    number of arrays and of entries int64, numbers of the arrays int64, entries int64, and of each array what was there
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from shoal.types import Array

_HEADER = struct.Struct("<qq")


class Memory(Protocol):
    """Attributes:
    journals: whether `changing` has to be told of every change.
    """

    @property
    def journals(self) -> bool: ...
    def array(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A new array, zero at first. Asked again in the same order for the same shapes, a file gives what it was left with."""

    def changing(self, arrays: Sequence[Array], entry_M: Array) -> None:
        """These entries (along the first axis) of arrays that `array` gave are about to be written."""

    def begin(self, version: int) -> None:
        """An update begins; the one that made this version is final."""


class OwnMemory:
    """Of one process, and gone with it. Memory that was never written is not there yet."""

    journals = False

    def array(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, dtype)

    def changing(self, arrays: Sequence[Array], entry_M: Array) -> None:
        """Nothing."""

    def begin(self, version: int) -> None:
        """Nothing."""


OWN: Memory = OwnMemory()


class KeptMemory:
    """In two files, which one process at a time maps."""

    journals = True

    def __init__(self, fd: int, journal_fd: int) -> None:
        """fd: of the arrays' file. journal_fd: of the journal's. Both stay the caller's."""
        self._fd, self._journal_fd = fd, journal_fd
        self._forget()

    def _forget(self) -> None:
        self._arrays: list[Array] = []
        self._numbers: dict[int, int] = {}  # by id
        self._end = 0

    def clear(self) -> None:
        """Begin anew: all is zero. Arrays that were given out must not be touched any more."""
        self._forget()
        os.ftruncate(self._journal_fd, 0)
        os.ftruncate(self._fd, 0)

    def array(self, shape: tuple[int, ...], dtype: str) -> Array:
        size_bytes, begin = math.prod(shape) * np.dtype(dtype).itemsize, self._end
        if not size_bytes:
            return np.zeros(shape, dtype)
        self._end += math.ceil(size_bytes / mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if os.fstat(self._fd).st_size < self._end:
            os.ftruncate(self._fd, self._end)
        found = np.frombuffer(mmap.mmap(self._fd, size_bytes, offset=begin), dtype).reshape(shape)
        self._numbers[id(found)] = len(self._arrays)
        self._arrays.append(found)
        return found

    def changing(self, arrays: Sequence[Array], entry_M: Array) -> None:
        entry_M = np.asarray(entry_M, np.int64).ravel()
        if not len(entry_M):
            return
        numbers = [self._numbers[id(array)] for array in arrays]
        base, length = self._header()
        head = np.concatenate([np.array([len(arrays), len(entry_M), *numbers], np.int64), entry_M])
        end = length
        for part in (head, *(array[entry_M] for array in arrays)):
            end += self._write(_HEADER.size + end, part)
        self._write_header(base, end)

    def begin(self, version: int) -> None:
        """The journal is empty from here on: base and length change in one write."""
        self._write_header(version, 0)

    def back_to(self, version: int) -> None:
        """Undo the update that was made of this version, whole or not; leave the one that made it. Once all arrays are there.

        Raises:
          ValueError: the journal is of another version, or is none.
        """
        base, length = self._header()
        if base == version:
            self._undo(length)
            self._write_header(base, 0)
        elif base != version - 1:
            raise ValueError(f"the journal is that of an update of version {base}")

    def _undo(self, length: int) -> None:
        held = os.fstat(self._journal_fd).st_size - _HEADER.size
        if not 0 <= length <= held:
            raise ValueError(f"the journal is to hold {length} bytes of records, and holds {held}")
        content = bytearray()
        while part := os.pread(self._journal_fd, min(1 << 30, length - len(content)), _HEADER.size + len(content)):
            content += part
        records: list[tuple[Array, list[int], int]] = []
        place = 0
        while place < length:
            count, num = (int(each) for each in np.frombuffer(content, np.int64, 2, place))
            if not (0 < count <= len(self._arrays) and 0 < num <= length):
                raise ValueError(f"the record at byte {place} of the journal is of {count} arrays and {num} entries")
            numbers = np.frombuffer(content, np.int64, count, place + 16).tolist()
            entry_M = np.frombuffer(content, np.int64, num, place + 16 + 8 * count)
            place += 16 + 8 * (count + num)
            records.append((entry_M, numbers, place))
            for number in numbers:
                array = self._array_of(number)
                if entry_M.min() < 0 or entry_M.max() >= len(array):
                    raise ValueError(f"the record at byte {place} of the journal names entries that array {number} has not")
                place += num * array[0].nbytes
        if place != length:
            raise ValueError("the last record of the journal is cut off")
        for entry_M, numbers, place in reversed(records):
            for number in numbers:
                array = self._arrays[number]
                size = len(entry_M) * math.prod(array.shape[1:])
                array[entry_M] = np.frombuffer(content, array.dtype, size, place).reshape(-1, *array.shape[1:])
                place += size * array.itemsize

    def _array_of(self, number: int) -> Array:
        if not 0 <= number < len(self._arrays):
            raise ValueError(f"the journal names array {number} of {len(self._arrays)}")
        return self._arrays[number]

    def _header(self) -> tuple[int, int]:
        content = os.pread(self._journal_fd, _HEADER.size, 0)
        base, length = _HEADER.unpack(content) if len(content) == _HEADER.size else (-1, 0)
        return int(base), int(length)

    def _write_header(self, base: int, length: int) -> None:
        os.pwrite(self._journal_fd, _HEADER.pack(base, length), 0)

    def _write(self, place: int, part: Array) -> int:
        left = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        while left:
            written = os.pwrite(self._journal_fd, left, place)
            left, place = left[written:], place + written
        return part.nbytes
