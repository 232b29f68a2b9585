"""The processes of a run on a Ray cluster, as the supervisor sees them: the learner here, actors on the nodes. Nothing is decided here; local.py decides.
Of several learners all but the first may be on nodes too (engines/ray_learners.py).

Where the driver's own machine is one of the nodes, its actors are processes of the driver's fleet and share its memory, as on the local engine; of Ray it
has an actor that holds the CPUs, and that says when the machine is to be taken away (engines/ray_own_node.py).

The fleet of any other node (engines/ray_node.py) is a tunnel: an actor there is told the same words as one here, and says the same. What shared memory does on one
machine is done on the way: weights go before the first word that names their version, once per node; a finished rollout comes with the word that
tells of it, and is checked before it is put into its slot here. So every decision, and with it every bit of a sync run, is that of the local engine.

What is under way is bounded by what is leased: a slot's rollout crosses once, and one version of the weights per node.

Nodes come and go while a run goes on. One is taken in where there are groups for more actors, and left where no actor is to live. One that is to be taken away
(engines/ray_cluster.py says so, or the node itself) gets no more groups: those it has move once their leases are done, as actors retire, and then it is left.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import MAX_ACTORS, RunConfig, actor_bounds
from shoal.engines.fleet import POLL_SECONDS, STOP_SECONDS, Death, Fleet, Process
from shoal.engines.importing import try_imports
from shoal.engines.messages import Word, to_json
from shoal.engines.node_report import NodeReport, refusal, report_here
from shoal.engines.placement import shares
from shoal.engines.plan import Plan
from shoal.engines.process import close_all
from shoal.engines.question import read_log
from shoal.engines.ray_cluster import HEAD_SECONDS, Cluster, ClusterNode, connect
from shoal.engines.ray_hearing import Hearing, RemoteChannel
from shoal.engines.ray_job import check_run_directory, passing_files
from shoal.engines.ray_joining import Newcomers, node_setup, report_of
from shoal.engines.ray_learners import LearnerChannel, Spread, check_learners
from shoal.engines.ray_link import NodeLink
from shoal.engines.ray_node import REPORT_BYTES
from shoal.engines.ray_words import Frame, Kind, number_of
from shoal.engines.traffic import Delivery, summary
from shoal.errors import ConfigError, ProcessError
from shoal.experience.ring import Ring
from shoal.experience.schema import Schema
from shoal.supervision.channel import HasFileno, wait
from shoal.supervision.zygote import Exited, Lost, Role
from shoal.types import ActivityRecord
from shoal.weights.board import WeightBoard

RENEW_SECONDS = 1.0  # between two looks for nodes that have come
NODELESS_SECONDS = 60.0  # a run without any node waits so long for one
REJOIN_SECONDS = 10.0  # until a node that was lost and seems alive to Ray is tried again: a fleet that died, a partition that healed
SLOW_SECONDS = 1.0  # what takes longer to a node is not the fault of whom it is for
STACK_SECONDS = 1.0


class RayFleet(Fleet):
    """As `Fleet`, with the actors, and learners where they are to be there, on the nodes of a cluster."""

    def __init__(
        self, config: RunConfig, pickled: bytes | None, directory: Path, run_id: bytes, traces: str, told: Callable[..., None]
    ) -> None:
        """told: of what happens to nodes, as `Observer.event`."""
        super().__init__(config, pickled, directory, run_id, traces)
        self._told = told
        self._cluster: Cluster | None = None
        self._links: dict[str, NodeLink] = {}  # by the node's id
        self._homes: dict[int, NodeLink] = {}  # by an actor's index; of a learner that lives on a node, by its number (ray_words.py)
        self._spread = Spread(config, self.learners, self._homes)
        self._hearing = Hearing(run_id, self, told)
        self._setup: bytes = b""
        self._board: WeightBoard | None = None
        self._weights_lock = threading.Lock()
        self._newest: tuple[int, bytes] = (-1, b"")
        self._renewed_at = self._lost_at = 0.0
        self._left: dict[str, float] = {}  # nodes that were lost, or taken away, by their id: when; those that are never taken: infinity
        self._newcomers = Newcomers()
        self._here = NodeReport("")
        self._gone: list[NodeLink] = []  # to nodes that were lost, or taken away
        self._leaving: dict[NodeLink, str] = {}  # nodes that are to be taken away: who said so
        self._candidates: deque[ClusterNode] = deque()  # nodes that may be taken in
        self._wanted = MAX_ACTORS
        self._crowd = 0  # actors that each node is to have, where that is more than its part of the cluster
        self._changed = self._told_blind = False
        self._num_groups = self._num_weights = self._most_bytes = 0

    # ---- start and end -------------------------------------------------------------------------------------------
    def open(self) -> None:
        """The helper process here imports while the cluster is joined."""
        super().open()
        if self._cluster is None:
            check_run_directory(self._directory)
            for message in passing_files(self._config):
                self._told("warning", message=message)
            self._cluster = connect(self._config, lambda message: self._told("warning", message=message))

    @property
    def cluster(self) -> Cluster:
        if self._cluster is None:
            raise ProcessError("the engine is not open")
        return self._cluster

    def look(self) -> dict[str, Any]:
        facts = super().look()
        self._spread.device = "cuda" if "gpu" in facts["build"] else "cpu"
        return facts

    def allocate(self, schema: Schema, plan: Plan, weights: int) -> Ring:
        ring = super().allocate(schema, plan, weights)
        assert self._memory is not None
        assert self._activities is not None
        self._hearing.begin(ring, self._activities)
        self._spread.ring = ring
        self._num_weights = weights
        self._most_bytes = REPORT_BYTES + schema.slot_bytes
        self._board = WeightBoard(weights, self._memory.buffer[self._common["ring_bytes"] :])
        packages = self._look_here()
        self._setup = node_setup(self._config, self._common, schema, weights, packages)
        self.actors = []
        self._num_groups = plan.num_groups
        if self._config.autoscale is not None:
            self._wanted = actor_bounds(self._config.autoscale)[1]
        self.cluster.gpu_each = self._spread.on and self._spread.device == "cuda"
        for node in self.cluster.wait_for_nodes():
            self._links[node.id] = self._link(node)
        self._check_nodes()
        if self._spread.on:
            self._spread.here = self.cluster.driver()
            others = len(self._spread.others(self._staying()))
            for message in check_learners(self._config, os.environ, replayed=plan.rate is not None, others=others):
                self._told("warning", message=message)
        self._settle()
        return ring

    def close(self) -> None:
        self._newcomers.close()
        for link in self._links.values():
            link.close()
        if self._cluster is not None:
            self._cluster.close()
        super().close()

    def _link(self, node: ClusterNode) -> NodeLink:
        """This run's fleet on a node, which is started there now."""
        handle, own = self.cluster.start(node, self._setup, self._pickled), node.id == self.cluster.own
        link = NodeLink(node.name, handle, self._weights_for, self._most_bytes, own=own)
        self._spread.places[link] = node.id, node.address
        return link

    def _look_here(self) -> list[str]:
        """What this machine is, which the nodes are compared with. Returns the packages that the run's own code needs."""
        env = self._config.env
        packages, error = try_imports(self.zygote, env.id, env.step_timeout_seconds, self._directory / "logs")
        if error:
            raise ProcessError(f"what the run is made of can no longer be imported here: {error}")
        self._here = report_here(packages)
        return packages

    def _check_nodes(self) -> None:
        """Raise ConfigError where nodes are not as this machine is, in what the run needs. One that is gone meanwhile is left out, where others are there."""
        here, gone = [], []
        for node_id, link in self._links.items():
            try:
                here.append((link.name, report_of(link.node)))
            except ProcessError as error:
                gone.append((node_id, link, str(error)))
        silent = [(link.name, NodeReport("", error=why)) for _, link, why in gone]
        if not here or refusal(here, self._here):
            raise ConfigError(refusal([*here, *silent], self._here))
        for node_id, link, why in gone:
            del self._links[node_id]
            self._left[node_id] = time.monotonic()
            self._give_back(link)
            self._told("node_lost", node=link.name, reason=why, actors=[])

    # ---- roles ---------------------------------------------------------------------------------------------------
    def start(self, process: Process, setup: dict[str, Any], encode: Callable[[bytes], bytes] = lambda body: body) -> None:
        if process.name == "learner" and self._spread.on:
            if not any(learner.up for learner in self.learners):
                close_all(self._meeting)
                self._meeting = []
                self._meeting = [self._spread.begin(self._staying())]
            setup = {**setup, "meeting": self._spread.meeting_of(process)}
        if (link := self._home(process)) is None:
            super().start(process, setup, encode)
            return
        config = self._config.model_dump(mode="json", by_alias=True)
        channel: Any = RemoteChannel(link, process.index, process.incarnation, self._hearing.leases)
        if process.name == "learner":
            channel, config["device"] = self._spread.channel(process, link), self._spread.device
        process.channel, process.ready, process.doomed, process.pid = channel, False, "", 0
        process.asked_at = process.told_at = time.monotonic()
        body = to_json({"config": config, **self._common, **setup, "traces": ""})
        link.post(Frame(Kind.START, number_of(process.name, process.index), process.incarnation, body=body))

    def kill(self, process: Process, why: str) -> None:
        if (link := self._home(process)) is None:
            super().kill(process, why)
        elif process.up and not process.doomed:
            process.doomed, process.doomed_at = why, time.monotonic()
            link.post(Frame(Kind.KILL, number_of(process.name, process.index), process.incarnation))

    def reopen(self) -> None:
        """Whoever lives on a node is ended first: those that come in its place would meet it there. A node that does not say so in time is given up."""
        for process in self.processes:
            if self._home(process) is not None:
                self.kill(process, "the helper process of the driver is gone")
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and (lived_on := self._lived_on()):
            self.push()
            wait(lived_on, POLL_SECONDS)
            self._bury_on(lived_on)
        for link in (lived_on := self._lived_on()):
            link.lost = link.lost or f"it has not ended its processes within {STOP_SECONDS:g} s"
        self._bury_on(lived_on)
        self._forget()
        super().reopen()

    def _lived_on(self) -> list[NodeLink]:
        """Nodes where somebody is up."""
        there = [self._home(process) for process in self.processes if process.up]
        return [link for link in self._links.values() if link in there]

    def _bury_on(self, links: Sequence[NodeLink]) -> None:
        for link in links:
            self._take_in(link)
        for event in self._hearing.deaths():
            if isinstance(event, Death):
                event.process.ended()

    def stop_all(self, why: str) -> Lost | None:
        lost = super().stop_all(why)
        self._forget()
        return lost

    def _forget(self) -> None:
        """All roles are ended, and the run goes back: of what was under way nothing comes any more, and versions come again."""
        self._hearing.forget()
        with self._weights_lock:
            self._newest = (-1, b"")
            for link in self._links.values():
                link.forget_weights()

    def _to_meet(self, index: int) -> list[int]:
        return [*self._meeting, *self._kept] if self._spread.on else super()._to_meet(index)

    def _home(self, process: Process) -> NodeLink | None:
        """The other machine where a process lives; None: it is a process of this one."""
        home = self.home_of(number_of(process.name, process.index))
        return None if home is None or home.own else home

    # ---- what is heard -------------------------------------------------------------------------------------------
    def listen(self, timeout_seconds: float, also: Sequence[HasFileno] = ()) -> list[HasFileno]:
        own = [p for p in self.processes if p.channel is not None and p.channel.fileno() >= 0]
        for process in own:
            self.flush(process)
        waiting: list[HasFileno] = [*(p.channel for p in own if p.channel is not None), self.zygote, *self._links.values(), *also]
        self.push()
        if self._hearing.events or any(self._said(process) for process in self.processes):
            timeout_seconds = 0.0
        ready = wait(waiting, timeout_seconds)
        for link in list(self._links.values()):
            if link in ready:
                self._take_in(link)
        if self._hearing.events and self.zygote not in ready:
            ready.append(self.zygote)
        return [*ready, *(process.channel for process in self.processes if process.channel is not None and self._said(process))]

    @staticmethod
    def _said(process: Process) -> bool:
        return isinstance(process.channel, (RemoteChannel, LearnerChannel)) and bool(process.channel.said)

    def happened(self) -> list[Death | Lost]:
        self.push()
        self._spread.give_up_silent(time.monotonic())
        for link in list(self._links.values()):
            self._take_in(link)
        return super().happened() + self._hearing.deaths()

    def sources(self) -> list[HasFileno]:
        self.push()
        return [self.zygote, *self._links.values()]

    def push(self) -> None:
        """Also before every wait: what was posted meanwhile goes to the nodes, as one message each."""
        for link in self._links.values():
            link.flush()

    def _take_in(self, link: NodeLink) -> None:
        """Hear what a node said. One that says what no node says is given up, like one that is lost."""
        self._hearing.take_in(link)
        if link.lost:
            self._lose(link)

    def _lose(self, link: NodeLink) -> None:
        """All that lived on a node that is gone is dead, as far as this run is concerned, and its groups move to others; what it says later is
        not heard."""
        node_id = next(node_id for node_id, each in self._links.items() if each is link)
        del self._links[node_id]
        self._left[node_id] = time.monotonic()
        self._gone.append(link)
        link.close()
        link.node.end()
        notice = self._leaving.pop(link, "")
        lived = [process for process in self.actors if self._homes[process.index] is link and (process.up or not process.retired)]
        reason = f"preempted ({notice}), and gone before all was moved: {link.lost}" if notice else link.lost
        self._told("node_lost", node=link.name, reason=reason, actors=[process.index for process in lived])
        self._lost_at, self._changed = time.monotonic(), True
        for process in lived:
            process.retired = True
        for process in (*lived, *(learner for learner, home in self._spread.lodged() if home is link)):
            if process.up and link.own:
                self.kill(process, f"node {link.name}, this machine, is lost: {link.lost}")
            elif process.up:
                role = Role(process.name, process.index, process.incarnation)
                self._hearing.died(process, Exited(0, role, None, f"node {link.name} is lost: {link.lost}"))

    def collect(self, actor: Process, word: Word, newest_version: int) -> None:
        """Put the rollout that came with a word into its slot, where it is not there already. Raises SchemaError: none came, or what came does not stand its
        checks."""
        self._hearing.collect(self._homes[actor.index], word, newest_version)
        self._spread.bring(word)

    def home_of(self, number: int) -> NodeLink | None:
        return self._homes.get(number)

    # ---- nodes and actors that come and go -------------------------------------------------------------------------
    @property
    def room(self) -> int:
        """Actors that there is room for: on the nodes that are here to stay, and those that may be taken in."""
        return self.cluster.actors_per_node * (len(self._staying()) + len(self._candidates))

    def scale(self, actors: int) -> None:
        """Go on with this many, on as many nodes as that takes, evenly; where there are too few nodes for it, each gets more than its CPUs."""
        self._find_nodes(time.monotonic())
        nodes = len(self._staying()) + len(self._candidates)
        self._wanted, self._crowd = actors, -(-actors // max(1, nodes))
        self._settle()

    def by_node(self) -> dict[str, int]:
        names = Counter(link.name for link in self._links.values())
        named = {link: link.name if names[link.name] == 1 else f"{link.name} {node_id[:6]}" for node_id, link in self._links.items()}
        living = Counter(self._homes[process.index] for process in self.living)
        return {name: living[link] for link, name in named.items()}

    def _staying(self) -> list[NodeLink]:
        return [link for link in self._links.values() if link not in self._leaving]

    def _settle(self) -> None:
        """Take in nodes, and have actors there, as far as they are wanted; retire those that are too many, and those of nodes that are to be left."""
        wanted = min(self._wanted, self._num_groups, MAX_ACTORS)
        per_node = max(self.cluster.actors_per_node, self._crowd)
        while self._candidates and (len(self._staying()) + len(self._newcomers.asked)) * per_node < wanted:
            node = self._candidates.popleft()
            self._newcomers.ask(node.id, self._link(node))
        lives: dict[NodeLink, list[Process]] = {link: [] for link in self._staying()}
        if not lives:  # there is nowhere to go: work goes on as long as it is let
            return
        for process in self.living:
            home = self._homes[process.index]
            if home in lives:
                lives[home].append(process)
            else:
                self._retire(process)
        for link, count in shares({link: len(here) for link, here in lives.items()}, wanted, per_node).items():
            for process in lives[link][count:]:
                self._retire(process)
            for _ in range(count - len(lives[link])):
                self._house(link)

    def _retire(self, process: Process) -> None:
        process.retired = self._changed = True

    def _house(self, link: NodeLink) -> None:
        """One more actor on a node: one that lives there still, one that ended, wherever that was, or a new one."""
        retired = [process for process in self.actors if process.retired and (not process.up or self._homes[process.index] is link)]
        if retired:
            process = max(retired, key=lambda process: process.up)
        elif len(self.actors) < MAX_ACTORS:
            process = Process("actor", len(self.actors))
            self.actors.append(process)
        else:
            return
        process.retired, process.deaths, process.not_before, process.node = False, 0, 0.0, "" if link.own else link.name
        self._homes[process.index], self._changed = link, True
        self._hearing.states.pop(process.index, None)

    def renew(self) -> bool:
        """Look which nodes have come or are to go, about once a second; says whether actors came or went since the last call.

        Raises:
          ProcessError: no node has been left for NODELESS_SECONDS, or the head is lost.
        """
        now = time.monotonic()
        if now - self._renewed_at >= RENEW_SECONDS:
            self._renewed_at = now
            if self.cluster.head_is_lost:
                raise ProcessError(f"the head of the cluster has not answered for {HEAD_SECONDS:g} s: {self._how_to_go_on}")
            self._find_nodes(now)
            self._greet(now)
            self._settle()
            self._leave_nodes(now)
            if not self._links and not self._newcomers.asked and now - self._lost_at > NODELESS_SECONDS:
                raise ProcessError(f"no node of the cluster is left: {self._how_to_go_on}")
        changed, self._changed = self._changed, False
        return changed

    def _find_nodes(self, now: float) -> None:
        draining = self.cluster.draining()
        if draining is None and not self._told_blind:
            self._told_blind = True
            self._told(
                "warning",
                message="Ray does not tell here which nodes it takes away: what lives on one is made again elsewhere once it is lost",
            )
        for node_id, seconds in (draining or {}).items():
            if node_id in self._links:
                self.notice(self._links[node_id], "Ray takes the node away", seconds)
        absent = {node_id for node_id, since in self._left.items() if now - since < REJOIN_SECONDS} | set(draining or ())
        staying = [node_id for node_id, link in self._links.items() if link not in self._leaving] + list(self._newcomers.asked)
        self._candidates = deque(node for node in self.cluster.new_nodes(staying, absent) if node.id not in self._links)

    def _greet(self, now: float) -> None:
        """Take in the nodes that have said what they are, but for those that are not as this machine is."""
        for node_id, link, report in self._newcomers.answered():
            if report is None:  # it cannot be reached; perhaps it can later
                self._left[node_id] = now
                self._give_back(link)
            elif why := refusal([(link.name, report)], self._here):
                self._left[node_id] = math.inf
                self._give_back(link)
                self._told("node_refused", node=link.name, reason=why)
            else:
                self._links[node_id] = link
                self._told("node_joined", node=link.name)

    def notice(self, link: NodeLink, notice: str, seconds: float | None = None) -> None:
        """A node is to be taken away, in so many seconds where somebody said: whoever lives there moves, with the next look at the nodes."""
        if link not in self._leaving:
            self._leaving[link] = notice
            lives = [process.index for process in self.living if self._homes[process.index] is link]
            self._told("node_draining", node=link.name, reason="preempted", notice=notice, seconds=seconds, actors=lives)

    def _leave_nodes(self, now: float) -> None:
        """Those where no actor is to live, and none is left."""
        lived_in = {self._homes[process.index] for process in self.actors if process.up or not process.retired}
        for learner, home in self._spread.lodged():
            lived_in.add(home)
            if learner.up and home in self._leaving:
                self.kill(learner, f"its node is taken away: {self._leaving[home]}")
        for node_id, link in [(node_id, link) for node_id, link in self._links.items() if link not in lived_in]:
            del self._links[node_id]
            preempted = self._leaving.pop(link, "") != ""
            if preempted:
                self._left[node_id] = now
            self._gone.append(link)
            link.close()
            link.node.leave()
            self._told("node_left", node=link.name, reason="preempted" if preempted else "no actor is to live there")

    def _give_back(self, link: NodeLink) -> None:
        """A node that came is not used."""
        link.close()
        link.node.end()

    @property
    def _how_to_go_on(self) -> str:
        return (
            f"`shoal resume {self._directory}` goes on from the newest checkpoint, "
            "with `--address HEAD:PORT` on another cluster, with `--engine local` on this machine alone"
        )

    # ---- looking ---------------------------------------------------------------------------------------------------
    def activities(self) -> list[ActivityRecord]:
        """Nobody is judged by how long words are under way: an actor has been at something for as long as its node said last, and was told
        what it was told once that was there."""
        now, records = time.monotonic(), super().activities()
        for at, process in enumerate(self.processes):
            if self._home(process) is not None:
                if self.delivery_of(process) is not None:
                    process.told_at = now
                unseen_seconds = now - self._hearing.seen_at.get(number_of(process.name, process.index), now)
                records[at] = replace(records[at], age_seconds=max(0.0, records[at].age_seconds - unseen_seconds))
        return records

    def delivery_of(self, process: Process) -> Delivery | None:
        link = self._home(process)
        delivery = None if link is None else link.delivery
        return delivery if delivery is not None and delivery.seconds > SLOW_SECONDS else None

    def state_of(self, process: Process) -> str | None:
        if self._home(process) is None:
            return super().state_of(process)
        return self._hearing.states.get(number_of(process.name, process.index))

    def stopped_itself(self, process: Process) -> bool:
        return self._home(process) is None and super().stopped_itself(process)

    def dump(self, process: Process) -> None:
        if (link := self._home(process)) is None:
            super().dump(process)
        else:
            link.post(Frame(Kind.DUMP, number_of(process.name, process.index), process.incarnation))

    def stack_of(self, process: Process) -> str:
        if (link := self._home(process)) is None:
            return super().stack_of(process)
        log = self.log_of(process)
        begin = log.stat().st_size if log.exists() else 0
        self.dump(process)
        deadline = time.monotonic() + STACK_SECONDS
        link.flush()
        while time.monotonic() < deadline and not link.lost:
            wait([link], 0.1)
            self._take_in(link)
        return read_log(log, begin)

    def network(self) -> dict[str, Any]:
        return summary([link.traffic for link in (*self._gone, *self._links.values())])

    # ---- weights -------------------------------------------------------------------------------------------------
    def _weights_for(self, version: int) -> tuple[int, bytes]:
        """This version or a newer one, read once for all nodes; called from their threads."""
        with self._weights_lock:
            if self._newest[0] < version:
                assert self._board is not None
                flat = np.empty(self._num_weights, np.float32)
                self._newest = self._board.read(flat), flat.tobytes()
            return self._newest
