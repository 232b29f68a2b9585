"""The coordinator: who makes which rollout, into which slot, and which rollouts the next update is made of.

Pure decisions, no clock, no process, no torch: every engine drives the same coordinator with what happened and carries out what it
says. It holds what must survive the death of any other role: the ledger, each group's history, the returns of the last episodes.

    sync    iteration k: one rollout of every group with policy version k, trained in group order
    async   rollouts are ordered while fewer than two batches (or max_policy_lag of them) are unconsumed: one is learned from, one is
            made, and more would only grow stale. So even the last in the queue arrives within the bound; the oldest are trained
            first, and those that could not wait another update join the batch beyond its size

Of a run that learns from a replay, an update is: these rollouts go in, and so many optimizer steps are made (experience/limiter.py). In async
mode the learner makes steps ahead while too few rollouts are there, and actors wait once too many are; both within replay.tolerance. None is too old.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.config import StopConfig
from shoal.engines.group import Group, new_groups
from shoal.engines.placement import NOBODY, spread
from shoal.engines.plan import Episode, Lease, Plan, Restore
from shoal.engines.poison import ANY_ROW, CERTAIN, UNNAMED, WHILE_RESTORED
from shoal.engines.rollouts import episodes_in, log_entry, oldest, shares_of, steps_so_far, version_min
from shoal.experience.envelope import Fate, Identity
from shoal.experience.group_state import pack, unpack
from shoal.experience.ledger import Ledger, Shares
from shoal.experience.limiter import RateLimiter
from shoal.experience.ring import Ring
from shoal.types import Arrays, EnvironmentSpec

EPISODES_KEPT = 100  # the window of `stop.return`


@dataclass
class Coordinator:
    """`ring` is read for envelopes only. All methods are called from one thread, in the order in which things happened."""

    plan: Plan
    spec: EnvironmentSpec
    ring: Ring
    stop: StopConfig
    version: int = 0
    env_steps: int = 0

    def __post_init__(self) -> None:
        self.ledger = Ledger()
        self.returns: deque[float] = deque(maxlen=EPISODES_KEPT)
        self.lengths: deque[int] = deque(maxlen=EPISODES_KEPT)
        self.num_episodes = 0
        self.lag: Counter[int] = Counter()
        self.groups = new_groups(self.plan, self.spec, self.ring.schema)
        self.ready: list[tuple[int, Identity]] = []  # finished, in order of arrival
        self.training: list[tuple[int, Identity]] = []  # with the learner
        self.learner_busy = False  # from `next_batch` to `trained`, also where all of its batch was dropped
        self._episodes: list[Episode] = []
        self._shares: dict[Identity, Shares] = {}  # of paced rollouts that are being trained
        self.consumption: list[dict[str, Any]] = []  # since the last version, for the log that replay follows
        self.limiter = None if self.plan.rate is None else RateLimiter(self.plan.rate)
        self.optimizer_steps = 0  # of the update that the learner is at, where it learns from a replay
        self.sampled: dict[str, float] = {}  # how full the replay is, and how old what the last update sampled, by name
        self.replay_lost = False  # ever: the run went on from a checkpoint without what it had sampled from
        self.released: list[tuple[int, int]] = []

    # ---- placement -----------------------------------------------------------------------------------------------
    def place(self, actors: Sequence[int]) -> None:
        """Spread the groups evenly over `actors`, with as few moves as can be. One that is being stepped moves once its leases are done."""
        for index, target in enumerate(spread([group.target for group in self.groups], actors)):
            self.groups[index].target = target
            self._move(index, self.groups[index])

    def _move(self, index: int, group: Group) -> None:
        if group.actor == group.target or group.leased:
            return
        if group.hosted:
            self.released.append((group.actor, index))
        group.actor, group.hosted = group.target, False

    def take_released(self) -> list[tuple[int, int]]:
        """(actor, group) pairs that moved away since the last call: that actor may let go of its environments."""
        released, self.released = self.released, []
        return released

    def groups_of(self, actor: int) -> list[int]:
        """The groups that are on this actor now."""
        return [index for index, group in enumerate(self.groups) if group.actor == actor]

    def hosts(self, actor: int) -> bool:
        """Whether any group is, or is to be, on this actor."""
        return any(actor in (group.actor, group.target) for group in self.groups)

    def suspect(self, actor: int, group: int, row: int, env: int, points: int = CERTAIN) -> bool:
        """The process of `actor` broke while it stepped `group` at this place (see engines/poison.py). `lost` or `faulted` follows.
        False where it was making nothing of this group."""
        broken = self.groups[group] if 0 <= group < len(self.groups) else None
        if broken is None or broken.actor != actor or not broken.leased:
            return False
        if env == UNNAMED and row != WHILE_RESTORED and self.is_paced(group):
            row = ANY_ROW
        broken.suspects.add(next(iter(broken.leased.values())).sequence, row, env, points)
        return True

    def is_paced(self, group: int) -> bool:
        """Whether the rollout that is being made of this group is one whose environments act each on its own."""
        if not 0 <= group < len(self.groups) or not self.groups[group].leased:
            return False
        slot, identity = next(iter(self.groups[group].leased.items()))
        return self.ring.slots[slot].identity == identity and bool(self.ring.slots[slot].envelope["paced"])

    def lost(self, actor: int, broke: int = -1) -> list[Identity]:
        """An actor died: what it was making counts as such (in group `broke`: as its environment's fault) and will be made again.
        Returns the attempts lost."""
        fates = [Fate.ENVIRONMENT_FAULT if index == broke else Fate.ACTOR_DIED for index in range(len(self.groups))]
        return [i for group, fate in zip(self.groups, fates, strict=True) if group.actor == actor for i in self._give_back(group, fate)]

    def faulted(self, identity: Identity, row: int, env: int, step: tuple[int, int] | None = None) -> list[Identity]:
        """An environment broke its contract in this rollout: the group is made anew. The second time at the same step its episode
        is given up there. Returns the attempts lost.

        Args:
          step: (episode, step) of an environment of a paced group that hung, perhaps since an earlier rollout.
        """
        group = self.groups[identity.group]
        if identity not in group.leased.values():  # an old attempt's word; or it was put back before its time, and nothing was being made
            if (identity.sequence, identity.attempt) == (group.next_sequence, group.attempt) and not group.leased:
                group.hosted = False
            return []
        if step is None:
            group.suspects.add(identity.sequence, row, env)
        else:
            group.suspects.add_step(env, *step)
        return self._give_back(group, Fate.ENVIRONMENT_FAULT)

    def _give_back(self, group: Group, fate: Fate) -> list[Identity]:
        gone = list(group.leased.values())
        group.hosted = False
        for slot, identity in group.leased.items():
            self.ledger.finish(identity, self._steps_so_far(slot, identity))
            self.ledger.settle(identity, fate)
            group.free.append(slot)
        group.next_sequence -= len(gone)
        group.attempt += bool(gone)
        group.leased.clear()
        return gone

    def _steps_so_far(self, slot: int, identity: Identity) -> int:
        return steps_so_far(self.ring.slots[slot], identity, self.plan.rollout_length)

    # ---- orders --------------------------------------------------------------------------------------------------
    def next_leases(self, available: Container[int] | None = None) -> list[Lease]:
        """Every rollout that may be begun now, by the actors that are `available` (default: all)."""
        leases: list[Lease] = []
        outstanding = len(self.ready) + sum(len(g.leased) for g in self.groups)
        for index in self._order():
            group = self.groups[index]
            self._move(index, group)
            if (
                group.actor != group.target
                or group.actor < 0
                or (available is not None and group.actor not in available)
                or not group.free
                or not self._may_begin(group, outstanding + len(leases))
            ):
                continue
            identity = Identity(index, group.next_sequence, group.attempt)
            restore = None if group.hosted else group.history.state_at(group.next_sequence)
            slot = group.free.popleft()
            self.ring.slots[slot].envelope["num_rows"] = 0
            group.leased[slot] = identity
            group.hosted = True
            group.next_sequence += 1
            self.ledger.begin(identity)
            suspects, sequence = group.suspects, identity.sequence
            special = suspects.given_up(sequence), suspects.given_up_steps(), suspects.careful(sequence)
            leases.append(Lease(group.actor, slot, identity, restore, *special))
        return leases

    def next_restores(self, available: Container[int]) -> list[Restore]:
        """Groups that nobody hosts yet and whose next rollout may not be begun now: an available actor puts them back while it waits."""
        restores = []
        for index, group in enumerate(self.groups):
            if not group.hosted and not group.leased and group.actor == group.target and group.actor in available:
                group.hosted = True
                identity = Identity(index, group.next_sequence, group.attempt)
                restores.append(Restore(group.actor, identity, group.history.state_at(group.next_sequence)))
        return restores

    def _order(self) -> list[int]:
        """Groups that are behind come first; each as often as it has slots."""
        once = sorted(range(len(self.groups)), key=lambda g: (self.groups[g].next_sequence, g))
        return once * self.plan.slots_per_group

    def _may_begin(self, group: Group, outstanding: int) -> bool:
        if self.plan.mode == "sync":
            return group.next_sequence == self.version and not self.learner_busy
        return outstanding < self.plan.rollouts_ahead

    def next_batch(self) -> list[tuple[int, Identity]] | None:
        """The rollouts of the next update in training order, or None: not enough are there, or the learner is at work. Without rollouts: the
        learner is to make `optimizer_steps` from its replay alone."""
        if self.learner_busy:
            return None
        if self.plan.mode == "sync":
            if len(self.ready) < self.plan.num_groups:
                return None
            batch = sorted(self.ready, key=lambda entry: entry[1].group)
        else:
            stuck = not any(g.leased for g in self.groups)
            if not self.ready or (len(self.ready) < self.plan.batch_rollouts and not stuck):
                return self._ahead()
            batch = oldest(self.ready, max(self.plan.batch_rollouts, self._urgent()), self._version_min)
        taken = set(batch)
        self.ready = [entry for entry in self.ready if entry not in taken]
        self.training, self.learner_busy = batch, True
        self._pace(batch)
        self.consumption += [self._log_entry(slot, identity) for slot, identity in batch]
        self._episodes += [e for slot, _ in batch for e in episodes_in(self.ring.slots[slot])]
        for _, identity in batch:
            group = self.groups[identity.group]
            group.history.forget_before(identity.sequence + 1)
            group.suspects.forget_before(identity.sequence + 1)
        return batch

    def _urgent(self) -> int:
        """Rollouts that would be too old with the next update but one; none is where a replay takes them."""
        if self.limiter is not None:
            return 0
        return sum(self.version + 1 - self._version_min(slot) > self.plan.max_policy_lag for slot, _ in self.ready)

    def _pace(self, batch: list[tuple[int, Identity]]) -> None:
        """How many optimizer steps come with these rollouts. Replay follows the log in async mode, and reckons again in sync mode."""
        if self.limiter is None:
            return
        self.optimizer_steps = self.limiter.insert(sum(int(self.ring.slots[slot].envelope["num_env_steps"]) for slot, _ in batch))
        if self.plan.mode == "async":
            self.consumption.append({"optimizer_steps": self.optimizer_steps})

    def _ahead(self) -> list[tuple[int, Identity]] | None:
        """An update without rollouts, where the replay may be sampled ahead of them."""
        steps = 0 if self.limiter is None else self.limiter.ahead(self.plan.steps_of_batch)
        if not steps:
            return None
        self.training, self.learner_busy, self.optimizer_steps = [], True, steps
        self.consumption.append({"optimizer_steps": steps})
        return []

    def _version_min(self, slot: int) -> int:
        return version_min(self.ring.slots[slot])

    def _log_entry(self, slot: int, identity: Identity) -> dict[str, Any]:
        given_up = self.groups[identity.group].suspects.given_up(identity.sequence)
        return log_entry(self.ring.slots[slot], identity, self.plan.fate, given_up)

    # ---- what happened -------------------------------------------------------------------------------------------
    def check_place(self, slot: int, identity: Identity) -> None:
        """Raise ValueError where a message names a slot or a group that this run does not have."""
        if slot >= len(self.ring.slots) or identity.group >= len(self.groups):
            raise ValueError(f"slot {slot} of {len(self.ring.slots)}, group {identity.group} of {len(self.groups)}")

    def awaits(self, slot: int, identity: Identity) -> bool:
        """Whether this attempt is being made, into that slot."""
        return self.groups[identity.group].leased.get(slot) == identity

    def makes(self, actor: int, identity: Identity) -> bool:
        """Whether this actor makes this attempt, or is to make it next and puts the group back for it: what others say of it is not heard."""
        group = self.groups[identity.group]
        following = Identity(identity.group, group.next_sequence, group.attempt)
        return group.actor == actor and (identity in group.leased.values() or (identity == following and not group.leased))

    def filled(self, slot: int, identity: Identity) -> bool:
        """An actor finished a rollout. False if nobody waits for it (an old incarnation's word). Raises SchemaError for a header that cannot be."""
        group = self.groups[identity.group]
        if not self.awaits(slot, identity):
            return False
        self.ring.slots[slot].check_counts()
        del group.leased[slot]
        group.history.append(self.ring.slots[slot], keep_actions=self.spec.exact_restore and not self.spec.snapshot_bytes)
        self.ledger.finish(identity, int(self.ring.slots[slot].envelope["num_env_steps"]))
        self.ready.append((slot, identity))
        return True

    def consumed(self, dropped: dict[Identity, Fate]) -> None:
        """The learner copied its batch: the slots are free. `dropped` did not stand its checks."""
        oldest_version = self.version - self.plan.max_policy_lag if self.limiter is None else 0
        for slot, identity in self.training:
            self.groups[identity.group].free.append(slot)
            shares = shares_of(self.ring.slots[slot], oldest_version, whole=identity in dropped)
            if identity in dropped:
                self.ledger.settle(identity, dropped[identity], shares)
            elif shares is not None:
                self._shares[identity] = shares
        self.training = [(slot, i) for slot, i in self.training if i not in dropped]
        for entry in self.consumption:
            fate = dropped.get(Identity(*entry["id"])) if "id" in entry else None
            if fate is not None:
                entry["fate"] = fate.label

    def trained(self, metrics: dict[str, float]) -> list[Episode]:
        """The learner made the next version out of its batch. Returns the episodes in it.

        Where all of the batch was dropped there is no version; its episodes and its part of the log come with the next one.
        """
        self.learner_busy = False
        if not self.training and not self.optimizer_steps:
            return []
        for _, identity in self.training:
            self.ledger.settle(identity, self.plan.fate, self._shares.pop(identity, None))
        self.version += 1
        self.env_steps += int(metrics["num_env_steps"])
        for name, count in metrics.items():
            kind, _, which = name.partition("/")
            if kind == "lag":
                self.lag[int(which)] += int(count)
            elif kind == "evicted":
                self.ledger.evict(int(which), int(count))
            elif kind == "replay":
                self.sampled[which] = count
        self.training, self.consumption, self.optimizer_steps = [], [], 0
        episodes, self._episodes = self._episodes, []
        self.returns.extend(e.episode_return for e in episodes)
        self.lengths.extend(e.num_steps for e in episodes)
        self.num_episodes += len(episodes)
        return episodes

    def stop_reason(self, seconds: float) -> str | None:
        """Which stop condition is met, if any. `seconds` since the first environment step."""
        s = self.stop
        if s.return_ is not None and len(self.returns) == EPISODES_KEPT and self.mean_return >= s.return_:
            return "return"
        if s.env_steps is not None and self.env_steps >= s.env_steps:
            return "env_steps"
        if s.updates is not None and self.version >= s.updates:
            return "updates"
        if s.seconds is not None and seconds >= s.seconds:
            return "seconds"
        return None

    @property
    def replay_facts(self) -> dict[str, float]:
        """Of a run that learns from a replay: `steps` it holds of `capacity_steps`, `inserted` and `sampled` so far, `surplus` (samples beyond what is
        due), and the ages of what was sampled last, in updates and in env steps. Counts are whole numbers, means and the surplus are not."""
        if self.limiter is None:
            return {}
        told = {name: value if name.endswith("_mean") else int(value) for name, value in self.sampled.items()}
        return {"inserted": self.limiter.inserted, "sampled": self.limiter.sampled, "surplus": self.limiter.surplus, **told}

    @property
    def mean_return(self) -> float:
        """Mean return of the last episodes (at most 100); NaN before the first."""
        return float(np.mean(self.returns)) if self.returns else float("nan")

    def shut_down(self) -> None:
        """The run ends: what is still in flight is accounted for."""
        for group in self.groups:
            for slot, identity in group.leased.items():
                self.ledger.finish(identity, self._steps_so_far(slot, identity))
            group.leased.clear()
            group.hosted = False
        for identity in self.ledger.in_flight:
            self.ledger.settle(identity, Fate.SHUTDOWN)

    # ---- checkpoints ---------------------------------------------------------------------------------------------
    def get_state(self) -> tuple[Arrays, dict[str, Any]]:
        """The state between two updates; what is ready or being made is left out and will be made again."""
        arrays: Arrays = {}
        groups = []
        for index, group in enumerate(self.groups):
            state = group.history.state_at(group.history.sequence)
            arrays |= {f"group/{index}/{name}": value for name, value in pack(state).items()}
            groups.append({"sequence": group.history.sequence, "attempt": group.attempt})
        arrays["returns"] = np.array(self.returns, np.float64)
        arrays["lengths"] = np.array(self.lengths, np.int64)
        facts = {
            "version": self.version,
            "env_steps": self.env_steps,
            "num_episodes": self.num_episodes,
            "consumption": list(self.consumption),
            "lag": {str(k): v for k, v in self.lag.items()},
            "ledger": self.ledger.get_state(),
            "groups": groups,
        }
        if self.limiter is not None:
            facts["limiter"] = self.limiter.get_state()
            facts["replay_lost"] = self.replay_lost
            facts["sampled"] = dict(self.sampled)
        return arrays, facts

    def set_state(self, arrays: Arrays, facts: dict[str, Any], *, live: bool = False) -> None:
        """Go on from `get_state`. live: this coordinator goes back to it, and its ledger says so; all actors must be gone or idle."""
        if live:
            for group in self.groups:
                for slot, identity in group.leased.items():
                    self.ledger.finish(identity, self._steps_so_far(slot, identity))
            self.ledger.roll_back(facts["ledger"])
        else:
            self.ledger.set_state(facts["ledger"])
        attempts = [group.attempt for group in self.groups]
        actors = [group.actor for group in self.groups]
        self.groups = new_groups(self.plan, self.spec, self.ring.schema)
        for index, (group, saved) in enumerate(zip(self.groups, facts["groups"], strict=True)):
            prefix = f"group/{index}/"
            mine = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
            group.history.reset_to(saved["sequence"], unpack(mine))
            group.next_sequence = saved["sequence"]
            group.attempt = max(saved["attempt"], attempts[index]) + 1
            group.actor = group.target = actors[index] if live else NOBODY
        self.ready, self.training, self._episodes, self._shares = [], [], [], {}
        self.learner_busy, self.optimizer_steps = False, 0
        if self.limiter is not None:
            self.limiter.set_state(facts["limiter"])
            self.replay_lost = bool(facts.get("replay_lost", False))
            self.sampled = {name: float(value) for name, value in facts.get("sampled", {}).items()}
            if not facts.get("holds_replay", True):
                self.replay_lost |= self.limiter.inserted > 0
                self.limiter.begin_again()
                self.sampled = {}
                self.ledger.evict_all()
        self.consumption = list(facts.get("consumption", []))
        self.version, self.env_steps = facts["version"], facts["env_steps"]
        self.num_episodes = facts["num_episodes"]
        self.lag = Counter({int(k): v for k, v in facts["lag"].items()})
        self.returns = deque(arrays["returns"].tolist(), maxlen=EPISODES_KEPT)
        self.lengths = deque(arrays["lengths"].tolist(), maxlen=EPISODES_KEPT)

    def number_attempts_from(self, attempt: int) -> None:
        """No attempt is numbered below this: a part of the run that was killed keeps the names of what it made and lost."""
        for group in self.groups:
            group.attempt = max(group.attempt, attempt)
