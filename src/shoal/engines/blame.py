"""What is said of an environment that took its process with it: it hung, or ended it."""

from __future__ import annotations

from shoal.config import EnvConfig
from shoal.engines.fleet import Death
from shoal.errors import EnvironmentFault
from shoal.types import Activity, ActivityRecord

HANGS = "hangs in its environment"  # why the supervisor killed a process


def _facts(kind: str, record: ActivityRecord) -> dict[str, object]:
    return {"kind": kind, "group": record.group, "row": record.row} | ({} if record.env < 0 else {"env": record.env})


def hang(env: EnvConfig, record: ActivityRecord, since: str) -> EnvironmentFault:
    """`since`: in what and for how long."""
    limit = f"allowed are {env.step_timeout_seconds:g} s (--env.step-timeout-seconds)"
    return EnvironmentFault(f"environment {env.id}: group {record.group} has been {since}, {limit}", _facts("hang", record))


def crash(env: EnvConfig, death: Death, log_tail: str) -> EnvironmentFault:
    """`log_tail`: where faulthandler wrote the stacks of a segmentation fault."""
    record = death.record
    where = "while it was put back, of" if record.activity is Activity.RESTORING else f"in a step (row {record.row}) of"
    named = "" if record.env < 0 else f", environment {record.env}"
    message = f"environment {env.id}: its process ended {where} group {record.group}{named}: {death.how}.\n{log_tail}"
    return EnvironmentFault(message, {**_facts("crash", record), "how": death.how, "traceback": log_tail})
