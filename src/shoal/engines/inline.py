"""All roles in the calling process, one after the other, with the same code: for a debugger, and as the reference (`actors: 0`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from shoal.actors.actor import Actor
from shoal.engines.roles import Blueprint, one_thread
from shoal.engines.saving import load_learner, save_learner
from shoal.engines.session import Session
from shoal.errors import DivergedError
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring
from shoal.learners.learner import Learner
from shoal.supervision.heartbeat import ActivityBoard
from shoal.types import Activity
from shoal.weights.board import WeightBoard


class InlineEngine:
    """Runs a session to its end. `interrupted()` is asked between updates."""

    def __init__(self, blueprint: Blueprint, session: Session, ring: Ring) -> None:
        self._session, self._ring = session, ring
        self._activities = ActivityBoard.create(1)
        self._recorder = self._activities.heartbeat(0)
        size = blueprint.layout(blueprint.policy()).size
        self._board = WeightBoard(size, np.zeros(WeightBoard.size_bytes(size), np.uint8))
        self._begin(blueprint)

    def _begin(self, blueprint: Blueprint) -> None:
        """Make the roles."""
        self._blueprint = blueprint
        self._board.reset()
        self._behaviour = blueprint.behaviour(self._board)
        self._actor: Actor = blueprint.actor(self._ring, self._behaviour, recorder=self._recorder)
        self._learner: Learner = blueprint.learner(self._ring, self._board, self._session.coordinator.plan.max_policy_lag, self._recorder)

    @property
    def learner(self) -> Learner:
        return self._learner

    def run(self, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Train until a stop condition. Returns {reason, weights_sha256}; the last checkpoint is saved."""
        session, coordinator = self._session, self._session.coordinator
        self._load()
        coordinator.place([0])
        reason = coordinator.stop_reason(session.seconds) if coordinator.version else None
        first_epoch, ticked = session.epoch, 0.0
        while reason is None:
            self._fill()
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
                self._save()
            if time.monotonic() - ticked > 0.25:
                ticked = time.monotonic()
                session.observer.tick(self._activities.records())
        coordinator.shut_down()
        self._save()
        self._actor.close()
        return {"reason": reason, "weights_sha256": self._learner.weights_sha256}

    def _load(self) -> None:
        if self._session.checkpoint_path is not None:
            load_learner(self._learner, self._session.checkpoint_path)
        self._learner.publish()
        self._behaviour.refresh()

    def _learn(self, batch: list[tuple[int, Identity]]) -> str | None:
        """One update. Returns the reason to stop, if there is one."""
        consumed = self._learner.consume(batch)
        self._session.coordinator.consumed(consumed.dropped)
        metrics = self._learner.update(consumed) if consumed.batch is not None else {}
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

    def _fill(self) -> None:
        """Everything that may be begun now, with one torch thread as in an actor's process: the numbers can depend on it."""
        with one_thread(self._blueprint.config.learner.threads):
            self._fill_all()

    def _fill_all(self) -> None:
        coordinator = self._session.coordinator
        for lease in coordinator.next_leases():
            if lease.restore is not None:
                lost = self._actor.restore(lease.identity.group, lease.restore)
                if lost:
                    self._session.observer.event("not_restored", group=lease.identity.group, environments=lost)
            slot = self._actor.fill(lease.slot, lease.identity, None, lease.give_up, lease.careful)
            self._session.begun(int(slot.envelope["begun_ns"]))
            coordinator.filled(lease.slot, lease.identity)

    def _save(self) -> None:
        self._recorder.enter(Activity.SAVING)
        staging, arrays, facts = self._session.begin_checkpoint()
        with staging:
            save_learner(self._learner, staging.path, self._blueprint)
            self._session.commit(staging, arrays, facts)
