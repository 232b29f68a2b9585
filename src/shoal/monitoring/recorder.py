"""The recorder: an engine's observer that keeps a run's numbers (run.db, TensorBoard), shows them (live view), and calls the user back.

consumes    what the session reports after each update, events, and a tick a few times a second
waits for   nothing but a commit of run.db, once a second
on failure  a disk that refuses is said in the view, and so is its end; the run goes on without its numbers, never without its ledger
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shoal.config import RunConfig
from shoal.errors import RunError
from shoal.experience.envelope import CONSUMED, Fate, Identity
from shoal.monitoring.live import View
from shoal.monitoring.snapshot import ActorHealth, Pace, RoleTime, Snapshot, eta_seconds, scalars
from shoal.monitoring.store import EpisodeRow, RunStore
from shoal.monitoring.tensorboard import TensorBoardWriter
from shoal.monitoring.words import event_words
from shoal.types import Activity, ActivityRecord
from shoal.urls import is_url, name_of

if TYPE_CHECKING:
    from shoal.engines.coordinator import Coordinator
    from shoal.engines.session import Session, UpdateReport

RECORD_SECONDS = 0.5  # between two rows of metrics
RATE_SECONDS = 5.0  # window of env steps per second, and of time by role
_UNSPOKEN = frozenset({"checkpoint", "failed", "recovered", "uploaded"})  # whoever called says why it failed
_ROLE_OF = {
    Activity.STEPPING: "environment",
    Activity.RESTORING: "environment",
    Activity.INFERRING: "inference",
    Activity.WAITING_FOR_LEASE: "waiting",
    Activity.WAITING_FOR_BATCH: "waiting",
    Activity.LEARNING: "learning",
    Activity.SAVING: "learning",
    Activity.PUBLISHING: "learning",
    Activity.SHARING: "waiting",
}

Callback = Callable[[Mapping[str, Any]], Any]


class _Spent(NamedTuple):
    """What all roles together had spent at a moment (monotonic clock), by role, and how many updates there were."""

    at: float
    update: int
    seconds: dict[str, float]


class Recorder:
    """Watches one run. `attach` names the session once it exists."""

    def __init__(self, config: RunConfig, directory: Path, view: View, callbacks: Sequence[Callback] = ()) -> None:
        self._config, self._directory, self._view = config, directory, view
        self._callbacks = list(callbacks)
        self.store = RunStore(directory / "run.db")
        self._board = TensorBoardWriter(directory / "tensorboard")
        self._session: Session | None = None
        self._recorded = self._ticked = 0.0
        self._rate: deque[tuple[float, int]] = deque()
        self._since: Pace | None = None  # when it began to go as it goes now; None before it learns
        self._spent: deque[_Spent] = deque()
        self._shares: dict[str, float] = {}
        self._metrics: dict[str, float] = {}
        self._activities: list[ActivityRecord] = []
        self._broken = self._board_broken = self._paused = False
        self._wanted_actors = config.actors or 0
        self._autoscale, self._scaled = config.autoscale or "", ""
        self._checkpoints: deque[int] = deque(maxlen=config.checkpoint.keep)
        self._kept = "uploaded" if is_url(config.run_dir) else "checkpoint"  # what a run may go on from, wherever it does

    def attach(self, session: Session) -> None:
        self._session = session
        session.coordinator.ledger.listener = self._settled

    def resumed(self) -> None:
        """The session stands where an earlier part of the run had a checkpoint: what that part made after it is booked as rolled back."""
        c = self._coordinator
        undone: list[int] = []

        def take_over() -> None:
            undone.append(self.store.rewind(c.version, c.ledger.final))
            c.ledger.take_over({(group, Fate[reason.upper()]): lost for (group, reason), lost in self.store.lost().items()})

        self._keep(take_over)
        self.event("resumed", update=c.version, updates_undone=sum(undone))

    @property
    def began(self) -> bool:
        """Whether a rollout was made, now or in an earlier part of the run."""
        return self._session is not None and bool(self._coordinator.version or self._coordinator.ledger.balance()["produced"])

    # ---- what the engine calls -----------------------------------------------------------------------------------
    def updated(self, report: UpdateReport) -> bool:
        self._metrics = {k: v for k, v in report.metrics.items() if "/" not in k}
        if self._since is None and self._learns:
            self._since = Pace(report.update, report.env_steps, report.seconds)
        self._keep(lambda: self._record(report))
        now = time.monotonic()
        self._rate.append((now, report.env_steps))
        while len(self._rate) > 2 and now - self._rate[1][0] > RATE_SECONDS:
            self._rate.popleft()
        if now - self._recorded >= RECORD_SECONDS:
            self._recorded = now
            self._keep(self._write_scalars)
        if not self._callbacks:
            return False
        facts = {**self._metrics, "update": report.update, "env_steps": report.env_steps, "seconds": report.seconds,
                 "mean_return": self._coordinator.mean_return, "episodes": report.episodes}  # fmt: skip
        answers = [callback(facts) for callback in self._callbacks]
        return any(answer is False for answer in answers)

    def event(self, kind: str, **details: Any) -> None:
        update = int(details.get("update", self._coordinator.version if self._session is not None else 0))
        facts = {k: v for k, v in details.items() if k != "update"}
        self._keep(lambda: self.store.event(kind, update, **facts))
        if kind in ("rolled_back", "continue"):
            self._since = None
        if kind == "rolled_back":
            self._keep(lambda: self.store.rewind(update, self._coordinator.ledger.final))
        if kind == self._kept and self._coordinator.plan.mode == "sync":
            self._keep(lambda: self._forget(update))
        if kind in ("pause", "continue"):
            self._paused = kind == "pause"
        if kind == "scaled":
            self._wanted_actors = int(details["actors"])
            self._autoscale, self._scaled = details.get("autoscale", self._autoscale), details.get("reason", "")
        if kind not in _UNSPOKEN and not (kind == "died" and details.get("reason")):
            self._view.message(event_words(kind, details))

    def tick(self, activities: list[ActivityRecord]) -> None:
        self._activities = activities
        spent: dict[str, float] = {}
        for record in activities:
            for activity, seconds in record.seconds.items():
                if activity in _ROLE_OF:
                    spent[_ROLE_OF[activity]] = spent.get(_ROLE_OF[activity], 0.0) + seconds
        now, update = time.monotonic(), self._coordinator.version if self._session is not None else 0
        self._spent.append(_Spent(now, update, spent))
        # Whole updates: in sync mode roles take turns, and a shorter stretch shows whose turn it was.
        while len(self._spent) > 2 and now - self._spent[1].at > RATE_SECONDS and self._spent[1].update < update - 1:
            self._spent.popleft()
        before = self._spent[0].seconds
        self._shares = {k: max(0.0, v - before.get(k, 0.0)) for k, v in spent.items()}  # what a dead role was in is not counted
        self._keep(self.store.tick)
        self._view(self.snapshot())

    def flush(self) -> None:
        self._keep(self.store.flush)

    def state(self) -> dict[str, Any]:
        return self.snapshot().to_json()

    # ---- what is shown -------------------------------------------------------------------------------------------
    @property
    def _coordinator(self) -> Coordinator:
        if self._session is None:
            raise RunError("the recorder watches no session yet")
        return self._session.coordinator

    @property
    def _learns(self) -> bool:
        """Whether updates make optimizer steps: while a replay is first filled they do not, and take next to no time."""
        limiter = self._coordinator.limiter
        return limiter is None or limiter.sampled > 0

    def _phase(self, session: Session) -> str:
        if session.wanted_end is not None:
            return "stopping"
        return "paused" if self._paused else "starting" if session.started is None else "training"

    @np.errstate(over="ignore", invalid="ignore")  # of returns beyond any number
    def snapshot(self, phase: str | None = None) -> Snapshot:
        """Where the run stands now."""
        c, session, config = self._coordinator, self._session, self._config
        assert session is not None
        returns = list(c.returns)
        mean, p99, largest = lag_summary(c.lag)
        balance = c.ledger.balance()
        return Snapshot(
            run=name_of(config.run_dir) if is_url(config.run_dir) else self._directory.name,
            env=config.env.id,
            algorithm=config.algorithm.name,
            mode=c.plan.mode,
            seed=config.seed,
            preset=config.preset or "none",
            phase=phase or self._phase(session),
            update=c.version,
            env_steps=c.env_steps,
            seconds=session.seconds,
            env_steps_per_second=self._speed(),
            episodes=c.num_episodes,
            mean_return=c.mean_return,
            std_return=float(np.std(returns)) if returns else math.nan,
            mean_length=float(np.mean(c.lengths)) if c.lengths else math.nan,
            time_by_role=self._shares,
            roles=self._roles(),
            lag_mean=mean,
            lag_p99=p99,
            lag_max=largest,
            max_policy_lag=c.plan.max_policy_lag,
            produced=balance["produced"],
            trained=balance["trained"],
            replayed=balance.get("replayed", 0),
            evicted=balance.get("evicted", 0),
            replay=c.replay_facts,
            dropped=balance["dropped"],
            in_flight=balance["in_flight"],
            actors=self._health(),
            autoscale=self._autoscale,
            scaled=self._scaled,
            restarts=session.restarts,
            network=session.network(),
            train=self._metrics,
            eta_seconds=eta_seconds(config.stop, Pace(c.version, c.env_steps, session.seconds), self._since),
            stop_return=config.stop.return_,
        )

    def _speed(self) -> float:
        if len(self._rate) < 2:
            return 0.0
        (t0, n0), (t1, n1) = self._rate[0], self._rate[-1]
        return max(0, n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    @property
    def _served(self) -> bool:
        """Whether the last of all activities is the inference server's."""
        return bool(self._config.actors) and self._config.policy.inference == "server"

    @property
    def _of_actors(self) -> list[ActivityRecord]:
        return self._activities[self._num_learners : -1] if self._served else self._activities[self._num_learners :]

    @property
    def _num_learners(self) -> int:
        """How many of the first activities are learners': those of one process, where all roles are in it, are one."""
        return self._config.learners if self._config.actors != 0 else 1

    def _roles(self) -> tuple[RoleTime, ...]:
        names = ["learner" if self._config.actors != 0 else "all roles", *(f"learner {n}" for n in range(1, self._num_learners))]
        names += [f"actor {n}" for n in range(len(self._of_actors))]
        names += ["inference"] if self._served else []
        return tuple(
            RoleTime(name, record.pid, {activity.name.lower(): seconds for activity, seconds in record.seconds.items() if seconds > 0})
            for name, record in zip(names, self._activities, strict=False)
        )

    def _health(self) -> tuple[ActorHealth, ...]:
        limit = self._config.env.step_timeout_seconds
        actors = []
        hosted: dict[int, list[int]] = {}
        for index, group in enumerate(self._coordinator.groups):
            hosted.setdefault(group.actor, []).append(index)
        missing = self._wanted_actors - sum(actor >= 0 for actor in hosted)
        for index, record in enumerate(self._of_actors):
            groups = tuple(hosted.get(index, ()))
            if not groups:
                state, missing = "dead" if missing > 0 else "stopped", missing - 1
            elif record.activity is Activity.STARTING:
                state = "starting"
            else:
                state = "stalled" if record.age_seconds > min(limit, 5.0) and record.activity is Activity.STEPPING else "running"
            actors.append(ActorHealth(index, state, record.incarnation, groups, record.age_seconds))  # type: ignore[arg-type]
        return tuple(actors)

    # ---- what is kept --------------------------------------------------------------------------------------------
    def _record(self, report: UpdateReport) -> None:
        ended = [
            EpisodeRow(report.update, report.env_steps, e.group, e.env, e.seed, e.num_steps, e.episode_return,
                       "truncated" if e.truncated else "terminated")
            for e in report.episodes
        ]  # fmt: skip
        self.store.episodes(ended)
        log = report.consumption
        if self._coordinator.plan.mode == "sync":  # replay needs no log; a resume wants to know what a killed part had consumed
            log = [{name: entry[name] for name in ("id", "steps", "fate")} for entry in log]
        self.store.consumed(report.update, log)

    def _forget(self, update: int) -> None:
        """Of a sync run, only what lies beyond the oldest checkpoint is asked for again."""
        self._checkpoints.append(update)
        if len(self._checkpoints) == self._checkpoints.maxlen:
            self.store.forget_consumed(self._checkpoints[0])

    def _settled(self, identity: Identity, fate: Fate, num_env_steps: int) -> None:
        if fate not in CONSUMED:
            self.store.dropped(identity.group, identity.sequence, identity.attempt, fate.label, self._coordinator.version, num_env_steps)

    def _write_scalars(self) -> None:
        snapshot = self.snapshot()
        values = scalars(snapshot)
        self.store.metrics(snapshot.update, snapshot.env_steps, snapshot.seconds, values)
        ledger = self._coordinator.ledger
        self.store.set_meta("ledger", {"steps": ledger.balance(), "rollouts": ledger.balance_rollouts(), "groups": ledger.by_group()})
        self.store.set_meta("lag", {"mean": snapshot.lag_mean, "p99": snapshot.lag_p99, "max": snapshot.lag_max})
        self.store.set_meta("replay", snapshot.replay)
        self.store.set_meta("network", snapshot.network)
        self._show(lambda: self._board.scalars(snapshot.env_steps, values))

    def finish(self, result: Mapping[str, Any]) -> None:
        """The run is over: the last numbers, and its result."""
        self._keep(self._write_scalars)
        self._keep(lambda: self.store.set_meta("result", dict(result)))
        self._view(self.snapshot("done"))

    def failed(self, error: Exception) -> None:
        """An error ends the run: the last numbers, and why."""
        if self._session is not None:
            self._keep(self._write_scalars)
        self.event("failed", error=type(error).__name__, message=str(error))

    def close(self) -> None:
        self._keep(self.store.close)
        self._show(self._board.close)

    def _keep(self, write: Callable[[], object]) -> None:
        try:
            write()
        except (RunError, OSError, ValueError, sqlite3.Error) as error:
            if not self._broken:
                self._broken = True
                self._view.message(f"warning: numbers of this run are not kept for now: {error}")
            return
        if self._broken and not self.store.failing:
            self._broken = False
            lost = f"; {self.store.rows_lost} rows were lost" if self.store.rows_lost else ""
            self._view.message(f"numbers of this run are kept again in {self.store.path.name}{lost}")

    def _show(self, write: Callable[[], None]) -> None:
        """The same for TensorBoard's files: they are a copy."""
        try:
            write()
        except OSError as error:
            if not self._board_broken:
                self._view.message(f"warning: TensorBoard's files miss numbers: {error}")
            self._board_broken = True


def lag_summary(lag: Mapping[int, int]) -> tuple[float, float, int]:
    """Mean, 99th percentile and maximum of a histogram {lag: steps}; zeros for none."""
    total = sum(lag.values())
    if not total:
        return 0.0, 0.0, 0
    mean = sum(k * n for k, n in lag.items()) / total
    seen, p99 = 0, 0
    for k in sorted(lag):
        seen += lag[k]
        p99 = k
        if seen >= 0.99 * total:
            break
    return mean, float(p99), max(lag)
