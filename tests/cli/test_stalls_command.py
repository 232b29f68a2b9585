"""`shoal stalls` and SIGUSR1, on a run whose environment hangs in C with the interpreter's lock, and on runs that do not live."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.cli import main
from shoal.cli.control import tell_run
from shoal.errors import RunError
from shoal.streams import episode_seed
from stopping import stop_process

WALLS = Path(__file__).parents[1] / "engines" / "walls.py"
WAIT_SECONDS = 300.0


def ends_with(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def stuck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str], Path]]:
    """A sync run in which the second episode of environment 1 of group 1 never ends its fifth step."""
    work = tmp_path_factory.mktemp("work")
    config = {
        "env": {"id": f"{WALLS}:Wall", "form": "python", "kwargs": {"what": {str(episode_seed(3, 1, 1, 1)): "grip"}, "at": 5}, "step_timeout_seconds": 3600.0},
        "sampling": {"groups": 2, "group_size": 2, "rollout_length": 8}, "policy": {"hidden_sizes": [8]},
        "algorithm": {"name": "ppo", "minibatch_size": 16, "epochs": 1}, "seed": 3, "actors": 2, "preset": "none", "stop": {"updates": 1000000},
    }  # fmt: skip
    (work / "run.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "shoal.cli", "train", str(work / "run.yaml"), "--run-dir", str(work / "run"), "--view", "silent"]
    paths = [str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with (work / "err").open("w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, text=True)
    yield work / "run", process, work / "err"
    process.kill()
    process.wait()


def until_it_hangs(run: Path) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            found = tell_run(run, "stalls")["stalls"]
        except RunError:
            time.sleep(0.1)
            continue
        assert isinstance(found, dict)
        hangs = any("group 1" in text for text in found["blamed"]) and found["waits"][0]["seconds"] > 0.5
        if hangs and all(
            "File" in each["stack"] for each in found["processes"]
        ):  # a busy machine may write one down too late for the answer
            return found
        time.sleep(0.1)
    raise AssertionError("it never hung")


def test_a_stall_is_explained_with_every_stack(stuck, capfd):
    run, process, errors = stuck
    found = until_it_hangs(run)
    waits = {each["who"]: each for each in found["waits"]}
    assert waits["learner-0"]["for"] == ["actor-1"]
    assert waits["actor-0"]["for"] == ["actor-1"]
    assert waits["learner-0"]["why"] == "1 of 2 rollouts of the next update are there; being made: group 1 (actor 1)"
    assert len(found["blamed"]) == 1
    assert found["blamed"][0].startswith("actor-1, stepping group 1")
    processes = {each["name"]: each for each in found["processes"]}
    assert set(processes) == {"supervisor", "zygote", "learner-0", "actor-0", "actor-1"}
    assert all("File" in each["stack"] for each in processes.values()), processes
    assert "walls.py" in processes["actor-1"]["stack"]  # though it holds the interpreter
    assert "_do" in processes["actor-1"]["stack"]
    assert "serve" in processes["zygote"]["stack"]

    stop_process(processes["actor-0"]["pid"])
    assert ends_with("stalls", str(run)) == 0
    text = capfd.readouterr().out
    os.kill(processes["actor-0"]["pid"], signal.SIGCONT)
    assert "learner-0 has waited for actor-1" in text
    assert "in the end it is actor-1, stepping group 1, row" in text
    assert "stopped (SIGSTOP)" in text

    process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + WAIT_SECONDS
    while "in the end it is actor-1" not in errors.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "walls.py" in errors.read_text()
    assert process.poll() is None

    stop_process(process.pid)
    assert ends_with("stalls", str(run)) == 1
    assert "kill -CONT" in capfd.readouterr().err
    process.send_signal(signal.SIGCONT)

    process.kill()
    process.wait()
    assert ends_with("stalls", str(run), "--json") == 1
    said = capfd.readouterr()
    assert "not running" in said.err
    assert json.loads(said.out)["error"]["kind"] == "RunError"
