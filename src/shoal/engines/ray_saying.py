"""What a node says in words, without secrets: frames, and logs that come piece by piece, of which a node may say so many bytes a second.

Both ends use it: a node before it says something, the driver before anything is kept, since it does not know what the node left in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from shoal.engines.messages import WORD_BYTES, from_json
from shoal.engines.messages import Kind as Told
from shoal.engines.ray_security import redact, redact_all, secret_spans
from shoal.engines.ray_words import Frame, Kind

TAIL_BYTES = 1 << 14  # of a log: what is held back at most, until a line is whole; no secret is longer, private keys included
LOG_BYTES_PER_SECOND = 1 << 16  # of all logs of a node
LOG_BURST_BYTES = 1 << 20


def without_secrets(frame: Frame) -> Frame:
    """The frame with `***` for what is secret in its words; logs are not looked at, since a secret may be cut there (`LogText`)."""
    if frame.kind is Kind.LEAVING:
        return replace(frame, head=redact(frame.head.decode(errors="replace")).encode())
    if frame.kind in (Kind.HAPPENED, Kind.SAID):
        return replace(frame, head=_json_without_secrets(frame.head))
    if frame.kind is Kind.WORD and frame.head[:1] == bytes([Told.FAULT]):
        return replace(frame, head=frame.head[:WORD_BYTES] + _json_without_secrets(frame.head[WORD_BYTES:]))
    return frame


def _json_without_secrets(content: bytes) -> bytes:
    try:
        said: dict[str, Any] = redact_all(from_json(content))
    except ValueError:
        return content  # whoever reads it refuses it
    return json.dumps(said, ensure_ascii=False).encode(errors="replace")  # a lone surrogate cannot be written into a file


class LogText:
    """One log, as it comes. What may be the beginning of a secret is held back: the last line until it is whole, a private key until its end, TAIL_BYTES at most."""

    def __init__(self) -> None:
        self._tail = ""

    def take(self, written: bytes) -> bytes:
        """What may be kept now."""
        text = self._tail + written.decode(errors="surrogateescape")
        cut = max(text.rfind("\n") + 1, len(text) - TAIL_BYTES)
        for begin, end in sorted(secret_spans(text), reverse=True):
            if begin < cut < end or (end == len(text) and begin < cut):
                cut = begin
        if len(text) - cut > 2 * TAIL_BYTES:  # a key that does not end
            cut = len(text)
        self._tail = text[cut:]
        return redact(text[:cut]).encode(errors="surrogateescape")

    def rest(self) -> bytes:
        """What was held back, once nothing more comes."""
        rest, self._tail = redact(self._tail), ""
        return rest.encode(errors="surrogateescape")


@dataclass
class Allowance:
    """How much may be said: so many bytes a second, and a burst after silence. Told the time, in seconds."""

    bytes_per_second: float = LOG_BYTES_PER_SECOND
    burst_bytes: float = LOG_BURST_BYTES
    _left: float | None = None
    _at: float = 0.0

    def grants(self, size_bytes: int, now: float) -> bool:
        """Whether so much may be said now; it is then taken off."""
        left = self.burst_bytes if self._left is None else min(self.burst_bytes, self._left + self.bytes_per_second * (now - self._at))
        granted = size_bytes <= left
        self._left, self._at = left - size_bytes * granted, now
        return granted


@dataclass
class BoundedLog:
    """One log of a node, as the driver keeps it."""

    allowance: Allowance  # shared by all logs of the node
    node: str
    text: LogText
    left_out_bytes: int = 0

    def take(self, written: bytes, now: float) -> bytes:
        """What is to be kept of what came."""
        return self._allowed(self.text.take(written), now)

    def end(self, now: float) -> bytes:
        """The rest: nothing more comes from this process."""
        return self._allowed(self.text.rest(), now) or self._notice()

    def _allowed(self, said: bytes, now: float) -> bytes:
        if not said:
            return b""
        if not self.allowance.grants(len(said), now):
            self.left_out_bytes += len(said)
            return b""
        return self._notice() + said

    def _notice(self) -> bytes:
        left_out, self.left_out_bytes = self.left_out_bytes, 0
        limit = f"{self.allowance.bytes_per_second:,.0f}"
        return (
            f"\n[shoal: {left_out:,} bytes were left out here: the logs of node {self.node} may have {limit} a second]\n".encode()
            if left_out
            else b""
        )
