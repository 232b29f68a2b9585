"""The processes of a run on a Ray cluster, as the supervisor sees them: the learner here, actors on the nodes. Nothing is decided here; local.py decides.
Of several learners all but the first may be on nodes too (engines/ray_learners.py).

Where the driver's own machine is one of the nodes, its actors are processes of the driver's fleet and share its memory, as on the local engine; of Ray it
has an actor that holds the CPUs, and that says when the machine is to be taken away (engines/ray_own_node.py).

The fleet of any other node (engines/ray_node.py) is a tunnel: an actor there is told the same words as one here, and says the same. What shared memory does on one
machine is done on the way: weights go before the first word that names their version, once per node; a finished rollout comes with the word that
tells of it, and is checked before it is put into its slot here. So every decision, and with it every bit of a sync run, is that of the local engine.

What is under way is bounded by what is leased: a slot's rollout crosses once, where learners are on nodes once more to each of those that did not make it,
and one version of the weights per node.

Nodes come and go while a run goes on; engines/ray_nodes.py has which there are, and who lives where.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import MAX_ACTORS, RunConfig, actor_bounds
from shoal.engines.fleet import POLL_SECONDS, STOP_SECONDS, Death, Fleet, Process
from shoal.engines.importing import try_imports
from shoal.engines.messages import Word, to_json
from shoal.engines.node_report import report_here
from shoal.engines.plan import Plan
from shoal.engines.process import close_all
from shoal.engines.question import read_log
from shoal.engines.ray_channel import NodeChannel
from shoal.engines.ray_cluster import Cluster, ClusterNode
from shoal.engines.ray_connecting import connect
from shoal.engines.ray_hearing import Hearing, RemoteChannel
from shoal.engines.ray_job import check_run_directory, passing_files
from shoal.engines.ray_joining import node_setup
from shoal.engines.ray_learners import Spread, check_learners
from shoal.engines.ray_link import NodeLink
from shoal.engines.ray_node import REPORT_BYTES
from shoal.engines.ray_nodes import Nodes
from shoal.engines.ray_own_logs import OwnLogs
from shoal.engines.ray_words import Frame, Kind, number_of
from shoal.engines.traffic import Delivery, summary
from shoal.errors import ProcessError
from shoal.experience.ring import Ring
from shoal.experience.schema import Schema
from shoal.supervision.channel import HasFileno, wait
from shoal.supervision.zygote import Exited, Lost, Role
from shoal.types import ActivityRecord
from shoal.weights.board import WeightBoard

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
        self._own_logs = self._clean_logs = OwnLogs()
        self._cluster: Cluster | None = None
        self._nodes = Nodes(self, directory, told)
        self._spread = Spread(config, self.learners, self._nodes.homes)
        self._hearing = Hearing(run_id, self, told)
        self._setup: bytes = b""
        self._board: WeightBoard | None = None
        self._weights_lock = threading.Lock()
        self._newest: tuple[int, bytes] = (-1, b"")
        self._num_weights = self._most_bytes = 0

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
        self.cluster.gpus_first = self._spread.on_gpus
        most = MAX_ACTORS if self._config.autoscale is None else actor_bounds(self._config.autoscale)[1]
        nodes = self.cluster.wait_for_nodes(self._told)
        if self._spread.on:
            self._spread.here = self.cluster.driver()
            self._spread.check_gpus(nodes)
        self._nodes.begin(nodes, plan.num_groups, most, report_here(packages))
        if self._spread.on:
            others = len(self._spread.fit(self._nodes.staying))
            for message in check_learners(self._config, os.environ, replayed=plan.rate is not None, others=others):
                self._told("warning", message=message)
        self._nodes.settle()
        return ring

    def close(self) -> None:
        self._nodes.close()
        if self._zygote is not None:
            self._zygote.close()
        self._clean_logs.close()  # before the token is gone, which is looked for in them
        if self._cluster is not None:
            self._cluster.close()
        super().close()

    def link_to(self, node: ClusterNode) -> NodeLink:
        """This run's fleet on a node, which is started there now."""
        gpu = self._spread.uses_gpu(node, self._nodes.expected)
        handle, own = self.cluster.start(node, self._setup, self._pickled, gpu=gpu), node.id == self.cluster.own
        link = NodeLink(node.name, handle, self._weights_for, self._most_bytes, own=own)
        self._spread.places[link] = node.id, node.address
        if gpu:
            self._spread.with_gpu.add(link)
        return link

    def _look_here(self) -> list[str]:
        """The packages that the run's own code needs, which the nodes have to have too."""
        env = self._config.env
        packages, error = try_imports(self.zygote, env.id, env.step_timeout_seconds, self._directory / "logs")
        if error:
            raise ProcessError(f"what the run is made of can no longer be imported here: {error}")
        return packages

    # ---- roles ---------------------------------------------------------------------------------------------------
    def start(self, process: Process, setup: dict[str, Any], encode: Callable[[bytes], bytes] = lambda body: body) -> None:
        if process.name == "learner" and self._spread.on:
            if not any(learner.up for learner in self.learners):
                close_all(self._meeting)
                self._meeting = []
                self._meeting = [self._spread.begin(self._nodes.staying)]
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
        return [link for link in self._nodes.links.values() if link in there]

    def _bury_on(self, links: Sequence[NodeLink]) -> None:
        for link in links:
            self._take_in(link)
        for event in self._hearing.deaths():
            if isinstance(event, Death):
                event.process.ended()

    def give_up_nodes(self) -> bool:
        now, doomed = (
            time.monotonic(),
            [(self._home(process), process.doomed_at) for process in self.processes if process.up and process.doomed],
        )
        late = {link: [at for home, at in doomed if home is link] for link in self._nodes.links.values()}
        late = {link: since for link, since in late.items() if since}
        for link, since in late.items():
            link.lost = link.lost or f"it has not ended its processes within {now - min(since):.1f} s"
            self._take_in(link)
        return bool(late)

    def stop_all(self, why: str) -> Lost | None:
        lost = super().stop_all(why)
        self._forget()
        return lost

    def _forget(self) -> None:
        """All roles are ended, and the run goes back: of what was under way nothing comes any more, and versions come again."""
        self._hearing.forget()
        with self._weights_lock:
            self._newest = (-1, b"")
            for link in self._nodes.links.values():
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
        waiting: list[HasFileno] = [*(p.channel for p in own if p.channel is not None), self.zygote, *self._nodes.links.values(), *also]
        self.push()
        self._spread.give_up_silent(time.monotonic())
        if self._hearing.events or any(self._said(process) for process in self.processes):
            timeout_seconds = 0.0
        ready = wait(waiting, timeout_seconds)
        for link in list(self._nodes.links.values()):
            if link in ready or link.lost:
                self._take_in(link)
        if self._hearing.events and self.zygote not in ready:
            ready.append(self.zygote)
        return [*ready, *(process.channel for process in self.processes if process.channel is not None and self._said(process))]

    @staticmethod
    def _said(process: Process) -> bool:
        return isinstance(process.channel, NodeChannel) and bool(process.channel.said)

    def happened(self) -> list[Death | Lost]:
        self.push()
        self._spread.give_up_silent(time.monotonic())
        for link in list(self._nodes.links.values()):
            self._take_in(link)
        return super().happened() + self._hearing.deaths()

    def sources(self) -> list[HasFileno]:
        self.push()
        return [self.zygote, *self._nodes.links.values()]

    def push(self) -> None:
        """Also before every wait: what was posted meanwhile goes to the nodes, as one message each."""
        for link in self._nodes.links.values():
            link.flush()

    def _take_in(self, link: NodeLink) -> None:
        """Hear what a node said. One that says what no node says is given up, like one that is lost."""
        self._hearing.take_in(link)
        if link.lost:
            self._lose(link)

    def _lose(self, link: NodeLink) -> None:
        """All that lived on a node that is gone is dead, as far as this run is concerned."""
        for process in (*self._nodes.lose(link), *(learner for learner, home in self.lodged() if home is link)):
            if process.up and link.own:
                self.kill(process, f"node {link.name}, this machine, is lost: {link.lost}")
            elif process.up:
                role = Role(process.name, process.index, process.incarnation)
                self._hearing.died(process, Exited(0, role, None, f"node {link.name} is lost: {link.lost}"))

    def collect(self, actor: Process, word: Word, newest_version: int) -> None:
        """Put the rollout that came with a word into its slot, where it is not there already. Raises SchemaError: none came, or what came does not stand its
        checks."""
        home = self._nodes.homes[actor.index]
        self._hearing.collect(home, word, newest_version)
        self._spread.bring(word, home)

    def home_of(self, number: int) -> NodeLink | None:
        return self._nodes.homes.get(number)

    def lodged(self) -> list[tuple[Process, NodeLink]]:
        return self._spread.lodged()

    # ---- nodes and actors that come and go -------------------------------------------------------------------------
    @property
    def room(self) -> int:
        return self._nodes.room

    def scale(self, actors: int) -> None:
        self._nodes.scale(actors)

    def by_node(self) -> dict[str, int]:
        return self._nodes.by_node()

    def renew(self) -> bool:
        return self._nodes.renew()

    def notice(self, link: NodeLink, notice: str) -> None:
        self._nodes.notice(link, notice)

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
        return summary(self._nodes.traffic)

    # ---- weights -------------------------------------------------------------------------------------------------
    def _weights_for(self, version: int) -> tuple[int, bytes]:
        """This version or a newer one, read once for all nodes; called from their threads."""
        with self._weights_lock:
            if self._newest[0] < version:
                assert self._board is not None
                flat = np.empty(self._num_weights, np.float32)
                self._newest = self._board.read(flat), flat.tobytes()
            return self._newest
