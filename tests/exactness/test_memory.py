"""Policies with memory leave what is promised, in every form of an environment: their state goes where their environments go."""

from __future__ import annotations

from pathlib import Path

import pytest

from .harness import PPO, SAMPLING, TASKS, Killer, Outcome, reference, shoal, start, train
from .test_sync import UPDATES

MEMORY = ["--env.form", "native", "--policy.memory", "gru"]
NATIVE = ["CartPole-v1", *PPO, *MEMORY]  # a NEXT_STEP autoreset: resets take rows of their own


@pytest.mark.parametrize("task", ["memory", "r2d2"])
def test_environments_in_threads_give_the_same_weights(task: str, tmp_path: Path, shared: Path) -> None:
    found = train([*TASKS[task], "--env.form", "threads", "--stop.updates", str(UPDATES[task]), "--actors", "2"], tmp_path / "run")
    assert found.sha == reference(task, UPDATES[task], shared).sha


def test_a_native_form_that_resets_in_rows_of_its_own_is_exact_too_and_resumed_and_replayed(tmp_path: Path) -> None:
    args = [*NATIVE, "--stop.updates", "16"]
    alone = train([*args, "--actors", "0"], tmp_path / "alone")
    killers = [Killer.of("shoal:actor", 2, 16, seed=5), Killer.of("shoal:learner", 1, 16, seed=6)]
    assert train([*args, "--actors", "2"], tmp_path / "killed", *killers).sha == alone.sha
    half = train([*NATIVE, "--stop.updates", "8", "--actors", "1"], tmp_path / "half")
    resumed = shoal("resume", str(tmp_path / "half"), "--stop.updates", "16", log=tmp_path / "resumed.log")
    assert half.sha != alone.sha
    assert Outcome(resumed).sha == alone.sha
    assert shoal("replay", str(tmp_path / "killed"), log=tmp_path / "replay.log")["equal"] is True


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--learner.compile", "true"), "learner.compile does not go with policy.memory"),
        (("--policy.share-encoder", "false"), "policy.share_encoder: with policy.memory"),
        (("--algorithm", "examples/own_algorithm.py:A2C"), "does not train policies with memory"),
        (("--algorithm", "dqn"), "policy.memory: dqn learns from a replay"),
    ],
)
def test_what_does_not_go_with_a_memory_is_bad_usage(more: tuple[str, str], said: str, tmp_path: Path) -> None:
    flag, value = more
    if value.startswith("examples/"):
        value = str(Path(__file__).resolve().parents[2] / value)
    log, args = tmp_path / "run.log", ["CartPole-v1", *SAMPLING, *MEMORY]
    process = start(["train", *args, flag, value, "--stop.updates", "1", "--actors", "0", "--run-dir", str(tmp_path / "run")], log)
    assert process.wait(120) == 2
    assert said in log.read_text()
