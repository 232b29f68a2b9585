"""The numbers that a run is planned by, and what the coordinator says to others: leases and episodes. Plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shoal.config import RunConfig
from shoal.experience.envelope import Fate, Identity
from shoal.experience.limiter import Rate
from shoal.types import GroupState

BATCHES_AHEAD = 2  # async: batches that are unconsumed at most, where no replay takes them
_NEVER = 1 << 30  # versions


@dataclass(frozen=True)
class Plan:
    """The numbers of a run that the coordinator goes by."""

    mode: Literal["sync", "async"]
    num_groups: int
    group_size: int
    rollout_length: int
    batch_rollouts: int
    max_policy_lag: int
    slots_per_group: int
    rate: Rate | None = None  # of a run that learns from a replay
    batches_ahead: float = BATCHES_AHEAD

    @classmethod
    def of(cls, config: RunConfig, rate: Rate | None = None) -> Plan:
        """rate: of an algorithm that learns from a replay; None for the others."""
        groups = config.sampling.groups or 1
        sync = config.mode != "async"
        batch = groups if sync else config.sampling.batch_rollouts or groups
        ahead: float = BATCHES_AHEAD if rate is None else max(1.0, config.replay.tolerance)
        slots = -(-batch // groups) + 1 if rate is None else math.ceil(batch * ahead / groups)
        held = -(-batch // groups) if config.learners > 1 else 0  # several keep an update's slots until it is made
        return cls(
            mode="sync" if sync else "async",
            num_groups=groups,
            group_size=config.sampling.group_size or 1,
            rollout_length=config.sampling.rollout_length,
            batch_rollouts=batch,
            max_policy_lag=0 if sync else config.max_policy_lag,
            slots_per_group=1 if sync else max(2, slots) + held,
            rate=rate,
            batches_ahead=ahead,
        )

    @property
    def num_slots(self) -> int:
        return self.num_groups * self.slots_per_group

    @property
    def fate(self) -> Fate:
        """What becomes of a rollout that an update consumed."""
        return Fate.TRAINED if self.rate is None else Fate.REPLAYED

    @property
    def steps_of_batch(self) -> int:
        """Optimizer steps that a batch of whole rollouts brings with it, of a run that learns from a replay; at least one."""
        if self.rate is None:
            return 0
        samples = self.rate.samples_per_insert * self.batch_rollouts * self.rollout_length * self.group_size
        return max(1, int(samples / self.rate.batch_size))

    @property
    def rollouts_ahead(self) -> float:
        """Rollouts that are unconsumed at most, in async mode. A replay takes those of any age, so no bound of the lag counts there."""
        return self.batch_rollouts * (self.batches_ahead if self.rate is not None else min(self.max_policy_lag, self.batches_ahead))

    @property
    def close_after_lag(self) -> int:
        """An actor closes a rollout early once its first row is this many versions old: one more update takes it, in good time.

        Never where it goes into a replay, which takes rows of any age: what is random in a rollout, and where sequences begin, counts on whole ones.
        """
        if self.rate is not None:
            return _NEVER
        return max(1, self.max_policy_lag - (1 if self.max_policy_lag < 3 else 2))


@dataclass(frozen=True)
class Lease:
    """An order to an actor: make `identity` in `slot`; first restore the group to `restore`, where given."""

    actor: int
    slot: int
    identity: Identity
    restore: GroupState | None
    give_up: tuple[tuple[int, int], ...] = ()  # (row, env): end that episode there as invalid, its fault came twice
    give_up_steps: tuple[tuple[int, int, int], ...] = ()  # (env, episode, step): the same for a paced group that hung there twice
    careful: tuple[int, ...] = ()  # rows at which each environment is to be named before it is stepped


@dataclass(frozen=True)
class Restore:
    """An order to an actor: put the group where its next rollout begins, before that may be made."""

    actor: int
    identity: Identity
    state: GroupState


@dataclass
class Episode:
    """An episode that ended, as training saw it."""

    group: int
    env: int
    episode_return: float
    num_steps: int
    seed: int
    truncated: bool
