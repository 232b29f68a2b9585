"""The board of activities: what each role does at this moment, since when, and how its time was spent.

One record per role in shared memory; one writer each, any number of readers, no lock. A role writes at every step (about a microsecond),
so that a hang, a stop and a wait for something are seen from outside without its help.
"""

from __future__ import annotations

import os
import struct
import time

import numpy as np

from shoal.supervision.memory import SharedMemory
from shoal.types import Activity, ActivityRecord, Array

__all__ = ["Activity", "ActivityBoard", "ActivityRecord", "Heartbeat"]

NUM_ACTIVITIES = len(Activity)

# 192 bytes: two roles never write one cache line. `begun` is written before the other fields and `beat` after them; a reader goes the other way round and compares.
RECORD = np.dtype(
    [
        ("begun", np.int64),
        ("activity", np.int32),
        ("group", np.int32),
        ("env", np.int32),
        ("row", np.int32),
        ("since_ns", np.int64),  # CLOCK_MONOTONIC, the same for all processes of a machine
        ("beat", np.int64),  # calls of `enter`, over all incarnations
        ("total_ns", np.int64, (NUM_ACTIVITIES,)),  # finished stretches, by activity, over all incarnations
        ("incarnation", np.int64),
        ("pid", np.int64),
        ("unused", np.int64, (17 - NUM_ACTIVITIES,)),  # up to the next cache line
    ]
)
_FIELDS = struct.Struct("@iiiiq")  # activity to since_ns; pack_into writes zeros first, hence the two counters outside of it
_FIELDS_OFFSET, _BEAT_WORD, _TOTAL_WORD = 8, 4, 5  # the first in bytes, the others in words of 8
_READ_ATTEMPTS = 200


class Heartbeat:
    """A role's own record. Made at its start; goes on counting where its predecessor stopped."""

    __slots__ = ("_beat", "_now", "_pack", "_record", "_since", "_total_word", "_words")

    def __init__(self, record: memoryview, incarnation: int) -> None:
        """record: the bytes of this role (kept)."""
        before = np.frombuffer(record, RECORD)[0]
        before["incarnation"], before["pid"] = incarnation, os.getpid()
        self._record = record
        self._words = record.cast("q")
        self._pack = _FIELDS.pack_into
        self._now = time.monotonic_ns
        self._beat = int(before["beat"])
        self._total_word = _TOTAL_WORD + Activity.STARTING
        self._since = self._now()
        self.enter(Activity.STARTING)

    def enter(self, activity: int, group: int = -1, env: int = -1, row: int = -1) -> None:
        """From now on this role does `activity`; the time since the last call goes to what it did before."""
        now = self._now()
        words = self._words
        words[0] = self._beat = beat = self._beat + 1
        words[self._total_word] += now - self._since
        self._pack(self._record, _FIELDS_OFFSET, activity, group, env, row, now)
        words[_BEAT_WORD] = beat
        self._total_word = _TOTAL_WORD + activity
        self._since = now


class ActivityBoard:
    """Records of `num_roles` roles; pass `fd` to them."""

    def __init__(self, memory: SharedMemory, num_roles: int) -> None:
        self._memory = memory
        self.num_roles = num_roles
        self._bytes = memory.buffer.data
        self._words = memory.buffer.data.cast("q")

    @classmethod
    def create(cls, num_roles: int) -> ActivityBoard:
        return cls(SharedMemory.create(num_roles * RECORD.itemsize, "shoal-activities"), num_roles)

    @classmethod
    def attach(cls, fd: int, num_roles: int) -> ActivityBoard:
        return cls(SharedMemory.attach(fd, num_roles * RECORD.itemsize), num_roles)

    @property
    def fd(self) -> int:
        return self._memory.fd

    def heartbeat(self, index: int, incarnation: int = 0) -> Heartbeat:
        """The writer of one record; exactly one living process may hold it."""
        offset = index * RECORD.itemsize
        return Heartbeat(self._bytes[offset : offset + RECORD.itemsize], incarnation)

    def records(self, count: int | None = None) -> list[ActivityRecord]:
        """All roles now (or the first `count`), by index; one that has not begun is STARTING with 0 beats."""
        return [self.record(index) for index in range(self.num_roles if count is None else count)]

    def record(self, index: int) -> ActivityRecord:
        """One role now."""
        offset = index * RECORD.itemsize
        words, word = self._words, offset // 8
        for _ in range(_READ_ATTEMPTS):
            beat = words[word + _BEAT_WORD]
            copied = bytes(self._bytes[offset : offset + RECORD.itemsize])
            whole = words[word] == beat
            if whole:
                break  # else it is being written, or its writer was killed, stopped or preempted in the middle of that
        record = np.frombuffer(copied, RECORD)[0]
        activity = Activity(int(record["activity"]))
        age_ns = max(0, time.monotonic_ns() - int(record["since_ns"])) if beat and whole else 0  # torn, `since_ns` may be 0
        totals_ns = [int(total) for total in record["total_ns"]]
        totals_ns[activity] += age_ns
        return ActivityRecord(
            activity=activity,
            incarnation=int(record["incarnation"]),
            group=int(record["group"]),
            env=int(record["env"]),
            row=int(record["row"]),
            age_seconds=age_ns / 1e9,
            num_beats=beat,
            seconds={each: totals_ns[each] / 1e9 for each in Activity},
            whole=whole,
            pid=int(record["pid"]),
        )

    def raw(self, index: int) -> bytes:
        """One role's record as it is in memory, for another machine's board."""
        offset = index * RECORD.itemsize
        return bytes(self._bytes[offset : offset + RECORD.itemsize])

    def put(self, index: int, record: Array) -> None:
        """Take over the record ([1] of RECORD, times on this machine's clock) of a role that lives on another machine."""
        offset = index * RECORD.itemsize
        self._bytes[offset : offset + RECORD.itemsize] = record.tobytes()

    def close(self) -> None:
        self._words.release()
        self._bytes.release()
        self._memory.close()
