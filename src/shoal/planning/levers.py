"""What would move a predicted run: each thing that bounds it made twice as good, and the run simulated again. The bottleneck is what moves it most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shoal.planning.pipeline import Prediction
from shoal.planning.system import System

SPOKEN = 0.02  # a gain below this is not worth a sentence


@dataclass(frozen=True)
class Lever:
    """Something that may be made better.

    Attributes:
      what: in words. better: what is done to it. advice: how a user would.
      pull: the system with it; None where it is no part of this one.
      bounds: whether it may be called the bottleneck.
    """

    name: str
    what: str
    better: str
    advice: str
    pull: Callable[[System], System | None]
    bounds: bool = True


@dataclass(frozen=True)
class Move:
    """What a lever gives: 0.5 is half as many env steps per second again."""

    lever: Lever
    gain: float

    def to_json(self) -> dict[str, Any]:
        lever = self.lever
        return {"name": lever.name, "what": lever.what, "better": lever.better, "gain": self.gain, "advice": lever.advice}


def _cores(s: System) -> System:
    return replace(s, costs=replace(s.costs, acting=s.costs.acting / 2))


def _learner_cores(s: System) -> System | None:
    return None if (s.nodes == 1 and s.learners == 1) or s.one_machine else replace(s, learner_cores=2 * s.cores)


def _learner(s: System) -> System:
    costs = replace(s.costs, learning=s.costs.learning / 2, consume=s.costs.consume / 2)
    return replace(s, costs=costs, publish=s.publish / 2)


def _exchange(s: System) -> System | None:
    return None if s.learners == 1 else replace(s, exchange=s.exchange / 2)


def _driver(s: System) -> System:
    d = s.driver
    return replace(s, driver=replace(d, rollout=d.rollout / 2, update=d.update / 2, look_group=d.look_group / 2))


def _learner_link(s: System) -> System | None:
    return None if s.nodes == 1 else replace(s, links=replace(s.links, learner_bandwidth=2 * s.links.learner_bandwidth))


def _node_links(s: System) -> System | None:
    return None if s.nodes == 1 else replace(s, links=replace(s.links, node_bandwidth=2 * s.links.node_bandwidth))


def _latency(s: System) -> System | None:
    return None if s.nodes == 1 else replace(s, links=replace(s.links, latency=s.links.latency / 2))


def _messages(s: System) -> System | None:
    if s.nodes == 1 or s.way is None:
        return None
    return replace(s, way=replace(s.way, message=s.way.message / 2, pack=s.way.pack / 2, unpack=s.way.unpack / 2))


def _waiting(s: System) -> System | None:
    return None if s.costs.blocking is None else replace(s, costs=replace(s.costs, blocking=s.costs.blocking / 2))


def _batch(s: System) -> System | None:
    """Of as many groups, so the rollouts that may be in flight are more too."""
    batch = 2 * s.plan.batch_rollouts
    slots = _slots(s, -(-batch // s.plan.num_groups))
    return None if s.plan.mode == "sync" else replace(s, plan=replace(s.plan, batch_rollouts=batch, slots_per_group=slots))


def _slots(s: System, of_batch: int) -> int:
    """Of a group in async mode, of which a batch has so many rollouts: as `Plan.of` says, which several learners keep until an update is made."""
    return max(2, of_batch + 1) + (of_batch if s.learners > 1 else 0)


def _turns(s: System) -> System | None:
    """The same costs in async mode, with the defaults of its keys."""
    if s.plan.mode == "async":
        return None
    return replace(s, plan=replace(s.plan, mode="async", max_policy_lag=4, slots_per_group=_slots(s, 1)))


LEVERS = (
    Lever("cores", "the nodes' cores (environment, inference, writing down)", "steps that take half of it",
          "more nodes or cores; cheaper steps: --env.form native, larger groups (--sampling.group-size)", _cores),
    Lever("learner", "the learner", "one that is twice as fast",
          "more of them (--learners) where they have cores, a GPU (--device cuda), fewer epochs, larger minibatches, a smaller network", _learner),
    Lever("exchange", "what learners take to add up their gradients", "half of it",
          "fewer learners, larger minibatches, fewer epochs, a smaller network", _exchange),
    Lever("learner_cores", "the cores of the machines with learners, which learners, driver and actors there share", "twice as many there",
          "larger machines for the learners, or fewer actors on them", _learner_cores),
    Lever("learner_link", "the link of the driver's machine, where a learner is", "twice the bandwidth",
          "a faster link there (--learner-bandwidth), smaller observations and networks", _learner_link),
    Lever("node_links", "the nodes' links", "twice the bandwidth", "faster links (--link-bandwidth), smaller observations and networks", _node_links),
    Lever("messages", "what messages between driver and nodes take of the cores", "half of it",
          "fewer and larger rollouts: --sampling.rollout-length, --sampling.group-size", _messages),
    Lever("latency", "the way between nodes", "half the latency", "longer rollouts (--sampling.rollout-length), async mode", _latency),
    Lever("driver", "the driver (words and decisions)", "one that is twice as fast",
          "fewer and larger rollouts: --sampling.rollout-length, --sampling.group-size", _driver),
    Lever("waiting", "environments that wait", "half the wait", "more of them: --sampling.group-size, more groups with an actor each", _waiting),
    Lever("batches", "the rollouts that may be in flight", "batches twice as large",
          "--sampling.batch-rollouts, which changes what is learned", _batch),
    Lever("turns", "actors and learner taking turns", "async mode", "--algorithm appo or impala, whose samples are some updates old", _turns, bounds=False),
)  # fmt: skip


def moves(system: System, rate: float, simulated: Callable[[System], Prediction]) -> list[Move]:
    """What each lever gives a run of `rate` env steps per second, the most first."""
    pulled = [(lever, changed) for lever in LEVERS if (changed := lever.pull(system)) is not None]
    found = [Move(lever, simulated(changed).env_steps_per_second / rate - 1.0) for lever, changed in pulled]
    return sorted(found, key=lambda move: -move.gain)


def bottleneck(found: list[Move]) -> Move | None:
    """What bounds the run; None where nothing alone does. Of several that give as much (to a tenth), the last of LEVERS: where all wait for the same
    few, quicker steps help like more of them, but it is not the cores that are scarce."""
    bounding = [move for move in found if move.lever.bounds and move.gain >= SPOKEN]
    most = max((move.gain for move in bounding), default=0.0)
    return max((move for move in bounding if move.gain >= 0.9 * most), key=lambda move: LEVERS.index(move.lever), default=None)


def in_words(found: list[Move], used: Mapping[str, float]) -> str:
    """One sentence on what bounds the run."""
    most = bottleneck(found)
    if most is None:
        return "nothing by itself: no one thing, twice as good, gives 2 % more"
    share = used.get(_USED.get(most.lever.name, ""))
    busy = "" if share is None else f", in use {100 * share:.0f} % of the time"
    return f"{most.lever.what}{busy}; {most.lever.better}: {100 * most.gain:.0f} % more"


_USED = {
    "cores": "cores",
    "learner_cores": "learner_cores",
    "learner": "learner",
    "learner_link": "learner_link",
    "node_links": "node_links",
    "driver": "driver",
}
