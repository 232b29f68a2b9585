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
from shoal.engines.actor_words import ActorWords
from shoal.engines.blame import Blame
from shoal.engines.commands import obey
from shoal.engines.deaths import Deaths
from shoal.engines.ending import Ending
from shoal.engines.errors_told import rebuild_error
from shoal.engines.fleet import Fleet
from shoal.engines.learner_words import LearnerWords
from shoal.engines.messages import Kind, Word, check_word, from_json, to_json
from shoal.engines.orders import send_lease, send_restore
from shoal.engines.plan import Plan
from shoal.engines.process import Process, tell, words
from shoal.engines.running import Running
from shoal.engines.saves import Saves
from shoal.engines.scaling import Scaling
from shoal.engines.session import Session
from shoal.engines.stalls import Inquiry, Situation, in_words, look
from shoal.engines.starting import Starts
from shoal.engines.watch import Verdict, Watch
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring
from shoal.experience.schema import Schema
from shoal.supervision.channel import HasFileno
from shoal.supervision.control import ControlServer, Reply
from shoal.supervision.trace import Span, open_trace
from shoal.types import ActivityRecord

WATCH_SECONDS = 0.25
ANSWER_SECONDS = 10.0  # the zygote forks or kills within this time, or is given up


class LocalEngine:
    """`open`, `look` (spec and sizes), `allocate`, `run`; `close` leaves nothing behind."""

    def __init__(self, config: RunConfig, fleet: Fleet, directory: Path, traces: str = "") -> None:
        self._directory, self._fleet, self._traces = directory, fleet, traces
        self._watcher = Watch(config.env.step_timeout_seconds, config.learner.timeout_seconds)
        self._inquiries: list[Inquiry] = []
        self._control: ControlServer | None = None
        self._paused = False
        self._heard_at = 0.0  # when it was last found out who has something to say
        self._watched_at = 0.0

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
        self._assemble(session)
        running, wanted_since = self._running, 0.0
        self._starts.everybody()
        while running.reason is None or not self._end.finish(wanted_since):
            if interrupted():
                session.wanted_end = session.wanted_end or "interrupted"
            if asked():
                self._inquire(lambda found: print(in_words(found), file=sys.stderr, flush=True))
            if session.wanted_end and not self._saves.under_way:
                running.reason, wanted_since = session.wanted_end, time.monotonic()
                continue
            if running.at_checkpoint:
                running.at_checkpoint = False
                running.reason = self._coordinator.stop_reason(session.seconds) if self._coordinator.version else None
                continue
            self._trace.begin(Span.DISPATCH)
            self._dispatch()
            self._trace.end()
            self.attend()
        return {"reason": running.reason, "weights_sha256": self._saves.weights_sha256}

    def _assemble(self, session: Session) -> None:
        """The parts of the engine, for this session."""
        self._session, self._coordinator = session, session.coordinator
        session.network = self._fleet.network
        self._trace = open_trace(self._traces, "supervisor", warn=session.warn)
        self._running = running = Running(session, self._fleet)
        self._saves = Saves(session, self.tell_learner, self._trace)
        self._end = Ending(session, self._fleet, self._saves, self)
        self._starts, self._blame = Starts(running), Blame(running)
        self._scaling = Scaling(session, self._fleet, self._starts.place)
        self._actor_words, self._learner_words = ActorWords(running), LearnerWords(running, self._saves, self.tell_learner)
        self._deaths = Deaths(running, self._starts, self._saves, self._end, self._blame, self._hear)
        try:
            self._control = ControlServer(self._directory)
        except OSError as error:
            session.warn(f"the run takes no requests (shoal control): {error.strerror} ({self._directory})")

    @property
    def ends(self) -> bool:
        """Whether there is a reason to end; no more once the learner was lost, and the run went back to its last checkpoint."""
        return self._running.reason is not None

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
            self._deaths.bury(self._fleet.happened())
        if self._control is not None and any(source in ready for source in control):
            for request, reply in self._control.receive():
                obey(self, request, reply)
        if self._running.divergence is not None:
            self._deaths.mend(self._running.divergence)
        self._inquiries = [one for one in self._inquiries if not one.answered(time.monotonic())]

    def _hear(self, process: Process) -> None:
        for message in words(process):
            try:
                if process.name != "actor":
                    said = from_json(message)
                else:
                    word = Word.decode(message)
                    self._coordinator.check_place(word.slot, word.identity)
                    check_word(word, self._coordinator.plan.group_size, self._coordinator.plan.rollout_length)
            except ValueError as error:  # its memory is not what it was: native code of an environment wrote where it should not
                self._running.kill(process, f"sent what is no message ({error})")
                return
            if process.name == "learner":
                self._learner_words.heard(process, said)
            elif process.name == "inference":
                self._inference_said(process, said)
            else:
                self._actor_words.heard(process, word)

    def _dispatch(self) -> None:
        """Order what may be ordered now. Groups are put back also while the learner is at work, or not there yet."""
        if self.ends:
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
            self._running.under_way = order
        for learner in self._fleet.learners:
            learner.told_at = time.monotonic()
            tell(learner, to_json(order))

    def _inference_said(self, server: Process, said: dict[str, Any]) -> None:
        if said["is"] == "failed":
            raise rebuild_error(said)
        server.ready = True
        self._running.recoveries.ready("inference", 0, time.monotonic())

    def kill(self, process: Process, why: str) -> None:
        self._running.kill(process, why)

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
        self._starts.learners()
        if not self._end.begun:
            self._renew(situation, now)
        self._session.observer.tick([seen.record for seen in situation.seen])

    def _renew(self, situation: Situation, now: float) -> None:
        """Start who may start again, end who is to end, have as many actors as the load asks for, and save for whoever asked."""
        self._starts.server()
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
            self._starts.place()
        if self._saves.wanted and self._saves.due and not self._coordinator.learner_busy and self._fleet.learner.ready:
            self._saves.begin()

    def _situation(self, now: float) -> Situation:
        return look(self._fleet, self._coordinator, saving=self._saves.awaited, paused=self._paused, now=now)

    def _condemn(self, process: Process, record: ActivityRecord, verdict: Verdict) -> None:
        why = self._blame.of_verdict(process, record, verdict)
        self._running.recoveries.lost(process.name, process.index, why, time.monotonic())
        self._running.kill(process, why)

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
