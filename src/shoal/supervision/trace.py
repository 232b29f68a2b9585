"""Traces of what a process did, written while it does it: the raw material of `profile.json` (monitoring/profile.py).

Each process writes a file of its own through a mapping, so that what was written is there however it ends. The file is a ring of fixed-size records:
the newest CAPACITY of them are kept. A record is one finished span on the monotonic clock, which is the same for all processes of a machine.

Spans nest: `begin` and `end` go in pairs, and between them run the activities that a role enters anyway (types.Activity), each until the next one, or
until a span begins or ends. So what is written never overlaps, by construction.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from shoal.types import Activity, ActivityRecorder

CAPACITY = 1 << 15  # records of a process
DETAILED_ROLLOUTS = 10  # rollouts at the beginning whose rows are written one by one
DETAILED_EVERY = 100  # and of those after it, one in so many
SUFFIX = ".trace"

_HEADER = struct.Struct("<qq")  # process id, records written so far
_RECORD = struct.Struct("<qqqqqqq")  # kind, begin and end in ns, four numbers (SPAN_NUMBERS)
_PAGE = 4096  # the header has one of its own


class Span(IntEnum):
    """What is told besides activities; numbered after them."""

    ROLLOUT = 32
    REFRESH = 33
    CONSUME = 34
    UPDATE = 35
    DISPATCH = 36
    HEAR = 37
    WATCH = 38
    CHECKPOINT = 39
    ANSWER = 40


SPAN_NUMBERS: dict[Span, tuple[str, ...]] = {
    Span.ROLLOUT: ("group", "sequence", "stepping_us", "inferring_us"),
    Span.REFRESH: ("version",),
    Span.CONSUME: ("rollouts",),
    Span.UPDATE: ("version",),
    Span.ANSWER: ("groups", "version"),
}
_ROWS = (Activity.STEPPING, Activity.INFERRING)
_COVERED = (Activity.LEARNING,)  # shown by spans


class Tracer(Protocol):
    """Where a process tells what it does. `NullTrace` where nobody asked for a profile."""

    def begin(self, span: Span) -> None: ...
    def end(self, *numbers: int) -> None: ...
    def recorder(self, recorder: ActivityRecorder) -> ActivityRecorder:
        """A recorder that also tells this trace."""


class NullTrace:
    """Keeps nothing."""

    def begin(self, span: Span) -> None:
        """Nothing."""

    def end(self, *numbers: int) -> None:
        """Nothing."""

    def recorder(self, recorder: ActivityRecorder) -> ActivityRecorder:
        return recorder


class Trace:
    """A trace in a file of `directory`, which `trace_file` names. Making it raises OSError where the disk has no room for all of it."""

    def __init__(self, path: Path, capacity: int = CAPACITY) -> None:
        size = _PAGE + capacity * _RECORD.size
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, size)  # in a hole, a write into the mapping would end the process where the disk is full
            else:
                os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self._capacity, self._written = capacity, 0
        self._open: list[tuple[Span, int]] = []
        self._activity: Activity | None = None
        self._since = 0
        self._rollouts, self._detail = 0, False
        self._spent = dict.fromkeys(_ROWS, 0)
        _HEADER.pack_into(self._map, 0, os.getpid(), 0)

    def recorder(self, recorder: ActivityRecorder) -> ActivityRecorder:
        return _TracedRecorder(recorder, self)

    def enter(self, activity: int, group: int, row: int) -> None:
        """From now on the process does this, until it enters another, or a span begins or ends."""
        now = time.monotonic_ns()
        self._leave(now)
        self._activity, self._since = Activity(activity), now
        self._place = (group, row)

    def begin(self, span: Span) -> None:
        now = time.monotonic_ns()
        self._leave(now)
        self._open.append((span, now))
        if span is Span.ROLLOUT:
            self._detail = self._rollouts < DETAILED_ROLLOUTS or self._rollouts % DETAILED_EVERY == 0
            self._rollouts += 1
            self._spent = dict.fromkeys(_ROWS, 0)

    def end(self, *numbers: int) -> None:
        """End the span that was begun last. Numbers are named in SPAN_NUMBERS; a rollout's last two are filled in."""
        now = time.monotonic_ns()
        self._leave(now)
        span, begun = self._open.pop()
        if span is Span.ROLLOUT:
            numbers += tuple(spent // 1000 for spent in self._spent.values())
        self._write(span, begun, now, *numbers)

    def _leave(self, now: int) -> None:
        activity, self._activity = self._activity, None
        if activity is None or activity in _COVERED:
            return
        if activity in _ROWS:
            self._spent[activity] += now - self._since
            if not self._detail:
                return
        self._write(activity, self._since, now, *self._place)

    def _write(self, kind: int, begin: int, end: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> None:
        _RECORD.pack_into(self._map, _PAGE + (self._written % self._capacity) * _RECORD.size, kind, begin, end, a, b, c, d)
        self._written += 1
        _HEADER.pack_into(self._map, 0, os.getpid(), self._written)  # last: a record counts once it is whole


class _TracedRecorder:
    __slots__ = ("_recorder", "_trace")

    def __init__(self, recorder: ActivityRecorder, trace: Trace) -> None:
        self._recorder, self._trace = recorder, trace

    def enter(self, activity: int, group: int = -1, env: int = -1, row: int = -1) -> None:
        self._recorder.enter(activity, group, env, row)
        self._trace.enter(activity, group, row)


@dataclass(frozen=True)
class Event:
    """One record as it is read: nanoseconds of the monotonic clock, and its numbers."""

    kind: Activity | Span
    begin_ns: int
    end_ns: int
    numbers: tuple[int, int, int, int]


def to_log(message: str) -> None:
    """Standard error, which of a role's process is its log."""
    print(message, file=sys.stderr, flush=True)


def open_trace(directory: str, name: str, index: int = 0, incarnation: int = 0, warn: Callable[[str], None] = to_log) -> Tracer:
    """The trace of a role's process in `directory`; none where that is empty, or (said by `warn`) where the disk refuses."""
    if not directory:
        return NullTrace()
    path = trace_file(Path(directory), name, index, incarnation)
    try:
        return Trace(path)
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        warn(f"profile.json will say nothing of {name} {index}: {error.strerror or error} ({path})")
        return NullTrace()


def trace_file(directory: Path, name: str, index: int, incarnation: int) -> Path:
    return directory / f"{name}-{index}.{incarnation}{SUFFIX}"


def read_trace(path: Path) -> tuple[int, list[Event]]:
    """(process id, events in the order of their ends). What a process was writing when it was killed is left out."""
    data = path.read_bytes()
    if len(data) < _PAGE + _RECORD.size:
        return 0, []
    pid, written = _HEADER.unpack_from(data)
    capacity = (len(data) - _PAGE) // _RECORD.size
    oldest = max(0, written - capacity + 1) if written >= capacity else 0  # the place of the next record may be half written
    events = []
    for number in range(oldest, written):
        kind, begin, end, *numbers = _RECORD.unpack_from(data, _PAGE + (number % capacity) * _RECORD.size)
        events.append(Event(Span(kind) if kind >= min(Span) else Activity(kind), begin, end, tuple(numbers)))
    return pid, events
