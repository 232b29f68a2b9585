"""The local engine: roles in processes of this machine, rollouts and weights in shared memory, words through channels.

The supervisor's loop. It imports no torch, holds the coordinator, and is the only one that decides.

    consumes    words of actors and learner, exits told by the zygote
    waits for   all channels and the zygote together, a quarter of a second at most
    unblocked   by any word, any death, or the time
    on failure  an actor is replaced and its rollouts made again; the learner is replaced, and the run goes back to the last
                checkpoint; the supervisor's own end ends everything (the zygote sees to it)
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal import errors
from shoal.config import RunConfig
from shoal.engines.coordinator import Coordinator, Lease, Plan
from shoal.engines.messages import Kind, Word, to_json
from shoal.engines.session import Session
from shoal.errors import ConfigError, DivergedError, EnvironmentFault, ProcessError, ShoalError
from shoal.experience.envelope import Fate, Identity
from shoal.experience.group_state import to_bytes
from shoal.experience.ring import Ring
from shoal.experience.schema import Schema
from shoal.files import Staging
from shoal.supervision.channel import Channel, wait
from shoal.supervision.heartbeat import ActivityBoard
from shoal.supervision.memory import SharedMemory, anonymous_file
from shoal.supervision.processes import process_state
from shoal.supervision.zygote import Exited, Forked, Lost, Zygote, wait_until_ready
from shoal.types import Activity, Arrays
from shoal.weights.board import WeightBoard

START_SECONDS = 120.0  # the zygote's imports, on a slow disk
SAVE_SECONDS = 60.0
END_SECONDS = 2.0
WATCH_SECONDS = 0.25
EARLY_SECONDS = 10.0  # an environment fault in this time is a bug, and ends the run
DEATHS_IN_A_ROW = 5  # of one role without a rollout or update in between
_PRELOAD = ["torch", "gymnasium", "shoal.engines.mains"]


@dataclass
class _Process:
    """A role's process as the supervisor sees it."""

    name: str
    index: int
    incarnation: int = 0
    pid: int = 0
    channel: Channel | None = None
    ready: bool = False
    doomed: bool = False  # a kill was ordered
    deaths: int = 0  # since it last achieved something
    not_before: float = 0.0  # back-off of its next start
    last_words: str = ""

    @property
    def up(self) -> bool:
        return self.channel is not None


@dataclass
class _Save:
    """A checkpoint that the learner is writing its part of."""

    staging: Staging
    arrays: Arrays
    facts: dict[str, Any]
    begun: float = field(default_factory=time.monotonic)


