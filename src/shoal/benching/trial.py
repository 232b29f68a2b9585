"""A trial: a short run of the very training, on the local engine, and what its roles take in it.

The parts are measured in one process, one after the other (benching/parts.py). In a run processes wake each other, find caches as another one left them, wait for the slowest actor, and share
the machine with whatever else it does. All of that is in the times that every role keeps of its activities, and none of it in the parts. `shoal plan` makes its model
fit these times (planning/fitting.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shoal.benching.training import Watch, processor, time_by_role, watched_training
from shoal.config import RunConfig
from shoal.errors import ConfigError
from shoal.settings import resolve

LEAST_SECONDS, MOST_SECONDS = 2.0, 30.0
_UPDATES = 8  # that it is to be long enough for, by the costs of the parts
_LEFT_OUT = ("stop", "run_dir", "evaluation", "autoscale", "engine", "ray")  # of the settings


def trial(
    target: str,
    settings: Mapping[str, Any],
    config: RunConfig,
    costs: Mapping[str, Any],
    seconds: float,
    told: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Train for about `seconds` with these settings, on this machine, with one learner, actors that choose for themselves, and another seed.

    Args:
      config: what the settings are resolved to. costs: the answer of `bench_costs` so far.
    Returns:
      see `figures`. None where all roles are in one process, a file says that the run is one on a cluster, or 30 seconds are too few for some updates.
    Raises:
      as `shoal.train`.
    """
    batch = costs["settings"]["batch_env_steps"]
    length = min(MOST_SECONDS, max(LEAST_SECONDS, seconds, _UPDATES * batch / costs["ceilings"]["of_mode"]))
    asked = {key: value for key, value in settings.items() if key.partition(".")[0] not in _LEFT_OUT}
    asked |= {"stop.seconds": length, "seed": config.seed ^ 1, "learners": 1, "policy.inference": "actor"}
    if config.algorithm.schedule_env_steps is not None:  # it may be that of a stop condition
        asked["algorithm.schedule_env_steps"] = config.algorithm.schedule_env_steps
    if config.actors == 0 or resolve(target, asked)[0].engine != "local":
        return None
    told(f"costs: a trial run for {length:.0f} s")
    _, watch = watched_training(target, asked)
    words_us = costs["transport"]["words"] + costs["transport"]["decide"]
    try:
        found = figures(watch, costs["cores"], batch, words_us)
    except ConfigError:  # too short
        return None
    return None if found is None else {**found, "max_policy_lag": config.max_policy_lag}


def figures(watch: Watch, cores: int, batch_env_steps: int, words_us: float) -> dict[str, Any] | None:
    """What was seen after the warm-up; None where that was too short.

    Args:
      words_us: of the supervisor for messages and decisions, for each env step.
    Returns:
      env_steps_per_second; actors; acting, learning: shares of their time in which actors step and choose, and the learner learns and publishes;
      acting_us: processor time of the actors for each env step; update_us: of the supervisor for each update, besides words and decisions. The last two are None where the system does not tell.
    Raises:
      ConfigError: fewer than two updates.
    """
    rate, roles, used = watch.env_steps_per_second(), time_by_role(watch), processor(watch, cores)
    if "actors" not in roles or "learner" not in roles:
        return None
    spent = {role: 1e4 * cores * used[role] / rate for role in ("actors", "supervisor") if role in used}  # us for each env step
    update_us = batch_env_steps * (spent["supervisor"] - words_us) if "supervisor" in spent else None
    return {
        "env_steps_per_second": rate,
        "actors": sum(role.role.startswith("actor") for role in watch.looks[-1].roles),
        "acting": _share(roles["actors"], "stepping", "inferring"),
        "learning": _share(roles["learner"], "learning", "publishing"),
        "acting_us": spent.get("actors"),
        "update_us": None if update_us is None else max(0.0, update_us),
    }


def _share(percent: Mapping[str, float], *activities: str) -> float:
    return sum(percent.get(activity, 0.0) for activity in activities) / 100.0
