"""`shoal chaos`: a training with real faults, and what they cost.

Stretches with faults and without take turns in one run, so that whatever else makes a machine fast or slow is on both sides. A fault's recovery
lasts from its injection (of a stopped actor: its detection) to the first rollout or update after it; stepping episodes again is left out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.api import Run, replay
from shoal.config import RunConfig
from shoal.engines.environment_faults import EARLY_SECONDS
from shoal.errors import ConfigError
from shoal.monitoring.live import View
from shoal.monitoring.store import RunReader
from shoal.runs import new_run, quantile
from shoal.settings import resolve
from shoal.supervision.injector import Injection, Injector
from shoal.training.execution import execute

KINDS = ("kill", "stop", "slow", "nan", "learner")
PERIODS = 6  # of a stretch without faults and one with them, where the time is enough for it
MIN_STRETCH_SECONDS, MAX_STRETCH_SECONDS = 2.0, 30.0
_SLACK_SECONDS = 300.0  # beyond what both kinds of stretches take: a run that needs more comes to nothing
_BUDGET = 1_000_000  # faults of the environment that are mended: they are ours


@dataclass
class Stretches:
    """Turns of quiet and faults, and the environment steps of the updates made in each, those too that a roll-back undid later.

    Args:
      wanted_seconds: with faults, in all. stretch_seconds: of one turn.
    """

    wanted_seconds: float
    stretch_seconds: float
    clock: Callable[[], float] = time.monotonic
    seconds: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    steps: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._faulty = False
        self._begun = self._seen = -1.0  # of the stretch; of the last update
        self._env_steps: dict[int, int] = {}  # by update: after a roll-back they are made again from one of these

    @property
    def faulty(self) -> bool:
        """Whether faults are to be sent now. False before the first update."""
        with self._lock:
            return self._begun >= 0 and self._faulty and self.clock() - self._begun < self.stretch_seconds

    @property
    def running_seconds(self) -> float:
        """Since the first update."""
        with self._lock:
            return 0.0 if self._begun < 0 else sum(self.seconds.values())

    def __call__(self, facts: Mapping[str, Any]) -> bool:
        """After each update. False once there was enough of it."""
        now, update, env_steps = self.clock(), int(facts["update"]), int(facts["env_steps"])
        with self._lock:
            if self._begun < 0:
                self._begun = self._seen = now
            else:
                self.seconds[self._faulty] += now - self._seen
                self.steps[self._faulty] += env_steps - self._env_steps.get(update - 1, 0)
                self._seen = now
                if now - self._begun >= self.stretch_seconds:
                    self._faulty, self._begun = not self._faulty, now
            self._env_steps[update] = env_steps
            return self.seconds[True] < self.wanted_seconds

    def speed(self, faulty: bool) -> float:
        """Environment steps of updates per second."""
        return self.steps[faulty] / self.seconds[faulty] if self.seconds[faulty] > 0 else 0.0


def chaos(
    target: str,
    every: Mapping[str, float],
    seconds: float,
    *,
    seed: int = 0,
    compare: bool = True,
    progress: View | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train with faults at random moments, and see what became of them.

    Args:
      target: as of `shoal.train`, by name.
      every: seconds between two faults of a kind (KINDS), on average.
      seconds: of training with faults; as long again is trained without. seed: of the moments and victims.
      compare: execute the training again without faults, in sync mode, and compare the weights.
    Returns:
      run, mode, updates, seconds, env_steps_per_second (of the updates made, those too that a roll-back undid later: `lost` says how much that
      was) and kept (of it), faults (by kind: injected, recovered, p50, p99, max in
      seconds), ledger, lost (share of what was produced, by reason), balances, restarts, weights_equal (sync mode: with those of the
      same training executed again without faults; None where that was not done), ok.
    Raises:
      ConfigError: no kind of fault, or one that cannot be sent here; else as `shoal.train`.
    """
    _check_engine(settings.get("engine"))
    config, preset = resolve(target, _with_stop(settings, seconds))
    config.preset = preset
    _check(config, every)
    config.env.restart_budget = max(config.env.restart_budget, _BUDGET)
    stretches = Stretches(seconds, min(MAX_STRETCH_SECONDS, max(MIN_STRETCH_SECONDS, seconds / PERIODS)))

    def active(kind: str) -> bool:
        """An environment's fault in the first seconds of a run is taken for a bug, and ends it."""
        return stretches.faulty and (kind != "nan" or stretches.running_seconds > EARLY_SECONDS)

    with new_run(config) as begun:
        path = begun.directory / "chaos.flags"
        objects = _wrapped(config, path) if "nan" in every else {}
        with closing(Injector(every, seed, active, path)) as injector:
            injector.start()
            result = execute(config, objects, begun.directory, [stretches], progress, discard=begun.discard, elsewhere=begun.elsewhere)
    run = Run(begun.directory, result, objects)
    return _report(run, config, every, injector.sent, stretches, compare and config.mode != "async")


