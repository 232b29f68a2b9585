"""`shoal bench` from the command line: what its answers hold, and that their figures fit together. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands import answer_here
from shoal.benching import costs, replays
from shoal.benching.training import mean_of
from shoal.cli import main
from shoal.cli.bench import _print_costs

SMALL = ["--preset", "none", "--sampling.groups", "2", "--sampling.group-size", "2", "--sampling.rollout-length", "16", "--actors", "1"]
PARTS = {
    "settings", "date", "machine", "cores", "costs", "mixed", "crowding", "transport", "crossing", "learning", "several", "environment", "sizes",
    "ceilings", "references", "trial",
}  # fmt: skip


def shoal(*args: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "shoal.cli", *args]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    return done


def answer(*args: str, cwd: Path) -> dict[str, Any]:
    found = json.loads(shoal(*args, "--json", cwd=cwd).stdout)
    assert isinstance(found, dict)
    return found


def ceilings_follow(found: dict[str, Any]) -> None:
    costs, cores = found["costs"], found["cores"]
    assert all(cost > 0 for cost in costs.values())
    assert costs["x"] == pytest.approx(sum(found["transport"].values()))
    assert min(found["crossing"]["pack"], found["crossing"]["unpack"]) > 0
    acting = costs["e"] + costs["i"] + costs["x"]
    assert found["ceilings"]["async"] == pytest.approx(cores * 1e6 / (acting + costs["l"]))
    assert found["ceilings"]["sync"] == pytest.approx(1e6 / (acting / cores + costs["l"] / found["learning"]["cores"]))
    assert 1 <= found["learning"]["cores"] <= cores


@pytest.mark.parametrize(
    ("options", "form", "mode"),
    [(["--algorithm", "ppo"], "python", "sync"), (["--algorithm", "impala", "--env.form", "native"], "native", "async")],
)
def test_costs_and_the_ceilings_that_follow(options: list[str], form: str, mode: str, tmp_path: Path) -> None:
    """In a process of their own, as what a user starts; they are measured in this one below."""
    found = answer("bench", "costs", "CartPole-v1", *SMALL, *options, "--seconds", "0", cwd=tmp_path)
    assert set(found) == PARTS
    assert (found["settings"]["form"], found["settings"]["mode"], found["settings"]["batch_env_steps"]) == (form, mode, 64)
    ceilings_follow(found)
    assert found["several"] is None
    assert found["ceilings"]["waiting"] is None
    assert found["crowding"] > 0.0
    assert found["ceilings"]["of_mode"] == found["ceilings"][mode]
    assert found["sizes"]["weights_bytes"] == 4 * (2 * (4 * 64 + 64 + 64 * 64 + 64) + 64 * 2 + 2 + 64 + 1)  # actor and critic apart
    assert 16 * 2 * (4 * 4 + 8) < found["sizes"]["rollout_bytes"] < 4096  # observations, rewards and a little more
    for beside in (found["references"][name] for name in ("environment", "inference", "learning")):
        assert beside["times"] == pytest.approx(beside["shoal_us"] / beside["bare_us"])
    trial = found["trial"]
    assert trial["env_steps_per_second"] > 0
    assert trial["actors"] == 1
    assert 0 < trial["acting"] <= 1
    assert 0 < trial["learning"] <= 1
    assert min(trial["acting_us"], trial["update_us"]) >= 0
    assert list(tmp_path.iterdir()) == []


def test_several_learners_are_measured_at_their_part_and_at_what_they_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--algorithm", "ppo", "--algorithm.epochs", "2", "--algorithm.minibatch-size", "32", "--learners", "2"]
    found = answer_here("bench", "costs", "CartPole-v1", *SMALL, *options, "--seconds", "0")
    several = found["several"]
    assert several["learners"] == 2
    assert several["exchanges"] == 1 + 2 * 2  # values, and two minibatches of each epoch
    assert several["share_us"] > 0
    assert several["exchange_us"] > 0
    whole = 2 * (several["share_us"] + several["exchange_us"]) + found["transport"]["consume"]
    assert several["l_us"] == pytest.approx(whole)
    acting = found["costs"]["e"] + found["costs"]["i"] + found["costs"]["x"]
    assert found["ceilings"]["async"] == pytest.approx(found["cores"] * 1e6 / (acting + whole))
    assert found["ceilings"]["sync"] == pytest.approx(1e6 / (acting / found["cores"] + whole / several["cores"]))
    _print_costs(found)
    said = capsys.readouterr().out
    assert "each of 2 learners: its part" in said
    assert "5 exchanges an update" in said


def test_a_network_that_bare_loops_have_not_is_measured_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer_here("bench", "costs", "CartPole-v1", *SMALL, "--policy.memory", "lstm", "--seconds", "0")
    assert (found["references"]["inference"], found["references"]["learning"]) == (None, None)
    assert found["references"]["environment"]["times"] > 0
    assert found["references"]["missing"] == "its network has a memory"
    _print_costs(found)
    assert "no bare loop beside inference and learning: its network has a memory" in capsys.readouterr().out


def test_environments_that_wait_bound_what_can_be_reached(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nimport gymnasium\n"
        "class Slow(gymnasium.Wrapper):\n"
        "    def step(self, action):\n        time.sleep(0.002)\n        return self.env.step(action)\n"
        "def make():\n    return Slow(gymnasium.make('CartPole-v1'))\n"
    )
    options = ["--env.form", "threads", "--algorithm", "appo", "--algorithm.minibatch-size", "64"]
    found = answer_here("bench", "costs", f"{tmp_path / 'slow.py'}:make", *SMALL, *options, "--seconds", "0")
    ceilings_follow(found)
    assert found["environment"]["wall_us"] >= 2000
    assert found["ceilings"]["waiting"] == pytest.approx(4 * 1e6 / found["environment"]["wall_us"])
    assert found["ceilings"]["of_mode"] == min(found["ceilings"]["async"], found["ceilings"]["waiting"])


def here(*args: str) -> int:
    """The command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(["bench", *args])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The costs, once for all that do not ask how they are measured."""
    return answer_here("bench", "costs", "CartPole-v1", *SMALL, "--algorithm", "ppo", "--seconds", "0")


def test_a_training_against_its_ceiling(measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = iter([measured, mean_of(measured, {**measured, "ceilings": dict.fromkeys(measured["ceilings"], 0.0)})])
    monkeypatch.setattr(costs, "bench_costs", lambda *asked, **how: next(halves))  # before and after: other ones each time
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dawdling = [f"{Path(__file__).parents[1] / 'engines' / 'walls.py'}:Wall", "--env.kwargs.step_seconds", "0.001", "--env.form", "python"]
    found = answer_here("bench", "train", *dawdling, *SMALL, "--algorithm", "ppo", "--stop.seconds", "4", "--seconds", "0")
    assert next(halves, None) is None
    assert found["costs"]["x"] == pytest.approx(sum(found["transport"].values()))
    assert set(found) == PARTS | {
        "env_steps_per_second", "ceiling", "ceiling_before", "ceiling_after", "fraction", "time_by_role", "processor", "missing", "words", "result",
    }  # fmt: skip
    assert found["ceiling_after"] == pytest.approx(found["ceiling_before"] / 2)
    assert found["ceiling"] == found["ceilings"]["of_mode"] == pytest.approx((found["ceiling_before"] + found["ceiling_after"]) / 2)
    assert found["fraction"] == pytest.approx(found["env_steps_per_second"] / found["ceiling"])
    assert set(found["time_by_role"]) == {"actors", "learner", "supervisor"}
    for shares in found["time_by_role"].values():
        assert sum(shares.values()) == pytest.approx(100.0, abs=1.0)
    assert {"stepping", "inferring", "waiting"} <= set(found["time_by_role"]["actors"])
    assert {"learning", "waiting", "publishing"} <= set(found["time_by_role"]["learner"])
    assert found["result"]["reason"] == "seconds"
    assert list(tmp_path.iterdir()) == []  # the run is gone


def test_a_training_can_be_kept_and_told_in_words(
    measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(costs, "bench_costs", lambda *asked, **how: measured)
    assert here("train", "CartPole-v1", *SMALL, "--stop.updates", "60", "--seconds", "0", "--run-dir", str(tmp_path / "kept")) == 0
    said = capfd.readouterr().out
    assert "% of the ceiling" in said
    assert "a trial run: " in said
    assert "microseconds of one core per environment step" in said
    assert (tmp_path / "kept" / "result.json").exists()


def test_a_training_that_is_too_short_is_refused(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(costs, "bench_costs", lambda *asked, **how: measured)
    assert here("train", "CartPole-v1", *SMALL, "--stop.updates", "1", "--seconds", "0") == 2
    assert "too short to be measured" in capfd.readouterr().err


def test_the_replay_is_measured_with_vectors_and_with_stacks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Small ones: how large those of the command are is in tests/benching/test_bench_replay.py."""
    monkeypatch.setattr(replays, "CASES", tuple(replace(case, capacity_steps=4160) for case in replays.CASES))
    assert here("replay", "--seconds", "0", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert set(found) == {"settings", "date", "machine", "cases"}
    assert set(found["cases"]) == {"vector", "short rollouts", "stacks"}
    for case in found["cases"].values():
        assert case["insert_per_second"] > 0
        assert case["sample_per_second"] > 0
