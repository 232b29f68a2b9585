"""The cluster that a run is placed on: its nodes, and what runs on them.

This and engines/ray_connecting.py alone import Ray, when a run asks for it. Of Ray's objects only bytes pass: they travel as they are, without pickle.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from shoal.engines.ray_link import FIRST_PART_BYTES, LEAST_PART_BYTES, NodeHandle, UnfitNodeError, next_part_bytes
from shoal.engines.ray_node import SignalledNode
from shoal.engines.ray_own_node import OwnNode
from shoal.engines.ray_roll import Roll
from shoal.engines.ray_secrets import OwnSecrets
from shoal.engines.ray_security import redact
from shoal.engines.ray_words import is_part
from shoal.errors import ProcessError, TooFewNodesError

NODES_SECONDS = 60.0  # until as many nodes are there as were asked for
START_SECONDS = 120.0  # a node's first answer: its imports, on a slow disk
LOOK_SECONDS = 600.0  # until a node has imported what a run is made of, torch included
QUIET_SECONDS = 5.0  # a node that says nothing for so long is asked whether it is there
BEAT_SECONDS = 10.0  # and given up where it has not answered that after so long
TRANSFER_SECONDS = 600.0  # for one message, as long as the node answers: a slow link
HEAD_SECONDS = 30.0  # a cluster whose head answers nothing for so long is given up; Ray itself would end this process after 60
CLOSE_SECONDS = 5.0
POLL_SECONDS = 0.2
DRAINS = "Drains"  # of a machine: when it is taken away, in seconds since the epoch; 0 where nobody said, negative where it is not; None: Ray does not tell
_CREATION = "error raised in its creation task"  # Ray's words
_NEVER = "; are its CPUs taken? Ray starts nothing there before enough are free. Free them, or take fewer nodes (--nodes) or fewer CPUs (--actors-per-node)"
ASKED_AHEAD = 2  # questions that wait at a node: what happens while an answer travels finds the next one there


@dataclass(frozen=True)
class ClusterNode:
    """One machine of the cluster. cpus, gpus: that Ray may give away there. address: at which the other machines reach it."""

    id: str
    name: str
    cpus: float
    address: str = ""
    gpus: float = 0.0

    @property
    def has_gpu(self) -> bool:
        """A whole one."""
        return self.gpus >= 1.0


class RemoteNode:
    """A `Node` as a Ray actor on another machine; its errors are ProcessErrors that say what became of it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._asked: deque[Any] = deque()
        self._part_bytes, self._full, self._heard_at = FIRST_PART_BYTES, False, 0.0

    def say(self, message: bytes) -> None:
        self._wait(self._actor.say.options(concurrency_group="say").remote(message))

    def hear(self) -> bytes:
        """The next questions are asked before this answer is looked at; they are answered in their order, one at a time, in parts that take a few seconds."""
        hear = self._actor.hear.options(concurrency_group="hear")
        first = not self._asked
        while len(self._asked) < ASKED_AHEAD:
            self._asked.append(hear.remote(self._part_bytes))
        answer: bytes = self._get(self._asked[0], START_SECONDS, _NEVER) if first else self._wait(self._asked[0])
        self._measure(answer)
        self._asked.popleft()
        self._asked.append(hear.remote(self._part_bytes))
        return answer

    def _measure(self, answer: bytes) -> None:
        """A part that came right after another one was under way as long as both, since they share the way."""
        now, full = time.monotonic(), len(answer) > LEAST_PART_BYTES and is_part(answer)
        if full and self._full:
            self._part_bytes = next_part_bytes(self._part_bytes, ASKED_AHEAD * (now - self._heard_at))
        self._full, self._heard_at = full, now

    def look(self) -> bytes:
        answer: bytes = self._get(self._actor.look.remote(), LOOK_SECONDS)
        return answer

    def close(self) -> Any:
        """Have it end its processes; returns what Ray waits for."""
        return self._actor.close.remote()

    def end(self) -> None:
        """SIGKILL, and with it all of its processes; at once, whatever it does."""
        import ray

        with contextlib.suppress(Exception):  # it is gone already, or Ray is
            ray.kill(self._actor, no_restart=True)

    def leave(self) -> None:
        """Have it end its processes, and then itself; returns at once."""
        threading.Thread(target=self._leave, name="leaving", daemon=True).start()

    def _leave(self) -> None:
        with contextlib.suppress(Exception):  # it is gone already, or Ray is
            self._get(self.close(), CLOSE_SECONDS)
        self.end()

    def _wait(self, asked: Any) -> Any:
        """What was asked for. It may take long to come over a slow link; meanwhile the node has to say that it is there."""
        import ray

        given_up_at = time.monotonic() + TRANSFER_SECONDS
        while not ray.wait([asked], timeout=QUIET_SECONDS)[0]:
            self._get(self._actor.beat.options(concurrency_group="beat").remote(), BEAT_SECONDS)
            if time.monotonic() > given_up_at:
                raise ProcessError(f"a message has been under way for {TRANSFER_SECONDS:g} s")
        return self._get(asked, BEAT_SECONDS)

    def _get(self, asked: Any, timeout_seconds: float, advice: str = "") -> Any:
        import ray

        try:
            return ray.get(asked, timeout=timeout_seconds)
        except ray.exceptions.GetTimeoutError as error:
            raise ProcessError(f"it has not answered for {timeout_seconds:g} s{advice}") from error
        except ray.exceptions.RayError as error:
            why = redact(_why(str(error)))[:500] or type(error).__name__
            raise (UnfitNodeError if _CREATION in str(error) else ProcessError)(why) from error


