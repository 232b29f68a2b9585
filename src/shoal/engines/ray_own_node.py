"""The driver's own machine, as a node of the cluster: it holds the CPUs of the actors there, which are processes of the driver and share its memory.

consumes    nothing; its process's SIGTERM, which is a notice that the machine is to be taken away
waits for   that notice, HEAR_SECONDS at most
unblocked   by it
on failure  its end is told by Ray: the driver takes the node for lost, ends the actors there, and tries it again later
"""

from __future__ import annotations

import os
import select
import signal

from shoal.engines.messages import from_json
from shoal.engines.node_report import report_here
from shoal.engines.ray_node import HEAR_SECONDS, REPORT_BYTES
from shoal.engines.ray_words import Frame, Kind, encode


class OwnNode:
    """Answers what a `Node` answers, as far as the driver asks its own machine. Made in its process's main thread.

    Args:
      setup: JSON, of which only the names of packages are read (see `node_setup` of engines/ray_joining.py).
    """

    def __init__(self, setup: bytes) -> None:
        self._packages: list[str] = from_json(setup)["packages"]
        self._leaving = ""
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        signal.signal(signal.SIGTERM, lambda number, frame: self.announce("its process got SIGTERM"))

    def hear(self, most_bytes: int = REPORT_BYTES) -> bytes:
        """Whether the machine is to be taken away. What that takes is less than any message may have."""
        if select.select([self._wake], [], [], HEAR_SECONDS)[0]:
            os.eventfd_read(self._wake)
            return encode([Frame(Kind.LEAVING, head=self._leaving.encode())])
        return encode([])

    def beat(self) -> None:
        """It is there."""

    def look(self) -> bytes:
        """What this node is: a `NodeReport`."""
        return report_here(self._packages).to_json()

    def announce(self, why: str) -> None:
        """This node is soon to end. May be called from a signal handler."""
        self._leaving = why
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Nothing is to be ended: the actors here are the driver's."""
