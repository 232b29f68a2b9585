"""Watching: which process is stopped, hangs in its environment, or is stuck anywhere else. Pure: told what is seen, it says what is wrong.

Every wait of a role has its limit here, so that none is without end:

    stopped (SIGSTOP)                STOPPED_SECONDS; shorter pulses only slow it down
    the steps of a group's row       env.step_timeout_seconds; the reset of each episode that ended has it to itself, and what is stepped after it too
    a call that puts it back         the same, and to close it
    choosing actions                 INFER_SECONDS; of an actor that has a server choose, START_SECONDS more, in which the server is made anew
    starting                         START_SECONDS
    an order that is not taken up    UNHEARD_SECONDS
    an update                        learner.timeout_seconds; of a learner that waits for another, SHARE_SECONDS more
    a checkpoint                     SAVE_SECONDS
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shoal.engines.traffic import Delivery
from shoal.types import CLOSING, Activity, ActivityRecord

STOPPED_SECONDS = 0.4
INFER_SECONDS = 60.0
START_SECONDS = 120.0
UNHEARD_SECONDS = 30.0
SAVE_SECONDS = 60.0
SHARE_SECONDS = 5.0  # more for a learner that waits for another: that one is to blame


@dataclass(frozen=True)
class Seen:
    """One process at one moment.

    Attributes:
      state: the kernel's letter (supervision.processes.process_state). record: of its own incarnation, or an older one's while it starts.
      up_seconds: since its start was ordered. order_seconds: since its last order, None where it has none that is not answered.
      saving: that order is a checkpoint. served: it has a server choose its actions. delivery: what it is told, where that has been on its way for long.
    """

    name: str
    index: int
    incarnation: int
    state: str | None
    record: ActivityRecord
    up_seconds: float
    order_seconds: float | None = None
    saving: bool = False
    served: bool = False
    delivery: Delivery | None = None


@dataclass(frozen=True)
class Verdict:
    """What is wrong. `environment`: it hangs in an environment's code, which is that environment's fault."""

    kind: Literal["stopped", "environment", "stuck"]
    reason: str
    limit_seconds: float = 0.0


@dataclass
class Watch:
    """Looks at processes a few times a second. Keeps only since when which one stands still."""

    step_timeout_seconds: float
    update_timeout_seconds: float
    _stopped: dict[tuple[str, int, int], tuple[float, int]] = field(default_factory=dict)  # -> (since, beats then)

    def look(self, seen: Seen, now: float) -> Verdict | None:
        """`now`: any clock that only goes forward, in seconds."""
        if self._stands_still(seen, now):
            return Verdict("stopped", "was stopped")
        record = seen.record
        if record.incarnation != seen.incarnation or record.activity is Activity.STARTING:
            late = seen.up_seconds > START_SECONDS
            return Verdict("stuck", f"was not there within {START_SECONDS:g} s of its start") if late else None
        if seen.name == "inference":
            return self._inference(seen, record)
        return self._actor(seen, record) if seen.name == "actor" else self._learner(seen)

    def _stands_still(self, seen: Seen, now: float) -> bool:
        """One that has nothing to do is left alone: it may be in the middle of a pulse, and shows itself once it is given an order."""
        who = (seen.name, seen.index, seen.incarnation)
        starting = seen.record.incarnation != seen.incarnation or seen.record.activity is Activity.STARTING
        if seen.state != "T" or (seen.order_seconds is None and not starting):
            self._stopped.pop(who, None)
            return False
        since, beats = self._stopped.setdefault(who, (now, seen.record.num_beats))
        if seen.record.num_beats != beats:  # it ran between two looks: a pulse
            self._stopped[who] = (now, seen.record.num_beats)
            return False
        return now - since >= STOPPED_SECONDS

    def _actor(self, seen: Seen, record: ActivityRecord) -> Verdict | None:
        if not record.whole:
            return None
        age, limit = record.age_seconds, self.step_timeout_seconds
        if record.activity is Activity.STEPPING and age > limit:
            where = f"row {record.row}" if record.env < 0 else f"row {record.row}, environment {record.env}"
            return Verdict("environment", f"in one step ({where}) for {age:.1f} s", limit)
        if record.activity is Activity.RESTORING and age > limit:
            return Verdict("environment", f"being {'closed' if record.row == CLOSING else 'put back'} for {age:.1f} s", limit)
        if record.activity is Activity.INFERRING and age > INFER_SECONDS + (START_SECONDS if seen.served else 0.0):
            return Verdict("stuck", f"has been choosing actions for {age:.0f} s")
        unheard = record.activity is Activity.WAITING_FOR_LEASE and seen.order_seconds is not None
        if unheard and min(age, seen.order_seconds or 0.0) > UNHEARD_SECONDS:
            return Verdict("stuck", f"has not taken up an order for {age:.0f} s")
        return None

    def _inference(self, seen: Seen, record: ActivityRecord) -> Verdict | None:
        if not record.whole:
            return None
        if record.activity is Activity.INFERRING and record.age_seconds > INFER_SECONDS:
            return Verdict("stuck", f"has been choosing actions for {record.age_seconds:.0f} s")
        waits = record.activity is Activity.WAITING_FOR_BATCH
        if waits and min(record.age_seconds, seen.order_seconds or 0.0) > UNHEARD_SECONDS:
            return Verdict("stuck", f"has not taken up a question for {record.age_seconds:.0f} s")
        return None

    def _learner(self, seen: Seen) -> Verdict | None:
        limit = SAVE_SECONDS if seen.saving else self.update_timeout_seconds
        grace = SHARE_SECONDS if seen.record.activity is Activity.SHARING else 0.0
        if seen.order_seconds is None or seen.order_seconds <= limit + grace:
            return None
        return Verdict("stuck", f"did not {'save' if seen.saving else 'finish an update'} within {limit:g} s")
