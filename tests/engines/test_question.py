"""What the asker of a question makes of an answering process that says nothing."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.engines import question
from shoal.engines.question import Question
from shoal.engines.watch import STOPPED_SECONDS
from shoal.errors import EnvironmentFault, ProcessError
from stopping import stop_process, wake_process


class Zygote:
    """Keeps whom it was to kill."""

    def __init__(self) -> None:
        self.killed: list[int] = []

    def kill(self, pid: int) -> None:
        self.killed.append(pid)


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Question]:
    """A question whose process sleeps, in a step that may take 300 s."""
    process = subprocess.Popen(["sleep", "600"])
    zygote: Any = Zygote()
    asked = Question(zygote, "fake", 300.0, tmp_path)
    asked._pid, asked._log, asked._since = process.pid, tmp_path / "log", time.monotonic()
    asked.played("reset()", seed=7)
    asked.played("step()", action=2)
    yield asked
    process.kill()
    process.wait()


def test_a_process_that_is_stopped_for_a_moment_is_let_be_and_one_that_stays_so_is_a_fault(asked: Question) -> None:
    for _ in range(2):
        stop_process(asked._pid)
        asked._check_time()
        wake_process(asked._pid)
        asked._check_time()
    stop_process(asked._pid)
    asked._check_time()
    time.sleep(STOPPED_SECONDS)
    with pytest.raises(EnvironmentFault, match=r"was stopped \(SIGSTOP\) in step\(\)") as caught:
        asked._check_time()
    assert (caught.value.report["seed"], caught.value.report["step"], caught.value.report["last_action"]) == (7, 1, 2)


def test_a_call_of_the_environment_has_its_own_limit_and_all_else_another(asked: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question, "OTHER_SECONDS", 0.0)
    asked._check_time()
    asked._since -= 200.0  # the machine may be busy
    asked._check_time()
    asked.played("")
    with pytest.raises(ProcessError, match="did not answer within 0 s"):
        asked._check_time()
