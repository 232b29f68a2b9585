"""Replay of a run: executes it again in one process, update by update, from what its log says was consumed.

(Not the replay that algorithms learn from, which is experience/replay.py.)

An async run's weights depend on which rollouts each update consumed, and with which policy version each of their rows was made. The
log holds both, and everything else is a function of the configuration: so the same weights come out, bit for bit. A sync run needs
no log: update k consumes rollout k of every group, made with version k. How many optimizer steps an update of a run that learns from
a replay makes is in the log of an async run, and is reckoned again for a sync one. Where an episode was given up, since the same step broke twice, is an
event of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.engines.plan import Plan
from shoal.engines.roles import Blueprint, one_thread
from shoal.errors import RunError
from shoal.experience.envelope import Identity
from shoal.experience.group_state import GroupHistory
from shoal.experience.limiter import RateLimiter
from shoal.experience.ring import allocate
from shoal.types import Array

Entry = dict[str, Any]
GivenUp = Mapping[tuple[int, int], Sequence[Sequence[int]]]


class WeightHistory:
    """A weight board that remembers versions for as long as they are asked for."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._versions: dict[int, Array] = {}
        self.wanted = 0

    def begin(self, version: int) -> Array:
        self._versions[version] = np.empty(self._size, np.float32)
        return self._versions[version]

    def commit(self, version: int) -> None:
        pass

    def read(self, out: Array) -> int:
        if self.wanted not in self._versions:
            raise RunError(f"the log asks for policy version {self.wanted}, which is not among those kept ({sorted(self._versions)})")
        np.copyto(out, self._versions[self.wanted])
        return self.wanted

    def forget_before(self, version: int) -> None:
        self._versions = {v: w for v, w in self._versions.items() if v >= version}


def replay(
    blueprint: Blueprint,
    log: dict[int, list[Entry]],
    num_updates: int,
    told: Callable[[int], None] = lambda update: None,
    given_up: GivenUp | None = None,
) -> str:
    """Execute updates 1 to `num_updates` again. Returns weights_sha256.

    Args:
      log: by update, what it consumed in order; empty for a sync run.
      told: called after each update.
      given_up: of a sync run, by (group, sequence), the places (row, env) at which episodes were ended as invalid.
    Raises:
      RunError: the log has a gap, or the environments acted, or actions were chosen, as they were ready, which no log can repeat.
    """
    if any(entry.get("paced") for entries in log.values() for entry in entries):
        raise RunError(
            "this run cannot be replayed: its environments wait, and each acted when it was ready (env.form threads, mode async)"
        )
    plan = blueprint.plan()
    if blueprint.served and plan.mode == "async":
        raise RunError(
            "this run cannot be replayed: its actions were chosen for all who had asked together, and the numbers depend on who they were "
            "(policy.inference server, mode async)"
        )
    policy = blueprint.policy()
    schema = blueprint.schema(policy)
    updates = list(_updates(plan, log, num_updates, given_up or {}))
    ring = allocate(schema, max([1, *(len(update.entries) for update in updates)]))
    weights = WeightHistory(blueprint.layout(policy).size)
    behaviour = blueprint.behaviour(weights)
    actor = blueprint.actor(ring, behaviour)
    learners = blueprint.learners_here(ring, weights, 1 << 30)
    learners.first.publish()
    action = next(f for f in schema.fields if f.name == "action")
    for group in range(plan.num_groups):
        states = {n: np.zeros((plan.group_size, *f.shape), f.dtype) for n, f in ((f.name, f) for f in policy.fields() if f.axis == "B")}
        actor.restore(group, GroupHistory(plan.group_size, action.shape, action.dtype, states).state_at(0))
    oldest = _oldest_versions([update.entries for update in updates])
    limiter = None if plan.rate is None else RateLimiter(plan.rate)
    for number, update in enumerate(updates):
        weights.forget_before(oldest[number])
        orders = []
        for slot, entry in enumerate(update.entries):
            identity = Identity(*entry["id"])
            rows = _versions_by_row(entry["versions"])
            weights.wanted = rows[0]
            behaviour.refresh()
            with one_thread(blueprint.config.learner.threads):
                follow = None if plan.mode == "sync" else _follow(rows, weights, behaviour.refresh)
                actor.fill(slot, identity, follow, [tuple(g) for g in entry.get("give_up", ())])
            if entry["fate"] == plan.fate.label:
                orders.append((slot, identity))
        steps = update.optimizer_steps
        if limiter is not None and steps is None:
            steps = limiter.insert(sum(int(ring.slots[slot].envelope["num_env_steps"]) for slot, _ in orders))
        if orders or steps:
            learners.update(learners.consume(orders), steps or 0)
        told(number + 1)
    actor.close()
    return learners.first.weights_sha256


@dataclass(frozen=True)
class _Update:
    """What an update consumed, in order, and the optimizer steps that the log says it made."""

    entries: list[Entry]
    optimizer_steps: int | None = None

    @classmethod
    def of(cls, logged: list[Entry]) -> _Update:
        steps = [int(entry["optimizer_steps"]) for entry in logged if "id" not in entry]
        return cls([entry for entry in logged if "id" in entry], sum(steps) if steps else None)


def _updates(plan: Plan, log: dict[int, list[Entry]], num_updates: int, given_up: GivenUp) -> Iterator[_Update]:
    for update in range(1, num_updates + 1):
        if plan.mode == "sync":
            versions = [[update - 1, plan.rollout_length]]
            fate = plan.fate.label
            entries = [
                {"id": [g, update - 1, 0], "versions": versions, "fate": fate, "give_up": given_up.get((g, update - 1), ())}
                for g in range(plan.num_groups)
            ]
            yield _Update(entries)
        elif update in log:
            yield _Update.of(log[update])
        else:
            raise RunError(f"the log has no update {update}: it was lost with run.db, and the run cannot be replayed beyond {update - 1}")


def _versions_by_row(runs: list[list[int]]) -> list[int]:
    return [version for version, rows in runs for _ in range(rows)]


def _follow(rows: list[int], weights: WeightHistory, refresh: Callable[[], int]) -> Callable[[int], bool]:
    """Between two rows: close where the run did, and take the version that the run took."""
    place = 0

    def between_rows(first_version: int) -> bool:
        nonlocal place
        place += 1
        if place == len(rows):
            return True
        if rows[place] != weights.wanted:
            weights.wanted = rows[place]
            refresh()
        return False

    return between_rows


def _oldest_versions(updates: list[list[Entry]]) -> list[int]:
    """For each update, the oldest version that it or a later one asks for."""
    oldest, out = len(updates), []
    for entries in reversed(updates):
        oldest = min([oldest, *(version for e in entries for version, _ in e["versions"])])
        out.append(oldest)
    return out[::-1]
