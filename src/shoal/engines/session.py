"""One training as every engine runs it: what follows an update, when to save, when to stop, and what the outside is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shoal.config import RunConfig, against_divergence
from shoal.engines.coordinator import Coordinator
from shoal.engines.elsewhere import Elsewhere
from shoal.engines.plan import Episode
from shoal.errors import CheckpointError, DivergedError
from shoal.files import CheckpointDirectory, Loaded, Staging, whole_state
from shoal.types import ActivityRecord, Arrays, EnvironmentSpec

ATTEMPTS_PER_PART = 1 << 20  # attempts of a group that one start of a run may number


@dataclass
class UpdateReport:
    """What an update did, for whoever watches. Metrics carry the names of the algorithm; times are seconds."""

    update: int
    env_steps: int
    seconds: float
    metrics: dict[str, float]
    episodes: list[Episode]
    consumption: list[dict[str, Any]]


class Observer(Protocol):
    """Whoever watches a run: the run store, TensorBoard, the live view, the user's callbacks. Never changes what is learned."""

    def updated(self, report: UpdateReport) -> bool:
        """After each update. True asks for the run to end."""

    def event(self, kind: str, **details: Any) -> None:
        """Something that is not an update: a fault, a restart, a checkpoint, a warning."""

    def tick(self, activities: list[ActivityRecord]) -> None:
        """A few times a second, with what every role does now (learners first)."""

    def flush(self) -> None:
        """Keep for good what was told: a checkpoint is about to count."""

    def state(self) -> dict[str, Any]:
        """Where the run stands, JSON-able, for the control socket."""


