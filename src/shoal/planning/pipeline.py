"""The model: actors, links, driver and learners as processes of a discrete-event simulation (SimPy), under the coordinator's rules.

    actor      takes a lease, makes the rollout piece by piece with the newest weights of its node, hands it to the node's link, takes the next
    driver     hears what arrived, decides (planning/rules.py), sends leases, has the learner begin
    learner    copies its batch, learns its part of it, adds up with the others, publishes; a node fetches the newest version once it has the one before

Every learner needs every rollout: to one that is on another node than the head the driver sends each on as it comes in.

Nothing is drawn at random: nodes are alike and steps take what they take on average. So nodes but the head need not all be there: a few stand
for all of them, each for so many; what one of those sends takes the head's link and the driver as often as it stands for, and its own node once.
Where fewer rollouts may be in flight than there are nodes, no more nodes are busy than that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from simpy import Environment, Event, Store

from shoal.planning.resources import Cores, Link, Occupied, call_after
from shoal.planning.rules import Rollout, Rules
from shoal.planning.system import System

REPRESENTATIVES = 8
WITH_LEARNERS = 2  # of nodes with a learner, each of which is brought every rollout
PIECES = 4  # of a rollout: between two of them an actor takes new weights, or closes it early
UPDATES, WARM_UP = 60, 20

_Process = Generator[Event, Any, None]


@dataclass(frozen=True)
class Prediction:
    """What a run would do, once it is warm.

    Attributes:
      lag: share of the trained env steps by policy lag in updates. over_lag: share of all env steps that came too late to be trained.
      utilisation: share of its time or capacity that each resource is used: `cores` of all nodes, `learner_cores` of the head,
        `actors` (making rollouts), `learner`, `driver`, `learner_link` (of the head) and `node_links` (of those without a learner; the busier direction).
      learner_bytes: rollouts that lie on the head at most, with the copies that learners there have of their batch.
    """

    env_steps_per_second: float
    updates_per_second: float
    lag: dict[int, float]
    over_lag: float
    utilisation: dict[str, float]
    learner_bytes: float

    @property
    def lag_mean(self) -> float:
        return sum(lag * share for lag, share in self.lag.items())

    @property
    def lag_max(self) -> int:
        return max(self.lag, default=0)


def simulate(system: System, *, representatives: int = REPRESENTATIVES, updates: int = UPDATES, warm_up: int = WARM_UP) -> Prediction:
    """Run the model for so many updates, of which the first `warm_up` are left out.

    Args:
      representatives: how many nodes are simulated of those without a learner; with as many as there are nodes, all of them.
    """
    if system.one_machine:  # where no node has cores of its own, none stands for others
        representatives = max(representatives, system.nodes)
    return _Pipeline(system, representatives, updates, warm_up).run()


def spread(number: int, parts: int) -> list[int]:
    """`number` as at most `parts` numbers that differ by one at most; none is 0."""
    parts = min(number, parts)
    return [number // parts + (part < number % parts) for part in range(parts)]


class _Node:
    """A node that stands for `amount` alike; `fetches` of them get weights when it does. far: it is not the head, whose memory driver and learner read."""

    def __init__(self, env: Environment, system: System, cores: Cores, amount: int, fetches: float, learns: bool, far: bool) -> None:
        self.env, self.cores, self.amount, self.fetches, self.learns, self.far = env, cores, amount, fetches, learns, far
        bandwidth = system.links.learner_bandwidth if learns else system.links.node_bandwidth
        self.up, self.down = (Link(env, bandwidth) for _ in range(2))
        self.leases = [Store(env) for _ in range(system.actors)]
        self.version = 0
        self.newer = env.event()

    def take_version(self, version: int) -> None:
        self.version = version
        newer, self.newer = self.newer, self.env.event()
        newer.succeed()


@dataclass(frozen=True)
class _Reading:
    """Clocks at one moment."""

    at: float
    busy: dict[str, float]


class _Pipeline:
    def __init__(self, system: System, representatives: int, updates: int, warm_up: int) -> None:
        self._system, self._updates, self._warm_up = system, updates, warm_up
        self._env = env = Environment()
        self._nodes = _nodes(env, system, representatives)
        self._head, *others = self._nodes
        self._elsewhere = [node for node in others if node.learns]
        self._rules = Rules(system.plan, [node.amount for _ in range(system.groups_of_node) for node in self._nodes])
        self._sync = system.plan.mode == "sync"
        self._brought: dict[Rollout, Event] = {}  # when each lies with all learners elsewhere
        self._inbox: list[tuple[float, Callable[[], None]]] = [(0.0, lambda: None)]  # (seconds of the driver, what happened)
        self._woken, self._published, self._finished = env.event(), env.event(), env.event()
        self._batches = Store(env)
        self._spent = {"learner": 0.0, "driver": 0.0}
        self._acting = Occupied(env)
        self._lag: defaultdict[int, float] = defaultdict(float)
        self._late_steps = 0.0
        self._most_held = 0
        self._begun: _Reading | None = None

    def run(self) -> Prediction:
        env, system = self._env, self._system
        for node in self._nodes:
            for leases in node.leases:
                env.process(self._act(node, leases))
            if node.far:
                env.process(self._fetch(node))
        env.process(self._drive())
        env.process(self._learn())
        env.run(until=self._finished)
        begin, end = self._begun, self._read()
        assert begin is not None
        seconds = end.at - begin.at
        counted = sum(self._lag.values())
        rate = counted / seconds
        copies = system.learners - system.elsewhere
        size = system.rollout_bytes * (self._most_held + copies * system.plan.batch_rollouts)
        return Prediction(
            env_steps_per_second=rate,
            updates_per_second=(self._updates - self._warm_up) / seconds,
            lag={lag: steps / counted for lag, steps in sorted(self._lag.items())} if counted else {},
            over_lag=self._late_steps / (self._late_steps + counted) if counted else 1.0,
            utilisation={name: (busy - begin.busy[name]) / seconds for name, busy in end.busy.items()},
            learner_bytes=float(size),
        )

    # ---- actors --------------------------------------------------------------------------------------------------
    def _act(self, node: _Node, leases: Store) -> _Process:
        """Makes one rollout after the other. A sync one waits for the version that it is to be made with."""
        plan = self._system.plan
        pieces = 1 if self._sync else min(PIECES, plan.rollout_length)
        version = -1
        while True:
            rollout = yield leases.get()
            while self._sync and node.version < rollout.sequence:
                yield node.newer
            for piece in range(pieces):
                if node.version > version:
                    version = node.version
                    yield node.cores.work(self._system.refresh)
                if piece and version - rollout.version_min >= plan.close_after_lag:
                    break
                self._acting.change(node.amount)
                yield self._make(node, 1 / pieces)
                self._acting.change(-node.amount)
                rollout.pieces.append((version, self._system.rollout_steps / pieces))
            self._env.process(self._deliver(node, rollout))

    def _make(self, node: _Node, share: float) -> Event:
        """So much of a rollout. Environments that wait do so beside each other, and each waits for its own answer too."""
        costs, system = self._system.costs, self._system
        work = node.cores.work(share * system.rollout_steps * costs.acting)
        if costs.blocking is None:
            return work
        waiting = self._env.timeout(share * system.plan.rollout_length * (costs.blocking + costs.acting))
        return work & waiting

    def _deliver(self, node: _Node, rollout: Rollout) -> _Process:
        system = self._system
        share, seconds = rollout.env_steps / system.rollout_steps, system.driver.rollout / 2
        if node.far and system.way is not None:
            yield node.cores.work(share * system.way.pack)
            seconds += share * system.way.unpack
        if node.far:
            size = share * system.rollout_bytes
            yield node.up.send(size) & self._head.down.send(size * rollout.amount)
            self._pass_message(node, rollout.amount)
            yield self._env.timeout(system.links.latency)
        if system.way is not None:
            seconds += system.elsewhere * share * system.way.pack  # once more for each learner that it is sent on to
        self._tell(rollout.amount * seconds, partial(self._arrived, rollout))

    def _pass_message(self, node: _Node, amount: float, each: float = 1.0) -> None:
        """What messages take of the cores at both ends, beside all else: how long one takes is the latency. amount: at the head. each: at the node."""
        if self._system.way is not None:
            node.cores.work(each * self._system.way.message)
            self._head.cores.work(amount * self._system.way.message)

    def _arrived(self, rollout: Rollout) -> None:
        self._rules.filled(rollout)
        self._most_held = max(self._most_held, self._rules.held)
        if self._elsewhere:
            self._brought[rollout] = self._env.process(self._bring(rollout))

    def _bring(self, rollout: Rollout) -> _Process:
        """From the head to every learner elsewhere, wherever it came from; unpacked there."""
        system, nodes = self._system, self._elsewhere
        share = rollout.amount * rollout.env_steps / system.rollout_steps
        size = share * system.rollout_bytes
        yield self._env.all_of([self._head.up.send(system.elsewhere * size), *(node.down.send(size) for node in nodes)])
        for node in nodes:
            self._pass_message(node, node.amount * rollout.amount, rollout.amount)
        yield self._env.timeout(system.links.latency)
        if system.way is not None:
            yield self._env.all_of([node.cores.work(share * system.way.unpack) for node in nodes])

    # ---- driver --------------------------------------------------------------------------------------------------
    def _tell(self, seconds: float, happened: Callable[[], None]) -> None:
        """A word to the driver, who takes so long to hear it."""
        self._inbox.append((seconds, happened))
        if not self._woken.triggered:
            self._woken.succeed()

    def _drive(self) -> _Process:
        """Hears all words that are there, looks once what may be begun, and sends it. On the cores of the head."""
        system, cores = self._system, self._head.cores
        look = system.driver.look_group * system.plan.num_groups
        while True:
            if not self._inbox:
                self._woken = self._env.event()
                yield self._woken
            begun = self._env.now
            heard, self._inbox = self._inbox, []
            yield cores.work(look + sum(seconds for seconds, _ in heard))
            for _, happened in heard:
                happened()
            for rollout in self._rules.leases():
                yield cores.work(rollout.amount * system.driver.rollout / 2)
                self._send(rollout)
            batch = self._rules.next_batch()
            if batch is not None:
                self._batches.put(batch)
            self._spent["driver"] += self._env.now - begun

    def _send(self, rollout: Rollout) -> None:
        node = self._nodes[rollout.group % len(self._nodes)]
        leases = node.leases[rollout.group // len(self._nodes) % len(node.leases)]
        if not node.far:
            leases.put(rollout)
        else:
            self._pass_message(node, rollout.amount)
            call_after(self._env, self._system.links.latency, lambda _: leases.put(rollout), None)

    # ---- learners ------------------------------------------------------------------------------------------------
    def _learn(self) -> _Process:
        """Every learner copies the whole batch, and learns its part; what one does, all do at the same time. Several keep the slots until the end."""
        system, costs = self._system, self._system.costs
        while True:
            batch = yield self._batches.get()
            if self._elsewhere:
                yield from self._order(batch)
            begun = self._env.now
            steps = self._look_at(batch)
            yield self._on_learners(costs.consume * steps)
            if system.learners == 1:
                self._tell(0.0, self._rules.consumed)
            if steps:
                yield from self._update(steps)
            self._spent["learner"] += self._env.now - begun
            if self._sync and system.pause:
                yield self._env.timeout(system.pause)
            self._tell(system.driver.update, partial(self._trained, steps))

    def _order(self, batch: Sequence[tuple[Rollout, int]]) -> _Process:
        """Tells the learners elsewhere, who begin once all of the batch lies with them."""
        for node in self._elsewhere:
            self._pass_message(node, node.amount)
        yield self._env.timeout(self._system.links.latency)
        yield self._env.all_of([self._brought[rollout] for rollout, _ in batch])
        for rollout, _ in batch:
            if not rollout.left:
                del self._brought[rollout]

    def _update(self, steps: float) -> _Process:
        system, costs = self._system, self._system.costs
        seconds = costs.learning * steps * system.part
        if costs.own_device:
            yield self._env.timeout(seconds)
        else:
            yield self._on_learners(seconds, costs.learning_cores)
        if system.exchange_seconds:
            yield self._on_learners(system.exchange_seconds)
        if self._elsewhere:
            ring = [link.send(system.ring_bytes) for node in (self._head, *self._elsewhere) for link in (node.up, node.down)]
            yield self._env.all_of(ring)
            yield self._env.timeout(system.ring_latency)
        yield self._head.cores.work(system.publish)

    def _on_learners(self, seconds: float, width: float = 1.0) -> Event:
        """Each of them takes so much, where it lives."""
        here = [self._head.cores] * (self._system.learners - self._system.elsewhere)
        return self._env.all_of([cores.work(seconds, width) for cores in (*here, *(node.cores for node in self._elsewhere))])

    def _look_at(self, batch: Sequence[tuple[Rollout, int]]) -> float:
        """The env steps of a batch that are not too old."""
        version, steps = self._rules.version, 0.0
        for rollout, taken in batch:
            if version - rollout.version_min > self._system.plan.max_policy_lag:
                self._late_steps += taken * rollout.env_steps
                continue
            for made_with, env_steps in rollout.pieces:
                self._lag[version - made_with] += taken * env_steps
                steps += taken * env_steps
        return steps

    def _trained(self, steps: float) -> None:
        if self._system.learners > 1:
            self._rules.consumed()
        self._rules.trained(counted=steps > 0)
        version = self._rules.version
        for node in self._nodes:
            if not node.far:
                node.take_version(version)
        published, self._published = self._published, self._env.event()
        published.succeed()
        if version == self._warm_up and self._begun is None:
            self._begun = self._read()
            self._lag.clear()
            self._late_steps = 0.0
        if version == self._updates:
            self._finished.succeed()

    def _fetch(self, node: _Node) -> _Process:
        """Gets the newest version, as often as there is one that the node does not have."""
        size = self._system.weights_bytes
        while True:
            while node.version == self._rules.version:
                yield self._published
            version = self._rules.version
            yield self._head.up.send(size * node.fetches) & node.down.send(size)
            self._pass_message(node, node.fetches)
            yield self._env.timeout(self._system.links.latency)
            if self._system.way is not None:  # into the node's own memory, where its actors read it
                yield node.cores.work(self._system.publish)
            node.take_version(version)

    # ---- clocks --------------------------------------------------------------------------------------------------
    def _read(self) -> _Reading:
        """Utilisation grows by one a second where something is used without a pause."""
        system = self._system
        learning = 1 + system.elsewhere
        there = (system.nodes - learning) * system.cores + learning * (system.learner_cores or system.cores)
        cores = sum(node.amount * node.cores.busy for node in self._nodes) / there
        if system.one_machine:
            cores = self._head.cores.busy / system.cores
        busy = {
            "cores": cores,
            "learner_cores": self._head.cores.busy / (system.learner_cores or system.cores),
            "actors": self._acting.seconds / (system.nodes * system.actors),
            **self._spent,
            "learner_link": max(self._head.up.busy, self._head.down.busy),
            "node_links": max((max(node.up.busy, node.down.busy) for node in self._nodes if not node.learns), default=0.0),
        }
        return _Reading(self._env.now, busy)


def _nodes(env: Environment, system: System, representatives: int) -> list[_Node]:
    """The head first, then the other nodes with a learner, then those without."""
    learners = 1 + system.elsewhere
    busy = min(system.nodes, learners + math.ceil(system.in_flight_limit))
    with_learners = representatives if representatives >= system.nodes else WITH_LEARNERS
    learning, acting = spread(learners - 1, with_learners), spread(busy - learners, representatives)
    each = (system.nodes - learners) / max(1, busy - learners)
    shared = Cores(env, system.cores, system.costs.crowding) if system.one_machine else None

    def node(amount: int, fetches: float, *, learns: bool, far: bool) -> _Node:
        cores = (system.learner_cores if learns else None) or system.cores
        return _Node(env, system, shared or Cores(env, cores, system.costs.crowding), amount, fetches, learns, far)

    nodes = [node(1, 1.0, learns=True, far=False)]
    nodes += [node(amount, amount, learns=True, far=True) for amount in learning]
    return nodes + [node(amount, amount * each, learns=False, far=True) for amount in acting]
