"""Whether an environment is to blame for a process that died, hangs or was stopped; where it is, that is said, and remembered for the next attempt."""

from __future__ import annotations

from shoal.engines.poison import CERTAIN, DOUBTFUL, WHILE_RESTORED
from shoal.engines.process import Death, Process
from shoal.engines.running import Running
from shoal.engines.watch import Verdict
from shoal.types import CLOSING, Activity, ActivityRecord

HANGS = "hangs in its environment"  # why the supervisor killed a process
STOPS = "was stopped by its environment"
_IN_ENVIRONMENT = (Activity.STEPPING, Activity.RESTORING)
CRASH_HINT = {"hint": "nothing in an environment may end its process (os._exit, a crash in native code)"}
STOP_HINT = {"hint": "nothing in an environment may stop its process (SIGSTOP)"}
HANG_HINT = {"hint": "raise --env.step-timeout-seconds if it is only slow; else give every wait inside a limit of its own"}


class Blame:
    """Raises EnvironmentFault from each method where the fault is one that ends the run (engines/environment_faults.py)."""

    def __init__(self, running: Running) -> None:
        self._fleet, self._coordinator, self._faults = running.fleet, running.coordinator, running.faults

    def of_death(self, actor: Process, death: Death) -> int:
        """The group whose environment ended the actor's process; -1 where none did, or that is not certain."""
        record = death.record
        if not (record.whole and record.incarnation == actor.incarnation - 1 and self._in_environment(record)):
            return -1
        certain = death.crashed or death.why in (HANGS, STOPS)
        suspected = self._suspect(actor, record, certain)
        if death.crashed:
            self._say("died", f"its process ended in {_call(record)}: {death.how}", record, CRASH_HINT, self._fleet.log_tail(actor))
        return suspected if certain else -1

    def of_verdict(self, process: Process, record: ActivityRecord, verdict: Verdict) -> str:
        """Why a process that was found wanting is to be killed."""
        if verdict.kind == "environment":
            how = {"expected": f"at most {verdict.limit_seconds:g} s", "actual": f"{record.age_seconds:.1f} s", **HANG_HINT}
            what = f"{_call(record)} has not returned for {record.age_seconds:.1f} s"
            self._say("hang", what, record, how, self._fleet.stack_of(process), record.age_seconds)
            return HANGS
        if verdict.kind == "stopped" and self._in_environment(record) and self._fleet.stopped_itself(process):
            self._say("hang", f"its process stopped itself (SIGSTOP) in {_call(record)}", record, STOP_HINT, "", record.age_seconds)
            return STOPS
        return verdict.reason

    def _in_environment(self, record: ActivityRecord) -> bool:
        """Whether code of an environment ran: that of a paced group also runs while actions are chosen for others of it."""
        infers = record.activity is Activity.INFERRING
        return record.activity in _IN_ENVIRONMENT or (infers and self._coordinator.is_paced(record.group))

    def _suspect(self, actor: Process, record: ActivityRecord, certain: bool) -> int:
        """Remember where its process ended. Returns the group, -1 where it was making none."""
        row = WHILE_RESTORED if record.activity is Activity.RESTORING else record.row
        known = self._coordinator.suspect(actor.index, record.group, row, record.env, CERTAIN if certain else DOUBTFUL)
        return record.group if known else -1

    def _say(self, kind: str, what: str, record: ActivityRecord, how: dict[str, str], stack: str, seconds_ago: float = 0.0) -> None:
        fault = self._faults.lost(kind, what, (record.group, record.row, record.env), how, stack)
        self._faults.happened(fault, self._faults.place_of(record.group), seconds_ago)


def _call(record: ActivityRecord) -> str:
    """Which of the environment's calls a process is in."""
    if record.activity is not Activity.RESTORING:
        return "step()"
    return "close()" if record.row == CLOSING else "making it, reset() or a step while it was put back"
