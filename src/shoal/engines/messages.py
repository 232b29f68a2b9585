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
_MOST_NESTED = 64  # lists and objects within each other: whoever goes through them, or writes them down, needs some of the stack for each
_MOST_SECONDS = 1e9
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


def check_word(word: Word, num_envs: int, num_rows: int) -> None:
    """Raise ValueError for what no actor says: what only it is told, and a body that is not what comes along with its kind.

    Args:
      num_envs, num_rows: of a rollout, in which a fault has its place.
    """
    if word.kind is Kind.RESTORED:
        _check_restored(word, num_envs)
    elif word.kind is Kind.FAULT:
        _check_fault(word.json, num_envs, num_rows)
    elif word.kind is not Kind.FILLED:
        raise ValueError(f"{word.kind.name} is what an actor is told")


def _check_restored(word: Word, num_envs: int) -> None:
    match word.json:
        case {"seconds": int() | float() as seconds} if 0 <= seconds <= _MOST_SECONDS and 0 <= word.value <= num_envs:
            return
    raise ValueError(f"no group of {num_envs} environments is put back like this: {word.value} began anew, {word.json!s:.200}")


def _check_fault(said: dict[str, Any], num_envs: int, num_rows: int) -> None:
    """See `describe_error` (engines/errors_told.py). Where it was the report says, as far as that is known; of a paced group's hang all of it."""
    match said:
        case {"error": str(), "message": str(message), "report": dict(report), "traceback": str()} if message.partition("\n")[0].strip():
            pass
        case _:
            raise ValueError(f"this is no fault: {said!s:.200}")
    if "snippet" in report:
        raise ValueError("a fault comes with a snippet, which only the supervisor writes")
    needed = ("env", "step", "seed") if "paced" in report else ()
    for name, limit in {"env": num_envs, "row": num_rows + 1, "step": 2**63, "seed": 2**64}.items():
        if name in needed or report.get(name) is not None:
            _check_count(name, report.get(name), limit)
    match report.get("paced", [0, 0]):
        case [episode, step]:
            _check_count("episode", episode, 2**63)
            _check_count("step", step, 2**63)
        case other:
            raise ValueError(f"the place of a hang is an episode and a step, got {other!s:.200}")


def _check_count(name: str, value: object, limit: int) -> None:
    """Raise ValueError unless it is a whole number below `limit`, or its digits."""
    count = int(value) if isinstance(value, str) and len(value) <= 20 and value.isascii() and value.isdigit() else value
    if type(count) is not int or not 0 <= count < limit:
        raise ValueError(f"{name} is {value!s:.50}, expected 0 to {limit - 1}")


def from_json(message: bytes) -> dict[str, Any]:
    """The inverse of `to_json`. Raises ValueError for bytes that are no JSON object."""
    try:
        value = json.loads(message)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a message is a JSON object, got {type(value).__name__}")
    if not _is_flat(value, _MOST_NESTED):
        raise ValueError("JSON nested too deeply")
    return value


def _is_flat(value: object, levels: int) -> bool:
    """Whether no more lists and objects are within each other."""
    if not isinstance(value, (dict, list)):
        return True
    return levels > 0 and all(_is_flat(each, levels - 1) for each in (value.values() if isinstance(value, dict) else value))


def to_json(value: dict[str, Any]) -> bytes:
    """One message; the inverse is `from_json`."""
    return json.dumps(value).encode()
