"""A checkpoint of several learners counts once all have written their parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shoal.engines.saves import Saves
from shoal.errors import CheckpointError
from shoal.supervision.trace import open_trace


class Session:
    """Notes what becomes of checkpoints. full: the disk refuses the commit."""

    def __init__(self, learners: int, full: bool = False) -> None:
        self.config, self.coordinator = SimpleNamespace(learners=learners), SimpleNamespace(version=7)
        self.checkpoint_path, self.may_save = None, True
        self.happened: list[str] = []
        self._full = full

    def begin_checkpoint(self) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        return SimpleNamespace(path="aside", discard=lambda: self.happened.append("discarded")), {}, {}

    def commit(self, *_: Any) -> None:
        if self._full:
            raise CheckpointError("no space")
        self.happened.append("committed")

    def save_failed(self, message: str) -> None:
        self.happened.append(f"failed: {message}")


def begun(learners: int, **how: bool) -> tuple[Saves, Session, list[dict[str, Any]]]:
    session, replies = Session(learners, **how), list[dict[str, Any]]()
    saves = Saves(session, lambda order: None, open_trace("", "test", warn=print))  # type: ignore[arg-type]
    saves.wanted.append(replies.append)  # type: ignore[arg-type]
    saves.begin()
    return saves, session, replies


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_it_is_committed_with_the_last_part(order: tuple[int, ...]) -> None:
    saves, session, replies = begun(3)
    for learner in order:
        assert (session.happened, replies, saves.under_way) == ([], [], True)
        assert learner in saves.awaited
        saves.saved(learner, "" if learner else "abc")
    assert (session.happened, saves.under_way, saves.weights_sha256, saves.refused) == (["committed"], False, "abc", "")
    assert replies == [{"ok": True, "update": 7}]


def test_one_part_that_is_refused_refuses_it_once_all_have_answered() -> None:
    saves, session, replies = begun(2)
    saves.not_saved(1, "disk full")
    assert (session.happened, saves.under_way) == ([], True)
    saves.saved(0, "abc")
    assert session.happened == ["discarded", "failed: disk full"]
    assert (saves.under_way, saves.weights_sha256, saves.refused) == (False, "", "disk full")
    assert replies == [{"ok": False, "error": "disk full"}]


def test_a_commit_that_is_refused_is_told() -> None:
    saves, session, replies = begun(1, full=True)
    saves.saved(0, "abc")
    assert session.happened == ["discarded", "failed: no space"]
    assert (saves.under_way, saves.weights_sha256) == (False, "")
    assert replies == [{"ok": False, "error": "no space"}]


def test_answers_to_one_that_was_abandoned_are_not_heard() -> None:
    saves, session, replies = begun(2)
    saves.saved(0, "abc")
    saves.abandon()
    saves.saved(1, "")
    assert session.happened == ["discarded"]
    assert (replies, len(saves.wanted)) == ([], 1)
