"""A role's process as the supervisor sees it, its death, and the words that go there and come from there. No torch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shoal.supervision.memory import anonymous_file
from shoal.types import ActivityRecord

DEATHS_IN_A_ROW = 5  # of one role without a rollout or update in between: it is gone for good


class WordChannel(Protocol):
    """The supervisor's end of the way to a role: a `Channel`, or what leads to another machine."""

    def send_with_fds(self, message: bytes, fds: Sequence[int]) -> bool: ...
    def receive(self) -> bytes | None: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


@dataclass
class Process:
    """A role's process."""

    name: str
    index: int
    incarnation: int = 0
    pid: int = 0
    channel: WordChannel | None = None
    ready: bool = False
    doomed: str = ""  # why a kill was ordered
    asked_at: float = 0.0  # when its start was ordered
    told_at: float = 0.0  # when its last order was given
    doomed_at: float = 0.0
    retired: bool = False  # it is to end, and comes again only where more are wanted
    dismissed: bool = False  # it was told to end
    node: str = ""  # of a cluster, where it lives on another machine
    deaths: int = 0  # since it last achieved something
    not_before: float = 0.0  # back-off of its next start
    # Messages that its channel had no room for, with descriptors, or with the content of a file that is to come along.
    unsent: deque[tuple[bytes, list[int] | bytes]] = field(default_factory=deque)

    @property
    def up(self) -> bool:
        return self.channel is not None

    @property
    def gone_for_good(self) -> bool:
        return self.deaths >= DEATHS_IN_A_ROW or self.retired

    def ended(self) -> None:
        """It is dead and reaped."""
        if self.channel is not None:
            self.channel.close()
        self.channel, self.pid, self.ready, self.doomed = None, 0, False, ""
        self.incarnation += 1
        while self.unsent:
            close_all(self.unsent.popleft()[1])


@dataclass(frozen=True)
class Death:
    """A role's process is dead and reaped.

    why: set where the supervisor killed it. crashed: by its own doing. record: what it did last.
    """

    process: Process
    how: str
    why: str
    crashed: bool
    record: ActivityRecord


def back_off_seconds(deaths: int) -> float:
    """How long after its death a role is started again; `deaths`: since it last achieved something. The first time at once."""
    return 0.0 if deaths < 2 else 0.1 * 2 ** min(deaths - 2, 6)


def tell(process: Process, message: bytes, fds: Sequence[int] = (), *, must_arrive: bool = True) -> None:
    """Send a message, in order. Where the channel is full (its reader got no processor for a while), it is kept and sent by `flush`, or
    dropped unless it must arrive. One that is gone is heard of from the zygote; one that is stopped or hangs, by its activity."""
    if process.channel is None:
        return
    flush(process)
    if process.unsent:
        if must_arrive:
            process.unsent.append((message, [os.dup(fd) for fd in fds]))
        return
    try:
        if not process.channel.send_with_fds(message, fds) and must_arrive:
            process.unsent.append((message, [os.dup(fd) for fd in fds]))
    except EOFError:
        pass


def tell_with_file(process: Process, message: bytes, content: bytes) -> None:
    """`tell`, with a descriptor of a file that holds `content`: made when it is sent, and when there are descriptors left for it."""
    if process.channel is not None:
        process.unsent.append((message, content))
        flush(process)


def flush(process: Process) -> None:
    """Send what did not fit into the channel before, or needs a descriptor that was not there."""
    while process.channel is not None and process.unsent:
        message, more = process.unsent[0]
        try:
            sent = (
                _send_with_file(process.channel, message, more) if isinstance(more, bytes) else process.channel.send_with_fds(message, more)
            )
        except (EOFError, OSError):  # it is gone, which the zygote tells; or the limit of open files is reached
            return
        if not sent:
            return
        close_all(process.unsent.popleft()[1])


def _send_with_file(channel: WordChannel, message: bytes, content: bytes) -> bool:
    with os.fdopen(anonymous_file("shoal-words"), "wb") as file:
        file.write(content)
        file.flush()
        return channel.send_with_fds(message, [file.fileno()])


def close_all(more: list[int] | bytes) -> None:
    """Descriptors that came along with a message; a file's content needs none."""
    for fd in () if isinstance(more, bytes) else more:
        os.close(fd)


def words(process: Process) -> list[bytes]:
    """Everything that a role said, in order."""
    said: list[bytes] = []
    while process.channel is not None and (message := _receive(process.channel)) is not None:
        said.append(message)
    return said


def _receive(channel: WordChannel) -> bytes | None:
    try:
        return channel.receive()
    except EOFError:
        return None
