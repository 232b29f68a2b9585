"""Episodes in this process, each call of an environment within its limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.evaluation import LoadedPolicy


def play(policy: LoadedPolicy, **how: Any) -> dict[str, Any]:
    """What the policy is worth; `how` as of `shoal.evaluation.evaluate`."""
    from shoal.engines.alarm import CallClock, limited
    from shoal.evaluation import evaluate

    clock = CallClock()
    with limited(clock.age_seconds, policy.env_config.step_timeout_seconds):
        return evaluate(policy, tell=clock, **how)
