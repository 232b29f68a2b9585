"""What actors say, and what follows from it. What is said of a rollout that nobody waits for, or that another actor makes, is not heard."""

from __future__ import annotations

import time

from shoal.engines.errors_told import rebuild_error
from shoal.engines.messages import Kind, Word
from shoal.engines.process import Process
from shoal.engines.running import Running
from shoal.errors import EnvironmentFault, SchemaError


class ActorWords:
    def __init__(self, running: Running) -> None:
        self._running, self._session, self._coordinator = running, running.session, running.coordinator
        self._fleet, self._faults, self._recoveries = running.fleet, running.faults, running.recoveries

    def heard(self, actor: Process, word: Word) -> None:
        """Raises EnvironmentFault where that is not to be mended, and whatever else the actor failed of. The word has passed `check_word`."""
        error = rebuild_error(word.json) if word.kind is Kind.FAULT else None
        if error is not None and not isinstance(error, EnvironmentFault):
            raise error
        if not self._coordinator.makes(actor.index, word.identity):
            return
        if word.kind is Kind.FILLED:
            self._filled(actor, word)
        elif word.kind is Kind.RESTORED:
            for role, index in (("actor", actor.index), ("group", word.identity.group)):
                self._recoveries.restored(role, index, word.json["seconds"])
            if word.value:
                self._session.observer.event("not_restored", group=word.identity.group, environments=word.value)
        elif error is not None:
            self._faults.happened(error, word.identity)
            self._recoveries.lost("group", word.identity.group, str(error.report.get("kind", "fault")), time.monotonic())
            self._faults.give_back(error, word.identity)

    def _filled(self, actor: Process, word: Word) -> None:
        if not self._collected(actor, word):
            return
        actor.deaths = 0
        actor.told_at = time.monotonic()  # it goes on with the next
        slot = self._coordinator.ring.slots[word.slot]
        slot.envelope["received_ns"] = time.monotonic_ns()
        if self._coordinator.filled(word.slot, word.identity):
            self._session.begun(int(slot.envelope["begun_ns"]))
            self._faults.look_at(slot)
        self._running.back("actor", actor.index)
        self._running.back("group", word.identity.group)
        if self._fleet.inference is not None and self._fleet.inference.ready:
            self._running.back("inference", 0)

    def _collected(self, actor: Process, word: Word) -> bool:
        """Whether the rollout that a word tells of is here."""
        try:
            if self._coordinator.awaits(word.slot, word.identity):
                self._fleet.collect(actor, word, self._coordinator.version)
        except SchemaError as error:
            self._running.kill(actor, f"sent what is no rollout ({error})")
            return False
        return True