@dataclass
class Session:
    """The state of a training that no role holds: clock, checkpoints, the decision to end."""

    config: RunConfig
    spec: EnvironmentSpec
    coordinator: Coordinator
    directory: Path
    observer: Observer
    clock: Callable[[], float] = time.monotonic
    seconds_before: float = 0.0  # of earlier parts of a resumed run
    restarts: int = 0
    epoch: int = 0  # of the random streams; raised by a roll-back after divergence
    skipped_steps: int = 0  # optimizer steps that were refused, since loss or gradient was not finite
    may_save: bool = True  # False while the last update that made steps was barren: what is saved is to be worth going back to
    started: float | None = None  # first environment step, on the clock
    wanted_end: str | None = None  # "interrupted", or a reason that a caller gave
    checkpoint_path: Path | None = None  # of the newest checkpoint that this run made or began with
    replay_whole: bool = True  # in it; else what the run learns from is filled anew
    elsewhere: Elsewhere = field(default_factory=Elsewhere)
    network: Callable[[], dict[str, Any]] = dict  # what crossed a network so far (engines/traffic.py)

    def __post_init__(self) -> None:
        self.checkpoints = CheckpointDirectory(self.directory / "checkpoints")
        self._saved_at = self.clock()
        self._saved_version = self.coordinator.version
        self._beginning: tuple[Arrays, dict[str, Any]] | None = self.coordinator.get_state()

    @property
    def seconds(self) -> float:
        """Since the first environment step, earlier parts of the run included."""
        return self.seconds_before + (0.0 if self.started is None else self.clock() - self.started)

    def warn(self, message: str) -> None:
        self.observer.event("warning", message=message)

    def begun(self, begun_ns: int) -> None:
        """The first rollout tells when the first environment step was made (monotonic clock)."""
        if self.started is None:
            self.started = min(self.clock(), begun_ns / 1e9)

    def finish_update(self, metrics: dict[str, float]) -> str | None:
        """Account for an update that the learner finished. Returns the reason to stop, if there is one. Raises StorageError where the run is another driver's now."""
        self.elsewhere.tell(self.observer.event)
        c = self.coordinator
        skipped, stepped = int(metrics.get("skipped_steps", 0.0)), int(metrics.get("optimizer_steps", 0.0))
        if skipped and self.may_save:
            self.observer.event("not_finite", update=c.version, steps=skipped)
        self.skipped_steps += skipped
        if stepped or skipped:  # an update without any step leaves the numbers as they were
            self.may_save = stepped > 0
        version, consumption = c.version, c.consumption
        episodes = c.trained(metrics)
        for entry in consumption if c.version > version else ():
            if places := entry.get("give_up"):
                group, sequence, _ = entry["id"]
                self.observer.event("given_up", group=group, sequence=sequence, places=places)
        report = UpdateReport(c.version, c.env_steps, self.seconds, metrics, episodes, consumption)
        if c.version > version and self.observer.updated(report):
            self.wanted_end = self.wanted_end or "interrupted"
        reason = c.stop_reason(self.seconds)
        if reason is not None and not self.may_save:
            raise DivergedError(
                f"diverged: the run met its stop condition ({reason}), and in its last update no loss or gradient was finite; "
                f"{against_divergence(self.config, replayed=c.limiter is not None)}"
            )
        return reason or self.wanted_end

    # ---- checkpoints ---------------------------------------------------------------------------------------------
    def checkpoint_due(self) -> bool:
        c = self.config.checkpoint
        if not self.may_save:
            return False
        if c.every_updates is not None and self.coordinator.version - self._saved_version >= c.every_updates:
            return True
        return c.every_seconds is not None and self.clock() - self._saved_at >= c.every_seconds

    def begin_checkpoint(self) -> tuple[Staging, Arrays, dict[str, Any]]:
        """The supervisor's part of a checkpoint; the learner writes its own beside it, then `commit`."""
        self.coordinator.ledger.check()
        arrays, facts = self.coordinator.get_state()
        if self.coordinator.limiter is not None:
            facts["holds_replay"] = self.config.checkpoint.replay
        facts |= {"seconds": self.seconds, "restarts": self.restarts, "epoch": self.epoch, "skipped_steps": self.skipped_steps}
        staging = self.checkpoints.begin(self.coordinator.version)
        staging.write_arrays("coordinator", arrays)
        staging.write_json("coordinator", facts)
        return staging, arrays, facts

    def commit(self, staging: Staging, arrays: Arrays, facts: dict[str, Any]) -> Path:
        self.observer.flush()  # the log of consumption is never behind a checkpoint
        path = staging.commit()
        self.elsewhere.saved(path)
        self.checkpoints.sweep(self.config.checkpoint.keep, self.elsewhere.held())
        self.checkpoint_path, self.replay_whole = path, True
        self._saved_at, self._saved_version = self.clock(), self.coordinator.version
        self.observer.event("checkpoint", update=self.coordinator.version, path=path.name)
        return path

    def save_failed(self, message: str) -> None:
        """The disk refused a checkpoint: said, and tried again when the next one is due."""
        self._saved_at, self._saved_version = self.clock(), self.coordinator.version
        self.observer.event("checkpoint_failed", message=message, before=self.checkpoint_path is not None)

    def last_refused(self, message: str) -> CheckpointError:
        """What a run ends with whose last checkpoint the disk refused."""
        if self.checkpoint_path is None:
            return CheckpointError(f"no checkpoint could be saved, so `shoal resume` begins again from the start. {message}")
        return CheckpointError(f"the last checkpoint could not be saved; `shoal resume` goes on from the one before. {message}")

    def load(self, loaded: Loaded) -> None:
        """Go on from a checkpoint (a resumed run)."""
        arrays, facts = self._state_in(loaded)
        with whole_state(loaded.path):
            self.coordinator.set_state(arrays, facts)
            self.seconds_before, self.restarts = float(facts["seconds"]), int(facts["restarts"])
            self.epoch, self.skipped_steps = int(facts.get("epoch", 0)), int(facts.get("skipped_steps", 0))
        self.checkpoint_path, self._beginning = loaded.path, None
        self._saved_version = self.coordinator.version
        self._say_what_is_lost(facts)

    def _state_in(self, loaded: Loaded) -> tuple[Arrays, dict[str, Any]]:
        """The supervisor's part of a checkpoint. One whose replay is damaged holds none."""
        self.replay_whole = not loaded.replay_damage
        facts = loaded.json("coordinator")
        if loaded.replay_damage:
            facts |= {"holds_replay": False, "replay_damage": loaded.replay_damage}
        return loaded.arrays("coordinator"), facts

    def _say_what_is_lost(self, facts: dict[str, Any]) -> None:
        """Of a checkpoint without the replay that the run learns from."""
        rate, limiter = self.coordinator.plan.rate, facts.get("limiter")
        if rate is None or limiter is None or facts.get("holds_replay", True) or not limiter["inserted"]:
            return
        damage = facts.get("replay_damage")
        why = f"holds no whole replay ({damage})" if damage else "holds no replay (checkpoint.replay false)"
        message = (
            f"the checkpoint of update {facts['version']:,} {why}: it is filled anew, learning goes on once "
            f"{rate.learning_starts:,} env steps are in (replay.learning_starts), and the weights will be others than those of a run that went on"
        )
        self.observer.event("warning", message=message)

    def return_to_checkpoint(self) -> Path | None:
        """Go back in place to the newest whole checkpoint (None: to the beginning), since the learner was lost or its numbers diverged.

        Raises:
          CheckpointError: none is whole any more, and the run did not begin in this process.
        """
        arrays, facts, path = self._newest_whole()
        undone = self.coordinator.version - facts["version"]
        self.coordinator.set_state(arrays, facts, live=True)
        self._saved_version, self.checkpoint_path, self.may_save = self.coordinator.version, path, True
        self.observer.event("rolled_back", update=facts["version"], updates_undone=undone)
        self._say_what_is_lost(facts)
        return path

    def _newest_whole(self) -> tuple[Arrays, dict[str, Any], Path | None]:
        try:
            if self.checkpoint_path is None and self._beginning is not None:
                return (*self._beginning, None)
            loaded = self.checkpoints.newest_to_go_on(replay=self.config.checkpoint.replay)
            for warning in loaded.warnings:
                self.observer.event("warning", message=warning)
            return (*self._state_in(loaded), loaded.path)
        except CheckpointError as error:
            if self._beginning is None:
                raise
            self.observer.event("warning", message=f"{error}; going back to the beginning")
            return (*self._beginning, None)