def _wrapped(config: RunConfig, flags: Path) -> dict[str, Any]:
    from shoal.environments.chaotic import ChaoticFactory, make_flags

    make_flags(flags)
    return {"env": ChaoticFactory(config.env, flags)}


def _with_stop(settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The stretches end it, not the preset's conditions; should they never, this does."""
    given = any(str(key).startswith("stop") for key in settings)
    return settings if given else {**settings, "stop": {"seconds": 2 * seconds + _SLACK_SECONDS}}


def _check_engine(engine: object) -> None:
    """Also before the settings are resolved, which would advise on actors of a cluster."""
    if engine == "ray":
        raise ConfigError(
            "engine: chaos signals processes of this machine, so it is for the local engine; give --engine local, without what is said of a cluster"
        )


def _check(config: RunConfig, every: Mapping[str, float]) -> None:
    _check_engine(config.engine)
    if not every:
        raise ConfigError("chaos needs a kind of fault: --kill 5s, --stop 20s, --slow 10s, --nan 30s, --learner 60s")
    if not config.actors:
        raise ConfigError("actors: chaos kills processes, and with 0 there are none; give --actors 1 or more")
    if "nan" in every and config.env.form == "native":
        raise ConfigError("env.form: --nan wraps single environments, which the native form has none of")


# ---- what became of it -----------------------------------------------------------------------------------------------
def _report(
    run: Run, config: RunConfig, every: Mapping[str, float], sent: Sequence[Injection], stretches: Stretches, compare: bool
) -> dict[str, Any]:
    with RunReader(run.path / "run.db") as reader:
        events = reader.events("recovered")
    ledger = run.result["ledger"]
    produced = max(1, ledger["produced"])
    balances = (
        ledger["produced"] == ledger["trained"] + ledger.get("replayed", 0) + sum(ledger["dropped"].values()) + ledger["in_flight"]
        and not ledger["in_flight"]
    )
    equal = bool(replay(run.path)["equal"]) if compare else None
    quiet, faulty = stretches.speed(False), stretches.speed(True)
    return {
        "run": str(run.path),
        "mode": "async" if config.mode == "async" else "sync",
        "updates": run.result["updates"],
        "seconds": {"quiet": stretches.seconds[False], "faulty": stretches.seconds[True]},
        "env_steps_per_second": {"quiet": quiet, "faulty": faulty},
        "kept": faulty / quiet if quiet > 0 else None,
        "faults": {kind: recoveries([one for one in sent if one.kind == kind], events) for kind in KINDS if kind in every},
        "ledger": ledger,
        "lost": {reason: count / produced for reason, count in ledger["dropped"].items()},
        "balances": balances,
        "restarts": run.result["restarts"],
        "weights_equal": equal,
        "ok": balances and equal is not False,
    }


def recoveries(sent: Sequence[Injection], events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What became of the faults of one kind: injected, recovered, and seconds p50, p99, max; None where nobody was missed."""
    seconds = sorted(found for one in sent if (found := _missed(one, events)) is not None)
    spread = {name: quantile(seconds, share) if seconds else None for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}
    return {"injected": len(sent), "recovered": len(seconds), **spread}


def _missed(one: Injection, events: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds from one fault until who was hit worked again. A slowed process is not missed, and an environment's fault is its group's."""
    if one.kind == "slow":
        return None
    after = (event for event in events if event["time"] > one.time)
    if one.kind == "nan":
        found = next((e for e in after if e["role"] == "group" and e["after"] in ("not_finite", "reward")), None)
    else:
        found = next((e for e in after if (e["role"], e["index"]) == (one.role, one.index)), None)
    if found is None:
        return None
    whole = found["time"] - one.time if one.kind in ("kill", "learner") else found["seconds"]
    return float(max(0.0, whole - found["restoring_seconds"]))
