"""How a training ended, as it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.config import RunConfig
from shoal.engines.session import Session
from shoal.monitoring.recorder import Recorder, lag_summary


def result_of(session: Session, outcome: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The object that `--json` prints."""
    c = session.coordinator
    seconds = session.seconds
    mean, p99, largest = lag_summary(c.lag)
    return {
        "run": session.elsewhere.url or str(directory),
        "reason": outcome["reason"],
        "env_steps": c.env_steps,
        "updates": c.version,
        "seconds": seconds,
        "env_steps_per_second": c.env_steps / seconds if seconds > 0 else 0.0,
        "mean_return": None if not c.returns else c.mean_return,
        "policy_version": c.version,
        "weights_sha256": outcome["weights_sha256"],
        "ledger": c.ledger.balance(),
        "lag": {"mean": mean, "p99": p99, "max": largest},
        "restarts": session.restarts,
        "skipped_steps": session.skipped_steps,
        **({"replay": c.replay_facts} if c.limiter is not None else {}),
        **({"network": network} if (network := session.network()) else {}),
    }


def is_evaluated(config: RunConfig, result: dict[str, Any]) -> bool:
    """Whether the final policy is to play."""
    return config.evaluation.episodes > 0 and result["reason"] != "interrupted"


def interrupted(recorder: Recorder, *, resumed: bool) -> str:
    """What an end at once leaves."""
    if recorder.began:
        return "interrupted: ended at once; `shoal resume` goes on from the newest checkpoint"
    return "interrupted before training " + ("went on: the run is as it was" if resumed else "began: nothing was kept")
