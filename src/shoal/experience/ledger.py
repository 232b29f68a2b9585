"""The ledger: what became of every rollout.

At any moment, per group and in total: produced = trained + replayed + dropped (by reason) + in flight, in rollouts and in environment steps.
Replayed is what went into a replay; what was evicted from it since is counted beside, and is a part of it. In-flight rollouts are listed by identity; nothing here is computed as a remainder, so the law can be checked.
Steps count as produced when a rollout is finished, or when it is found unfinished at its actor's death.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from shoal.errors import LedgerError
from shoal.experience.envelope import CONSUMED, REMADE, Fate, Identity
from shoal.types import Array


class Shares(NamedTuple):
    """What each environment of a group contributed to a rollout, in steps: int64 [B] each."""

    trained_B: Array
    late_B: Array  # left out, since they were too old


@dataclass
class _Account:
    """Totals of one group."""

    produced_rollouts: int = 0
    produced_steps: int = 0
    rollouts: dict[Fate, int] = field(default_factory=lambda: defaultdict(int))
    steps: dict[Fate, int] = field(default_factory=lambda: defaultdict(int))
    late_steps: int = 0  # of rollouts that were trained without them: dropped as over_lag
    evicted_steps: int = 0  # of the replayed ones, those that the replay holds no more
    shares: Shares | None = None  # of a group whose environments act each on its own
    next_sequence: int = 0  # the first that was never begun
    final: int = 0  # high-water mark: every sequence below has one final attempt
    final_ahead: set[int] = field(default_factory=set)  # final ones above the mark
    begun: set[int] = field(default_factory=set)  # those with an attempt in flight


class Ledger:
    """Owned by whoever decides about rollouts; told of every begin, finish and end of an attempt."""

    def __init__(self) -> None:
        self._accounts: dict[int, _Account] = defaultdict(_Account)
        self._in_flight: dict[Identity, int] = {}  # steps of the finished ones, 0 before
        self.listener: Callable[[Identity, Fate, int], None] | None = None  # told of every attempt's end, with its steps

    # ---- what happens to a rollout -------------------------------------------------------------------------------
    def begin(self, identity: Identity) -> None:
        """An attempt was ordered. Sequences of a group come without gaps; an open sequence may come again, attempt raised."""
        account = self._accounts[identity.group]
        if identity.sequence > account.next_sequence:
            raise LedgerError(f"group {identity.group}: sequence {identity.sequence} begun before {account.next_sequence}")
        if identity.sequence < account.final or identity.sequence in account.final_ahead:
            raise LedgerError(f"group {identity.group}: sequence {identity.sequence} begun again after a final attempt")
        if identity.sequence in account.begun:
            raise LedgerError(f"group {identity.group}: two attempts of sequence {identity.sequence} in flight")
        account.next_sequence = max(account.next_sequence, identity.sequence + 1)
        account.produced_rollouts += 1
        account.begun.add(identity.sequence)
        self._in_flight[identity] = 0

    def finish(self, identity: Identity, num_env_steps: int) -> None:
        """The attempt was filled; its steps exist from now on."""
        if identity not in self._in_flight:
            raise LedgerError(f"group {identity.group}: {identity} finished, but is not in flight")
        self._accounts[identity.group].produced_steps += num_env_steps - self._in_flight[identity]
        self._in_flight[identity] = num_env_steps

    def settle(self, identity: Identity, fate: Fate, shares: Shares | None = None) -> None:
        """The attempt came to its end.

        Args:
          shares: by environment, where they acted each on its own. Late steps of a rollout that was trained count as dropped.
        """
        if identity not in self._in_flight:
            raise LedgerError(f"group {identity.group}: {identity} is to be {fate.label}, but is not in flight: a duplicate")
        steps = self._in_flight.pop(identity)
        account = self._accounts[identity.group]
        account.begun.discard(identity.sequence)
        account.rollouts[fate] += 1
        account.steps[fate] += steps
        if shares is not None:
            self._share(identity, account, fate, steps, shares)
        if self.listener is not None:
            self.listener(identity, fate, steps)
        if fate not in REMADE:
            account.final_ahead.add(identity.sequence)
            while account.final in account.final_ahead:
                account.final_ahead.discard(account.final)
                account.final += 1

    def evict(self, group: int, num_env_steps: int) -> None:
        """So many replayed steps of a group left the replay."""
        account = self._accounts[group]
        account.evicted_steps += num_env_steps
        if account.evicted_steps > account.steps[Fate.REPLAYED]:
            raise LedgerError(
                f"group {group}: {account.evicted_steps} steps evicted from the replay, {account.steps[Fate.REPLAYED]} went into it"
            )

    def evict_all(self) -> None:
        """The replay is gone, and with it all that it held."""
        for account in self._accounts.values():
            account.evicted_steps = account.steps[Fate.REPLAYED]

    @staticmethod
    def _share(identity: Identity, account: _Account, fate: Fate, steps: int, shares: Shares) -> None:
        late, trained = int(shares.late_B.sum()), int(shares.trained_B.sum())
        if late + trained != steps:
            raise LedgerError(f"group {identity.group}: {identity} has {steps} steps, {trained} trained and {late} late are accounted for")
        if fate is Fate.TRAINED:
            account.steps[fate] -= late
            account.late_steps += late
        before = account.shares
        account.shares = shares if before is None else Shares(before.trained_B + shares.trained_B, before.late_B + shares.late_B)

    def roll_back(self, mark: dict[str, Any]) -> None:
        """Return to a checkpoint's state: what was trained since counts as rolled back, its sequences are open again.

        Args:
          mark: `get_state()` of the checkpoint. What was produced and dropped since then stays counted.
        """
        for identity in list(self._in_flight):
            self.settle(identity, Fate.ROLLED_BACK)
        before = Ledger()
        before.set_state(mark)
        for group, account in self._accounts.items():
            old = before._accounts[group]
            for undone in (Fate.TRAINED, Fate.REPLAYED, Fate.OVER_LAG, Fate.INVALID):
                for now, then in ((account.rollouts, old.rollouts), (account.steps, old.steps)):
                    now[Fate.ROLLED_BACK] += now[undone] - then[undone]
                    now[undone] = then[undone]
            account.steps[Fate.ROLLED_BACK] += account.late_steps - old.late_steps
            account.late_steps, account.shares, account.evicted_steps = old.late_steps, old.shares, old.evicted_steps
            account.next_sequence = account.final = old.final
            account.final_ahead = set()

    def take_over(self, lost: Mapping[tuple[int, Fate], tuple[int, int]]) -> None:
        """Book what a part of the run that was killed made after this state, as the log of lost attempts knows it.

        Args:
          lost: (rollouts, env steps) by group and fate, of the whole run. What this state counts already is not counted again.
        """
        for (group, fate), (num_rollouts, num_env_steps) in lost.items():
            account = self._accounts[group]
            more_rollouts = max(0, num_rollouts - account.rollouts[fate])
            more_steps = max(0, num_env_steps - account.steps[fate])
            account.rollouts[fate] += more_rollouts
            account.steps[fate] += more_steps
            account.produced_rollouts += more_rollouts
            account.produced_steps += more_steps

    # ---- the law -------------------------------------------------------------------------------------------------
    @property
    def final(self) -> dict[int, int]:
        """By group, the first sequence without a final attempt."""
        return {group: account.final for group, account in self._accounts.items()}

    @property
    def in_flight(self) -> list[Identity]:
        return list(self._in_flight)

    def check(self) -> None:
        """Raise LedgerError where the law does not hold, naming the group."""
        for group, account in self._accounts.items():
            mine = {i: s for i, s in self._in_flight.items() if i.group == group}
            rollouts = sum(account.rollouts.values()) + len(mine)
            steps = sum(account.steps.values()) + account.late_steps + sum(mine.values())
            if rollouts != account.produced_rollouts:
                raise LedgerError(f"group {group}: {account.produced_rollouts} rollouts produced, {rollouts} accounted for")
            if steps != account.produced_steps:
                raise LedgerError(f"group {group}: {account.produced_steps} steps produced, {steps} accounted for")

    def balance(self) -> dict[str, Any]:
        """Totals in environment steps: {produced, trained, dropped: {reason: n}, in_flight}; of a run with a replay also {replayed, evicted}."""
        evicted = sum(a.evicted_steps for a in self._accounts.values())
        rows = [(a.produced_steps, _steps_by_fate(a)) for a in self._accounts.values()]
        return self._summed(rows, sum(self._in_flight.values()), evicted)

    def balance_rollouts(self) -> dict[str, Any]:
        """Totals in rollouts."""
        return self._summed([(a.produced_rollouts, a.rollouts) for a in self._accounts.values()], len(self._in_flight))

    def by_group(self) -> dict[int, dict[str, Any]]:
        """Environment steps per group, with the shares of what it produced that were trained, and replayed. Where its environments act each on its
        own, also `by_environment`: {trained, late: [B]}."""
        out = {}
        for group, account in sorted(self._accounts.items()):
            waiting = sum(s for i, s in self._in_flight.items() if i.group == group)
            row = self._summed([(account.produced_steps, _steps_by_fate(account))], waiting, account.evicted_steps)
            for fate in sorted(CONSUMED):
                if fate.label in row:
                    row[f"{fate.label}_share"] = row[fate.label] / row["produced"] if row["produced"] else 0.0
            if account.shares is not None:
                row["by_environment"] = _listed(account.shares)
            out[group] = row
        return out

    @staticmethod
    def _summed(rows: list[tuple[int, dict[Fate, int]]], in_flight: int, evicted: int | None = None) -> dict[str, Any]:
        total: dict[Fate, int] = defaultdict(int)
        for _, fates in rows:
            for fate, count in fates.items():
                total[fate] += count
        dropped = {f.label: n for f, n in sorted(total.items()) if n and f not in CONSUMED}
        summed = {
            "produced": sum(produced for produced, _ in rows),
            "trained": total[Fate.TRAINED],
            "dropped": dropped,
            "in_flight": in_flight,
        }
        if total[Fate.REPLAYED]:
            summed["replayed"] = total[Fate.REPLAYED]
            if evicted is not None:
                summed["evicted"] = evicted
        return summed

    # ---- checkpoints ---------------------------------------------------------------------------------------------
    def get_state(self) -> dict[str, Any]:
        """JSON-able. What is in flight is left out, with its steps: a resumed run makes those sequences again."""
        out: dict[str, Any] = {}
        for group, a in self._accounts.items():
            waiting = [s for i, s in self._in_flight.items() if i.group == group]
            out[str(group)] = {
                "produced_rollouts": a.produced_rollouts - len(waiting),
                "produced_steps": a.produced_steps - sum(waiting),
                "rollouts": {f.label: n for f, n in a.rollouts.items()},
                "steps": {f.label: n for f, n in a.steps.items()},
                "final": a.final,
            }
            if a.evicted_steps:
                out[str(group)]["evicted_steps"] = a.evicted_steps
            if a.shares is not None:
                out[str(group)] |= {"late_steps": a.late_steps, "by_environment": _listed(a.shares)}
        return out

    def set_state(self, state: dict[str, Any]) -> None:
        self._accounts.clear()
        self._in_flight.clear()
        for group, row in state.items():
            account = self._accounts[int(group)]
            account.produced_rollouts = row["produced_rollouts"]
            account.produced_steps = row["produced_steps"]
            for name in ("rollouts", "steps"):
                getattr(account, name).update({Fate[k.upper()]: n for k, n in row[name].items()})
            account.next_sequence = account.final = row["final"]
            account.late_steps, by = row.get("late_steps", 0), row.get("by_environment")
            account.evicted_steps = row.get("evicted_steps", 0)
            account.shares = None if by is None else Shares(np.array(by["trained"], np.int64), np.array(by["late"], np.int64))


def _steps_by_fate(account: _Account) -> dict[Fate, int]:
    return {**account.steps, Fate.OVER_LAG: account.steps.get(Fate.OVER_LAG, 0) + account.late_steps}


def _listed(shares: Shares) -> dict[str, list[int]]:
    return {"trained": shares.trained_B.tolist(), "late": shares.late_B.tolist()}