@dataclass
class Cluster:
    """The cluster of one run.

    Attributes:
      num_nodes: that host actors; None: all that there are. actors_per_node: processes that host environments on each.
      secrets: of a cluster that was started for this run, and ends with it.
      roll: of its machines.
      gpus_first: whether nodes with a GPU are taken before others.
      own: the id of the node that is the driver's machine; empty where it is none (ray://).
    """

    num_nodes: int | None
    actors_per_node: int
    secrets: OwnSecrets | None = None
    roll: Roll | None = None
    gpus_first: bool = False
    own: str = ""
    _started: WeakSet[RemoteNode] = field(default_factory=WeakSet)  # one that nobody has any more, Ray ends

    @property
    def head_is_lost(self) -> bool:
        """Whether the head has not answered for HEAD_SECONDS."""
        return self.roll is not None and self.roll.silent_seconds > HEAD_SECONDS

    def wait_for_nodes(self, told: Callable[..., None]) -> list[ClusterNode]:
        """The nodes that the run takes.

        Args:
          told: of what is waited for, as `Observer.event`; once, and at once.
        Raises:
          TooFewNodesError: fewer than were asked for came within NODES_SECONDS.
        """
        deadline, said = time.monotonic() + NODES_SECONDS, False
        while True:
            draining = self.draining() or {}
            nodes = [node for node in self.nodes() if node.id not in draining]
            if nodes and (self.num_nodes is None or len(nodes) >= self.num_nodes):
                return nodes[: self.num_nodes]
            wanted = self.num_nodes or 1
            if not said:
                told("nodes_awaited", there=len(nodes), wanted=wanted, cpus=self.actors_per_node, seconds=NODES_SECONDS)
                said = True
            if time.monotonic() > deadline:
                raise TooFewNodesError(
                    f"ray.nodes: {wanted} with {self.actors_per_node} CPUs each were asked for (--nodes, --actors-per-node), the "
                    f"cluster has {len(nodes)}; ask for less, or add machines to it: `ray start --address HEAD:PORT` on each"
                )
            time.sleep(POLL_SECONDS)

    def nodes(self) -> list[ClusterNode]:
        """Those that are alive and have CPUs for the actors of one node, in the order in which they are taken."""
        found = [
            ClusterNode(
                each["NodeID"],
                each.get("NodeManagerHostname") or each["NodeManagerAddress"],
                each["Resources"].get("CPU", 0.0),
                each["NodeManagerAddress"],
                each["Resources"].get("GPU", 0.0),
            )
            for each in (self.roll.machines if self.roll is not None else [])
            if each["Alive"]
        ]
        fit = (node for node in found if node.cpus >= self.actors_per_node)
        return sorted(fit, key=lambda node: (self.gpus_first and not node.has_gpu, node.name, node.id))

    def driver(self) -> tuple[str, str]:
        """The machine of this process, which is part of the cluster: its node's id, and its address as the others know it. Raises ProcessError where the
        cluster does not list it."""
        for each in self.roll.machines if self.roll is not None else []:
            if each["NodeID"] == self.own:
                return self.own, each["NodeManagerAddress"]
        raise ProcessError(
            "the cluster does not list the machine of this process among its nodes; run the driver on one that `ray status` lists"
        )

    def draining(self) -> dict[str, float | None] | None:
        """Nodes that Ray is about to take away (a preemption, `ray drain-node`, SIGTERM of `ray start --block`), by id: in how many seconds, None where
        nobody said. None instead of all that: this Ray, or the way to it (ray://), does not tell."""
        found: dict[str, float | None] = {}
        for each in self.roll.machines if self.roll is not None else []:
            if (at := each.get(DRAINS)) is None:
                return None
            if at >= 0.0:
                found[each["NodeID"]] = max(0.0, at - time.time()) if at else None
        return found

    def new_nodes(self, known: Collection[str], left: Collection[str] = ()) -> list[ClusterNode]:
        """Nodes that have come and are wanted; `known` are those that the run has, `left` those that it does not take now."""
        room = None if self.num_nodes is None else max(0, self.num_nodes - len(known))
        return [node for node in self.nodes() if node.id not in known and node.id not in left][:room]

    def start(self, node: ClusterNode, setup: bytes, pickled: bytes | None, *, gpu: bool) -> NodeHandle:
        """This run's fleet on one node; on the driver's own, what holds its CPUs. gpu: one of its GPUs with it. Returns at once."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        groups, own = {"say": 1, "hear": 1, "beat": 2}, node.id == self.own
        kind: Any = ray.remote(concurrency_groups=groups)(OwnNode if own else SignalledNode)  # type: ignore[call-overload]
        placed = kind.options(
            num_cpus=self.actors_per_node,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            **({"num_gpus": 1} if gpu else {}),
        )
        started = RemoteNode(placed.remote(setup) if own else placed.remote(setup, pickled))
        self._started.add(started)
        return started

    def close(self) -> None:
        """End what was started on the nodes, and the cluster where it is this run's own. Where the head is gone, on which Ray would wait, no more than can be
        done in a moment: whoever runs this process ends it then, and does not wait for Ray."""
        import ray

        closing = threading.Thread(target=self._close_nodes, name="closing", daemon=True)
        closing.start()
        closing.join(2 * CLOSE_SECONDS)
        if self.roll is not None:
            self.roll.close()
        if self.roll is None or self.roll.silent_seconds < HEAD_SECONDS:
            for node in list(self._started):
                node.end()
            ray.shutdown()
        if self.secrets is not None:
            self.secrets.cleanup()

    def _close_nodes(self) -> None:
        import ray

        closing = []
        for node in list(self._started):
            with contextlib.suppress(Exception):
                closing.append(node.close())
        with contextlib.suppress(Exception):
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)


def _why(text: str) -> str:
    """Ray's words of what became of an actor: what its own code raised as it was made, else the first paragraph."""
    if _CREATION in text:
        return f"it could not be started: {text.strip().splitlines()[-1]}"
    return " ".join(text.split("\n\n", maxsplit=1)[0].split())
