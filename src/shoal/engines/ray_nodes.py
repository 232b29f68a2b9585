"""The nodes of a run on a cluster: which it has, which come and go, and who lives where.

One is taken in where there are groups for more actors, and left where no actor is to live. One that is to be taken away (engines/ray_cluster.py says so, or
the node itself) gets no more groups: those it has move once their leases are done, as actors retire, and then it is left.

consumes    what the cluster lists, about once a second (`renew`); answers of nodes that came; notices
waits for   nothing, but at the start for the nodes and what each says of itself
unblocked   by nothing
on failure  a node that is lost (`lose`) is tried again later; a run that has had none for NODELESS_SECONDS, or whose head is lost, ends
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from shoal.config import MAX_ACTORS
from shoal.engines.node_report import NodeReport, refusal
from shoal.engines.placement import shares
from shoal.engines.process import Process
from shoal.engines.ray_cluster import HEAD_SECONDS, Cluster, ClusterNode
from shoal.engines.ray_joining import Newcomers
from shoal.engines.ray_link import NodeLink
from shoal.engines.traffic import Traffic
from shoal.errors import ConfigError, ProcessError

POLL_SECONDS = 0.05
SILENT_SECONDS = 20.0  # until nodes are named that have not said at the start what they are
RENEW_SECONDS = 1.0  # between two looks for nodes that have come
NODELESS_SECONDS = 60.0  # a run without any node waits so long for one
REJOIN_SECONDS = 10.0  # until a node that was lost and seems alive to Ray is tried again: a fleet that died, a partition that healed


class Household(Protocol):
    """Whose actors live on the nodes: as much of a `RayFleet` as is asked here."""

    actors: list[Process]

    @property
    def living(self) -> list[Process]:
        """The actors that are to be there."""

    @property
    def cluster(self) -> Cluster: ...

    def link_to(self, node: ClusterNode) -> NodeLink:
        """This run's fleet on a node, which is started there now."""

    def lodged(self) -> list[tuple[Process, NodeLink]]:
        """Learners that live on nodes."""

    def kill(self, process: Process, why: str) -> None: ...


