"""Nodes of a cluster before they are used: each is asked what it is, and whether it can import what the run is made of.

consumes    the answer of each node that came while the run goes on
waits for   nothing: a thread for each node asks, since a node imports first, which takes seconds
unblocked   by the answer, or by the handle's error
on failure  a node on which nothing can be made is answered for with a report that says why; for one that cannot be reached there is none, but why. That is known
            once its link is lost, which takes less patience than the question
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from shoal.config import RunConfig
from shoal.engines.messages import from_json, to_json
from shoal.engines.node_report import NodeReport
from shoal.engines.ray_link import NodeHandle, NodeLink, UnfitNodeError
from shoal.engines.ray_security import redact_all
from shoal.errors import ProcessError
from shoal.experience.schema import Schema

Answer = tuple[str, NodeLink, NodeReport | str]  # the node's id, the way to it, what it is or why it cannot be reached


class Newcomers:
    """Those that are asked now, by their ids. For the supervisor's thread."""

    def __init__(self) -> None:
        self.asked: dict[str, NodeLink] = {}
        self._answers: deque[Answer] = deque()

    def ask(self, node_id: str, link: NodeLink) -> None:
        self.asked[node_id] = link
        threading.Thread(target=self._ask, args=(node_id, link), name=f"ask-{link.name}", daemon=True).start()

    def answered(self) -> list[Answer]:
        """Those that have answered since the last call; they are asked no more."""
        answers: list[Answer] = []
        while self._answers:
            answers.append(self._answers.popleft())
        answers += [(node_id, link, link.lost) for node_id, link in self.asked.items() if link.lost]
        heard: list[Answer] = []
        for answer in answers:
            if self.asked.get(answer[0]) is answer[1]:  # else it was given up before
                del self.asked[answer[0]]
                heard.append(answer)
        return heard

    def close(self) -> None:
        for link in self.asked.values():
            link.close()

    def _ask(self, node_id: str, link: NodeLink) -> None:
        try:
            report: NodeReport | str = report_of(link.node)
        except ProcessError as error:
            report = str(error)
        self._answers.append((node_id, link, report))


def report_of(node: NodeHandle) -> NodeReport:
    """What a node says of itself. Waits for its imports, as long as its handle lets it. Raises ProcessError where it cannot be reached."""
    try:
        return NodeReport.from_json(to_json(redact_all(from_json(node.look()))))
    except (UnfitNodeError, ValueError) as error:
        return NodeReport("", error=str(error))


def node_setup(config: RunConfig, common: dict[str, Any], schema: Schema, weights: int, packages: list[str]) -> bytes:
    """What a node builds its memory from: the same sizes and numbers of slots as here; and of which packages it is to say the versions."""
    fields = [{"name": f.name, "dtype": f.dtype, "shape": list(f.shape), "axis": f.axis} for f in schema.fields]
    sizes = {name: common[name] for name in ("run_id", "ring_bytes", "memory_bytes", "num_slots", "num_roles")}
    return to_json(
        {
            "config": config.model_dump(mode="json", by_alias=True),
            "fields": fields,
            "num_rows": schema.num_rows,
            "num_envs": schema.num_envs,
            "weights": weights,
            "packages": packages,
            **sizes,
        }
    )
