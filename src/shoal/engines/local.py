"""The local engine: roles in processes of this machine, rollouts and weights in shared memory, words through channels.

The supervisor's loop. It imports no torch, holds the coordinator, and is the only one that decides.

    consumes    words of actors and learner, exits told by the zygote, requests on the control socket
    waits for   all of them together, a quarter of a second at most
    unblocked   by any word, any death, or the time
    on failure  an actor is replaced and its rollouts are made again; the learner is replaced, and the run goes back to its last
                checkpoint; the supervisor's own end ends everything (the zygote sees to it)
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.config import RunConfig
from shoal.engines.coordinator import Lease, Plan
from shoal.engines.environment_faults import EnvironmentFaults
from shoal.engines.fleet import DEATHS_IN_A_ROW, MAX_ACTORS, START_SECONDS, STOP_SECONDS, Death, Fleet, Process, rebuild_error, tell, words
from shoal.engines.messages import Kind, Word, to_json
from shoal.engines.question import stack_of
from shoal.engines.session import Session
from shoal.errors import CheckpointError, EnvironmentFault, ProcessError
from shoal.experience.envelope import Fate, Identity
from shoal.experience.group_state import to_bytes
from shoal.experience.ring import Ring
from shoal.experience.schema import Schema
from shoal.files import Staging
from shoal.supervision.channel import HasFileno
from shoal.supervision.control import ControlServer, Reply
from shoal.supervision.memory import anonymous_file
from shoal.supervision.processes import process_state
from shoal.supervision.trace import Span, open_trace
from shoal.supervision.zygote import Lost
from shoal.types import Activity, ActivityRecord, Arrays

SAVE_SECONDS = 60.0
END_SECONDS = 2.0
WATCH_SECONDS = 0.25
RESTORE_TIMES = 10  # putting a group back may take this many times as long as one step, where it does not tell of each call
CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL", "SIGSYS", "SIGTRAP")


@dataclass
class _Save:
    """A checkpoint that the learner is writing its part of."""

    staging: Staging
    arrays: Arrays
    facts: dict[str, Any]
    replies: list[Reply]
    begun: float = field(default_factory=time.monotonic)


class LocalEngine:
    """`open`, `look` (spec and sizes), `allocate`, `run`; `close` leaves nothing behind."""

    def __init__(self, config: RunConfig, pickled: bytes | None, directory: Path, run_id: bytes, epoch: int = 0, traces: str = "") -> None:
        self._config, self._directory = config, directory
        self._fleet = Fleet(config, pickled, directory, run_id, epoch, traces)
        self._trace = open_trace(traces, "supervisor")
        self._save: _Save | None = None
        self._wants_save: list[Reply] = []
        self._control: ControlServer | None = None
        self._paused = False
        self._reason: str | None = None
        self._ending = False  # actors that end are not replaced
        self._weights_sha256 = ""
        self._zygote_deaths = 0
        self._furthest = 0  # newest version that this process saw

    def open(self) -> None:
        """Start the helper process; its imports go on while this one does other things."""
        self._fleet.open()

    def close(self) -> None:
        self._fleet.close()
        if self._control is not None:
            self._control.close()

    def look(self) -> dict[str, Any]:
        """Spec and sizes, found by a process of its own."""
        return self._fleet.look()

    def evaluate(self, path: Path) -> dict[str, Any]:
        """What the policy of a checkpoint is worth, as `shoal evaluate` says it."""
        return self._fleet.evaluate(path)

    def allocate(self, schema: Schema, plan: Plan, weights: int) -> Ring:
        return self._fleet.allocate(schema, plan, weights)

    # ---- the loop ------------------------------------------------------------------------------------------------
    def run(self, session: Session, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Train until a stop condition. Returns {reason, weights_sha256}; the last checkpoint is saved."""
        self._session, self._coordinator = session, session.coordinator
        self._faults = EnvironmentFaults(session)
        try:
            self._control = ControlServer(self._directory)
        except OSError as error:
            session.observer.event("warning", message=f"the run takes no requests (shoal control): {error.strerror} ({self._directory})")
        self._start_learner()
        self._place()
        if self._coordinator.version:
            self._reason = self._coordinator.stop_reason(session.seconds)
        watched = 0.0
        while self._reason is None or not self._finished():
            if interrupted():
                session.wanted_end = session.wanted_end or "interrupted"
            if session.wanted_end and not self._coordinator.learner_busy and self._save is None:
                self._reason = session.wanted_end
                continue
            self._trace.begin(Span.DISPATCH)
            self._dispatch()
            self._trace.end()
            self._listen(WATCH_SECONDS)
            if time.monotonic() - watched >= WATCH_SECONDS:
                watched = time.monotonic()
                self._trace.begin(Span.WATCH)
                self._watch()
                self._trace.end()
        return {"reason": self._reason, "weights_sha256": self._weights_sha256}

    def _listen(self, timeout_seconds: float) -> None:
        control = [] if self._control is None else self._control.sources()
        ready = self._fleet.listen(timeout_seconds, control)
        self._trace.begin(Span.HEAR)
        try:
            self._take_in(ready, control)
        finally:
            self._trace.end()

    def _take_in(self, ready: list[HasFileno], control: Sequence[HasFileno]) -> None:
        """Everything that those have to say who are ready."""
        for process in self._fleet.processes:
            if process.channel in ready:
                self._hear(process)
        if self._fleet.zygote in ready:
            self._bury(self._fleet.happened())
        if self._control is not None and any(source in ready for source in control):
            for request, reply in self._control.receive():
                self._obey(request, reply)

    def _hear(self, process: Process) -> None:
        for message in words(process):
            if process.name == "learner":
                self._learner_said(json.loads(message))
            else:
                self._actor_said(process, Word.decode(message))

    def _dispatch(self) -> None:
        """Order what may be ordered now."""
        if not self._fleet.learner.ready or self._reason is not None:
            return
        if not self._paused:
            available = {p.index for p in self._fleet.actors if p.up and not p.doomed}
            for lease in self._coordinator.next_leases(available):
                self._send_lease(self._fleet.actors[lease.actor], lease)
            for index, group in self._coordinator.take_released():
                tell(self._fleet.actors[index], Word(Kind.RELEASE, identity=Identity(group, 0, 0)).encode())
        if self._save is None and (batch := self._coordinator.next_batch()) is not None:
            self._tell_learner({"do": "train", "rollouts": [[slot, list(identity)] for slot, identity in batch]})

    def _send_lease(self, actor: Process, lease: Lease) -> None:
        body = to_json({"give_up": lease.give_up}) if lease.give_up else b""
        if lease.restore is not None:
            with os.fdopen(anonymous_file("shoal-group"), "wb") as file:
                file.write(to_bytes(lease.restore))
                file.flush()
                tell(actor, Word(Kind.RESTORE, 0, lease.identity).encode(), [file.fileno()])
        tell(actor, Word(Kind.LEASE, lease.slot, lease.identity, self._coordinator.version, body).encode())

    def _tell_learner(self, order: dict[str, Any]) -> None:
        tell(self._fleet.learner, to_json(order))

    # ---- what roles say ------------------------------------------------------------------------------------------
    def _actor_said(self, actor: Process, word: Word) -> None:
        if word.kind is Kind.FILLED:
            actor.deaths = 0
            self._coordinator.ring.slots[word.slot].envelope["received_ns"] = time.monotonic_ns()
            if self._coordinator.filled(word.slot, word.identity):
                self._session.begun(int(self._coordinator.ring.slots[word.slot].envelope["begun_ns"]))
                self._faults.look_at(self._coordinator.ring.slots[word.slot])
        elif word.kind is Kind.RESTORED and word.value:
            self._session.observer.event("not_restored", group=word.identity.group, environments=word.value)
        elif word.kind is Kind.FAULT:
            error, report = rebuild_error(word.json), word.json["report"]
            if not isinstance(error, EnvironmentFault):
                raise error
            self._faults.happened(error, word.identity)
            self._coordinator.faulted(word.identity, int(report.get("row", 0)), int(report.get("env", 0) or 0))

    def _learner_said(self, said: dict[str, Any]) -> None:
        kind = said["is"]
        if kind == "ready":
            self._fleet.learner.ready = True
            self._publish(said["version"])
        elif kind == "consumed":
            self._coordinator.consumed({Identity(*identity): Fate(fate) for identity, fate in said["dropped"]})
        elif kind == "trained":
            self._reason = self._session.finish_update(said["metrics"])
            if self._coordinator.version > self._furthest:  # made again after a roll-back, an update is no progress
                self._furthest, self._fleet.learner.deaths = self._coordinator.version, 0
            self._publish(said["version"])
            if self._reason is None and (self._session.checkpoint_due() or self._wants_save):
                self._begin_save()
        elif kind == "saved" and self._save is not None:
            self._weights_sha256 = said["weights_sha256"]
            self._trace.begin(Span.CHECKPOINT)
            try:
                self._session.commit(self._save.staging, self._save.arrays, self._save.facts)
            except CheckpointError as error:
                self._give_up_save(str(error))
                return
            finally:
                self._trace.end()
            save, self._save = self._save, None
            for reply in save.replies:
                reply({"ok": True, "update": self._coordinator.version})
        elif kind == "not_saved" and self._save is not None:
            self._give_up_save(said["message"])
        elif kind == "failed":
            raise rebuild_error(said)

    def _publish(self, version: int) -> None:
        """Tell async actors of new weights. One whose channel is full hears of the next version, or by its next lease."""
        if self._coordinator.plan.mode == "async":
            message = Word(Kind.PUBLISHED, value=version).encode()
            for actor in self._fleet.actors:
                tell(actor, message, must_arrive=False)

    def _begin_save(self) -> None:
        replies, self._wants_save = self._wants_save, []
        self._trace.begin(Span.CHECKPOINT)
        try:
            self._save = _Save(*self._session.begin_checkpoint(), replies)
        except CheckpointError as error:
            self._session.save_failed(str(error))
            for reply in replies:
                reply({"ok": False, "error": str(error)})
            return
        finally:
            self._trace.end()
        self._tell_learner({"do": "save", "path": str(self._save.staging.path)})

    def _give_up_save(self, message: str) -> None:
        """The disk refuses: the run goes on, with an alarm; the checkpoints before are whole."""
        assert self._save is not None
        save, self._save = self._save, None
        save.staging.discard()
        self._session.save_failed(message)
        for reply in save.replies:
            reply({"ok": False, "error": message})

    # ---- life and death ------------------------------------------------------------------------------------------
    def _start_learner(self) -> None:
        path = self._session.last_checkpoint[2]
        checkpoint = None if path is None else str(path.absolute())
        setup = {"checkpoint": checkpoint, "max_policy_lag": self._coordinator.plan.max_policy_lag}
        self._fleet.start(self._fleet.learner, {"spec": self._session.spec.to_json(), **setup})

    def _place(self) -> None:
        """Spread the groups over the actors that are not gone for good, and start those that are not up."""
        there = [a for a in self._fleet.actors if not a.gone_for_good]
        plan = self._coordinator.plan
        setup = {"spec": self._session.spec.to_json(), "close_after_lag": plan.close_after_lag, "sync": plan.mode == "sync"}
        for actor in there:
            if not actor.up and time.monotonic() >= actor.not_before:
                self._fleet.start(actor, setup, lambda body: Word(Kind.SETUP, body=body).encode())
        self._coordinator.place([a.index for a in there])

    def _kill(self, process: Process, why: str) -> None:
        if process.up and not process.doomed:
            self._session.observer.event("killed", role=process.name, index=process.index, reason=why)
        self._fleet.kill(process, why)

    def _bury(self, happened: list[Death | Lost]) -> None:
        """All that died together is heard for the last time and put away before anything follows from it."""
        for event in happened:
            if isinstance(event, Death):
                self._hear(event.process)
                event.process.ended()
        for event in happened:
            if isinstance(event, Lost):
                self._lost_zygote(event)
            elif not event.process.up:  # else it was started anew with all others
                self._died(event)

    def _died(self, death: Death) -> None:
        process = death.process
        if process.name == "actor" and self._ending:
            return  # what it was making is in flight still, and ends as such
        if process.retired:
            self._coordinator.lost(process.index)
            return
        process.deaths += 1
        process.not_before = time.monotonic() + (0.0 if process.deaths < 2 else 0.1 * 2 ** min(process.deaths - 2, 6))
        self._session.restarts += 1
        self._session.observer.event("died", role=process.name, index=process.index, how=death.how, reason=death.why)
        if process.name == "learner":
            if process.deaths >= DEATHS_IN_A_ROW:
                tail = self._fleet.log_tail(process)
                raise ProcessError(f"the learner died {DEATHS_IN_A_ROW} times without an update in between, the last {death.how}.\n{tail}")
            self._return_to_checkpoint()
        else:
            self._blame_environment(death)
            self._actor_died(process, death.how)

    def _blame_environment(self, death: Death) -> None:
        """An actor that ended by itself while it was in its environment: that is the environment's doing."""
        record = self._fleet.activities()[1 + death.process.index]
        in_it = record.activity in (Activity.STEPPING, Activity.RESTORING)
        if death.why or not in_it or not (death.how.startswith("exit") or death.how.endswith(CRASHES)):
            return
        call = "step()" if record.activity is Activity.STEPPING else "making it, reset() or a step while it was put back"
        hint = "nothing in an environment may end its process (os._exit, a crash in native code)"
        fault = self._faults.lost(
            "died",
            f"its process ended in {call}: {death.how}",
            record.group,
            record.row,
            {"hint": hint},
            self._fleet.log_tail(death.process),
        )
        self._faults.happened(fault, self._faults.place_of(record.group))

    def _actor_died(self, actor: Process, how: str) -> None:
        lost = self._coordinator.lost(actor.index)
        if actor.gone_for_good:
            self._session.observer.event("actor_gone", index=actor.index, how=how)
        if all(a.gone_for_good for a in self._fleet.actors):
            raise EnvironmentFault(
                f"environment {self._config.env.id}: every actor died {DEATHS_IN_A_ROW} times without finishing a rollout, "
                f"the last {how} (making {lost[:1] or 'nothing'}).\n{self._fleet.log_tail(actor)}",
                {"how": how},
            )
        self._place()

    def _return_to_checkpoint(self) -> None:
        """The learner is lost: everything goes back to the last checkpoint, all roles are made anew."""
        lost = self._fleet.stop_all("the run goes back to its last checkpoint")
        if lost is not None:
            self._lost_zygote(lost)
            return
        self._begin_again()

    def _lost_zygote(self, lost: Lost) -> None:
        self._session.observer.event("died", role="zygote", index=0, how=lost.reason, reason="")
        self._session.restarts += 1
        self._zygote_deaths += 1
        if self._zygote_deaths >= DEATHS_IN_A_ROW:
            raise ProcessError(f"the helper process died {DEATHS_IN_A_ROW} times; the last: {lost.reason}")
        self._fleet.reopen()
        self._begin_again()

    def _begin_again(self) -> None:
        if self._save is not None:
            self._save.staging.discard()
            self._wants_save += self._save.replies
            self._save = None
        self._session.return_to_checkpoint()
        self._reason, self._ending = None, False
        self._start_learner()
        self._place()

    # ---- watching ------------------------------------------------------------------------------------------------
    def _watch(self) -> None:
        """A few times a second: who is stopped, who hangs, who may start again."""
        records = self._fleet.activities()
        for process, record in zip(self._fleet.processes, records, strict=True):
            if process.pid and not process.doomed:
                self._watch_process(process, record)
        for actor in self._fleet.actors:
            if actor.retired and actor.up and not self._coordinator.hosts(actor.index):
                tell(actor, Word(Kind.STOP).encode())
        if any(not a.up and not a.gone_for_good for a in self._fleet.actors):
            self._place()
        if self._save is not None and time.monotonic() - self._save.begun > SAVE_SECONDS:
            self._kill(self._fleet.learner, f"did not save within {SAVE_SECONDS:g} s")
        if self._wants_save and self._save is None and not self._coordinator.learner_busy and self._fleet.learner.ready:
            self._begin_save()
        self._session.observer.tick(records)

    def _watch_process(self, process: Process, record: ActivityRecord) -> None:
        if process_state(process.pid) == "T":
            self._kill(process, "was stopped")
        elif process.name == "actor" and record.whole and record.incarnation == process.incarnation:
            limit = self._config.env.step_timeout_seconds
            stepping = record.activity is Activity.STEPPING and record.age_seconds > limit
            calls = 1 if record.env >= 0 else RESTORE_TIMES
            if stepping or (record.activity is Activity.RESTORING and record.age_seconds > calls * limit):
                self._hangs(process, record, limit if stepping else calls * limit)

    def _hangs(self, actor: Process, record: ActivityRecord, limit: float) -> None:
        what = "step()" if record.activity is Activity.STEPPING else "making it, reset() or a step while it was put back"
        fault = self._faults.lost(
            "hang", f"{what} has not returned for {record.age_seconds:.1f} s", record.group, record.row,
            {"expected": f"at most {limit:g} s", "actual": f"{record.age_seconds:.1f} s",
             "hint": "raise --env.step-timeout-seconds if it is only slow; else give every wait inside a limit of its own"},
            stack_of(actor.pid, self._fleet.log_path(actor)),
        )  # fmt: skip
        self._faults.happened(fault, self._faults.place_of(record.group), record.age_seconds)
        self._kill(actor, "hangs in its environment")

    # ---- control -------------------------------------------------------------------------------------------------
    def _obey(self, request: dict[str, Any], reply: Reply) -> None:
        command = request["command"]
        if command == "state":
            reply({"ok": True, "state": self._session.observer.state()})
        elif command == "save":
            self._wants_save.append(reply)
        elif command in ("pause", "continue"):
            self._paused = command == "pause"
            self._session.observer.event(command)
            reply({"ok": True})
        elif command == "stop":
            self._session.wanted_end = "interrupted"
            reply({"ok": True})
        elif command == "scale":
            self._scale(request.get("actors"), reply)
        else:
            reply({"ok": False, "error": f"no command {command!r}; there are state, save, pause, continue, scale, stop"})

    def _scale(self, wanted: object, reply: Reply) -> None:
        if not isinstance(wanted, int) or not 1 <= wanted <= min(MAX_ACTORS, self._coordinator.plan.num_groups):
            reply({"ok": False, "error": f"actors must be 1 to {self._coordinator.plan.num_groups} (the number of groups), got {wanted!r}"})
            return
        actors = self._fleet.actors
        actors += [Process("actor", index) for index in range(len(actors), wanted)]
        for actor in actors:
            actor.retired = actor.index >= wanted
            actor.deaths = 0
        self._place()
        self._session.observer.event("scaled", actors=wanted)
        reply({"ok": True, "actors": wanted})

    # ---- the end -------------------------------------------------------------------------------------------------
    def _finished(self) -> bool:
        """The actors end, so that nothing is stepped that the ledger does not see; then a last checkpoint, then the learner ends.

        False: the learner was lost on the way. The run went back to its last checkpoint, and goes on.
        """
        self._end_actors()
        if self._reason is not None:
            self._coordinator.shut_down()
            self._save_last()
        if self._reason is None:
            return False
        self._tell_learner({"do": "stop"})
        self._fleet.wait_for_ends(time.monotonic() + END_SECONDS)
        return True

    def _end_actors(self) -> None:
        self._ending = True
        for actor in self._fleet.actors:
            tell(actor, Word(Kind.STOP).encode())
        deadline = time.monotonic() + END_SECONDS
        while self._reason is not None and any(a.up for a in self._fleet.actors):
            self._listen(WATCH_SECONDS)
            if time.monotonic() > deadline:
                for actor in self._fleet.actors:
                    self._kill(actor, "did not end")
            if time.monotonic() > deadline + STOP_SECONDS:
                raise ProcessError("an actor could not be ended; see `ps` for a process in uninterruptible sleep")

    def _save_last(self) -> None:
        """Wait for the learner (it may be loading still) and for its part of the checkpoint."""
        deadline = time.monotonic() + START_SECONDS
        while self._reason is not None and not self._fleet.learner.ready and time.monotonic() < deadline:
            self._listen(WATCH_SECONDS)
        if self._reason is not None and self._save is None:
            self._begin_save()
        if self._reason is not None and self._save is None:
            raise CheckpointError("the last checkpoint could not be saved; `shoal resume` goes on from the one before")
        deadline = time.monotonic() + SAVE_SECONDS
        while self._reason is not None and self._save is not None:
            self._listen(WATCH_SECONDS)
            if time.monotonic() > deadline:
                raise ProcessError(f"the learner did not save within {SAVE_SECONDS:g} s; `shoal resume` goes on from the checkpoint before")
