"""Environment faults as messages: what was asked, what came, where, with which seed and action, and the original traceback."""

from __future__ import annotations

import signal
import traceback
from typing import Any, Literal

import numpy as np

from shoal.errors import EnvironmentFault


def environment_errors() -> tuple[type[BaseException], ...]:
    """What may come out of an environment and be its fault: sys.exit() in a simulator, too, but not the user's Ctrl-C. Roles ignore SIGINT: there all
    is its own, a KeyboardInterrupt too."""
    return (BaseException,) if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else (Exception, SystemExit)


class TookTooLong(TimeoutError):
    """Raised inside of a call of an environment, by whoever limits how long it may take (engines/alarm.py)."""

    def __init__(self, seconds: float, limit_seconds: float) -> None:
        super().__init__(f"has not returned for {seconds:.1f} s, allowed are {limit_seconds:g} s (--env.step-timeout-seconds)")
        self.seconds, self.limit_seconds = seconds, limit_seconds


_LONGEST_TEXT = 6_000  # characters of one text in a report: a report fits into one message between processes
_MOST_NUMBERS = 200  # of an action in a report


def plain(value: Any) -> Any:
    """A value as JSON can hold it; arrays of many numbers in short."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist() if np.size(value) <= _MOST_NUMBERS else cut(repr(value))
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return cut(repr(value))


def words_of(error: BaseException) -> str:
    """What an error says, as `Type: words`; one whose own `__str__` raises says that."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as again:
        return f"{type(error).__name__} (whose __str__ raises {type(again).__name__})"


def cut(text: str, longest: int = _LONGEST_TEXT) -> str:
    """A text that loses its middle where it is long."""
    return text if len(text) <= longest else f"{text[: longest // 2]}\n...\n{text[-longest // 2 :]}"


FaultKind = Literal[
    "raised", "hang", "died", "api", "reward", "flag", "structure", "shape", "dtype", "range", "mask", "not_finite", "snapshot"
]  # fmt: skip


# What to do, where whoever found the fault knows nothing better.
_HINTS: dict[str, str] = {
    "raised": "the traceback shows where; mend it there, or end the episode instead of raising",
    "hang": "raise --env.step-timeout-seconds if it is only slow; else give every wait inside a limit of its own",
    "died": "nothing in an environment may end its process (os._exit, a crash in native code, memory that runs out)",
    "api": "reset() returns (observation, info), step() returns (observation, reward, terminated, truncated, info)",
    "reward": "return one finite number; look for a division by zero or an overflow",
    "flag": "return bool(...)",
    "structure": "observation and observation_space must have the same keys and parts",
    "shape": "observation and observation_space must agree",
    "range": "the value is outside of its space",
    "mask": "info['action_mask'] or observation['action_mask'] needs one entry for each choice, and one that is allowed",
    "not_finite": "look for a division by zero or an overflow; clip, or end the episode there",
    "snapshot": "snapshot() returns bytes, at most snapshot_bytes of them, and restore_snapshot(bytes) returns (observation, info)",
}


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
    stack: str = "",
) -> EnvironmentFault:
    """The exception for one fault of one environment: its kind, and in words; `what` is the first line, such as `step() raised ValueError`.

    step: of its episode, counted from 1; 0 in the reset.

    error: what it raised; or stack: where a process hung or died, as faulthandler wrote it.
    """
    what, actual, hint = cut(what, 1_000), cut(actual, 1_000), hint or _HINTS.get(kind, "")
    lines = [f"{environment}: {what}", f"  where: group {group}, environment {env}, step {step} of its episode, seed {seed}"]
    if field:
        lines.append(f"  field: {field}")
    if expected:
        lines += [f"  expected: {expected}", f"  actual: {actual}"]
    if last_action is not None:
        lines.append(f"  last action: {plain(last_action)!r:.200}")
    if hint:
        lines.append(f"  hint: {hint}")
    trace = stack or (cut("".join(traceback.format_exception(error))) if error is not None else "")
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


def raised_in(call: str, error: BaseException, kind: FaultKind = "raised") -> dict[str, Any]:
    """Kind and words, for `environment_fault`, of what came out of a call."""
    if isinstance(error, TookTooLong):
        what = f"{call} has not returned for {error.seconds:.1f} s"
        return {
            "kind": "hang",
            "what": what,
            "expected": f"at most {error.limit_seconds:g} s",
            "actual": f"{error.seconds:.1f} s",
            "error": error,
        }
    return {"kind": kind, "what": f"{call} raised {words_of(error)}", "error": error}


def not_fitting(what: str, values: np.ndarray[Any, Any]) -> tuple[str, str]:
    """The words, and what is expected, for numbers that are not finite, or not in float32."""
    if np.isfinite(values).all():
        return f"the {what} does not fit into float32, in which everything is learnt", f"at most {np.finfo(np.float32).max:.2g} in size"
    return f"the {what} is not finite", "finite numbers"


def is_reset(result: Any) -> bool:
    """Whether it is what `reset` returns, as far as its form goes: (observation, info)."""
    return isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)


def wrong_result(call: str, expected: str, result: Any) -> tuple[str, str, str, str, str]:
    """What, field, expected, actual and hint of the fault of a call that returned something else."""
    if isinstance(result, tuple):
        actual = f"a tuple of {len(result)}"
        hint = "this is the old Gym interface: split done into terminated and truncated" if len(result) == 4 else ""
        if len(result) == expected.count(",") + 1 and not isinstance(result[-1], dict):
            actual += f" whose info is {type(result[-1]).__name__}"
            hint = "info is a dict, an empty one where there is nothing to say"
    else:
        actual, hint = type(result).__name__, "return (observation, info)" if call == "reset()" else ""
    return f"{call} returned something else than {expected}", call, expected, actual, hint
