"""What a node says, read: functions of a frame's bytes that raise ValueError for what no node says, and nothing else."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shoal.engines.messages import from_json
from shoal.engines.ray_node import ACTIVITY
from shoal.engines.ray_words import Frame
from shoal.supervision.channel import MAX_MESSAGE_BYTES
from shoal.supervision.heartbeat import RECORD
from shoal.types import Activity, Array

_MAX_PID = 2**31 - 1
_MAX_STATUS = 2**16 - 1  # as os.waitpid gives it


def check_head(frame: Frame) -> None:
    """No head is longer than what a process of a node may say at once: it is kept, and shown. Raises ValueError."""
    if len(frame.head) > MAX_MESSAGE_BYTES:
        raise ValueError(f"what a process says has at most {MAX_MESSAGE_BYTES:,} bytes, {len(frame.head):,} came")


class HelperLost(NamedTuple):
    """A node's helper process, from which its actors are forked, is gone, and is started again."""

    reason: str


class Forked(NamedTuple):
    pid: int


class Ended(NamedTuple):
    """A process is dead. status: as os.waitpid gives it; None where nobody could reap it, and `error` says why."""

    pid: int
    status: int | None
    error: str


@dataclass(frozen=True)
class Doing:
    """What a process does. index: a number of `number_of` (ray_words.py). letter: the kernel's. record: [1] of RECORD, times on the node's clock."""

    index: int
    letter: str
    record: Array


def read_happened(head: bytes) -> HelperLost | Forked | Ended:
    """The head of a HAPPENED."""
    said = from_json(head)
    match said:
        case {"is": "lost", "reason": str(reason)}:
            return HelperLost(reason)
        case {"is": "forked", "pid": int(pid)} if 0 <= pid <= _MAX_PID:
            return Forked(pid)
        case {"is": "exited", "pid": int(pid), "status": int() | None as status, "error": str(error)} if 0 <= pid <= _MAX_PID and (
            status is None or 0 <= status <= _MAX_STATUS
        ):
            return Ended(pid, status, error)
    raise ValueError(f"this cannot happen to a process: {said!s:.200}")


def read_slot(head: bytes) -> int:
    """The head of a PARTIAL."""
    if len(head) != 4:
        raise ValueError(f"the number of a slot has 4 bytes, got {len(head)}")
    return int.from_bytes(head, "little")


def check_said(head: bytes) -> None:
    """The head of a SAID: what a learner may say that is not the first, which alone tells of updates and of weights. Raises ValueError for all else."""
    said = from_json(head)
    match said:
        case {"is": "ready", "version": int()} | {"is": "saved", "weights_sha256": ""} | {"is": "not_saved", "message": str()}:
            return
        case {"is": "failed", "error": str(), "message": str(), "report": dict(report), "traceback": str()} if not report:
            return
    raise ValueError(f"this is nothing that a learner on a node says: {said!s:.200}")


def read_activities(frame: Frame) -> tuple[int, list[Doing]]:
    """The node's monotonic clock in ns, and what its processes do."""
    if len(frame.head) != 8:
        raise ValueError(f"a node's clock has 8 bytes, got {len(frame.head)}")
    (now_ns,) = struct.unpack("<q", frame.head)
    if now_ns < 0:
        raise ValueError(f"a node's clock stands at {now_ns} ns")
    size = ACTIVITY.size + RECORD.itemsize
    if len(frame.body) % size:
        raise ValueError(f"activities have {size} bytes each, got {len(frame.body)}")
    return now_ns, [_doing(frame.body, at) for at in range(0, len(frame.body), size)]


def _doing(body: bytes, at: int) -> Doing:
    index, letter = ACTIVITY.unpack_from(body, at)
    record = np.frombuffer(body, RECORD, 1, at + ACTIVITY.size).copy()
    Activity(int(record["activity"][0]))
    return Doing(index, letter.decode("ascii"), record)
