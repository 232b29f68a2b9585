"""What travels between the driver and the fleet of one node: many small words and some large bodies in one message of raw bytes, no pickle.

Every word names a process (its role's index and incarnation). Those that are meant for a process, or come from one, are handed on as they are
(engines/messages.py); the others are about processes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from shoal.config import MAX_ACTORS

_HEAD = struct.Struct("<BxxxIIQQ")
_NUMBERS = {"actor": 0, "learner": MAX_ACTORS}  # the least of each role


class Kind(IntEnum):
    """What a `Frame` is."""

    # to a node
    START = 1  # fork an actor or a learner; body: its set-up, JSON
    WORD = 2  # either way: head: a word of engines/messages.py; body: the file that comes along, or the rollout that is finished
    KILL = 3
    WEIGHTS = 4  # head: version, int64; body: float32 weights. Words behind it may name that version
    DUMP = 5  # have a process write its stacks into its log
    PART = 6  # either way: body: a piece of a message that goes in several; head: `more`, or empty with the last
    ROLLOUT = 7  # head: a word that names slot and identity; value: the newest version in it; body: the rollout, for the learner there
    ORDER = 8  # head: what a learner is told, JSON
    # from a node
    HAPPENED = 17  # head: JSON, what the zygote told of a process, or of itself
    PARTIAL = 18  # head: slot, uint32; body: the rollout as far as it was when its actor died
    ACTIVITIES = 19  # head: this machine's monotonic clock, int64 ns; body: activity records of all processes, and their states
    LOG = 20  # body: what a process wrote since
    LEAVING = 21  # head: why this node is soon to end, text; it goes on until it is told to
    SAID = 22  # head: what a learner says, JSON


@dataclass(frozen=True)
class Frame:
    """One word. `index`, a number of `number_of`, and `incarnation` of the process that it is about."""

    kind: Kind
    index: int = 0
    incarnation: int = 0
    head: bytes = b""
    body: bytes = b""

    @property
    def size(self) -> int:
        return _HEAD.size + len(self.head) + len(self.body)


def encode(frames: Iterable[Frame]) -> bytes:
    """One message; the inverse is `decode`."""
    parts: list[bytes] = []
    for frame in frames:
        parts += [_HEAD.pack(frame.kind, frame.index, frame.incarnation, len(frame.head), len(frame.body)), frame.head, frame.body]
    return b"".join(parts)


def decode(message: bytes) -> Iterator[Frame]:
    """The frames of a message, in order. Raises ValueError for bytes that are none, at the first that is not whole."""
    view, at = memoryview(message), 0
    while at < len(view):
        if len(view) - at < _HEAD.size:
            raise ValueError(f"a frame has at least {_HEAD.size} bytes, {len(view) - at} are left")
        kind, index, incarnation, head, body = _HEAD.unpack_from(view, at)
        at += _HEAD.size
        if head + body > len(view) - at:
            raise ValueError(f"a frame of {head + body} bytes is said to come, {len(view) - at} are left")
        yield Frame(Kind(kind), index, incarnation, bytes(view[at : at + head]), bytes(view[at + head : at + head + body]))
        at += head + body


MORE = b"more"
_PART_HEAD_BYTES = _HEAD.size + len(MORE)


def part(message: bytes, at: int, size: int) -> bytes:
    """The piece of a message that begins at `at`, as a message of its own; `Parts` puts them together."""
    return encode([Frame(Kind.PART, head=MORE if at + size < len(message) else b"", body=message[at : at + size])])


def is_part(message: bytes) -> bool:
    return message[:1] == bytes([Kind.PART])


class Parts:
    """Messages that come in one piece or in several, one after the other. most_bytes: that one may have, however it comes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._pieces: list[bytes] = []
        self._size = 0

    def take(self, message: bytes) -> list[Frame]:
        """The frames of the message that is whole with this one; none where more of it is to come. Raises ValueError for what is no message, for one that
        comes between the parts of another, and for one of more than `most_bytes`."""
        self._check_size(len(message) - is_part(message) * _PART_HEAD_BYTES)
        frames = list(decode(message))
        if not any(frame.kind is Kind.PART for frame in frames):
            if frames and self._pieces:
                raise ValueError("a message came between the parts of another")
            return frames
        (piece, *others) = frames
        if others or piece.kind is not Kind.PART or piece.head not in (MORE, b""):
            raise ValueError("a part of a message comes alone")
        self._size += len(piece.body)
        self._check_size(self._size)
        self._pieces.append(piece.body)
        if piece.head:
            return []
        whole = b"".join(self._pieces)
        self._pieces, self._size = [], 0
        frames = list(decode(whole))
        if any(frame.kind is Kind.PART for frame in frames):
            raise ValueError("a part of a message has no parts")
        return frames

    def _check_size(self, size: int) -> None:
        if size > self._most_bytes:
            raise ValueError(f"a message has at most {self._most_bytes:,} bytes, {size:,} came")


def number_of(role: str, index: int) -> int:
    """By which a frame names a process that lives on a node: an actor by its index, learners by numbers behind those of all actors."""
    return _NUMBERS[role] + index


def role_of(number: int) -> tuple[str, int]:
    """The inverse of `number_of`: role and index."""
    role = "learner" if number >= MAX_ACTORS else "actor"
    return role, number - _NUMBERS[role]
