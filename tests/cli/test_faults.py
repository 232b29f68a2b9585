"""Environments that break their contract, from the command line: what `shoal check` and `shoal train` say, and with which code they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import answer_here

ZOO = f"{Path(__file__).parents[1] / 'environments' / 'faulty.py'}:make"
HANGS = ("loops", "sleeps")  # faults that only the limit of a call ends
SMALL = [
    "--preset", "none", "--sampling.groups", "2", "--sampling.group-size", "2", "--sampling.rollout-length", "16", "--stop.updates", "4",
]  # fmt: skip


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200"}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def shoal(*args: str, cwd: Path) -> tuple[int, dict[str, Any]]:
    done = run("-m", "shoal.cli", *args, "--json", cwd=cwd)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def limit(fault: dict[str, Any]) -> list[str]:
    """Of a call: short where one hangs, but the machine may stand still for a moment; else it is that of every run."""
    return ["--env.step-timeout-seconds", "3"] if fault["fault"] in HANGS else []


def kwargs(**given: Any) -> list[str]:
    return [word for name, value in given.items() for word in (f"--env.kwargs.{name}", str(value))]


@pytest.mark.parametrize(
    ("fault", "name", "says"),
    [
        ({"fault": "loops", "at": 3}, "hangs", "step() has not returned"),  # in C, with the interpreter's lock
        ({"fault": "segfaults"}, "process_died", "SIGSEGV"),
        ({"fault": "stops"}, "hangs", "SIGSTOP"),
        ({"fault": "interrupts", "at": 3}, "raised", "step() raised KeyboardInterrupt"),
        ({"fault": "refuses"}, "action_refused", "I take only 0"),
        ({"fault": "info", "at": 3}, "interface", "whose info is list"),
    ],
)
def test_check_names_what_hangs_or_dies_and_ends(fault: dict[str, Any], name: str, says: str, tmp_path: Path) -> None:
    code, report = shoal("check", ZOO, *kwargs(**fault), *limit(fault), cwd=tmp_path)
    assert code == 3
    finding = next(one for one in report["findings"] if one["name"] == name)
    assert finding["severity"] == "error"
    assert says in finding["message"]
    assert finding["hint"]


@pytest.mark.parametrize(
    ("fault", "how", "says", "again"),
    [
        # seen by the look before training
        ({"fault": "raises_long"}, ["--actors", "0"], "step() raised ValueError: the arm is stuck", "ValueError: the arm is stuck"),
        ({"fault": "sleeps", "where": "reset"}, ["--actors", "0"], "reset() has not returned", "Timeout"),
        ({"fault": "loops"}, ["--actors", "1"], "step() has not returned", "faulty.py"),
        # only in training
        ({"fault": "shape", "hidden": True}, ["--actors", "0", "--algorithm", "impala"], "not in its space", "actual: float32 [2]"),
        ({"fault": "raises", "hidden": True}, ["--actors", "2"], "step() raised ValueError", "ValueError: the arm is stuck"),
        ({"fault": "interrupts", "hidden": True}, ["--actors", "1"], "step() raised KeyboardInterrupt", "KeyboardInterrupt"),
        (
            {"fault": "info", "hidden": True},
            ["--actors", "1", "--algorithm", "impala"],
            "returned something else",
            "actual: a tuple of 5 whose info is list",
        ),
        ({"fault": "loops", "hidden": True}, ["--actors", "1", "--algorithm", "impala"], "has not returned", "faulty.py"),
        ({"fault": "segfaults", "hidden": True}, ["--actors", "1"], "killed by SIGSEGV", "Segmentation fault"),
        ({"fault": "exits", "hidden": True}, ["--actors", "1"], "exit code 7", "step 5 action"),
    ],
)
def test_train_ends_with_code_3_and_a_snippet_that_shows_the_fault(
    fault: dict[str, Any], how: list[str], says: str, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is in this process; what breaks is in those that it starts, but for what only raises."""
    monkeypatch.chdir(tmp_path)
    error = answer_here("train", ZOO, *kwargs(**fault), *how, *SMALL, *limit(fault), code=3)["error"]
    assert error["kind"] == "EnvironmentFault"
    assert says in error["message"].splitlines()[0] or says in error["message"]
    assert {"kind", "environment", "group", "env", "step", "field", "seed", "last_action", "traceback", "snippet"} <= set(error["report"])
    assert ZOO in error["message"]
    assert "seed" in error["message"]
    if fault["fault"] not in ("shape", "exits", "info"):
        assert "faulty.py" in error["report"]["traceback"]
    assert f"python {error['report']['snippet']}" in error["message"]
    shown = run(error["report"]["snippet"], cwd=tmp_path)
    assert shown.returncode != 0
    assert again in shown.stdout + shown.stderr
    assert "no fault this time" not in shown.stdout
    if fault.get("hidden"):
        assert "step 5 action" in shown.stdout  # all the actions of that episode
