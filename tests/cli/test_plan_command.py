"""`shoal plan` from the command line, in processes of its own: what it answers and what it ends with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planning_costs import OPTIONS, costs
from shoal.planning.plan import ALONE

ANSWER = {"settings", "costs", "links", "driver", "fit", "way", "rows", "breaks", "warnings"}
ROW = {
    "nodes", "engine", "learners", "env_steps_per_second", "env_steps_per_second_and_node", "updates_per_second", "batch_env_steps", "lag", "over_lag",
    "utilisation", "learner_bytes", "bottleneck", "moves",
}  # fmt: skip


def shoal(*args: str, cwd: Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shoal.cli", "plan", "CartPole-v1", *args]
    everything = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", **environment}
    done = subprocess.run(command, cwd=cwd, env=everything, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "costs.json").write_text(json.dumps(costs()))
    return str(tmp_path / "costs.json")


def test_a_plan_from_a_file_as_json(file: str, tmp_path: Path) -> None:
    found: dict[str, Any] = json.loads(shoal(*OPTIONS, "--costs", file, "--nodes", "20,1,20", "--json", cwd=tmp_path).stdout)
    assert set(found) == ANSWER
    assert [row["nodes"] for row in found["rows"]] == [1, 20]
    assert all(set(row) == ROW for row in found["rows"])
    assert [row["engine"] for row in found["rows"]] == ["local", "ray"], "several nodes are a cluster of Ray"
    assert (found["settings"]["engine"], found["warnings"], found["fit"]) == ("ray", [ALONE], None), "a file of before the trials"
    one = found["rows"][0]
    assert 0.9e6 / (38 / 2 + 40) < one["env_steps_per_second"] <= 1e6 / (38 / 2 + 40)  # the driver takes the rest
    assert found["breaks"]["name"] == "learner"
    assert [entry.name for entry in tmp_path.iterdir()] == ["costs.json"]


def test_a_cluster_on_one_machine_has_its_cores_once_and_its_messages(file: str, tmp_path: Path) -> None:
    small = [*OPTIONS, "--costs", file, "--engine", "ray", "--actors-per-node", "2", "--nodes", "1,2", "--link-latency", "0", "--json"]
    apart, together, dear = (
        json.loads(shoal(*small, *more, cwd=tmp_path).stdout)
        for more in (["--message-us", "0"], ["--message-us", "0", "--one-machine"], ["--message-us", "5000", "--one-machine"])
    )
    assert (dear["way"]["message"], dear["settings"]["engine"], dear["settings"]["one_machine"]) == (0.005, "ray", True)
    rates = [[row["env_steps_per_second"] for row in found["rows"]] for found in (apart, together, dear)]
    assert rates[0][0] == rates[1][0]
    assert rates[0][1] > rates[1][1], "nodes on machines of their own have more cores"
    assert rates[1][1] > 1.1 * rates[2][1]
    assert rates[1][0] == rates[2][0], "on the driver's machine there are no messages"


def test_a_table_for_a_person(file: str, tmp_path: Path) -> None:
    said = shoal(*OPTIONS, "--costs", file, "--table", cwd=tmp_path).stdout
    lines = [text.split() for text in said.splitlines()]
    assert [cells[0] for cells in lines if cells and cells[0].replace(",", "").isdecimal()][:5] == ["1", "10", "100", "1000", "10,000"]
    assert "first breaks, at " in said
    assert "--learners" in said


def test_what_was_fitted_to_a_trial_is_told(tmp_path: Path) -> None:
    trial = {
        "env_steps_per_second": 14_000.0,
        "actors": 2,
        "acting": 0.35,
        "learning": 0.6,
        "acting_us": 40.0,
        "update_us": 500.0,
        "max_policy_lag": 4,
    }
    (tmp_path / "costs.json").write_text(json.dumps(costs(trial=trial)))
    done = shoal(*OPTIONS, "--costs", "costs.json", cwd=tmp_path)
    step, learning = 2 * 0.35 / 14_000 / 38e-6, 0.6 / 14_000 / 40e-6
    pause = 1024 / 14_000 * (1 - 0.35 - 0.6) - 0.0005
    assert f"steps take {step:.2f} times as long as their parts alone, learning {learning:.2f}; " in done.stdout
    told = re.search(r"([0-9.]+) ms of an update nobody works", done.stdout)
    assert told is not None
    assert float(told[1]) == pytest.approx(1e3 * pause, abs=0.05), "the driver also looks what may be begun"
    assert "warning" not in done.stderr


def test_several_learners_are_said_with_where_they_are(file: str, tmp_path: Path) -> None:
    small = [*OPTIONS, "--costs", file, "--learners", "2"]
    here = shoal(*small, "--nodes", "1,2", cwd=tmp_path)
    assert "; 2 learners, all on the driver's machine" in here.stdout
    assert "warning: the costs are not of 2 learners" in here.stderr
    there = shoal(*small, "--nodes", "2", "--engine", "ray", "--learners-on", "nodes", "--json", cwd=tmp_path)
    found = json.loads(there.stdout)
    assert (found["settings"]["learners"], found["settings"]["learners_on"], found["rows"][0]["learners"]) == (2, "nodes", 2)


def test_costs_are_measured_where_no_file_is_given(tmp_path: Path) -> None:
    small = ["--preset", "none", "--sampling.groups", "2", "--sampling.group-size", "2", "--sampling.rollout-length", "16", "--actors", "1"]
    found = json.loads(shoal(*small, "--algorithm", "impala", "--seconds", "0", "--json", cwd=tmp_path).stdout)
    assert set(found) == ANSWER
    assert found["rows"][0]["env_steps_per_second"] > 0
    assert (found["settings"]["mode"], found["settings"]["actors"], found["breaks"]) == ("async", 1, None)
    assert ALONE not in found["warnings"]
    assert min(found["fit"]["acting"], found["fit"]["learning"]) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--nodes", "0"], "whole numbers from 1"),
        (["--nodes", "1,x"], "whole numbers from 1"),
        (["--nodes", "3", "--table"], "give one of them"),
        (["--link-bandwidth", "0"], "--link-bandwidth"),
        (["--learners", "0"], "--learners"),
        (["--learners", "65"], "learners"),
        (["--learners", "2", "--learners-on", "nodes"], "--engine ray"),
        (["--learners", "3", "--learners-on", "nodes", "--engine", "ray", "--nodes", "2,9"], "has 1 nodes"),
        (["--sampling.group-size", "4"], "sampling.group_size"),
        (["--sampling.groops", "4"], "sampling.groups"),
        (["--algorithm", "dqn"], "algorithm"),
        (["--actors", "0"], "actors"),
    ],
)
def test_wrong_options_end_with_2_and_say_which(wrong: list[str], said: str, file: str, tmp_path: Path) -> None:
    options = [*OPTIONS, "--costs", file]
    if wrong[0] in options:
        at = options.index(wrong[0])
        del options[at : at + 2]
    done = shoal(*options, *wrong, "--json", cwd=tmp_path, code=2)
    assert said in done.stderr
    assert json.loads(done.stdout)["error"]["exit_code"] == 2


def test_a_missing_or_broken_file_ends_with_2(tmp_path: Path) -> None:
    assert "does not exist" in shoal("--costs", "none.json", cwd=tmp_path, code=2).stderr
    (tmp_path / "broken.json").write_text("{")
    assert "shoal bench costs ENV --json" in shoal("--costs", "broken.json", cwd=tmp_path, code=2).stderr


def test_without_simpy_it_ends_with_2_and_says_how_to_get_it(file: str, tmp_path: Path) -> None:
    (tmp_path / "simpy.py").write_text("raise ImportError('not here')\n")
    done = shoal(*OPTIONS, "--costs", file, cwd=tmp_path, code=2, PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert "pip install 'shoal[plan]'" in done.stderr
