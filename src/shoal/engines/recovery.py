"""How long the run was without somebody: from a fault to the first rollout (or update) of the one that came in place. Pure, told the time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Absence:
    since: float
    after: str
    restoring_seconds: float = 0.0
    ready_seconds: float | None = None


@dataclass
class Recoveries:
    """Whoever is away, by (role, index). A fault on the way back belongs to the absence that is under way."""

    _away: dict[tuple[str, int], _Absence] = field(default_factory=dict)

    def lost(self, role: str, index: int, after: str, now: float) -> None:
        """`after`: what happened, in words. `now` is when it was noticed."""
        self._away.setdefault((role, index), _Absence(now, after))

    def restored(self, role: str, index: int, seconds: float) -> None:
        """So long it took to put a group back (an episode is stepped again), which is counted apart."""
        if absence := self._away.get((role, index)):
            absence.restoring_seconds += seconds

    def ready(self, role: str, index: int, now: float) -> None:
        """It runs, and waits for its first order."""
        if absence := self._away.get((role, index)):
            absence.ready_seconds = now - absence.since

    def back(self, role: str, index: int, now: float) -> dict[str, Any] | None:
        """It made its first rollout, or update. Returns the facts of the event `recovered`; None where it was not away."""
        absence = self._away.pop((role, index), None)
        if absence is None:
            return None
        seconds = now - absence.since
        restoring_seconds = min(absence.restoring_seconds, seconds)
        facts: dict[str, Any] = {
            "role": role, "index": index, "after": absence.after, "seconds": seconds, "restoring_seconds": restoring_seconds
        }  # fmt: skip
        return facts if absence.ready_seconds is None else {**facts, "ready_seconds": absence.ready_seconds}

    def forget(self, *roles: str) -> None:
        """All of these are made anew for another reason."""
        self._away = {who: absence for who, absence in self._away.items() if who[0] not in roles}
