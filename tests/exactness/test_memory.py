"""Policies with memory leave what is promised, in every form of an environment: their state goes where their environments go."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.cli import main

from .harness import PPO, SAMPLING, TASKS, Killer, alone, assert_replayed, reference, train, train_through_kills
from .test_sync import UPDATES

MEMORY = ["--env.form", "native", "--policy.memory", "gru"]
NATIVE = ["CartPole-v1", *PPO, *MEMORY]  # a NEXT_STEP autoreset: resets take rows of their own


@pytest.mark.parametrize("task", ["memory", "r2d2"])
def test_environments_in_threads_give_the_same_weights(task: str, tmp_path: Path, shared: Path) -> None:
    found = train([*TASKS[task], "--env.form", "threads", "--stop.updates", str(UPDATES[task]), "--actors", "2"], tmp_path / "run")
    assert found.sha == reference(task, UPDATES[task], shared).sha


def test_a_native_form_that_resets_in_rows_of_its_own_is_exact_too_and_resumed_and_replayed(tmp_path: Path) -> None:
    args = [*NATIVE, "--stop.updates", "16"]
    expected = alone(args, tmp_path / "alone")
    killers = (Killer.of("shoal:actor", 2, 16, seed=5), Killer.of("shoal:learner", 1, 16, seed=6))
    outcome = train_through_kills([*args, "--actors", "2"], tmp_path / "killed", 1, 16, seed=49, killers=killers)
    assert outcome.sha == expected.sha
    assert_replayed(tmp_path / "killed")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--learner.compile", "true"), "learner.compile does not go with policy.memory"),
        (("--policy.share-encoder", "false"), "policy.share_encoder: with policy.memory"),
        (("--algorithm", "examples/own_algorithm.py:A2C"), "does not train policies with memory"),
        (("--algorithm", "dqn"), "policy.memory: dqn learns from a replay"),
    ],
)
def test_what_does_not_go_with_a_memory_is_bad_usage(
    more: tuple[str, str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flag, value = more
    if value.startswith("examples/"):
        value = str(Path(__file__).resolve().parents[2] / value)
    args = ["CartPole-v1", *SAMPLING, *MEMORY, flag, value, "--stop.updates", "1", "--actors", "0", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        main(["train", *args])
    assert ended.value.code == 2
    assert said in capfd.readouterr().err
