"""The cluster that a plan is about, in numbers. Plain data: times in seconds, sizes in bytes, bandwidths in bytes per second and direction.

N nodes of C cores, each with A actors and its share of the run's groups. Node 0 is the head: the driver, which is the coordinator, and the first learner live
there. Of several learners the others live there too, or each on another node. Every other node sends its rollouts over its link to the head, and gets every
version of the weights once. Every learner needs every rollout: those on the head read its memory, to each of the others the driver sends all of them on.
Actors of the head's own node share its memory; with those of every other node the driver speaks by messages (`Way`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shoal.engines.plan import Plan


@dataclass(frozen=True)
class StepCosts:
    """What an environment step takes of one core.

    Attributes:
      acting: environment, inference and writing down. consume: checking and copying into the batch.
      learning: wall time with the learner's threads, which keep `learning_cores` busy. own_device: it runs beside the cores.
      share: of `learning` that each of several learners takes; None: as much as there are fewer rows for it.
      blocking: wall time of a step whose environment waits; None where it computes.
      crowding: how many times as much all of it costs while every core of the node is busy.
    """

    acting: float
    consume: float
    learning: float
    learning_cores: float = 1.0
    own_device: bool = False
    blocking: float | None = None
    crowding: float = 1.0
    share: float | None = None


@dataclass(frozen=True)
class Links:
    """One way of every connection: `node_bandwidth` is a node's, `learner_bandwidth` that of the head, and of any other node with a learner."""

    latency: float
    node_bandwidth: float
    learner_bandwidth: float


@dataclass(frozen=True)
class Driver:
    """What the driver takes of one core: for each rollout (its lease, and its arrival), for each update, and for each of the run's groups whenever it
    looks what may be begun."""

    rollout: float
    update: float = 0.0
    look_group: float = 0.0


@dataclass(frozen=True)
class Way:
    """What the way between the driver and the actors of a node takes of a core, the links apart: of each message (a lease, a rollout, a version of the weights)
    at both ends; of each rollout where it is packed, and of the driver, which unpacks and checks it."""

    message: float
    pack: float = 0.0
    unpack: float = 0.0


@dataclass(frozen=True)
class System:
    """A whole run.

    Attributes:
      plan: of all nodes together; its groups are spread evenly.
      cores, actors: of a node.
      learners_on: where all but the first are: with it on the head, or on a node each, so that there are at most `nodes`.
      exchange: seconds of a core that each of several learners takes for one exchange, the links apart.
      publish, refresh: seconds of one core for each version: of a learner, and of each actor.
      epochs, minibatch_size: how many optimizer steps an update has; None: the whole batch in one.
      learner_cores: cores of the head, and of any other node with a learner; None: as many as the others have.
      way: to the actors of every node but the head; None: what they send costs no core.
      one_machine: all nodes share the cores of one.
      pause: sync mode: seconds of each update in which nobody works, since processes wake and wait for the slowest.
    """

    plan: Plan
    nodes: int
    cores: int
    actors: int
    learners: int
    costs: StepCosts
    links: Links
    driver: Driver
    publish: float = 0.0
    refresh: float = 0.0
    rollout_bytes: int = 0
    weights_bytes: int = 0
    epochs: int = 1
    minibatch_size: int | None = None
    learner_cores: int | None = None
    way: Way | None = None
    one_machine: bool = False
    pause: float = 0.0
    learners_on: Literal["driver", "nodes"] = "driver"
    exchange: float = 0.0

    @property
    def elsewhere(self) -> int:
        """Learners on other nodes than the head, and so nodes with one of those."""
        return self.learners - 1 if self.learners_on == "nodes" else 0

    @property
    def part(self) -> float:
        """Of `learning` that each learner takes."""
        return 1.0 / self.learners if self.learners == 1 or self.costs.share is None else self.costs.share

    @property
    def groups_of_node(self) -> int:
        return self.plan.num_groups // self.nodes

    @property
    def rollout_steps(self) -> int:
        """Environment steps of a whole rollout."""
        return self.plan.rollout_length * self.plan.group_size

    @property
    def batch_steps(self) -> int:
        return self.plan.batch_rollouts * self.rollout_steps

    @property
    def optimizer_steps(self) -> int:
        """Of one update of whole rollouts."""
        return self.epochs * (1 if self.minibatch_size is None else math.ceil(self.batch_steps / self.minibatch_size))

    @property
    def exchange_seconds(self) -> float:
        """Of a core of each of several learners for one update: the values of its batch are put together, then each gradient is added up."""
        return self.exchange * (self.optimizer_steps + 1) if self.learners > 1 else 0.0

    @property
    def ring_bytes(self) -> float:
        """Over every learner's link, each way, in one update of learners on nodes: 2 (L - 1) / L of each gradient
        (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002)."""
        return self.optimizer_steps * 2 * self.elsewhere / self.learners * self.weights_bytes

    @property
    def ring_latency(self) -> float:
        """Seconds of one update: 2 (L - 1) ways for each exchange. One more than above is that in which all agree that it is made."""
        return (self.optimizer_steps + 2) * 2 * self.elsewhere * self.links.latency

    @property
    def in_flight_limit(self) -> float:
        """Rollouts that are being made or ready, at most."""
        plan = self.plan
        return plan.num_groups if plan.mode == "sync" else plan.rollouts_ahead
