"""Who is started, and when: learners together, the inference server before those who ask it, actors where groups are to live."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from shoal.engines.messages import Kind, Word
from shoal.engines.orders import actor_setup, connect, inference_setup, learner_setup
from shoal.engines.process import Process
from shoal.engines.running import Running
from shoal.errors import ProcessError

RETRY_SECONDS = 1.0  # after a start for which there were no descriptors


class Starts:
    """Each of these starts only who is not up, and may start again by now."""

    def __init__(self, running: Running) -> None:
        self._running, self._session, self._fleet = running, running.session, running.fleet
        self._short: set[str] = set()  # roles for which there were no descriptors at the last attempt

    def everybody(self) -> None:
        self.learners()
        self.server()
        self.place()

    def learners(self) -> None:
        """Several meet as they begin."""
        if time.monotonic() < max(learner.not_before for learner in self._fleet.learners):
            return
        for learner in self._fleet.learners:
            if not learner.up:
                self._start(learner, learner_setup(self._session, self._running.kept))

    def server(self) -> None:
        """The inference server, where there is to be one; all actors are to ask it."""
        server = self._fleet.inference
        if server is None or server.up or time.monotonic() < server.not_before:
            return
        if self._start(server, inference_setup(self._session)):
            for actor in self._fleet.actors:
                self._connect(actor)

    def place(self) -> None:
        """The actors that are not gone for good; the groups are spread over them."""
        there = [a for a in self._fleet.actors if not a.gone_for_good]
        for actor in there:
            may_start = not actor.up and time.monotonic() >= actor.not_before
            if may_start and self._start(actor, actor_setup(self._session), lambda body: Word(Kind.SETUP, body=body).encode()):
                self._connect(actor)
        self._running.coordinator.place([a.index for a in there])

    def _start(self, process: Process, setup: dict[str, Any], encode: Callable[[bytes], bytes] = lambda body: body) -> bool:
        """Where there are no descriptors for it, that is said, and it is tried again a little later.

        Raises:
          ProcessError: that is so before the first update already: nothing will change by waiting.
        """
        try:
            self._fleet.start(process, setup, encode)
        except OSError as error:
            if not self._running.furthest:
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
            self._running.kill(actor, f"cannot be connected with the inference server: {error.strerror or error}")
