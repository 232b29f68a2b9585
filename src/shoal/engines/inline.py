"""All roles in the calling process, one after the other, with the same code: for a debugger, and as the reference (`actors: 0`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from shoal.actors.actor import Actor
from shoal.engines.alarm import GivenUp, limited
from shoal.engines.ending import UPDATE_SECONDS
from shoal.engines.environment_faults import EnvironmentFaults
from shoal.engines.plan import Lease
from shoal.engines.roles import Blueprint, one_thread
from shoal.engines.saving import load_learner, save_learner
from shoal.engines.session import Session
from shoal.errors import CheckpointError, DivergedError, EnvironmentFault
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring
from shoal.files import load_checkpoint, without_replay
from shoal.learners.learner import Learner
from shoal.learners.together import Together
from shoal.supervision.heartbeat import ActivityBoard
from shoal.supervision.trace import Span, open_trace
from shoal.types import Activity
from shoal.weights.board import WeightBoard

_IN_ENVIRONMENT = (Activity.STEPPING, Activity.RESTORING)
_LONG_SECONDS = 1.0  # in one call of an environment: longer than the engine's own work before or after it


class InlineEngine:
    """Runs a session to its end. `interrupted()` is asked between steps and between updates; a step or an update that takes long is given up
    UPDATE_SECONDS later, where Python runs in it now and then."""

    def __init__(self, blueprint: Blueprint, session: Session, ring: Ring, traces: str = "") -> None:
        self._session, self._ring = session, ring
        self._faults = EnvironmentFaults(session)
        self._activities = ActivityBoard.create(1)
        self._trace = open_trace(traces, "all", warn=session.warn)
        self._recorder = self._trace.recorder(self._activities.heartbeat(0))
        size = blueprint.layout(blueprint.policy()).size
        self._board = WeightBoard(size, np.zeros(WeightBoard.size_bytes(size), np.uint8))
        self._begin(blueprint)

    def _begin(self, blueprint: Blueprint) -> None:
        """Make the roles."""
        self._updating = False
        self._blueprint = blueprint
        self._board.reset()
        self._behaviour = blueprint.behaviour(self._board)
        self._actor: Actor = blueprint.actor(self._ring, self._behaviour, recorder=self._recorder)
        lag = self._session.coordinator.plan.max_policy_lag
        self._learners: Together = blueprint.learners_here(self._ring, self._board, lag, self._recorder)

    @property
    def learner(self) -> Learner:
        return self._learners.first

    def run(self, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Train until a stop condition. Returns {reason, weights_sha256}; the last checkpoint is saved."""
        try:
            with limited(self._environment_seconds, self._session.config.env.step_timeout_seconds, self._gives_up(interrupted)):
                try:
                    return self._run(interrupted)
                except GivenUp:
                    return self._end_at_checkpoint()
                finally:
                    self._close_environments()
        finally:
            self._activities.close()

    def _close_environments(self) -> None:
        try:
            self._actor.close()
        except (EnvironmentFault, GivenUp) as left:
            why = str(left).splitlines()[0] if isinstance(left, EnvironmentFault) else "close() of an environment takes long"
            self._session.warn(f"{why}; the run has ended, and its environments are left as they are")

    def _gives_up(self, interrupted: Callable[[], bool]) -> Callable[[], bool]:
        """Whether somebody wanted the end a while ago, and what is under way may be broken off: a call of an environment, or an update where
        there is a checkpoint to fall back on."""
        wanted_since = 0.0

        def gives_up() -> bool:
            nonlocal wanted_since
            if not interrupted():
                return False
            wanted_since = wanted_since or time.monotonic()
            broken_off = self._environment_seconds() > _LONG_SECONDS or (self._updating and self._session.checkpoint_path is not None)
            return broken_off and time.monotonic() - wanted_since > UPDATE_SECONDS

        return gives_up

    def _end_at_checkpoint(self) -> dict[str, Any]:
        """Whoever pressed Ctrl-C does not wait for a long update: the run ends at its last checkpoint, from which `resume` goes on."""
        self._session.coordinator.shut_down()
        path = self._session.return_to_checkpoint()
        assert path is not None
        return {"reason": "interrupted", "weights_sha256": load_checkpoint(path, wanted=without_replay).json("learner")["weights_sha256"]}

    def _environment_seconds(self) -> float:
        """How long an environment has been in its present call."""
        record = self._activities.records()[0]
        return record.age_seconds if record.activity in _IN_ENVIRONMENT else 0.0

    def _run(self, interrupted: Callable[[], bool]) -> dict[str, Any]:
        session, coordinator = self._session, self._session.coordinator
        self._load()
        coordinator.place([0])
        if session.checkpoint_path is None:
            self._try_save()  # so that a run that fails leaves one
        reason = coordinator.stop_reason(session.seconds) if coordinator.version else None
        first_epoch, ticked = session.epoch, 0.0
        while reason is None:
            try:
                self._fill(interrupted)
            except GivenUp:  # what was begun ends as interrupted
                self._recorder.enter(Activity.SAVING)
            if interrupted():
                reason = "interrupted"
                break
            batch = coordinator.next_batch()
            if batch is None:
                raise RuntimeError("no rollout may be begun and no update made: the coordinator is stuck")
            self._recorder.enter(Activity.LEARNING)
            try:
                reason = self._learn(batch) or ("interrupted" if interrupted() else None)
            except DivergedError as error:
                if session.epoch > first_epoch:
                    raise
                self._mend_divergence(error)
            if reason is None and session.checkpoint_due():
                self._try_save()
            if time.monotonic() - ticked > 0.25:
                ticked = time.monotonic()
                session.observer.tick(self._activities.records())
        coordinator.shut_down()
        try:
            self._save()
        except CheckpointError as error:
            raise session.last_refused(str(error)) from error
        return {"reason": reason, "weights_sha256": self.learner.weights_sha256}

    def _load(self) -> None:
        if self._session.checkpoint_path is not None:
            for learner in self._learners.all:
                load_learner(learner, self._session.checkpoint_path, len(self._learners.all), replay=self._session.replay_whole)
        self.learner.publish()
        self._behaviour.refresh()

    def _learn(self, batch: list[tuple[int, Identity]]) -> str | None:
        """One update. Returns the reason to stop, if there is one."""
        self._trace.begin(Span.CONSUME)
        consumed = self._learners.consume(batch)
        self._trace.end(len(batch))
        steps = self._session.coordinator.optimizer_steps
        self._session.coordinator.consumed(consumed.dropped)
        self._trace.begin(Span.UPDATE)
        self._updating = True
        try:
            metrics = self._learners.update(consumed, steps) if consumed.groups or steps else {}
        finally:
            self._updating = False
        self._trace.end(self.learner.version)
        self._behaviour.refresh()
        return self._session.finish_update(metrics)

    def _mend_divergence(self, error: DivergedError) -> None:
        """Once: back to the last good checkpoint, from which other random numbers lead another way."""
        self._session.epoch += 1
        self._session.observer.event("diverged", message=str(error))
        self._actor.close()
        self._session.return_to_checkpoint()
        self._begin(replace(self._blueprint, epoch=self._session.epoch))
        self._load()

    def _fill(self, interrupted: Callable[[], bool]) -> None:
        """Everything that may be begun now, with one torch thread as in an actor's process: the numbers can depend on it.

        What was begun when the run is interrupted stays unfinished, and ends as such in the ledger.
        """
        with one_thread(self._blueprint.config.learner.threads):
            while not self._fill_all(interrupted):
                pass

    def _fill_all(self, interrupted: Callable[[], bool]) -> bool:
        """False where an environment broke its contract: its group is to be made anew."""
        whole = True
        for lease in self._session.coordinator.next_leases():
            if lease.restore is None and not self._actor.hosts(lease.identity.group):
                continue  # the rollout before it was not finished, and this lease is void
            try:
                self._make(lease, interrupted)
            except EnvironmentFault as fault:
                self._faults.happened(fault, lease.identity)
                self._faults.give_back(fault, lease.identity)
                self._release(lease.identity)
                whole = False
            if interrupted():
                return True
        return whole

    def _release(self, identity: Identity) -> None:
        try:
            self._actor.release(identity.group)
        except EnvironmentFault as fault:  # it hangs in close(), and is left behind
            self._faults.happened(fault)

    def _make(self, lease: Lease, interrupted: Callable[[], bool]) -> None:
        group = lease.identity.group
        if lease.restore is not None:
            lost = self._actor.restore(group, lease.restore)
            if lost:
                self._session.observer.event("not_restored", group=group, environments=lost)
        self._trace.begin(Span.ROLLOUT)
        slot = self._actor.fill(lease.slot, lease.identity, lambda _: interrupted(), lease.give_up, lease.careful)
        self._trace.end(group, lease.identity.sequence)
        if interrupted():
            return
        self._session.begun(int(slot.envelope["begun_ns"]))
        self._session.coordinator.filled(lease.slot, lease.identity)
        self._faults.look_at(slot)

    def _save(self) -> None:
        """Raises CheckpointError where the disk refuses."""
        self._trace.begin(Span.CHECKPOINT)
        self._recorder.enter(Activity.SAVING)
        staging, arrays, facts = self._session.begin_checkpoint()
        with staging:
            with staging.disk_errors():
                for learner in self._learners.all:
                    save_learner(learner, staging.path, self._blueprint, self._session.checkpoint_path)
            self._session.commit(staging, arrays, facts)
        self._trace.end()

    def _try_save(self) -> None:
        """The disk refuses: the run goes on, with an alarm; the checkpoints before are whole."""
        try:
            self._save()
        except CheckpointError as error:
            self._session.save_failed(str(error))
