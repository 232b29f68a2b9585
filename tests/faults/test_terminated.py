"""SIGTERM to every process of a run at once, as Ray sends it to those of a job: it is an end as any other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

import shoal
from faults.living import TINY, command, living
from held import Line
from shoal.files import CheckpointDirectory
from shoal.monitoring.store import RunReader

RARELY = [*TINY, "--checkpoint.every-seconds", "1000", "--seed", "5"]
UPDATES = 20


@pytest.mark.parametrize("learners", [1, 2])
def test_a_run_all_of_whose_processes_are_terminated_ends_with_a_last_checkpoint(learners: int, tmp_path: Path) -> None:
    several = ["--learners", str(learners)]
    args = ("train", "CartPole-v1", *RARELY, *several, "--actors", "2", "--stop.updates", "1000000", "--run-dir", "run", "--json")
    with contextlib.closing(Line()) as line, living(*args, cwd=tmp_path, line=line) as run:
        directory = tmp_path / "run"
        line.reach(UPDATES, run.process, run.log)
        terminated = run.left()
        line.go_on(for_good=True)
        for pid in terminated:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        assert run.ends() == 130
        run.gone()
    result = json.loads((directory / "result.json").read_text())
    newest = CheckpointDirectory(directory / "checkpoints").newest()
    assert (result["reason"], result["updates"]) == ("interrupted", newest.update)
    assert newest.update >= UPDATES, "the first checkpoint is not the last"
    with RunReader(directory / "run.db") as reader:
        kinds = [(event["kind"], event.get("role")) for event in reader.events()]
    assert ("died", "learner") not in kinds
    assert not any(kind == "rolled_back" for kind, _ in kinds)
    end = str(newest.update + 5)
    code, resumed, said = command("resume", "run", "--stop.updates", end, "--json", cwd=tmp_path)
    assert code == 0, said
    again = shoal.replay(directory)  # in this process
    assert (again["updates"], again["equal"]) == (newest.update + 5, True)
    assert again["weights_sha256"] == json.loads(resumed)["weights_sha256"]