class Nodes:
    """For the supervisor's thread.

    Args:
      told: of what happens to nodes, as `Observer.event`.
    Attributes:
      links: to the nodes that the run has, by their ids. gone: what crossed the way to those that were lost, or left, by their ids.
      homes: nodes by the numbers of those who live there, or lived there last (ray_words.number_of).
    """

    def __init__(self, household: Household, directory: Path, told: Callable[..., None]) -> None:
        self._household, self._directory, self._told = household, directory, told
        self.links: dict[str, NodeLink] = {}
        self.gone: dict[str, Traffic] = {}
        self.homes: dict[int, NodeLink] = {}
        self._left: dict[str, float] = {}  # nodes that were lost, or taken away, by their id: when; those that are never taken: infinity
        self._leaving: dict[NodeLink, str] = {}  # nodes that are to be taken away: who said so
        self._newcomers = Newcomers()
        self._unreached: set[str] = set()  # nodes that came and could not be reached, of which that was said
        self._candidates: deque[ClusterNode] = deque()  # nodes that may be taken in
        self._here = NodeReport("")
        self._num_groups, self._wanted = 0, MAX_ACTORS
        self._crowd = 0  # actors that each node is to have, where that is more than its part of the cluster
        self._changed = self._told_blind = False
        self._renewed_at = self._lost_at = 0.0

    # ---- start and end -------------------------------------------------------------------------------------------
    def begin(self, nodes: Iterable[ClusterNode], num_groups: int, wanted: int, here: NodeReport) -> None:
        """Have these nodes.

        Args:
          wanted: actors, at most. here: what the driver's machine is, with which the nodes are compared.
        Raises:
          ConfigError: nodes are not as this machine is, in what the run needs.
        """
        self._num_groups, self._wanted, self._here = num_groups, wanted, here
        for node in nodes:
            self.links[node.id] = self._household.link_to(node)
        self._check()

    def _check(self) -> None:
        """Ask all of them at once. One that is gone meanwhile, or never answers, is left out, where others are there."""
        answers = self._ask_all()
        here = [(link.name, report) for link, report in answers.values() if isinstance(report, NodeReport)]
        gone = {node_id: (link, why) for node_id, (link, why) in answers.items() if isinstance(why, str)}
        silent = [(link.name, NodeReport("", error=why)) for link, why in gone.values()]
        if not here or refusal(here, self._here):
            raise ConfigError(refusal([*here, *silent], self._here))
        for node_id, (link, why) in gone.items():
            del self.links[node_id]
            self._left[node_id] = time.monotonic()
            _give_back(link)
            self._told("node_lost", node=link.name, reason=why, actors=[])

    def _ask_all(self) -> dict[str, tuple[NodeLink, NodeReport | str]]:
        """What each node is, or why it cannot be reached, by its id. Waits for that, as long as nodes may take; those that take long are named meanwhile."""
        for node_id, link in self.links.items():
            self._newcomers.ask(node_id, link)
        answers: dict[str, tuple[NodeLink, NodeReport | str]] = {}
        name_them_at = time.monotonic() + SILENT_SECONDS
        while self._newcomers.asked:
            answers |= {node_id: (link, report) for node_id, link, report in self._newcomers.answered()}
            if time.monotonic() > name_them_at and self._newcomers.asked:
                name_them_at = math.inf
                names = ", ".join(sorted(link.name for link in self._newcomers.asked.values()))
                self._told("warning", message=f"waiting for nodes that have not said yet what they are: {names}; are their CPUs taken?")
            time.sleep(POLL_SECONDS)
        return {node_id: answers[node_id] for node_id in self.links}

    def close(self) -> None:
        self._newcomers.close()
        for link in self.links.values():
            link.close()

    # ---- actors --------------------------------------------------------------------------------------------------
    @property
    def staying(self) -> list[NodeLink]:
        return [link for link in self.links.values() if link not in self._leaving]

    @property
    def expected(self) -> list[NodeLink]:
        """Those that are here to stay, and those that are asked what they are."""
        return [*self.staying, *self._newcomers.asked.values()]

    @property
    def room(self) -> int:
        """Actors that there is room for: on the nodes that are here to stay, and those that may be taken in."""
        return self._household.cluster.actors_per_node * (len(self.staying) + len(self._candidates))

    def by_node(self) -> dict[str, int]:
        """How many actors are to be on each node, by its name, with a part of its id where others have the same."""
        names = Counter(link.name for link in self.links.values())
        named = {link: link.name if names[link.name] == 1 else f"{link.name} {node_id[:6]}" for node_id, link in self.links.items()}
        living = Counter(self.homes[process.index] for process in self._household.living)
        return {name: living[link] for link, name in named.items()}

    def scale(self, actors: int) -> None:
        """Go on with this many, on as many nodes as that takes, evenly; where there are too few nodes for it, each gets more than its CPUs."""
        self._find(time.monotonic())
        nodes = len(self.staying) + len(self._candidates)
        self._wanted, self._crowd = actors, -(-actors // max(1, nodes))
        self.settle()

    def settle(self) -> None:
        """Take in nodes, and have actors there, as far as they are wanted; retire those that are too many, and those of nodes that are to be left."""
        wanted = min(self._wanted, self._num_groups, MAX_ACTORS)
        per_node = max(self._household.cluster.actors_per_node, self._crowd)
        while self._candidates and (len(self.staying) + len(self._newcomers.asked)) * per_node < wanted:
            node = self._candidates.popleft()
            self._newcomers.ask(node.id, self._household.link_to(node))
        lives: dict[NodeLink, list[Process]] = {link: [] for link in self.staying}
        if not lives:  # there is nowhere to go: work goes on as long as it is let
            return
        for process in self._household.living:
            home = self.homes[process.index]
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
        actors = self._household.actors
        retired = [process for process in actors if process.retired and (not process.up or self.homes[process.index] is link)]
        if retired:
            process = max(retired, key=lambda process: process.up)
        elif len(actors) < MAX_ACTORS:
            process = Process("actor", len(actors))
            actors.append(process)
        else:
            return
        process.retired, process.deaths, process.not_before, process.node = False, 0, 0.0, "" if link.own else link.name
        self.homes[process.index], self._changed = link, True

    # ---- nodes that come and go ----------------------------------------------------------------------------------
    def renew(self) -> bool:
        """Look which nodes have come or are to go, about once a second; says whether actors came or went since the last call.

        Raises:
          ProcessError: no node has been left for NODELESS_SECONDS, or the head is lost.
        """
        now = time.monotonic()
        if now - self._renewed_at >= RENEW_SECONDS:
            self._renewed_at = now
            if self._household.cluster.head_is_lost:
                raise ProcessError(f"the head of the cluster has not answered for {HEAD_SECONDS:g} s: {self._how_to_go_on}")
            self._find(now)
            self._greet(now)
            self.settle()
            self._leave(now)
            if not self.links and not self._newcomers.asked and now - self._lost_at > NODELESS_SECONDS:
                raise ProcessError(f"no node of the cluster is left: {self._how_to_go_on}")
        changed, self._changed = self._changed, False
        return changed

    def _find(self, now: float) -> None:
        cluster = self._household.cluster
        draining = cluster.draining()
        if draining is None and not self._told_blind:
            self._told_blind = True
            self._told(
                "warning",
                message="Ray does not tell here which nodes it takes away: what lives on one is made again elsewhere once it is lost",
            )
        for node_id, seconds in (draining or {}).items():
            if node_id in self.links:
                self.notice(self.links[node_id], "Ray takes the node away", seconds)
        absent = {node_id for node_id, since in self._left.items() if now - since < REJOIN_SECONDS} | set(draining or ())
        staying = [node_id for node_id, link in self.links.items() if link not in self._leaving] + list(self._newcomers.asked)
        self._candidates = deque(node for node in cluster.new_nodes(staying, absent) if node.id not in self.links)

    def _greet(self, now: float) -> None:
        """Take in the nodes that have said what they are, but for those that are not as this machine is."""
        for node_id, link, report in self._newcomers.answered():
            if isinstance(report, str):  # it cannot be reached; perhaps it can later
                self._left[node_id] = now
                _give_back(link)
                if node_id not in self._unreached:
                    self._unreached.add(node_id)
                    self._told(
                        "warning",
                        message=f"node {link.name} came, and is not used before it answers, for which it is tried again: {report}",
                    )
            elif why := refusal([(link.name, report)], self._here):
                self._left[node_id] = math.inf
                _give_back(link)
                self._told("node_refused", node=link.name, reason=why)
            else:
                self.links[node_id] = link
                self._unreached.discard(node_id)
                self._told("node_joined", node=link.name)

    def notice(self, link: NodeLink, notice: str, seconds: float | None = None) -> None:
        """A node is to be taken away, in so many seconds where somebody said: whoever lives there moves, with the next look at the nodes."""
        if link not in self._leaving:
            self._leaving[link] = notice
            lives = [process.index for process in self._household.living if self.homes[process.index] is link]
            self._told("node_draining", node=link.name, reason="preempted", notice=notice, seconds=seconds, actors=lives)

    def _leave(self, now: float) -> None:
        """Those where no actor is to live, and none is left."""
        lived_in = {self.homes[process.index] for process in self._household.actors if process.up or not process.retired}
        for learner, home in self._household.lodged():
            lived_in.add(home)
            if learner.up and home in self._leaving:
                self._household.kill(learner, f"its node is taken away: {self._leaving[home]}")
        for node_id, link in [(node_id, link) for node_id, link in self.links.items() if link not in lived_in]:
            self._part_from(node_id, link)
            preempted = self._leaving.pop(link, "") != ""
            if preempted:
                self._left[node_id] = now
            link.node.leave()
            self._told("node_left", node=link.name, reason="preempted" if preempted else "no actor is to live there")

    def lose(self, link: NodeLink) -> list[Process]:
        """A node is gone, and what it says later is not heard. Returns the actors that lived there, whose groups move to others; those that are still up are
        dead as far as this run is concerned."""
        node_id = next(node_id for node_id, each in self.links.items() if each is link)
        self._part_from(node_id, link)
        self._left[node_id] = self._lost_at = time.monotonic()
        link.node.end()
        notice = self._leaving.pop(link, "")
        lived = [process for process in self._household.actors if self.homes[process.index] is link and (process.up or not process.retired)]
        reason = f"preempted ({notice}), and gone before all was moved: {link.lost}" if notice else link.lost
        self._told("node_lost", node=link.name, reason=reason, actors=[process.index for process in lived])
        for process in lived:
            self._retire(process)
        self._changed = True
        return lived

    def _part_from(self, node_id: str, link: NodeLink) -> None:
        """What is heard of a node later counts no more."""
        before = self.gone.get(node_id)
        self.gone[node_id] = link.traffic if before is None else before.plus(link.traffic)
        del self.links[node_id]
        link.close()

    @property
    def traffic(self) -> list[Traffic]:
        """Of each node that the run has or had: of one that came back, of all times together."""
        found = dict(self.gone)
        for node_id, link in self.links.items():
            found[node_id] = found[node_id].plus(link.traffic) if node_id in found else link.traffic
        return list(found.values())

    @property
    def _how_to_go_on(self) -> str:
        return (
            f"`shoal resume {self._directory}` goes on from the newest checkpoint, "
            "with `--address HEAD:PORT` on another cluster, with `--engine local` on this machine alone"
        )


def _give_back(link: NodeLink) -> None:
    """A node that came is not used."""
    link.close()
    link.node.end()
