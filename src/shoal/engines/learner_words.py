"""What learners say, and what follows from it: of several, the first speaks for all where it tells of an update."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from shoal.engines.errors_told import rebuild_error
from shoal.engines.orders import tell_of_weights
from shoal.engines.process import Process
from shoal.engines.running import Running
from shoal.engines.saves import Saves
from shoal.errors import DivergedError
from shoal.experience.envelope import Fate, Identity


class LearnerWords:
    """tell: gives all learners an order."""

    def __init__(self, running: Running, saves: Saves, tell: Callable[[dict[str, Any]], None]) -> None:
        self._running, self._session, self._coordinator = running, running.session, running.coordinator
        self._fleet, self._saves, self._tell = running.fleet, saves, tell
        self._first_epoch = running.session.epoch

    def heard(self, learner: Process, said: dict[str, Any]) -> None:
        """Raises DivergedError where the numbers diverged once before, and whatever else the learner failed of."""
        kind = said["is"]
        if kind == "ready":
            learner.ready = True
            self._running.recoveries.ready("learner", learner.index, time.monotonic())
            if learner.index == 0:
                self._is_ready(said["version"])
        elif kind == "consumed":
            self._consumed(said)
        elif kind == "trained":
            self._trained(said)
        elif kind == "saved":
            self._saves.saved(learner.index, said["weights_sha256"])
        elif kind == "not_saved":
            self._saves.not_saved(learner.index, said["message"])
        elif kind == "failed":
            where = f"learner-{learner.index} on node {learner.node}: " if learner.node else ""
            error = rebuild_error(said | {"message": f"{where}{said['message']}"})
            if not isinstance(error, DivergedError):
                raise error
            self._diverged(error)

    def _is_ready(self, version: int) -> None:
        self._remember(version)
        tell_of_weights(self._session, self._fleet.actors, version)
        if self._coordinator.learner_busy:  # it stands where those stood that were lost
            self._tell(self._running.under_way)
        elif self._session.checkpoint_path is None and not self._saves.under_way and self._running.reason is None:
            self._saves.begin()  # so that a run that fails or is ended early leaves one

    def _consumed(self, said: dict[str, Any]) -> None:
        self._coordinator.consumed({Identity(*identity): Fate(fate) for identity, fate in said["dropped"]})

    def _trained(self, said: dict[str, Any]) -> None:
        tell_of_weights(self._session, self._fleet.actors, said["version"])  # before anything that may take its time, as a callback does
        self._fleet.push()
        if "dropped" in said:  # several learners, who say both at once
            self._consumed(said)
        try:
            self._running.reason = self._session.finish_update(said["metrics"])
        except DivergedError as diverged:
            self._diverged(diverged)
            return
        self._remember(said["version"])
        if self._coordinator.version > self._running.furthest:  # made again after a roll-back, an update is no progress
            self._progressed()
        for each in self._fleet.learners:
            self._running.back("learner", each.index)
        if self._running.reason is None and self._saves.due:
            self._saves.begin()

    def _progressed(self) -> None:
        """Deaths are counted anew."""
        self._running.furthest, self._running.zygote_deaths = self._coordinator.version, 0
        for each in self._fleet.learners:
            each.deaths = 0
        if self._fleet.inference is not None:
            self._fleet.inference.deaths = 0

    def _remember(self, version: int) -> None:
        if len(self._fleet.learners) > 1:
            self._running.kept = version

    def _diverged(self, error: DivergedError) -> None:
        """To be mended, once."""
        if self._session.epoch > self._first_epoch:
            raise error
        self._running.divergence = error
