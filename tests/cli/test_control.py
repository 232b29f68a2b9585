"""`shoal control`, on a run that lives and on runs that do not."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.cli import main
from shoal.cli.control import tell_run
from shoal.config import RunConfig
from shoal.errors import RunError
from shoal.locks import lock_run
from shoal.runs import create_run

WAIT_SECONDS = 300.0


def ends_with(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def alive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A run that goes on until somebody stops it."""
    directory = tmp_path_factory.mktemp("work") / "run"
    command = [sys.executable, "-m", "shoal.cli", "train", "CartPole-v1", "--algorithm", "appo", "--actors", "2", "--json"]
    command += ["--stop.updates", "1000000", "--run-dir", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until(process, lambda: state_of(directory).get("update", 0) >= 3)
        yield directory, process
    finally:
        process.kill()
        process.communicate()


def state_of(directory: Path) -> dict[str, Any]:
    """Empty while the run does not listen yet."""
    with contextlib.suppress(RunError):
        found: dict[str, Any] = tell_run(directory, "state")["state"]
        return found
    return {}


def until(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_living_run_does_what_it_is_told(alive: tuple[Path, subprocess.Popen[str]], capfd: pytest.CaptureFixture[str]) -> None:
    directory, process = alive
    run = str(directory)

    def answer(*args: str) -> dict[str, Any]:
        assert ends_with("control", run, *args, "--json") == 0
        found = json.loads(capfd.readouterr().out)
        assert isinstance(found, dict)
        return found

    state = answer("state")["state"]
    assert (state["env"], state["algorithm"], len(state["actors"])) == ("CartPole-v1", "appo", 2)
    assert state["produced"] == state["trained"] + sum(state["dropped"].values()) + state["in_flight"]
    saved = answer("save")["update"]
    assert any(str(saved) in path.name for path in (directory / "checkpoints").iterdir())
    assert answer("pause") == {"ok": True}
    assert answer("state")["state"]["phase"] == "paused"
    until(process, lambda: at_rest(directory))
    first = state_of(directory)["update"]
    time.sleep(1.0)
    assert at_rest(directory)
    assert state_of(directory)["update"] == first, "nothing is learned in a pause"
    assert answer("continue") == {"ok": True}
    until(process, lambda: state_of(directory)["update"] > first)
    assert answer("scale", "1") == {"ok": True, "actors": 1}
    for asked, said in ((("--actors", "2"), {"actors": 2}), (("--autoscale", "1:2"), {"actors": 2, "autoscale": "1:2"})):
        assert ends_with("scale", run, *asked, "--json") == 0
        assert json.loads(capfd.readouterr().out) == {"ok": True, **said}
    assert answer("state")["state"]["autoscale"] == "1:2"
    assert ends_with("scale", run, "--autoscale", "2:1") == 1
    assert "MIN:MAX" in capfd.readouterr().err
    assert ends_with("control", run, "scale", "99") == 1
    assert "the number of groups" in capfd.readouterr().err
    assert ends_with("control", run, "state") == 0
    assert "CartPole" not in capfd.readouterr().out  # one line, as in a log
    assert ends_with("control", run, "stop") == 0
    assert "with a checkpoint" in capfd.readouterr().out
    out, _ = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, json.loads(out)["reason"]) == (130, "interrupted")
    assert ends_with("control", run, "state") == 1
    assert "is not running" in capfd.readouterr().err


def at_rest(directory: Path) -> bool:
    """Whether a paused run has made what was ordered before, twice in a row: what was finished in the moment of the first look is ordered to be learned after it."""
    looks = [tell_run(directory, "stalls")["stalls"] for _ in range(2)]
    paused = [{each["who"] for each in look["waits"] if "the run is paused" in each["why"]} for look in looks]
    return paused == [{"learner-0", "actor-0", "actor-1"}] * 2 and looks[0]["update"] == looks[1]["update"]


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["scale"], "scale needs the number of actors"),
        (["save", "3"], "save takes no number"),
        (["sleep"], "'sleep' is not one of"),
        ([], "Missing"),
    ],
)
def test_wrong_usage_ends_with_two(args: list[str], part: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert ends_with("control", "latest", *args) == 2
    assert part in capfd.readouterr().err


@pytest.mark.parametrize("args", [[], ["--actors", "2", "--autoscale", "1:2"], ["--actors", "0"]])
def test_scale_takes_either_a_number_or_bounds(args: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert ends_with("scale", "latest", *args) == 2
    assert "--actors" in capfd.readouterr().err


def test_a_run_in_one_process_takes_no_requests(tmp_path: Path) -> None:
    path = create_run(RunConfig.model_validate({"env": {"id": "CartPole-v1"}, "actors": 0}), tmp_path)
    with pytest.raises(RunError, match="is not running"):
        tell_run(path, "save")
    with lock_run(path), pytest.raises(RunError, match="takes no requests"):
        tell_run(path, "save")
