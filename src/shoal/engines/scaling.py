"""How many actors a run has while it goes on: as many as somebody asked for (`shoal scale`), or as the load asks for (engines/autoscale.py).

Whoever decides, the way is the same: places for actors come or go, and the groups move once their leases are done, with their streams and states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shoal.config import MAX_ACTORS, actor_bounds
from shoal.engines.autoscale import Autoscaler, Decision, Sample
from shoal.engines.fleet import Fleet
from shoal.engines.session import Session
from shoal.engines.stalls import Situation, is_starting
from shoal.types import ActivityRecord


class Scaling:
    """Of one run. `place`: has the groups spread over the actors that there are."""

    def __init__(self, session: Session, fleet: Fleet, place: Callable[[], None]) -> None:
        self._session, self._fleet, self._place = session, fleet, place
        self._bounds = session.config.autoscale
        self._autoscaler = None if self._bounds is None else self._following(self._bounds)

    def _following(self, bounds: str) -> Autoscaler:
        plan = self._session.coordinator.plan
        return Autoscaler(*actor_bounds(bounds), groups=plan.num_groups, in_turn=plan.mode == "sync")

    # ---- what somebody asks for ----------------------------------------------------------------------------------
    def fix(self, actors: int) -> dict[str, Any]:
        """Go on with this many; the load decides no more. Returns what is so now, for the answer.

        Raises:
          ValueError: there are not so many groups.
        """
        self._check(actors)
        reason = "" if self._bounds is None else "asked for; it follows the load no more"
        self._bounds = self._autoscaler = None
        return self._go_on_with(actors, reason)

    def follow(self, bounds: str) -> dict[str, Any]:
        """Follow the load from now on, between these bounds; `none`: no more, and stay at what is there. Returns what is so now.

        Raises:
          ValueError: these are no bounds, or there are not so many groups.
        """
        there = len(self._fleet.living)
        if bounds == "none":
            return self.fix(there)
        least, most = actor_bounds(bounds)
        self._check(most)
        self._bounds, self._autoscaler = bounds, self._following(bounds)
        return self._go_on_with(min(max(there, least), most), f"asked for: it follows the load from {least} to {most}")

    def _check(self, actors: int) -> None:
        groups = self._session.coordinator.plan.num_groups
        if not 1 <= actors <= min(MAX_ACTORS, groups):
            raise ValueError(f"actors must be 1 to {groups} (the number of groups), got {actors!r}")

    def _go_on_with(self, actors: int, reason: str) -> dict[str, Any]:
        for actor in self._fleet.actors:
            actor.deaths = 0
        self._scale(actors, reason)
        facts = {"actors": actors, "autoscale": self._bounds, "nodes": self._fleet.by_node()}
        return {name: value for name, value in facts.items() if value} | self._missing(actors)

    def _missing(self, actors: int) -> dict[str, int]:
        """How many of the actors that are wanted have a place (`there`), where those are fewer: on a cluster, until there are nodes for the others."""
        there = len(self._fleet.living)
        return {"there": there} if there < actors else {}

    # ---- what the load asks for ----------------------------------------------------------------------------------
    def watch(self, situation: Situation, now: float) -> None:
        """Called a few times a second with what every process does."""
        if self._autoscaler is None:
            return
        working = self._working(situation)
        if not working:
            self._autoscaler.disturbed()
            return
        sample = Sample.of(now, situation.coordinator.version, situation.seen[0].record, working)
        decision = self._autoscaler.look(sample, len(self._fleet.living), self._fleet.room)
        if decision is not None:
            self._scale(decision.actors, decision.reason, **_figures(decision))

    def _working(self, situation: Situation) -> list[ActivityRecord]:
        """What the actors do; nothing where the run is paused, or somebody is starting or ending."""
        if situation.paused or not self._fleet.learner.ready:
            return []
        working = []
        for process, seen in zip(self._fleet.processes, situation.seen, strict=True):
            if process.name != "actor" or (process.gone_for_good and not process.up):
                continue
            if process.retired or not process.up or is_starting(seen, process.pid):
                return []
            working.append(seen.record)
        return working

    def _scale(self, actors: int, reason: str, **figures: float) -> None:
        before = len(self._fleet.living)
        self._fleet.scale(actors)
        if self._autoscaler is not None:
            self._autoscaler.disturbed()
        self._place()
        facts: dict[str, Any] = {"actors": actors, "before": before, "reason": reason, "autoscale": self._bounds or "", **figures}
        if nodes := self._fleet.by_node():
            facts["nodes"] = nodes
        facts |= self._missing(actors)
        self._session.observer.event("scaled", **facts)


def _figures(decision: Decision) -> dict[str, float]:
    load = decision.load
    return {} if load is None else {"learner_waits": load.learner_waits, "actors_wait": load.actors_wait, "window_seconds": load.seconds}
