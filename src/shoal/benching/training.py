"""`shoal bench train`: a training measured against the ceiling that its parts' costs give, and where the rest of its time went.

The training runs as `shoal train` does. It is watched by a callback (environment steps after each update) and by the boards of activities that every
role keeps anyway (sampled a few times a second, cumulative), so that it does nothing which it would not do unwatched. The start is left out.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.benching.gap import explain
from shoal.errors import ConfigError
from shoal.monitoring.live import SilentView
from shoal.monitoring.snapshot import RoleTime, Snapshot

DEFAULT_SECONDS = 15.0
_WARM_UP_SHARE = 0.2
_ACTIVITIES = {  # as the answer names them; `starting` is left out of it
    "stepping": "stepping",
    "inferring": "inferring",
    "restoring": "restoring",
    "waiting_for_lease": "waiting",
    "waiting_for_batch": "waiting",
    "sharing": "waiting",
    "learning": "learning",
    "publishing": "publishing",
    "saving": "saving",
}


@dataclass(frozen=True)
class Processor:
    """Seconds that all threads of a process spent on a processor (Linux: /proc/PID/stat), and its first one ready but waiting for one (schedstat)."""

    cpu: float
    queued: float

    @classmethod
    def of(cls, pid: int) -> Processor | None:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
            ticks, queued = int(fields[11]) + int(fields[12]), int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1])
        except (OSError, ValueError, IndexError):
            return None
        return cls(ticks / os.sysconf("SC_CLK_TCK"), queued / 1e9)


@dataclass(frozen=True)
class _Look:
    """The roles at one moment; the supervisor is this process."""

    at: float
    roles: tuple[RoleTime, ...]
    processors: dict[str, tuple[int, Processor | None]]

    @classmethod
    def now(cls, roles: tuple[RoleTime, ...]) -> _Look:
        pids = {role.role: role.pid for role in roles} | {"supervisor": os.getpid()}
        return cls(time.monotonic(), roles, {name: (pid, Processor.of(pid)) for name, pid in pids.items()})

    @property
    def known(self) -> int:
        """How many processes it knows the processor time of: one that has ended has none."""
        return sum(spent is not None for _, spent in self.processors.values())


@dataclass
class Watch:
    """What is seen of the run: (time, env steps) after each update, and the roles at each tick. The first fifth of the updates is the warm-up."""

    points: list[tuple[float, int]] = field(default_factory=list)
    looks: list[_Look] = field(default_factory=list)

    def updated(self, numbers: Mapping[str, Any]) -> None:
        self.points.append((time.monotonic(), int(numbers["env_steps"])))

    def ticked(self, snapshot: Snapshot) -> None:
        if snapshot.phase == "training" and self.points:
            self.looks.append(_Look.now(snapshot.roles))

    def steady(self) -> list[tuple[float, int]]:
        """The points after the warm-up. Raises ConfigError: they are fewer than two."""
        steady = self.points[math.ceil(_WARM_UP_SHARE * len(self.points)) :]
        if len(steady) < 2:
            raise ConfigError("the training was too short to be measured: give more of --stop.seconds, --stop.updates or --stop.env-steps")
        return steady

    def env_steps_per_second(self) -> float:
        """Between the first update after the warm-up and the last one. Raises ConfigError."""
        (t0, n0), *_, (t1, n1) = self.steady()
        return (n1 - n0) / (t1 - t0)

    def ends(self) -> tuple[_Look, _Look] | None:
        """The roles at the first and at the last tick after the warm-up, at which none had ended; None where that was shorter than two ticks."""
        begin = self.steady()[0][0]
        looks = [look for look in self.looks if look.at >= begin]
        while len(looks) > 1 and looks[-1].known < looks[0].known:
            looks.pop()
        return (looks[0], looks[-1]) if looks and looks[-1].at > looks[0].at else None


class _WatchingView(SilentView):
    def __init__(self, watch: Watch) -> None:
        super().__init__(sys.stderr)
        self._watch = watch

    def __call__(self, snapshot: Snapshot) -> None:
        self._watch.ticked(snapshot)


def bench_train(
    target: str, settings: Mapping[str, Any], *, seconds: float = 10.0, told: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Train with these settings, and measure the costs of its parts for `seconds`: half of them before the training and half after it, since a machine
    that others use too is not the same a minute later.

    Without a stop condition it trains for 15 seconds; without `run_dir` the run is removed.
    Returns:
      env_steps_per_second, ceiling, fraction, ceiling_before, ceiling_after, time_by_role (percent of wall time), processor and missing (percent of the
      cores' time, by role and by cause), words, result, and all of `bench_costs`, the means of both. See docs/performance.md.
    Raises:
      ConfigError: it was too short. Otherwise as `shoal.train`.
    """
    from shoal.benching.costs import bench_costs

    settings = dict(settings)
    if not any(key.partition(".")[0] == "stop" for key in settings):
        settings["stop.seconds"] = DEFAULT_SECONDS
    length = float(settings.get("stop.seconds", 0.0))
    costs_before = bench_costs(target, settings, seconds=seconds / 2, told=told)
    told(f"training{f' for {length:g} s' if length else ''}")
    run, watch = watched_training(target, settings)
    speed = watch.env_steps_per_second()
    costs_after = bench_costs(target, settings, seconds=seconds / 2, told=told)
    costs = mean_of(costs_before, costs_after)
    ceiling = costs["ceilings"]["of_mode"]
    found = {
        "env_steps_per_second": speed,
        "ceiling": ceiling,
        "fraction": speed / ceiling,
        "ceiling_before": costs_before["ceilings"]["of_mode"],
        "ceiling_after": costs_after["ceilings"]["of_mode"],
        "time_by_role": time_by_role(watch),
        "processor": processor(watch, costs["cores"]),
    }
    result = {name: run.result[name] for name in ("env_steps", "updates", "seconds", "reason", "mean_return", "lag", "restarts")}
    return {**found, **explain(found, costs), "result": result, **costs}


