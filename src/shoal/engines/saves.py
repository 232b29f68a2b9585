"""Checkpoints while a run goes on: the supervisor writes its part, the learner its own beside it, then the whole is committed.

consumes    `saved` and `not_saved` of the learner
waits for   nothing; `begin` gives the learner its order, and engines/watch.py sees when it does not answer
on failure  the disk refuses: said, with an alarm, and tried again when the next one is due; those before are whole
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal.engines.session import Session
from shoal.errors import CheckpointError
from shoal.files import Staging
from shoal.supervision.control import Reply
from shoal.supervision.trace import Span, Tracer
from shoal.types import Arrays


@dataclass
class _Save:
    """A checkpoint that the learner is writing its part of."""

    staging: Staging
    arrays: Arrays
    facts: dict[str, Any]
    replies: list[Reply]


class Saves:
    """At most one checkpoint under way, and those who asked for the next."""

    def __init__(self, session: Session, tell_learner: Callable[[dict[str, Any]], None], trace: Tracer) -> None:
        self._session, self._tell_learner, self._trace = session, tell_learner, trace
        self._current: _Save | None = None
        self.wanted: list[Reply] = []
        self.weights_sha256 = ""  # of the newest one that was committed
        self.refused = ""  # why the last one was not

    @property
    def under_way(self) -> bool:
        return self._current is not None

    @property
    def due(self) -> bool:
        """Whether one is to be begun before the next update."""
        return not self.under_way and self._session.may_save and (bool(self.wanted) or self._session.checkpoint_due())

    def begin(self) -> None:
        replies, self.wanted = self.wanted, []
        self._trace.begin(Span.CHECKPOINT)
        try:
            self._current = _Save(*self._session.begin_checkpoint(), replies)
        except CheckpointError as error:
            self.refused = str(error)
            self._session.save_failed(self.refused)
            _refuse(replies, self.refused)
            return
        finally:
            self._trace.end()
        before = self._session.checkpoint_path
        order = {"do": "save", "path": str(self._current.staging.path), "previous": None if before is None else str(before.absolute())}
        self._tell_learner(order)

    def saved(self, weights_sha256: str) -> None:
        """The learner wrote its part."""
        if self._current is None:
            return
        save = self._current
        self._trace.begin(Span.CHECKPOINT)
        try:
            self._session.commit(save.staging, save.arrays, save.facts)
        except CheckpointError as error:
            self.not_saved(str(error))
            return
        finally:
            self._trace.end()
        self._current = None
        self.weights_sha256, self.refused = weights_sha256, ""
        for reply in save.replies:
            reply({"ok": True, "update": self._session.coordinator.version})

    def not_saved(self, message: str) -> None:
        """The disk refuses: the run goes on."""
        if self._current is None:
            return
        save, self._current = self._current, None
        self.refused = message
        save.staging.discard()
        self._session.save_failed(message)
        _refuse(save.replies, message)

    def abandon(self) -> None:
        """The learner is gone: who asked waits for the next one."""
        if self._current is not None:
            self._current.staging.discard()
            self.wanted += self._current.replies
            self._current = None


def _refuse(replies: list[Reply], message: str) -> None:
    for reply in replies:
        reply({"ok": False, "error": message})
