"""Every example runs as its reader would run it: a script in a process of its own, in a directory of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LAST_WORDS = {
    "plain_script.py": "ten episodes: ",
    "own_environment.py": "as a lambda: ",
    "own_network.py": "ResidualTrunk(",
    "own_algorithm.py": "20 updates, mean return ",
    "memory.py": "an episode with what was remembered: ",
    "callbacks.py": "resumed, and ended: updates",
    "residual_cnn.py": "256",
}


def run(*command: str, cwd: Path) -> str:
    environment = {**os.environ, "TERM": "dumb"}
    environment.pop("OMP_NUM_THREADS", None)  # as a user has it
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_and_listed() -> None:
    scripts = {file.name for file in EXAMPLES.glob("*.py")}
    assert scripts == {*LAST_WORDS, "corridor.py"}
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}]({name})" in listed for name in scripts)


@pytest.mark.parametrize("name", [name for name in LAST_WORDS if name != "callbacks.py"])
def test_an_example_runs_to_its_end(name: str, tmp_path: Path) -> None:
    assert LAST_WORDS[name] in run(str(EXAMPLES / name), cwd=tmp_path)
    assert list(tmp_path.glob("runs/*/result.json"))


@pytest.mark.parametrize("named", [("--policy.network", "own_network.py:ResidualTrunk"), ("--algorithm", "own_algorithm.py:A2C")])
def test_what_an_example_defines_can_be_named_on_the_command_line(named: tuple[str, str], tmp_path: Path) -> None:
    key, name = named
    result = run(
        "-m", "shoal", "train", "CartPole-v1", key, f"{EXAMPLES}/{name}", "--actors", "1", "--stop.updates", "1", "--json", cwd=tmp_path
    )
    assert json.loads(result)["updates"] == 1


def test_callbacks_see_every_update_and_end_the_run(tmp_path: Path) -> None:
    said = run(str(EXAMPLES / "callbacks.py"), cwd=tmp_path).splitlines()
    assert [line.split(":")[0] for line in said if line.startswith("update")] == [f"update {update}" for update in range(1, 6)]
    assert "ended: interrupted" in said
    assert any(LAST_WORDS["callbacks.py"] in line for line in said)
    assert list(tmp_path.glob("runs/*/result.json"))


def test_the_corridor_is_sound_and_learns_from_the_command_line(tmp_path: Path) -> None:
    target = f"{EXAMPLES / 'corridor.py'}:make"
    report = json.loads(run("-m", "shoal.cli", "check", target, "--json", cwd=tmp_path))
    assert report["ok"]
    assert not report["findings"]
    small = ["--sampling.group-size", "4", "--sampling.rollout-length", "64", "--algorithm.learning-rate", "3e-3"]
    length = ["--env.kwargs.length", "5", "--stop.return", "0.9", "--stop.env-steps", "60000"]
    result = json.loads(run("-m", "shoal.cli", "train", target, *length, *small, "--actors", "2", "--json", cwd=tmp_path))
    assert (result["reason"], result["mean_return"] >= 0.9) == ("return", True)
