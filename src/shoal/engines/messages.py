"""The words between the supervisor and its roles: small, without pickle.

Actors: fixed-size records (`Word`), some followed by a few bytes of JSON. Learner and probe: JSON objects, one per message.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from shoal.experience.envelope import Identity


class Kind(IntEnum):
    """What a `Word` says. Orders are carried out in the order in which they come; a word of an older incarnation is not heard."""

    # to an actor
    SETUP = 1  # JSON: what it needs to build itself
    LEASE = 2  # slot, identity; value: the newest version, with which a sync rollout is made; JSON, where something broke before: give_up, careful
    RESTORE = 3  # group; a descriptor comes along, whose file holds the packed state
    RELEASE = 4  # group
    PUBLISHED = 5  # value: version
    STOP = 6
    CONNECT = 7  # a descriptor comes along: this actor's end of a channel to the inference server
    # from an actor
    FILLED = 17  # slot, identity
    RESTORED = 18  # group; value: number of environments that had to begin a new episode; JSON: seconds that it took
    FAULT = 19  # slot, identity; JSON: the report


def place_of(role: str, index: int, num_roles: int) -> int:
    """Where a role writes on a board of activities with so many places: the first learner, the actors, and from the end the inference server and the
    other learners, since there may be more actors later."""
    if role == "actor":
        return 1 + index
    return num_roles - 1 if role == "inference" else (num_roles - 1 - index) % (num_roles - 1)


NOBODY = Identity(0, 0, 0)
_WORD = struct.Struct("<BxxxIIIQq")
WORD_BYTES = _WORD.size  # before what rides along


@dataclass(frozen=True)
class Word:
    """One message of an actor's channel."""

    kind: Kind
    slot: int = 0
    identity: Identity = NOBODY
    value: int = 0
    body: bytes = b""

    def encode(self) -> bytes:
        group, sequence, attempt = self.identity
        return _WORD.pack(self.kind, self.slot, group, attempt, sequence, self.value) + self.body

    @classmethod
    def decode(cls, message: bytes) -> Word:
        """Raises ValueError for bytes that are no word."""
        if len(message) < _WORD.size:
            raise ValueError(f"a word has at least {_WORD.size} bytes, got {len(message)}")
        kind, slot, group, attempt, sequence, value = _WORD.unpack_from(message)
        return cls(Kind(kind), slot, Identity(group, sequence, attempt), value, message[_WORD.size :])

    @property
    def json(self) -> dict[str, Any]:
        """What rides along. Raises ValueError where that is no JSON object."""
        return from_json(self.body)


def from_json(message: bytes) -> dict[str, Any]:
    """The inverse of `to_json`. Raises ValueError for bytes that are no JSON object."""
    try:
        value = json.loads(message)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a message is a JSON object, got {type(value).__name__}")
    return value


def to_json(value: dict[str, Any]) -> bytes:
    """One message; the inverse is `from_json`."""
    return json.dumps(value).encode()
