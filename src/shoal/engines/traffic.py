"""What crosses the way between the driver and the nodes of a cluster, in bytes and messages, of each node and in all.

Counted are shoal's own messages (engines/ray_words.py), where they are handed to Ray and where Ray hands them over; what Ray, TLS and TCP add to them is
not in it. An answer that is empty, because nothing happened for a while, is a message too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Counted(NamedTuple):
    """Messages one way. The thread that counts replaces it as a whole, so whoever reads it sees both numbers of one moment."""

    messages: int = 0
    size_bytes: int = 0

    def plus(self, message: bytes) -> Counted:
        return Counted(self.messages + 1, self.size_bytes + len(message))


class Delivery(NamedTuple):
    """A message that is on its way: for so long, and how much of it is there."""

    seconds: float
    there_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class Traffic:
    """Of one node. said: to it; heard: from it. env_steps: of the rollouts that came from it."""

    node: str
    said: Counted
    heard: Counted
    env_steps: int

    def plus(self, later: Traffic) -> Traffic:
        """Of the same node, when it was there again."""
        said, heard = (Counted(*map(sum, zip(*ways, strict=True))) for ways in ((self.said, later.said), (self.heard, later.heard)))
        return Traffic(later.node, said, heard, self.env_steps + later.env_steps)


def summary(nodes: Sequence[Traffic]) -> dict[str, Any]:
    """`network` of a run: env_steps, messages, bytes_said, bytes_heard, bytes_per_env_step, messages_per_env_step of all nodes together, and of each one
    under `nodes`, by name; several nodes of one name are numbered. Empty where there are none."""
    if not nodes:
        return {}
    seen: Counter[str] = Counter()
    by_name = {}
    for traffic in nodes:
        seen[traffic.node] += 1
        number = seen[traffic.node]
        by_name[traffic.node if number == 1 else f"{traffic.node}#{number}"] = _figures([traffic])
    return {**_figures(nodes), "nodes": by_name}


def _figures(nodes: Sequence[Traffic]) -> dict[str, float]:
    env_steps = sum(node.env_steps for node in nodes)
    messages = sum(node.said.messages + node.heard.messages for node in nodes)
    said, heard = sum(node.said.size_bytes for node in nodes), sum(node.heard.size_bytes for node in nodes)
    return {
        "env_steps": env_steps,
        "messages": messages,
        "bytes_said": said,
        "bytes_heard": heard,
        "bytes_per_env_step": (said + heard) / env_steps if env_steps else 0.0,
        "messages_per_env_step": messages / env_steps if env_steps else 0.0,
    }
