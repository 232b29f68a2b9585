"""An error on its way from one process to another: described as JSON where it was raised, made again where it is to be raised."""

from __future__ import annotations

import json
import traceback
from typing import Any

from shoal import errors
from shoal.engines.ray_security import redact_all
from shoal.environments.faults import cut
from shoal.errors import EnvironmentFault, ShoalError
from shoal.supervision.channel import MAX_MESSAGE_BYTES

_LONGEST_TEXT = 8_000  # of an error in a message: escaped, a character takes up to six bytes, and a message holds 160 KiB


def describe_error(error: BaseException) -> dict[str, Any]:
    """An error as the supervisor raises it again: class, message, report, traceback."""
    report = error.report if isinstance(error, EnvironmentFault) else {}
    trace = "".join(traceback.format_exception(error))
    return {
        "error": type(error).__name__,
        "message": cut(str(error), _LONGEST_TEXT),
        "report": {k: cut(v, _LONGEST_TEXT) if isinstance(v, str) else v for k, v in report.items()},
        "traceback": cut(trace, _LONGEST_TEXT),
    }


def encoded(facts: dict[str, Any]) -> bytes:
    """An error that fits into one message, whatever its report holds."""
    whole = json.dumps(facts, default=str).encode()
    if len(whole) <= MAX_MESSAGE_BYTES // 2:
        return whole
    return json.dumps({k: v for k, v in facts.items() if k != "report"} | {"report": {}}).encode()


def rebuild_error(facts: dict[str, Any]) -> Exception:
    """An error that another process described (`describe_error`), as this process raises it, without secrets."""
    kind = getattr(errors, facts["error"], None)
    facts = redact_all(facts)
    message, trace = facts["message"], facts.get("traceback", "")
    if kind is EnvironmentFault:
        report = dict(facts["report"])
        report["traceback"] = report.get("traceback") or trace
        return EnvironmentFault(message, report)
    if isinstance(kind, type) and issubclass(kind, ShoalError):
        return kind(message)
    return ShoalError(f"{facts['error']}: {message}\n{trace}")
