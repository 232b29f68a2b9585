"""The supervisor's end of the way to a role on a node: what it says waits here until it is heard. There is no descriptor to wait for; the link has one."""

from __future__ import annotations

from collections import deque

from shoal.engines.ray_link import NodeLink


class NodeChannel:
    """Takes the part of a `Channel` in `Process`; subclasses send.

    Attributes:
      said: messages of the role that were not heard yet.
    """

    def __init__(self, link: NodeLink) -> None:
        self._link = link
        self.said: deque[bytes] = deque()

    def check_there(self) -> None:
        """Raise EOFError where the node is lost."""
        if self._link.lost:
            raise EOFError(self._link.lost)

    def receive(self) -> bytes | None:
        return self.said.popleft() if self.said else None

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self.said.clear()
