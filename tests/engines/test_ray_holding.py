"""When a node tells of its rollouts at once, and when they wait for others to go with them."""

from __future__ import annotations

import pytest

from shoal.engines.ray_node import is_urgent
from shoal.engines.ray_words import Frame, Kind

ROLLOUT = Frame(Kind.WORD, 0, 1, b"filled", b"rows")


@pytest.mark.parametrize(
    ("idle", "asynchronous", "urgent"),
    [
        ([False, False], False, True),  # the learner waits
        ([True, True], False, True),
        ([False, False], True, False),
        ([True, False], True, True),  # it could make more
    ],
)
def test_rollouts_wait_as_long_as_nobody_waits_for_them(idle: list[bool], asynchronous: bool, urgent: bool) -> None:
    assert is_urgent([ROLLOUT, ROLLOUT], idle, asynchronous=asynchronous) is urgent


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "other", [Frame(Kind.WORD, 0, 1, b"ready"), Frame(Kind.HAPPENED, 0, 1, b"{}", b""), Frame(Kind.LOG, 0, 1, body=b"said")]
)
def test_whatever_else_is_told_waits_for_nothing(other: Frame, asynchronous: bool) -> None:
    assert is_urgent([ROLLOUT, other], [False, False], asynchronous=asynchronous)
    assert is_urgent([], [False], asynchronous=asynchronous)  # nothing came in time: an empty answer
