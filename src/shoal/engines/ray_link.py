"""The driver's end of the way to one node (engines/ray_node.py): two threads that call it, so that the supervisor's loop never waits for a network.

consumes    frames of the supervisor (`post`), and what the node answers
waits for   the node's answers, as long as its handle lets it; the supervisor, where it has not taken what was answered before
unblocked   by an answer, by `take`, or by the handle's error: the node is dead, or has been silent for too long
on failure  `lost` says why, once; nothing of this node is heard any more

A large message goes in parts that take a few seconds each, either way, one after the other: what has not arrived after ten seconds, Ray sends all over again.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from shoal.engines.messages import Kind as Told
from shoal.engines.messages import Word
from shoal.engines.ray_words import Frame, Kind, Parts, encode, part
from shoal.engines.traffic import Counted, Delivery, Traffic
from shoal.errors import ProcessError

MESSAGE_BYTES = 4 << 20  # of orders in one message, but for a single frame that is larger
FIRST_PART_BYTES = 1 << 20
LEAST_PART_BYTES, MOST_PART_BYTES = 1 << 18, 1 << 26
PART_SECONDS = (1.0, 4.0)  # a part that takes less may be larger, one that takes more is to be smaller

Weights = Callable[[int], tuple[int, bytes]]  # a version -> that version or a newer one, and its bytes


class UnfitNodeError(ProcessError):
    """A machine that is there, and on which a node of this run cannot be made."""


class NodeHandle(Protocol):
    """A node, wherever it is. Each method returns when it is done, or raises: the node is gone."""

    def say(self, message: bytes) -> None: ...
    def hear(self) -> bytes:
        """One message, or a part of one."""

    def look(self) -> bytes: ...
    def end(self) -> None: ...
    def leave(self) -> None:
        """Have it end its processes and then itself; returns at once."""


class NodeLink:
    """One node as the supervisor sees it. `post`, `flush`, `take` and `close` are for the supervisor's thread.

    Args:
      weights: called from a thread of this link.
      most_bytes: of one message of the node. While more than that waits to be taken, the node is asked for nothing.
    Attributes:
      name: of the node, for people. own: it is the driver's machine, whose actors are the driver's. lost: why it is gone; empty while it is there.
      said, heard: what went there and came from there, since the beginning. env_steps: of the rollouts that came; counted by the supervisor.
    """

    def __init__(self, name: str, node: NodeHandle, weights: Weights, most_bytes: int, *, own: bool = False) -> None:
        self.name, self.node, self.own, self.lost = name, node, own, ""
        self.said, self.heard, self.env_steps = Counted(), Counted(), 0
        self._under_way: tuple[float, int, int] | None = None  # since when, bytes that are there, bytes in all
        self._part_bytes = FIRST_PART_BYTES
        self._weights = weights
        self._most_bytes, self._parts = most_bytes, Parts(most_bytes)
        self._sent_version = -1
        self._posted: list[Frame] = []
        self._out: deque[Frame] = deque()
        self._in: list[Frame] = []
        self._in_bytes = 0
        self._room = threading.Condition()
        self._closing = self._closed = False
        self._at_work = 2  # threads
        self._ready = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for work in (self._say, self._hear):
            threading.Thread(target=self._guard, args=(work,), name=f"link-{name}", daemon=True).start()

    @property
    def traffic(self) -> Traffic:
        return Traffic(self.name, self.said, self.heard, self.env_steps)

    def fileno(self) -> int:
        """Ready when `take` has something, or the node was lost."""
        return self._ready

    @property
    def delivery(self) -> Delivery | None:
        """The message that is on its way to the node."""
        under_way = self._under_way
        return None if under_way is None else Delivery(time.monotonic() - under_way[0], *under_way[1:])

    def post(self, frame: Frame) -> None:
        """Have the node told, in order, from the next `flush` on: what is posted at one moment goes there as one message."""
        self._posted.append(frame)

    def flush(self) -> None:
        """Whoever posts and then waits calls it in between."""
        if self._posted:
            with self._room:
                self._out.extend(self._posted)
                self._room.notify_all()
            self._posted.clear()

    def forget_weights(self) -> None:
        """The versions begin again: the run goes back to a checkpoint."""
        with self._room:
            self._sent_version = -1

    def take(self) -> list[Frame]:
        """What the node said since the last call; nothing once the link is closed."""
        if self._closed:
            return []
        try:
            os.eventfd_read(self._ready)
        except BlockingIOError:
            return []
        with self._room:
            taken, self._in, self._in_bytes = self._in, [], 0
            self._room.notify_all()
        return taken

    def close(self) -> None:
        """Let the threads end, which they do with the call that they are in, and the descriptor with them. May be called twice."""
        with self._room:
            self._closing = self._closed = True
            self._room.notify_all()
            self._let_go()

    def _let_go(self) -> None:
        """Close the descriptor once nobody needs it."""
        if self._closed and not self._at_work and self._ready >= 0:
            os.close(self._ready)
            self._ready = -1

    # ---- the threads ---------------------------------------------------------------------------------------------
    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            with self._room:
                first, self._closing = not self._closing, True
                self._room.notify_all()
            if first:
                self.lost = str(error) or type(error).__name__
                os.eventfd_write(self._ready, 1)
        with self._room:
            self._at_work -= 1
            self._let_go()

    def _say(self) -> None:
        while True:
            with self._room:
                self._room.wait_for(lambda: self._out or self._closing)
                if self._closing:
                    return
                frames = self._next()
            self._deliver(encode(self._with_weights(frames)))

    def _deliver(self, message: bytes) -> None:
        since, there = time.monotonic(), 0
        while there < len(message) and not self._closing:
            self._under_way = since, there, len(message)
            size, begun = self._part_bytes, time.monotonic()
            piece = part(message, there, size) if len(message) > size or there else message
            there += size
            self.node.say(piece)
            self.said = self.said.plus(piece)
            if len(piece) >= size:
                self._part_bytes = next_part_bytes(size, time.monotonic() - begun)
        self._under_way = None

    def _next(self) -> list[Frame]:
        frames = [self._out.popleft()]
        size = frames[0].size
        while self._out and size + self._out[0].size <= MESSAGE_BYTES:
            frames.append(self._out.popleft())
            size += frames[-1].size
        return frames

    def _with_weights(self, frames: list[Frame]) -> list[Frame]:
        """Weights go before the first word that names their version."""
        out: list[Frame] = []
        for frame in frames:
            version = _named_version(frame)
            if version > self._sent_version:
                self._sent_version, flat = self._weights(version)
                out.append(Frame(Kind.WEIGHTS, head=struct.pack("<q", self._sent_version), body=flat))
            out.append(frame)
        return out

    def _hear(self) -> None:
        while self._is_to_ask():
            message = self.node.hear()
            self.heard = self.heard.plus(message)
            if frames := self._parts.take(message):
                with self._room:
                    self._in += frames
                    self._in_bytes += sum(frame.size for frame in frames)
                os.eventfd_write(self._ready, 1)

    def _is_to_ask(self) -> bool:
        """Waits while more waits to be taken than one message may have; False once the link is closed."""
        with self._room:
            self._room.wait_for(lambda: self._in_bytes <= self._most_bytes or self._closing)
            return not self._closing


def next_part_bytes(part_bytes: int, seconds: float) -> int:
    """How large a part is to be, where one of this size took so long."""
    least, most = PART_SECONDS
    if seconds < least:
        return min(2 * part_bytes, MOST_PART_BYTES)
    return max(part_bytes // 2, LEAST_PART_BYTES) if seconds > most else part_bytes


def _named_version(frame: Frame) -> int:
    if frame.kind is not Kind.WORD:
        return -1
    word = Word.decode(frame.head)
    return word.value if word.kind in (Told.LEASE, Told.PUBLISHED) else -1
