"""Environment faults as messages: what was asked, what came, where, with which seed and action, and the original traceback."""

from __future__ import annotations

import traceback
from typing import Any, Literal

import numpy as np

from shoal.errors import EnvironmentFault

# What an environment may raise and still be reported as its fault: sys.exit() in a simulator, too, but not the user's Ctrl-C.
RAISED = (Exception, SystemExit)


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return repr(value)


FaultKind = Literal["raised", "api", "reward", "flag", "structure", "shape", "dtype", "range", "mask", "not_finite"]


def environment_fault(
    kind: FaultKind,
    what: str,
    *,
    environment: str,
    group: int,
    env: int,
    step: int,
    seed: int,
    last_action: Any = None,
    field: str = "",
    expected: str = "",
    actual: str = "",
    hint: str = "",
    error: BaseException | None = None,
) -> EnvironmentFault:
    """The exception for one fault of one environment: its kind, and in words; `what` is the first line, such as `step() raised ValueError`."""
    lines = [f"{environment}: {what}", f"  where: group {group}, environment {env}, step {step} of its episode, seed {seed}"]
    if field:
        lines.append(f"  field: {field}")
    if expected:
        lines += [f"  expected: {expected}", f"  actual: {actual}"]
    if last_action is not None:
        lines.append(f"  last action: {plain(last_action)!r:.200}")
    if hint:
        lines.append(f"  hint: {hint}")
    trace = "".join(traceback.format_exception(error)) if error is not None else ""
    if trace:
        lines += ["  traceback:", *("    " + line for line in trace.rstrip().splitlines())]
    report: dict[str, object] = {
        "kind": kind,
        "what": what,
        "environment": environment,
        "group": group,
        "env": env,
        "step": step,
        "field": field,
        "expected": expected,
        "actual": actual,
        "seed": seed,
        "last_action": plain(last_action),
        "hint": hint,
        "traceback": trace,
    }
    return EnvironmentFault("\n".join(lines), report)