class LocalEngine:
    """Start with `open`, then `look` (spec and sizes), `run`; `close` leaves nothing behind."""

    def __init__(self, config: RunConfig, pickled: bytes | None, directory: Path, run_id: bytes, epoch: int = 0) -> None:
        self._config, self._pickled, self._directory = config, pickled, directory
        self._run_id, self._epoch = run_id, epoch
        self._zygote: Zygote | None = None
        self._memory: SharedMemory | None = None
        self._activities: ActivityBoard | None = None
        self._learner = _Process("learner", 0)
        self._actors = [_Process("actor", i) for i in range(config.actors or 0)]
        self._save: _Save | None = None
        self._published = -1
        self._weights_sha256 = ""

    # ---- start and end -------------------------------------------------------------------------------------------
    def open(self) -> None:
        """Start the helper process; its imports go on while this one does other things."""
        (self._directory / "logs").mkdir(parents=True, exist_ok=True)
        payload = {"config": self._config.model_dump(mode="json", by_alias=True)}
        self._zygote = Zygote.start(payload, self._pickled, _PRELOAD, log_path=self._directory / "logs" / "zygote.log")

    def close(self) -> None:
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None
        for memory in (self._memory, self._activities):
            if memory is not None:
                memory.close()

    def look(self) -> dict[str, Any]:
        """Spec and sizes, found by a process of its own, so that an environment that crashes or hangs harms nobody."""
        zygote = self._require_zygote()
        ours, theirs = Channel.pair()
        sources: list[Channel | Zygote] = [ours, zygote]
        zygote.fork("shoal.engines.mains:probe_main", "probe", 0, 0, theirs)
        begun: float | None = None
        limit = self._config.env.step_timeout_seconds
        try:
            while True:
                wait(sources, WATCH_SECONDS)
                message = _receive(ours)
                if message is not None:
                    return self._answer(json.loads(message))
                for event in zygote.receive():
                    if isinstance(event, Lost):
                        raise ProcessError(event.reason)
                    if isinstance(event, Forked):
                        begun = time.monotonic()
                    if isinstance(event, Exited) and (message := _receive(ours)) is None:
                        raise EnvironmentFault(
                            f"environment {self._config.env.id}: its process {event.describe()} while it was made and stepped"
                        )
                    if isinstance(event, Exited) and message is not None:
                        return self._answer(json.loads(message))
                if begun is not None and time.monotonic() - begun > limit + 1.0:
                    raise EnvironmentFault(
                        f"environment {self._config.env.id}: not made, reset and stepped within {limit:g} s; "
                        "raise --env.step-timeout-seconds if it is only slow"
                    )
        finally:
            ours.close()

    @staticmethod
    def _answer(facts: dict[str, Any]) -> dict[str, Any]:
        if "error" in facts:
            raise rebuild_error(facts)
        return facts

    def allocate(self, schema: Schema, plan: Plan, weights: int) -> Ring:
        """The memory that all roles share."""
        ring_bytes = -(-Ring.size_bytes(schema, plan.num_slots) // 4096) * 4096
        self._sizes = {"ring_bytes": ring_bytes, "memory_bytes": ring_bytes + WeightBoard.size_bytes(weights), "num_slots": plan.num_slots}
        self._memory = SharedMemory.create(self._sizes["memory_bytes"])
        self._activities = ActivityBoard.create(1 + len(self._actors))
        return Ring(schema, plan.num_slots, self._memory.buffer[:ring_bytes])

    # ---- the loop ------------------------------------------------------------------------------------------------
    def run(self, session: Session, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Train until a stop condition. Returns {reason, weights_sha256}; the last checkpoint is saved."""
        self._session, self._coordinator = session, session.coordinator
        self._reason: str | None = None
        self._begun = time.monotonic()
        self._start_learner()
        self._place()
        watched = 0.0
        while self._reason is None:
            if interrupted():
                session.wanted_end = session.wanted_end or "interrupted"
            if session.wanted_end and not self._coordinator.training and self._save is None:
                self._reason = session.wanted_end
                break
            self._dispatch()
            self._listen(WATCH_SECONDS)
            if time.monotonic() - watched >= WATCH_SECONDS:
                watched = time.monotonic()
                self._watch()
        return self._finish()

    def _listen(self, timeout_seconds: float) -> None:
        processes = {p.channel.fileno(): p for p in self._processes() if p.channel is not None}
        zygote = self._require_zygote()
        sources: list[Channel | Zygote] = [p.channel for p in processes.values() if p.channel is not None]
        ready = wait([*sources, zygote], timeout_seconds)
        for source in ready:
            if isinstance(source, Channel) and source.fileno() in processes:
                self._hear(processes[source.fileno()])
        if zygote in ready:
            for event in zygote.receive():
                self._zygote_said(event)

    def _processes(self) -> list[_Process]:
        return [self._learner, *self._actors]

    def _hear(self, process: _Process) -> None:
        """Every word of one process; its end is told by the zygote."""
        while process.channel is not None:
            message = _receive(process.channel)
            if message is None:
                return
            if process.name == "learner":
                self._learner_said(json.loads(message))
            else:
                self._actor_said(process, Word.decode(message))

    def _dispatch(self) -> None:
        """Order what may be ordered now."""
        if not self._learner.ready or self._reason is not None:
            return
        available = {p.index for p in self._actors if p.up and not p.doomed}
        for lease in self._coordinator.next_leases(available):
            self._send_lease(self._actors[lease.actor], lease)
        if self._save is None and (batch := self._coordinator.next_batch()) is not None:
            self._tell_learner({"do": "train", "rollouts": [[slot, list(identity)] for slot, identity in batch]})

    def _send_lease(self, actor: _Process, lease: Lease) -> None:
        words = [Word(Kind.LEASE, lease.slot, lease.identity, self._coordinator.version)]
        if lease.give_up:
            words = [Word(Kind.LEASE, lease.slot, lease.identity, self._coordinator.version, to_json({"give_up": lease.give_up}))]
        if lease.restore is not None:
            fd = anonymous_file("shoal-group")
            with os.fdopen(fd, "wb") as file:
                file.write(to_bytes(lease.restore))
                file.flush()
                self._tell(actor, Word(Kind.RESTORE, 0, lease.identity), [fd])
        for word in words:
            self._tell(actor, word)

    def _tell(self, actor: _Process, word: Word, fds: list[int] | None = None) -> None:
        """A word to an actor. One that is gone is heard of from the zygote; one that does not read is replaced."""
        if actor.channel is None:
            return
        try:
            sent = actor.channel.send_with_fds(word.encode(), fds) if fds else actor.channel.send(word.encode())
        except EOFError:
            return
        if not sent and word.kind is not Kind.PUBLISHED:
            self._kill(actor, "does not read its channel")

    def _tell_learner(self, order: dict[str, Any]) -> None:
        try:
            if self._learner.channel is not None and not self._learner.channel.send(to_json(order)):
                self._kill(self._learner, "does not read its channel")
        except EOFError:
            pass

    # ---- what roles say ------------------------------------------------------------------------------------------
    def _actor_said(self, actor: _Process, word: Word) -> None:
        if word.kind is Kind.FILLED:
            actor.deaths = 0
            if self._coordinator.filled(word.slot, word.identity):
                self._session.begun(int(self._coordinator.ring.slots[word.slot].envelope["begun_ns"]))
        elif word.kind is Kind.RESTORED and word.value:
            self._session.observer.event("not_restored", group=word.identity.group, environments=word.value)
        elif word.kind is Kind.FAULT:
            self._environment_fault(word.identity, word.json)

    def _environment_fault(self, identity: Identity, facts: dict[str, Any]) -> None:
        """The first in the first seconds is a bug and ends the run; a later one is mended within the budget."""
        error = rebuild_error(facts)
        if not isinstance(error, EnvironmentFault):
            raise error
        self._session.restarts += 1
        self._session.observer.event("environment_fault", group=identity.group, message=str(error), report=facts["report"])
        self._faults = getattr(self, "_faults", 0) + 1
        early = self._session.seconds < EARLY_SECONDS and self._session.seconds_before == 0
        if early or self._faults > self._config.env.restart_budget:
            raise error
        report = facts["report"]
        self._coordinator.faulted(identity, int(report.get("row", 0)), int(report.get("env", 0) or 0))

    def _learner_said(self, said: dict[str, Any]) -> None:
        kind = said["is"]
        if kind == "ready":
            self._learner.ready = True
            self._publish(said["version"])
        elif kind == "consumed":
            self._coordinator.consumed({Identity(*identity): Fate(fate) for identity, fate in said["dropped"]})
        elif kind == "trained":
            self._learner.deaths = 0
            self._reason = self._session.finish_update(said["metrics"])
            self._publish(said["version"])
            if self._reason is None and self._session.checkpoint_due():
                self._begin_save()
        elif kind == "saved" and self._save is not None:
            self._session.commit(self._save.staging, self._save.arrays, self._save.facts)
            self._weights_sha256 = said["weights_sha256"]
            self._save = None
        elif kind == "failed":
            raise rebuild_error(said)

    def _publish(self, version: int) -> None:
        if self._coordinator.plan.mode == "async" and version != self._published:
            for actor in self._actors:
                self._tell(actor, Word(Kind.PUBLISHED, value=version))
        self._published = version

    def _begin_save(self) -> None:
        self._save = _Save(*self._session.begin_checkpoint())
        self._tell_learner({"do": "save", "path": str(self._save.staging.path)})

    # ---- life and death ------------------------------------------------------------------------------------------
    def _require_zygote(self) -> Zygote:
        if self._zygote is None:
            raise ProcessError("the engine is not open")
        return self._zygote

    def _start(self, process: _Process, setup: bytes) -> None:
        assert self._memory is not None
        assert self._activities is not None
        ours, theirs = Channel.pair()
        process.channel, process.ready, process.doomed, process.pid = ours, False, False, 0
        self._require_zygote().fork(
            f"shoal.engines.mains:{process.name}_main",
            process.name,
            process.index,
            process.incarnation,
            theirs,
            (self._memory.fd, self._activities.fd),
        )
        ours.send(setup)

    def _setup(self, **more: Any) -> dict[str, Any]:
        return {
            "config": self._config.model_dump(mode="json", by_alias=True),
            "spec": self._session.spec.to_json(),
            "run_id": self._run_id.hex(),
            "epoch": self._epoch,
            "num_roles": 1 + len(self._actors),
            **self._sizes,
            **more,
        }

    def _start_learner(self) -> None:
        path = self._session.last_checkpoint[2]
        checkpoint = None if path is None else str(path.absolute())
        setup = self._setup(checkpoint=checkpoint, max_policy_lag=self._coordinator.plan.max_policy_lag)
        self._start(self._learner, to_json(setup))

    def _start_actor(self, actor: _Process) -> None:
        plan = self._coordinator.plan
        setup = self._setup(close_after_lag=plan.close_after_lag, sync=plan.mode == "sync")
        self._start(actor, Word(Kind.SETUP, body=to_json(setup)).encode())

    def _place(self) -> None:
        """Spread the groups over the actors that are not gone for good, and start those that are not up."""
        there = [a for a in self._actors if a.deaths < DEATHS_IN_A_ROW]
        for actor in there:
            if not actor.up and time.monotonic() >= actor.not_before:
                self._start_actor(actor)
        for index, group in self._coordinator.place([a.index for a in there]):
            self._tell(self._actors[index], Word(Kind.RELEASE, identity=Identity(group, 0, 0)))

    def _kill(self, process: _Process, why: str) -> None:
        if process.doomed or not process.up:
            return
        process.doomed, process.last_words = True, why
        self._session.observer.event("killed", role=process.name, index=process.index, reason=why)
        if process.pid:
            self._require_zygote().kill(process.pid)

    def _zygote_said(self, event: object) -> None:
        if isinstance(event, Forked):
            process = self._process(event.role.name, event.role.index)
            if process is not None and process.incarnation == event.role.incarnation:
                process.pid = event.pid
                if process.doomed:
                    self._require_zygote().kill(event.pid)
        elif isinstance(event, Exited):
            process = self._process(event.role.name, event.role.index)
            if process is not None and process.incarnation == event.role.incarnation:
                self._died(process, event.describe())
        elif isinstance(event, Lost):
            self._restart_zygote(event.reason)

    def _process(self, name: str, index: int) -> _Process | None:
        return next((p for p in self._processes() if (p.name, p.index) == (name, index)), None)

    def _died(self, process: _Process, how: str) -> None:
        self._hear(process)  # what it said before
        if process.channel is not None:
            process.channel.close()
        process.channel, process.pid, process.ready = None, 0, False
        process.incarnation += 1
        process.deaths += 1
        process.not_before = time.monotonic() + (0.0 if process.deaths < 2 else 0.1 * 2 ** min(process.deaths - 2, 6))
        self._session.restarts += 1
        self._session.observer.event("died", role=process.name, index=process.index, how=how, reason=process.last_words)
        process.last_words = ""
        if process.name == "learner":
            self._learner_died(how)
        else:
            self._actor_died(process, how)

    def _actor_died(self, actor: _Process, how: str) -> None:
        lost = self._coordinator.lost(actor.index)
        if actor.deaths >= DEATHS_IN_A_ROW:
            self._session.observer.event("actor_gone", index=actor.index, how=how)
            if all(a.deaths >= DEATHS_IN_A_ROW for a in self._actors):
                raise EnvironmentFault(
                    f"environment {self._config.env.id}: every actor died {DEATHS_IN_A_ROW} times without finishing a rollout, "
                    f"the last {how} (making {lost[:1] or 'nothing'}).\n{self._log_tail(actor)}",
                    {"how": how},
                )
        self._place()

    def _log_tail(self, process: _Process) -> str:
        path = self._directory / "logs" / f"{process.name}-{process.index}.log"
        lines = path.read_text(errors="replace").splitlines()[-15:] if path.exists() else []
        return "\n".join([f"Its log ({path}) ends with:", *lines]) if lines else f"Its log {path} is empty."

    def _learner_died(self, how: str) -> None:
        if self._learner.deaths >= DEATHS_IN_A_ROW:
            raise ProcessError(
                f"the learner died {DEATHS_IN_A_ROW} times without an update in between, the last {how}.\n{self._log_tail(self._learner)}"
            )
        self._stop_all()
        self._return_to_checkpoint()

    def _stop_all(self) -> None:
        """Kill every role and wait until all are reaped: their slots are nobody's then."""
        deadline = time.monotonic() + END_SECONDS * 5
        for process in self._processes():
            self._kill(process, "the run goes back to its last checkpoint")
        while any(p.up for p in self._processes()):
            if time.monotonic() > deadline:
                raise ProcessError("a role could not be ended; see `ps` for a process in uninterruptible sleep")
            wait([self._require_zygote()], WATCH_SECONDS)
            for event in self._require_zygote().receive():
                if isinstance(event, Lost):
                    self._zygote_said(event)
                    return
                self._reap(event)

    def _reap(self, event: object) -> None:
        if isinstance(event, Forked):
            self._zygote_said(event)
        elif isinstance(event, Exited):
            process = self._process(event.role.name, event.role.index)
            if process is not None and process.channel is not None and process.incarnation == event.role.incarnation:
                process.channel.close()
                process.channel, process.pid, process.ready = None, 0, False
                process.incarnation += 1

    def _return_to_checkpoint(self) -> None:
        if self._save is not None:
            self._save.staging.discard()
            self._save = None
        self._session.return_to_checkpoint()
        self._published = -1
        self._start_learner()
        self._place()

    def _restart_zygote(self, reason: str) -> None:
        self._session.observer.event("died", role="zygote", index=0, how=reason, reason="")
        self._zygote_deaths = getattr(self, "_zygote_deaths", 0) + 1
        if self._zygote_deaths >= DEATHS_IN_A_ROW:
            raise ProcessError(f"the helper process died {DEATHS_IN_A_ROW} times; the last: {reason}")
        for process in self._processes():
            if process.channel is not None:
                process.channel.close()
                process.incarnation += 1
            process.channel, process.pid, process.ready = None, 0, False
        self._session.restarts += 1
        self.open()
        wait_until_ready(self._require_zygote(), START_SECONDS)
        self._return_to_checkpoint()

    # ---- watching ------------------------------------------------------------------------------------------------
    def _watch(self) -> None:
        """A few times a second: who is stopped, who hangs, who may start again."""
        assert self._activities is not None
        records = self._activities.records()
        for process, record in zip(self._processes(), records, strict=True):
            if not process.up or not process.pid:
                continue
            if process_state(process.pid) == "T":
                self._kill(process, "was stopped")
            limit = self._config.env.step_timeout_seconds
            if record.incarnation != process.incarnation or process.name == "learner":
                continue
            if record.activity is Activity.STEPPING and record.age_seconds > limit:
                self._hung(process, record.group, record.row, record.age_seconds)
            elif record.activity is Activity.RESTORING and record.age_seconds > 10 * limit:
                self._hung(process, record.group, -1, record.age_seconds)
        if any(not a.up and a.deaths < DEATHS_IN_A_ROW for a in self._actors):
            self._place()
        if self._save is not None and time.monotonic() - self._save.begun > SAVE_SECONDS:
            self._kill(self._learner, f"did not save within {SAVE_SECONDS:g} s")
        self._session.observer.tick(records)

    def _hung(self, actor: _Process, group: int, row: int, age_seconds: float) -> None:
        message = (
            f"environment {self._config.env.id}: group {group} has been in one step for {age_seconds:.1f} s at row {row}, "
            f"allowed are {self._config.env.step_timeout_seconds:g} s (--env.step-timeout-seconds)"
        )
        self._session.observer.event("environment_fault", group=group, message=message, report={"row": row})
        self._faults = getattr(self, "_faults", 0) + 1
        early = self._session.started is None or self._session.seconds < EARLY_SECONDS
        if early or self._faults > self._config.env.restart_budget:
            raise EnvironmentFault(message, {"group": group, "row": row})
        self._kill(actor, "hangs in an environment's step")

    # ---- the end -------------------------------------------------------------------------------------------------
    def _finish(self) -> dict[str, Any]:
        """A last checkpoint, then a word to everybody that it is over."""
        reason = self._reason
        deadline = time.monotonic() + SAVE_SECONDS
        self._coordinator.shut_down()
        if self._learner.ready and self._save is None:
            self._begin_save()
        while self._save is not None and time.monotonic() < deadline and self._learner.up:
            self._listen(WATCH_SECONDS)
        if self._save is not None:
            self._save.staging.discard()
        for actor in self._actors:
            self._tell(actor, Word(Kind.STOP))
        self._tell_learner({"do": "stop"})
        deadline = time.monotonic() + END_SECONDS
        while any(p.up for p in self._processes()) and time.monotonic() < deadline:
            wait([self._require_zygote()], WATCH_SECONDS)
            for event in self._require_zygote().receive():
                self._reap(event)
        return {"reason": reason, "weights_sha256": self._weights_sha256}


def _receive(channel: Channel) -> bytes | None:
    try:
        return channel.receive()
    except EOFError:
        return None


def rebuild_error(facts: dict[str, Any]) -> Exception:
    """An error that another process described (mains.describe_error), as this process raises it."""
    kind = getattr(errors, facts["error"], None)
    message = facts["message"]
    if kind is EnvironmentFault:
        report = {**facts["report"], "traceback": facts["report"].get("traceback") or facts["traceback"]}
        return EnvironmentFault(message, report)
    if isinstance(kind, type) and issubclass(kind, ShoalError):
        return kind(message)
    return EnvironmentFault(f"{facts['error']}: {message}", {"traceback": facts["traceback"]})


__all__ = ["ConfigError", "Coordinator", "DivergedError", "LocalEngine", "rebuild_error"]
