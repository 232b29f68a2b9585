"""The local engine: roles in processes of this machine, rollouts and weights in shared memory, words through channels.

The supervisor's loop. It imports no torch, holds the coordinator, and is the only one that decides.

    consumes    words of actors and learner, exits told by the zygote, requests on the control socket
    waits for   all of them together, a quarter of a second at most
    unblocked   by any word, any death, or the time
    on failure  an actor is replaced and its rollouts are made again; the inference server is replaced, and asked again; the learner is replaced, and the run goes back to its last
                checkpoint, as it does once after divergence; several learners are replaced together, and make the update again that was under way; the supervisor's own end ends
                everything (the zygote sees to it)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shoal.config import RunConfig
from shoal.engines.commands import obey
from shoal.engines.ending import Ending
from shoal.engines.environment_faults import EnvironmentFaults
from shoal.engines.fleet import DEATHS_IN_A_ROW, Death, Fleet, Process, back_off_seconds, rebuild_error, tell, words
from shoal.engines.messages import Kind, Word, from_json, to_json
from shoal.engines.orders import actor_setup, connect, inference_setup, learner_setup, send_lease, send_restore, tell_of_weights
from shoal.engines.plan import Plan
from shoal.engines.poison import CERTAIN, DOUBTFUL, WHILE_RESTORED
from shoal.engines.recovery import Recoveries
from shoal.engines.saves import Saves
from shoal.engines.scaling import Scaling
from shoal.engines.session import Session
from shoal.engines.stalls import Inquiry, Situation, in_words, look
from shoal.engines.watch import Verdict, Watch
from shoal.errors import DivergedError, EnvironmentFault, ProcessError, SchemaError
from shoal.experience.envelope import Fate, Identity
from shoal.experience.ring import Ring
from shoal.experience.schema import Schema
from shoal.supervision.channel import HasFileno
from shoal.supervision.control import ControlServer, Reply
from shoal.supervision.trace import Span, open_trace
from shoal.supervision.zygote import Lost
from shoal.types import CLOSING, Activity, ActivityRecord

WATCH_SECONDS = 0.25
RETRY_SECONDS = 1.0  # after a start for which there were no descriptors
ANSWER_SECONDS = 10.0  # the zygote forks or kills within this time, or is given up
HANGS = "hangs in its environment"  # why the supervisor killed a process
STOPS = "was stopped by its environment"
_IN_ENVIRONMENT = (Activity.STEPPING, Activity.RESTORING)
CRASH_HINT = {"hint": "nothing in an environment may end its process (os._exit, a crash in native code)"}
STOP_HINT = {"hint": "nothing in an environment may stop its process (SIGSTOP)"}
HANG_HINT = {"hint": "raise --env.step-timeout-seconds if it is only slow; else give every wait inside a limit of its own"}


class LocalEngine:
    """`open`, `look` (spec and sizes), `allocate`, `run`; `close` leaves nothing behind."""

    def __init__(self, config: RunConfig, fleet: Fleet, directory: Path, traces: str = "") -> None:
        self._config, self._directory = config, directory
        self._fleet = fleet
        self._traces = traces
        self._watcher = Watch(config.env.step_timeout_seconds, config.learner.timeout_seconds)
        self._recoveries = Recoveries()
        self._inquiries: list[Inquiry] = []
        self._control: ControlServer | None = None
        self._paused = False
        self._reason: str | None = None
        self._divergence: DivergedError | None = None  # that is to be mended
        self._short: set[str] = set()  # roles for which there were no descriptors at the last attempt
        self._at_checkpoint = True  # where the run may be to end already
        self._heard_at = 0.0  # when it was last found out who has something to say
        self._watched_at = 0.0
        self._zygote_deaths = 0
        self._furthest = 0  # newest version that this process saw
        self._kept: int | None = None  # newest version that several learners keep in memory (engines/keeping.py)
        self._under_way: dict[str, Any] = {}  # the last order to train

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
    def run(
        self, session: Session, interrupted: Callable[[], bool] = lambda: False, asked: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """Train until a stop condition. Returns {reason, weights_sha256}; the last checkpoint is saved.

        Args:
          interrupted: whether the user wants it to end. asked: whether somebody wants to see on standard error who waits for whom.
        """
        self._session, self._coordinator = session, session.coordinator
        session.network = self._fleet.network
        self._trace = open_trace(self._traces, "supervisor", warn=session.warn)
        self._saves = Saves(session, self.tell_learner, self._trace)
        self._faults = EnvironmentFaults(session)
        self._end = Ending(session, self._fleet, self._saves, self)
        self._scaling = Scaling(session, self._fleet, self._place)
        wanted_since = 0.0
        self._first_epoch = session.epoch
        try:
            self._control = ControlServer(self._directory)
        except OSError as error:
            session.observer.event("warning", message=f"the run takes no requests (shoal control): {error.strerror} ({self._directory})")
        self._start_learner()
        self._serve()
        self._place()
        while self._reason is None or not self._end.finish(wanted_since):
            if interrupted():
                session.wanted_end = session.wanted_end or "interrupted"
            if asked():
                self._inquire(lambda found: print(in_words(found), file=sys.stderr, flush=True))
            if session.wanted_end and not self._saves.under_way:
                self._reason, wanted_since = session.wanted_end, time.monotonic()
                continue
            if self._at_checkpoint:
                self._at_checkpoint = False
                self._reason = self._coordinator.stop_reason(session.seconds) if self._coordinator.version else None
                continue
            self._trace.begin(Span.DISPATCH)
            self._dispatch()
            self._trace.end()
            self.attend()
        return {"reason": self._reason, "weights_sha256": self._saves.weights_sha256}

    @property
    def ends(self) -> bool:
        """Whether there is a reason to end; no more once the learner was lost, and the run went back to its last checkpoint."""
        return self._reason is not None

    def attend(self) -> None:
        """Wait for words, a moment at most, and watch a few times a second."""
        self._listen(0.05 if self._inquiries else WATCH_SECONDS)
        if time.monotonic() - self._watched_at < WATCH_SECONDS:
            return
        if time.monotonic() - self._heard_at > WATCH_SECONDS:
            self._listen(0.0)  # a callback or a disk took its time: nobody is judged by words that came meanwhile
        self._watched_at = time.monotonic()
        self._trace.begin(Span.WATCH)
        self._watch()
        self._trace.end()

    def _listen(self, timeout_seconds: float) -> None:
        control = [] if self._control is None else self._control.sources()
        ready = self._fleet.listen(timeout_seconds, control)
        self._heard_at = time.monotonic()
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
                obey(self, request, reply)
        if self._divergence is not None:
            self._mend_divergence(self._divergence)
        self._inquiries = [one for one in self._inquiries if not one.answered(time.monotonic())]

    def _hear(self, process: Process) -> None:
        for message in words(process):
            try:
                if process.name != "actor":
                    said = from_json(message)
                else:
                    word = Word.decode(message)
                    self._coordinator.check_place(word.slot, word.identity)
            except ValueError as error:  # its memory is not what it was: native code of an environment wrote where it should not
                self.kill(process, f"sent what is no message ({error})")
                return
            if process.name == "learner":
                self._learner_said(process, said)
            elif process.name == "inference":
                self._inference_said(process, said)
            else:
                self._actor_said(process, word)

    def _dispatch(self) -> None:
        """Order what may be ordered now. Groups are put back also while the learner is at work, or not there yet."""
        if self._reason is not None:
            return
        available = {p.index for p in self._fleet.actors if p.up and not p.doomed and not p.dismissed}
        for index, group in self._coordinator.take_released():  # before orders: one that went and came back is put back after it is let go
            tell(self._fleet.actors[index], Word(Kind.RELEASE, identity=Identity(group, 0, 0)).encode())
        if self._fleet.learner.ready and not self._paused:
            for lease in self._coordinator.next_leases(available):
                send_lease(self._fleet.actors[lease.actor], lease, self._coordinator.version)
        for restore in self._coordinator.next_restores(available):
            send_restore(self._fleet.actors[restore.actor], restore.identity, restore.state)
        if not self._fleet.learner.ready:
            return
        if not self._saves.under_way and (batch := self._coordinator.next_batch()) is not None:
            rollouts = [[slot, list(identity)] for slot, identity in batch]
            self.tell_learner({"do": "train", "rollouts": rollouts, "optimizer_steps": self._coordinator.optimizer_steps})

    def tell_learner(self, order: dict[str, Any]) -> None:
        if order["do"] == "train":
            self._under_way = order
        for learner in self._fleet.learners:
            learner.told_at = time.monotonic()
            tell(learner, to_json(order))

    # ---- what roles say ------------------------------------------------------------------------------------------
    def _actor_said(self, actor: Process, word: Word) -> None:
        if word.kind is Kind.FILLED:
            if not self._collected(actor, word):
                return
            actor.deaths = 0
            actor.told_at = time.monotonic()  # it goes on with the next
            self._coordinator.ring.slots[word.slot].envelope["received_ns"] = time.monotonic_ns()
            if self._coordinator.filled(word.slot, word.identity):
                self._session.begun(int(self._coordinator.ring.slots[word.slot].envelope["begun_ns"]))
                self._faults.look_at(self._coordinator.ring.slots[word.slot])
            self._back("actor", actor.index)
            self._back("group", word.identity.group)
            if self._fleet.inference is not None and self._fleet.inference.ready:
                self._back("inference", 0)
        elif word.kind is Kind.RESTORED:
            for role, index in (("actor", actor.index), ("group", word.identity.group)):
                self._recoveries.restored(role, index, word.json["seconds"])
            if word.value:
                self._session.observer.event("not_restored", group=word.identity.group, environments=word.value)
        elif word.kind is Kind.FAULT:
            error, report = rebuild_error(word.json), word.json["report"]
            if not isinstance(error, EnvironmentFault):
                raise error
            self._faults.happened(error, word.identity)
            self._recoveries.lost("group", word.identity.group, str(report.get("kind", "fault")), time.monotonic())
            self._faults.give_back(error, word.identity)

    def _collected(self, actor: Process, word: Word) -> bool:
        """Whether the rollout that a word tells of is here."""
        try:
            if self._coordinator.awaits(word.slot, word.identity):
                self._fleet.collect(actor, word, self._coordinator.version)
        except SchemaError as error:
            self.kill(actor, f"sent what is no rollout ({error})")
            return False
        return True

    def _back(self, role: str, index: int) -> None:
        if facts := self._recoveries.back(role, index, time.monotonic()):
            self._session.observer.event("recovered", **facts)

    def _inference_said(self, server: Process, said: dict[str, Any]) -> None:
        if said["is"] == "failed":
            raise rebuild_error(said)
        server.ready = True
        self._recoveries.ready("inference", 0, time.monotonic())

    def _learner_said(self, learner: Process, said: dict[str, Any]) -> None:
        kind = said["is"]
        if kind == "ready":
            learner.ready = True
            self._recoveries.ready("learner", learner.index, time.monotonic())
            if learner.index == 0:
                self._learner_is_ready(said["version"])
        elif kind == "consumed":
            self._consumed(said)
        elif kind == "trained":
            tell_of_weights(
                self._session, self._fleet.actors, said["version"]
            )  # before anything that may take its time, as a callback does
            self._fleet.push()
            if "dropped" in said:  # several learners, who say both at once
                self._consumed(said)
            try:
                self._reason = self._session.finish_update(said["metrics"])
            except DivergedError as diverged:
                self._diverged(diverged)
                return
            self._remember(said["version"])
            if self._coordinator.version > self._furthest:  # made again after a roll-back, an update is no progress
                self._furthest, self._zygote_deaths = self._coordinator.version, 0
                for each in self._fleet.learners:
                    each.deaths = 0
                if self._fleet.inference is not None:
                    self._fleet.inference.deaths = 0
            for each in self._fleet.learners:
                self._back("learner", each.index)
            if self._reason is None and self._saves.due:
                self._saves.begin()
        elif kind == "saved":
            self._saves.saved(learner.index, said["weights_sha256"])
        elif kind == "not_saved":
            self._saves.not_saved(learner.index, said["message"])
        elif kind == "failed":
            error = rebuild_error(said)
            if not isinstance(error, DivergedError):
                raise error
            self._diverged(error)

    def _consumed(self, said: dict[str, Any]) -> None:
        self._coordinator.consumed({Identity(*identity): Fate(fate) for identity, fate in said["dropped"]})

    def _learner_is_ready(self, version: int) -> None:
        self._remember(version)
        tell_of_weights(self._session, self._fleet.actors, version)
        if self._coordinator.learner_busy:  # it stands where those stood that were lost
            self.tell_learner(self._under_way)
        elif self._session.checkpoint_path is None and not self._saves.under_way and self._reason is None:
            self._saves.begin()  # so that a run that fails or is ended early leaves one

    def _remember(self, version: int) -> None:
        if len(self._fleet.learners) > 1:
            self._kept = version

    def _diverged(self, error: DivergedError) -> None:
        """To be mended, once."""
        if self._session.epoch > self._first_epoch:
            raise error
        self._divergence = error

    # ---- life and death ------------------------------------------------------------------------------------------
    def _start_learner(self) -> None:
        """Where it is not up, and may start again; several meet as they begin."""
        if time.monotonic() < max(learner.not_before for learner in self._fleet.learners):
            return
        for learner in self._fleet.learners:
            if not learner.up:
                self._start(learner, learner_setup(self._session, self._kept))

    def _serve(self) -> None:
        """Start the inference server, where there is to be one and it is not up; all actors are to ask it."""
        server = self._fleet.inference
        if server is None or server.up or time.monotonic() < server.not_before:
            return
        if self._start(server, inference_setup(self._session)):
            for actor in self._fleet.actors:
                self._connect(actor)

    def _place(self) -> None:
        """Spread the groups over the actors that are not gone for good, and start those that are not up."""
        there = [a for a in self._fleet.actors if not a.gone_for_good]
        for actor in there:
            may_start = not actor.up and time.monotonic() >= actor.not_before
            if may_start and self._start(actor, actor_setup(self._session), lambda body: Word(Kind.SETUP, body=body).encode()):
                self._connect(actor)
        self._coordinator.place([a.index for a in there])

    def _start(self, process: Process, setup: dict[str, Any], encode: Callable[[bytes], bytes] = lambda body: body) -> bool:
        """Where there are no descriptors for it, that is said, and it is tried again a little later.

        Raises:
          ProcessError: that is so before the first update already: nothing will change by waiting.
        """
        try:
            self._fleet.start(process, setup, encode)
        except OSError as error:
            if not self._furthest:
                raise ProcessError(
                    f"a process ({process.name}) cannot be started: {error.strerror or error}; raise the limit of open files (`ulimit -n`)"
                ) from error
            process.not_before = time.monotonic() + RETRY_SECONDS
            if process.name not in self._short:
                self._short.add(process.name)
                self._session.warn(
                    f"a process ({process.name}) cannot be started for now: {error.strerror or error}; the run goes on without it, and tries again"
                )
            return False
        self._short.discard(process.name)
        process.dismissed = False
        return True

    def _connect(self, actor: Process) -> None:
        if self._fleet.inference is None:
            return
        try:
            connect(self._fleet.inference, actor)
        except OSError as error:
            self.kill(actor, f"cannot be connected with the inference server: {error.strerror or error}")

    def kill(self, process: Process, why: str) -> None:
        if process.up and not process.doomed:
            self._session.observer.event("killed", role=process.name, index=process.index, reason=why)
        self._fleet.kill(process, why)

    def _bury(self, happened: list[Death | Lost]) -> None:
        """All that died together is heard for the last time and put away before anything follows from it."""
        for event in happened:
            if isinstance(event, Death):
                self._hear(event.process)
                event.process.ended()
        if lost := next((event for event in happened if isinstance(event, Lost)), None):
            self._lost_zygote(lost)  # and with it all that died
            return
        dead = [event for event in happened if isinstance(event, Death)]
        learner_lost = False
        for death in sorted(
            dead, key=lambda death: death.process.name != "actor"
        ):  # their rollouts are settled before anybody is made anew
            if not death.process.up and not (learner_lost and death.process.name == "learner"):  # else it was started anew with all others
                learner_lost = learner_lost or death.process.name == "learner"
                self._died(death)
        if not self._end.begun and any(death.process.name == "actor" for death in dead):
            self._place()

    def _died(self, death: Death) -> None:
        process = death.process
        if process.name != "learner" and self._end.begun:
            return  # what it was making is in flight still, and ends as such
        if process.retired:
            for group in self._coordinator.groups_of(process.index):  # its node is lost: they move
                self._recoveries.lost("group", group, death.how, time.monotonic())
        if process.retired or process.dismissed:
            self._coordinator.lost(process.index)
            return
        if process.name == "learner" and self._divergence is not None:
            return  # it said why; all are made anew at once
        process.deaths += 1
        deaths = sum(each.deaths for each in self._fleet.learners) if process.name == "learner" else process.deaths
        process.not_before = time.monotonic() + back_off_seconds(deaths)
        self._session.restarts += 1
        self._session.observer.event("died", role=process.name, index=process.index, how=death.how, reason=death.why)
        self._recoveries.lost(process.name, process.index, death.why or death.how, time.monotonic())
        if process.name == "actor":
            self._actor_died(process, death)
        elif deaths >= DEATHS_IN_A_ROW:
            who, tail = "the learner" if process.name == "learner" else "the inference server", self._fleet.log_tail(process)
            raise ProcessError(f"{who} died {DEATHS_IN_A_ROW} times without an update in between, the last {death.how}.\n{tail}")
        elif process.name == "learner":
            self._replace_learners()
        else:
            self._serve()

    def _actor_died(self, actor: Process, death: Death) -> None:
        record, broke = death.record, -1
        if record.whole and record.incarnation == actor.incarnation - 1 and self._in_environment(record):
            certain = death.crashed or death.why in (HANGS, STOPS)
            suspected = self._suspect(actor, record, certain)
            broke = suspected if certain else -1
            if death.crashed:
                self._blame("died", f"its process ended in {_call(record)}: {death.how}", record, CRASH_HINT, self._fleet.log_tail(actor))
        lost = self._coordinator.lost(actor.index, broke)
        if actor.gone_for_good:
            self._session.observer.event("actor_gone", index=actor.index, how=death.how)
        if all(a.gone_for_good for a in self._fleet.actors):
            raise EnvironmentFault(
                f"environment {self._config.env.id}: every actor died {DEATHS_IN_A_ROW} times without finishing a rollout, "
                f"the last {death.how} (making {lost[:1] or 'nothing'}).\n{self._fleet.log_tail(actor)}",
                {"how": death.how},
            )

    def _in_environment(self, record: ActivityRecord) -> bool:
        """Whether code of an environment ran: that of a paced group also runs while actions are chosen for others of it."""
        infers = record.activity is Activity.INFERRING
        return record.activity in _IN_ENVIRONMENT or (infers and self._coordinator.is_paced(record.group))

    def _suspect(self, actor: Process, record: ActivityRecord, certain: bool) -> int:
        """Remember where its process ended. Returns the group, -1 where it was making none."""
        row = WHILE_RESTORED if record.activity is Activity.RESTORING else record.row
        known = self._coordinator.suspect(actor.index, record.group, row, record.env, CERTAIN if certain else DOUBTFUL)
        return record.group if known else -1

    def _replace_learners(self) -> None:
        """One is lost. Where others go with it, and the run does not end, all begin again at the last update that was told, and nothing else is
        lost: the slots of the update that was under way hold its rollouts still."""
        if self._kept is None or self._end.begun:
            self._return_to_checkpoint()
            return
        others = self._fleet.end_learners("another learner is lost")
        self._saves.abandon()
        if not any(isinstance(event, Lost) for event in others):
            self._start_learner()
        self._bury(others)

    def _return_to_checkpoint(self) -> None:
        """The learner is lost, or its numbers: everything goes back to the last checkpoint, all roles are made anew."""
        lost = self._fleet.stop_all("the run goes back to its last checkpoint")
        if lost is not None:
            self._lost_zygote(lost)
            return
        self._begin_again()

    def _mend_divergence(self, error: DivergedError) -> None:
        """Once: back to the last good checkpoint, from which other random numbers lead another way."""
        self._session.epoch += 1
        self._session.observer.event("diverged", message=str(error))
        self._return_to_checkpoint()
        self._divergence = None

    def _lost_zygote(self, lost: Lost) -> None:
        reason: str | None = lost.reason
        while reason is not None:
            self._session.observer.event("died", role="zygote", index=0, how=reason, reason="")
            self._session.restarts += 1
            self._recoveries.lost("learner", 0, f"the helper process is gone: {reason.splitlines()[0]}", time.monotonic())
            self._zygote_deaths += 1
            if self._zygote_deaths >= DEATHS_IN_A_ROW:
                raise ProcessError(f"the helper process died {DEATHS_IN_A_ROW} times; the last: {reason}")
            time.sleep(back_off_seconds(self._zygote_deaths))  # there is nobody to hear
            try:
                self._fleet.reopen()
                reason = None
            except ProcessError as error:  # this one died while it was starting
                reason = str(error)
        self._begin_again()

    def _begin_again(self) -> None:
        self._saves.abandon()
        self._recoveries.forget("actor", "group", "inference")
        self._session.return_to_checkpoint()
        self._reason, self._end.begun, self._at_checkpoint, self._kept = None, False, True, None
        self._start_learner()
        self._serve()
        self._place()

    # ---- watching ------------------------------------------------------------------------------------------------
    def _watch(self) -> None:
        """Who is stopped, who hangs, who may start again. Of actors that were told to end, engines/ending.py sees the end."""
        now = time.monotonic()
        situation = self._situation(now)
        for process, seen in zip(self._fleet.processes, situation.seen, strict=True):
            watched = process.pid and not process.doomed and not (self._end.begun and process.name == "actor")
            if watched and (verdict := self._watcher.look(seen, now)):
                self._condemn(process, seen.record, verdict)
        self._watch_zygote(now)
        self._start_learner()
        if not self._end.begun:
            self._renew(situation, now)
        self._session.observer.tick([seen.record for seen in situation.seen])

    def _renew(self, situation: Situation, now: float) -> None:
        """Start who may start again, end who is to end, have as many actors as the load asks for, and save for whoever asked."""
        self._serve()
        self._scaling.watch(situation, now)
        for actor in self._fleet.actors:
            if actor.retired and actor.up and not self._coordinator.hosts(actor.index):
                actor.dismissed = True
                tell(actor, Word(Kind.STOP).encode())
        changed = self._fleet.renew()
        if changed:
            for actor in self._fleet.actors:
                actor.deaths = 0
        if changed or any(a.up == a.gone_for_good for a in self._fleet.actors):  # one may start, or is to let go of what it has finished
            self._place()
        if self._saves.wanted and self._saves.due and not self._coordinator.learner_busy and self._fleet.learner.ready:
            self._saves.begin()

    def _situation(self, now: float) -> Situation:
        return look(self._fleet, self._coordinator, saving=self._saves.awaited, paused=self._paused, now=now)

    def _condemn(self, process: Process, record: ActivityRecord, verdict: Verdict) -> None:
        if verdict.kind == "environment":
            how = {"expected": f"at most {verdict.limit_seconds:g} s", "actual": f"{record.age_seconds:.1f} s", **HANG_HINT}
            what = f"{_call(record)} has not returned for {record.age_seconds:.1f} s"
            self._blame("hang", what, record, how, self._fleet.stack_of(process), record.age_seconds)
        why = HANGS if verdict.kind == "environment" else verdict.reason
        if verdict.kind == "stopped" and self._in_environment(record) and self._fleet.stopped_itself(process):
            self._blame("hang", f"its process stopped itself (SIGSTOP) in {_call(record)}", record, STOP_HINT, "", record.age_seconds)
            why = STOPS
        self._recoveries.lost(process.name, process.index, why, time.monotonic())
        self.kill(process, why)

    def _blame(self, kind: str, what: str, record: ActivityRecord, how: dict[str, str], stack: str, seconds_ago: float = 0.0) -> None:
        fault = self._faults.lost(kind, what, (record.group, record.row, record.env), how, stack)
        self._faults.happened(fault, self._faults.place_of(record.group), seconds_ago)

    def _watch_zygote(self, now: float) -> None:
        """One that is stopped is woken; one that neither forks nor kills when it is told to is given up, and with it all roles."""
        if self._fleet.zygote.wake():
            self._session.observer.event("woken", role="zygote", index=0)
        waiting = [
            p.asked_at if not p.pid else p.doomed_at for p in self._fleet.processes if p.up and not p.node and (p.doomed or not p.pid)
        ]
        if waiting and now - min(waiting) > ANSWER_SECONDS:
            self._session.observer.event("killed", role="zygote", index=0, reason=f"did not answer within {ANSWER_SECONDS:g} s")
            self._fleet.zygote.give_up()

    def _inquire(self, answer: Callable[[dict[str, Any]], None]) -> None:
        """Find out who waits for whom, and where each process stands; told when the stacks are there, a moment later."""
        self._inquiries.append(Inquiry(self._situation(time.monotonic()), self._fleet, answer))

    # ---- what the control socket asks for (engines/commands.py) --------------------------------------------------------
    @property
    def session(self) -> Session:
        return self._session

    @property
    def scaling(self) -> Scaling:
        return self._scaling

    def pause(self, paused: bool) -> None:
        """Order no more rollouts, or go on."""
        self._paused = paused
        self._session.observer.event("pause" if paused else "continue")

    def save(self, reply: Reply) -> None:
        self._saves.wanted.append(reply)

    def explain(self, reply: Reply) -> None:
        self._inquire(lambda found: reply({"ok": True, "stalls": found}))


def _call(record: ActivityRecord) -> str:
    """Which of the environment's calls a process is in."""
    if record.activity is not Activity.RESTORING:
        return "step()"
    return "close()" if record.row == CLOSING else "making it, reset() or a step while it was put back"