def watched_training(target: str, settings: Mapping[str, Any]) -> tuple[Any, Watch]:
    """Train, and look on. The run is removed unless the settings have a `run_dir`; its result stays. Raises as `shoal.train`."""
    from shoal.api import train

    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        where = {"run_dir": str(Path(scratch) / "run"), "evaluation.episodes": 0, **settings}
        run = train(target, callbacks=[watch.updated], progress=_WatchingView(watch), **where)
    return run, watch


def mean_of(before: Any, after: Any) -> Any:
    """Of two trees of the same names: the mean of each measured number (float); of all else, what came last."""
    if isinstance(before, dict) and isinstance(after, dict):
        return {name: mean_of(before.get(name, value), value) for name, value in after.items()}
    if isinstance(before, float) and isinstance(after, float):
        return (before + after) / 2
    return after


def time_by_role(watch: Watch) -> dict[str, dict[str, float]]:
    """Percent of wall time by role and activity after the warm-up; all actors together. Empty where the run was shorter than two ticks."""
    if (ends := watch.ends()) is None:
        return {}
    first, last = ends
    before = {role.role: role.seconds for role in first.roles}
    spent: dict[str, dict[str, float]] = {}
    for role in last.roles:
        of = spent.setdefault(role.role.partition(" ")[0] + "s" if role.role.startswith("actor") else role.role, {})
        for activity, seconds in role.seconds.items():
            if activity in _ACTIVITIES:
                name = _ACTIVITIES[activity]
                of[name] = of.get(name, 0.0) + max(0.0, seconds - before.get(role.role, {}).get(activity, 0.0))
    shares = {}
    for name, of in spent.items():
        total = sum(of.values())
        shares[name] = {activity: 100.0 * seconds / total for activity, seconds in of.items() if seconds > 0} if total > 0 else {}
    working = _cpu(first, last, "supervisor")
    if working is not None and "learner" in shares:
        share = 100.0 * working.cpu / (last.at - first.at)
        shares["supervisor"] = {"working": share, "waiting": max(0.0, 100.0 - share)}
    return shares


def processor(watch: Watch, cores: int) -> dict[str, float]:
    """Percent of all cores' time after the warm-up: by role, `idle` (or used by other programs), and `queued`: time in which a role was
    ready and had to wait for a processor. Empty where the system does not tell, or a role was restarted meanwhile."""
    if (ends := watch.ends()) is None:
        return {}
    first, last = ends
    shares: dict[str, float] = {}
    queued = 0.0
    whole = cores * (last.at - first.at)
    own = {last.processors[name][0] for name in last.processors}
    for name in last.processors:
        if name == "supervisor" and len(own) < len(last.processors):
            continue  # `actors: 0`: all roles are this process
        spent = _cpu(first, last, name)
        if spent is None:
            return {}
        role = "actors" if name.startswith("actor") or name == "inference" else name  # whose inference it is
        shares[role] = shares.get(role, 0.0) + 100.0 * spent.cpu / whole
        queued += 100.0 * spent.queued / whole
    return {**shares, "idle": max(0.0, 100.0 - sum(shares.values())), "queued": queued}


def _cpu(first: _Look, last: _Look, name: str) -> Processor | None:
    """What a role spent between two looks; None where it is not the same process."""
    (pid0, spent0), (pid1, spent1) = first.processors.get(name, (0, None)), last.processors[name]
    if pid0 != pid1 or spent0 is None or spent1 is None:
        return None
    return Processor(spent1.cpu - spent0.cpu, spent1.queued - spent0.queued)
