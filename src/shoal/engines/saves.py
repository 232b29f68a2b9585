"""Checkpoints while a run goes on: the supervisor writes its part, every learner its own beside it, then the whole is committed.

consumes    `saved` and `not_saved` of the learners
waits for   nothing; `begin` gives them their order, and engines/watch.py sees when it does not answer
on failure  the disk refuses: said, with an alarm, and tried again when the next one is due; those before are whole
"""

from __future__ import annotations

from collections.abc import Callable, Container
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
    """A checkpoint that learners are writing their parts of."""

    staging: Staging
    arrays: Arrays
    facts: dict[str, Any]
    replies: list[Reply]
    awaited: set[int]  # learners that have not answered
    weights_sha256: str = ""
    refused: str = ""


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
    def awaited(self) -> Container[int]:
        """Learners that write their parts of one."""
        return () if self._current is None else self._current.awaited

    @property
    def due(self) -> bool:
        """Whether one is to be begun before the next update."""
        return not self.under_way and self._session.may_save and (bool(self.wanted) or self._session.checkpoint_due())

    def begin(self) -> None:
        replies, self.wanted = self.wanted, []
        self._trace.begin(Span.CHECKPOINT)
        try:
            self._current = _Save(*self._session.begin_checkpoint(), replies, set(range(self._session.config.learners)))
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

    def saved(self, learner: int, weights_sha256: str) -> None:
        """A learner wrote its part; the first says the weights."""
        if self._current is not None:
            self._current.weights_sha256 = self._current.weights_sha256 or weights_sha256
            self._answered(self._current, learner)

    def not_saved(self, learner: int, message: str) -> None:
        """The disk refuses: the run goes on, once all have answered."""
        if self._current is not None:
            self._current.refused = self._current.refused or message
            self._answered(self._current, learner)

    def _answered(self, save: _Save, learner: int) -> None:
        save.awaited.discard(learner)
        if save.awaited:
            return
        if not save.refused:
            self._commit(save)
        if save.refused:
            self._current, self.refused = None, save.refused
            save.staging.discard()
            self._session.save_failed(save.refused)
            _refuse(save.replies, save.refused)

    def _commit(self, save: _Save) -> None:
        self._trace.begin(Span.CHECKPOINT)
        try:
            self._session.commit(save.staging, save.arrays, save.facts)
        except CheckpointError as error:
            save.refused = str(error)
            return
        finally:
            self._trace.end()
        self._current = None
        self.weights_sha256, self.refused = save.weights_sha256, ""
        for reply in save.replies:
            reply({"ok": True, "update": self._session.coordinator.version})

    def abandon(self) -> None:
        """A learner is gone: who asked waits for the next one."""
        if self._current is not None:
            self._current.staging.discard()
            self.wanted += self._current.replies
            self._current = None


def _refuse(replies: list[Reply], message: str) -> None:
    for reply in replies:
        reply({"ok": False, "error": message})
