"""Mixed precision and torch.compile leave what is promised: the same weights for any number of actors, through kills, resumes and replays."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import test_sync
from .harness import PPO, TIMEOUT_SECONDS, Killer, alone, assert_replayed, reference, refused, start, train, train_through_kills

UPDATES = test_sync.UPDATES["cartpole"]
WAYS = {
    "bfloat16": ["CartPole-v1", *PPO, "--learner.precision", "bfloat16"],
    "compile": ["CartPole-v1", *PPO, "--learner.compile", "true"],
}


@pytest.mark.parametrize("way", ["bfloat16", pytest.param("compile", marks=pytest.mark.soak)])  # each process compiles anew
def test_weights_do_not_depend_on_actors_kills_or_resumes(way: str, tmp_path: Path, shared: Path) -> None:
    if way == "compile":
        _skip_without_a_compiler()
    args = [*WAYS[way], "--stop.updates", str(UPDATES)]
    expected = alone(args, tmp_path / "alone")
    assert expected.sha != reference("cartpole", UPDATES, shared).sha
    killer = Killer.of("shoal:learner", 1, UPDATES, seed=2)
    outcome = train_through_kills([*args, "--actors", "2"], tmp_path / "killed", 1, UPDATES, seed=53, killers=(killer,))
    assert outcome.sha == expected.sha
    assert_replayed(tmp_path / "killed")


def test_an_async_run_in_bfloat16_is_replayed(tmp_path: Path) -> None:
    args = ["CartPole-v1", "--algorithm", "impala", "--preset", "none", "--learner.precision", "bfloat16"]
    outcome = train([*args, "--stop.updates", "12", "--actors", "2"], tmp_path / "run")
    assert outcome.result["lag"]["max"] <= 4
    assert_replayed(tmp_path / "run")


def test_a_resume_does_not_change_how_the_learner_computes(tmp_path: Path) -> None:
    alone([*WAYS["bfloat16"], "--stop.updates", "2"], tmp_path / "run")
    for option, value in (("--learner.precision", "float32"), ("--learner.compile", "true")):
        said = refused("resume", str(tmp_path / "run"), "--stop.updates", "4", option, value)
        assert re.search(rf"{option[2:]} was .* and cannot become", said)


def test_a_missing_compiler_ends_the_run_before_it_begins_with_one_line(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    process = start(["train", *WAYS["compile"], "--actors", "1", "--run-dir", str(tmp_path / "run")], log, {"CXX": "no-such-compiler"})
    assert process.wait(TIMEOUT_SECONDS) == 2
    said = [line for line in log.read_text().splitlines() if "learner.compile" in line]
    assert len(said) == 1
    assert "'no-such-compiler' is not on the PATH" in said[0]
    assert not (tmp_path / "run").exists()


def _skip_without_a_compiler() -> None:
    code = "import torch; from shoal.networks.computing import check_compiler; check_compiler(torch.device('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(done.stderr.strip().splitlines()[-1])
