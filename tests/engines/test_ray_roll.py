"""The roll of a cluster's machines is as new as its last answer, and says how old that is."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from shoal.engines.ray_roll import Roll


def wait_for(true: Any, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_newest_answer_counts() -> None:
    answers, looked = iter(range(1000)), threading.Event()

    def ask() -> list[dict[str, Any]]:
        number = next(answers)
        assert number == 0 or looked.wait(300.0)
        return [{"NodeID": number}]

    roll = Roll(ask)
    assert roll.machines == [{"NodeID": 0}]
    looked.set()
    wait_for(lambda: roll.machines[0]["NodeID"] >= 2)
    roll.close()


def test_the_first_question_is_waited_for_and_may_fail() -> None:
    def nobody() -> list[dict[str, Any]]:
        raise ConnectionError("nobody is there")

    with pytest.raises(ConnectionError, match="nobody is there"):
        Roll(nobody)


def test_a_head_that_answers_no_more_grows_silent_and_what_it_said_last_stays() -> None:
    lost, over, answered = threading.Event(), threading.Event(), []

    def ask() -> list[dict[str, Any]]:
        if lost.is_set() and len(answered) % 2:
            over.wait(600.0)
        answered.append(1)
        if lost.is_set():
            raise ConnectionError("the head is gone")
        return [{"NodeID": "a"}]

    roll = Roll(ask)
    lost.set()
    wait_for(lambda: roll.silent_seconds > 2.0)
    assert roll.machines == [{"NodeID": "a"}]
    over.set()
    roll.close()


def test_a_head_that_was_silent_and_answers_again_is_there() -> None:
    lost = threading.Event()

    def ask() -> list[dict[str, Any]]:
        if lost.is_set():
            raise ConnectionError("the head is away")
        return []

    roll = Roll(ask)
    lost.set()
    wait_for(lambda: roll.silent_seconds > 1.5)
    lost.clear()
    wait_for(lambda: roll.silent_seconds < 1.0)
    roll.close()
