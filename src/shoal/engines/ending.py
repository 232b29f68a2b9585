"""How a local run ends: its actors, so that nothing is stepped that the ledger does not see; then a last checkpoint; then the learner.

consumes    what the engine hears and sees meanwhile (`Engine.attend`): it watches the learner and the helper process still
waits for   actors END_SECONDS, then they are killed; nodes that do not say that they are dead, as long again where somebody wants the run to end, else
            STOP_SECONDS, then they are given up; an update under way UPDATE_SECONDS, where there is a checkpoint to fall back on; else the learner, as long
            as engines/watch.py lets it
unblocked   by their words and deaths
on failure  the learner is lost: the run went back to its last checkpoint, and goes on; the last checkpoint is refused: CheckpointError
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from shoal.engines.fleet import STOP_SECONDS, Fleet
from shoal.engines.messages import Kind, Word, to_json
from shoal.engines.process import Process, tell
from shoal.engines.saves import Saves
from shoal.engines.session import Session
from shoal.errors import ProcessError
from shoal.files import load_checkpoint, without_replay

END_SECONDS = 1.5  # for actors, once they are told to end
UPDATE_SECONDS = 1.8  # for an update that is under way when somebody wants the run to end


class Engine(Protocol):
    """What the end needs of the engine."""

    @property
    def ends(self) -> bool:
        """Whether there is a reason to end. No more once the run went back to its last checkpoint."""

    def attend(self) -> None:
        """Hear and watch, for a moment."""

    def kill(self, process: Process, why: str) -> None: ...
    def tell_learner(self, order: dict[str, Any]) -> None: ...


class Ending:
    """`begun`: actors that end are not replaced."""

    def __init__(self, session: Session, fleet: Fleet, saves: Saves, engine: Engine) -> None:
        self._session, self._fleet, self._saves, self._engine = session, fleet, saves, engine
        self._coordinator = session.coordinator
        self.begun = False

    def finish(self, wanted_since: float) -> bool:
        """End the run. wanted_since: when somebody wanted that, on the monotonic clock; 0 where a stop condition did.

        False: the learner was lost on the way. The run went back to its last checkpoint, and goes on.
        """
        self._end_actors(wanted_since)
        given_up = self._engine.ends and not self._update_ended(wanted_since)
        if given_up:
            self._give_up_update()
        if self._engine.ends:
            self._coordinator.shut_down()
            if not given_up:
                self._save_last()
        if not self._engine.ends:
            return False
        self._engine.tell_learner({"do": "stop"})
        self._stop_server()
        self._fleet.wait_for_ends(time.monotonic() + END_SECONDS)
        return True

    def _stop_server(self) -> None:
        if self._fleet.inference is not None:
            tell(self._fleet.inference, to_json({"do": "stop"}))

    def _end_actors(self, wanted_since: float) -> None:
        self.begun = True
        hurried = wanted_since > 0.0 and not any(learner.node for learner in self._fleet.learners)  # whose loss would cost updates
        node_seconds = END_SECONDS if hurried else STOP_SECONDS
        for actor in self._fleet.actors:
            tell(actor, Word(Kind.STOP).encode())
        deadline = time.monotonic() + END_SECONDS
        while self._engine.ends and any(a.up for a in self._fleet.actors):
            late_seconds = time.monotonic() - deadline
            if late_seconds > 0.0:
                for actor in self._fleet.actors:
                    self._engine.kill(actor, "did not end")
            if late_seconds > node_seconds and not self._fleet.give_up_nodes() and late_seconds > STOP_SECONDS:
                raise ProcessError("an actor could not be ended; see `ps` for a process in uninterruptible sleep")
            self._engine.attend()

    def _update_ended(self, wanted_since: float) -> bool:
        """Wait for the update that is under way, if there is one. False: it takes too long, and there is a checkpoint to fall back on."""
        while self._engine.ends and self._coordinator.learner_busy:
            if self._session.checkpoint_path is not None and time.monotonic() > wanted_since + UPDATE_SECONDS:
                return False
            self._engine.attend()
        return True

    def _give_up_update(self) -> None:
        """Whoever pressed Ctrl-C does not wait for a long update: the run ends at its last checkpoint, from which `resume` goes on."""
        for learner in self._fleet.learners:
            self._fleet.kill(learner, "its update took too long to wait for")
        self._stop_server()  # all others have ended: it would be waited for in vain
        self._fleet.wait_for_ends(time.monotonic() + END_SECONDS)
        path = self._session.return_to_checkpoint()
        assert path is not None
        self._saves.weights_sha256 = load_checkpoint(path, wanted=without_replay).json("learner")["weights_sha256"]

    def _save_last(self) -> None:
        """Wait for the learner (it may be loading still) and for its part of the checkpoint; one that hangs in either is replaced."""
        while self._engine.ends and not self._fleet.learner.ready:
            self._engine.attend()
        if self._engine.ends and not self._saves.under_way:
            self._saves.begin()
        while self._engine.ends and self._saves.under_way:
            self._engine.attend()
        if self._engine.ends and self._saves.refused:
            self._end_at_kept()

    def _end_at_kept(self) -> None:
        """The last checkpoint was refused: one of the same update that was kept before is as good; without one the run has not ended well."""
        path = self._session.checkpoint_path
        kept = None if path is None else load_checkpoint(path, wanted=without_replay)
        if kept is None or kept.update != self._coordinator.version:
            raise self._session.last_refused(self._saves.refused)
        self._saves.weights_sha256 = kept.json("learner")["weights_sha256"]
