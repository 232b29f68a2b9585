"""The coordinator's rules (engines/coordinator.py) over counts instead of slots: what may be begun, and what the next update is made of.

A group may stand for `amount` groups of as many nodes that are alike; what it makes are then so many rollouts at once, and a batch may take a part of
them. With amounts of 1 every decision is the coordinator's, which a test holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.engines.plan import Plan


@dataclass(eq=False)
class Rollout:
    """`amount` rollouts that were made alike.

    Attributes:
      pieces: (policy version, env steps) of one of them, in order.
      left: how many no batch has taken yet.
    """

    group: int
    sequence: int
    amount: int
    pieces: list[tuple[int, float]] = field(default_factory=list)
    left: int = 0

    @property
    def version_min(self) -> int:
        return self.pieces[0][0]

    @property
    def env_steps(self) -> float:
        """Of one of them."""
        return sum(steps for _, steps in self.pieces)


class Rules:
    """All methods are called in the order in which things happen."""

    def __init__(self, plan: Plan, amounts: Sequence[int]) -> None:
        self._plan, self._amounts = plan, list(amounts)
        self._sync = plan.mode == "sync"
        self._limit = plan.rollouts_ahead
        self._sequences = [0] * len(self._amounts)
        self._free = [plan.slots_per_group] * len(self._amounts)
        self._leased = 0
        self._busy = False
        self._ready: list[Rollout] = []
        self._training: list[tuple[Rollout, int]] = []
        self.version = 0

    @property
    def held(self) -> int:
        """Rollouts that are made and lie where the learner takes them."""
        return sum(r.left for r in self._ready) + sum(taken for _, taken in self._training)

    # ---- orders --------------------------------------------------------------------------------------------------
    def leases(self) -> list[Rollout]:
        """Every rollout that may be begun now, without pieces; those that are behind first."""
        if self._busy if self._sync else self._outstanding >= self._limit:
            return []
        begun = []
        once = sorted(range(len(self._amounts)), key=lambda g: (self._sequences[g], g))
        for group in once * self._plan.slots_per_group:
            if self._free[group] and self._may_begin(group):
                begun.append(Rollout(group, self._sequences[group], self._amounts[group]))
                self._free[group] -= 1
                self._sequences[group] += 1
                self._leased += self._amounts[group]
        return begun

    @property
    def _outstanding(self) -> int:
        return self._leased + sum(r.left for r in self._ready)

    def _may_begin(self, group: int) -> bool:
        if self._sync:
            return self._sequences[group] == self.version
        outstanding = self._outstanding  # what stands for many begins where most of it may
        return outstanding == 0 or outstanding + self._amounts[group] / 2 <= self._limit

    def next_batch(self) -> list[tuple[Rollout, int]] | None:
        """(rollout, how many of it) of the next update, or None: not enough are there, or the learner is at work."""
        if self._busy:
            return None
        if self._sync:
            if len(self._ready) < len(self._amounts):
                return None
            batch = [(r, r.left) for r in sorted(self._ready, key=lambda r: r.group)]
        else:
            ready = sum(r.left for r in self._ready)
            if not ready or (ready < self._plan.batch_rollouts and self._leased):
                return None
            batch = self._oldest()
        for rollout, taken in batch:
            rollout.left -= taken
        self._ready = [r for r in self._ready if r.left]
        self._training, self._busy = batch, True
        return batch

    def _oldest(self) -> list[tuple[Rollout, int]]:
        """The oldest, and all that could not wait another update; of each group its first ones, in order of arrival."""
        oldest = sorted(self._ready, key=lambda r: r.version_min)
        urgent = sum(r.left for r in oldest if self.version + 1 - r.version_min > self._plan.max_policy_lag)
        missing, wanted = max(self._plan.batch_rollouts, urgent), Counter[int]()
        for rollout in oldest:
            part = min(rollout.left, missing)
            wanted[rollout.group] += part
            missing -= part
        taken: dict[int, int] = {}
        for rollout in sorted(self._ready, key=lambda r: r.sequence):
            taken[id(rollout)] = part = min(rollout.left, wanted[rollout.group])
            wanted[rollout.group] -= part
        return [(r, taken[id(r)]) for r in self._ready if taken[id(r)]]

    # ---- what happened -------------------------------------------------------------------------------------------
    def filled(self, rollout: Rollout) -> None:
        """It is made, and where the learner takes it."""
        rollout.left = rollout.amount
        self._leased -= rollout.amount
        self._ready.append(rollout)

    def consumed(self) -> None:
        """The learner copied its batch: slots of what was taken to the last are free."""
        for rollout, _ in self._training:
            self._free[rollout.group] += not rollout.left
        self._training = []

    def trained(self, *, counted: bool = True) -> None:
        """The learner is done; `counted`: it made a version, since not all of its batch was too old."""
        self._busy = False
        self.version += counted
