"""`--learners N` as a user gives it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faults.living import TINY, command
from shoal.cli import main

RESULT = {
    "run", "reason", "env_steps", "updates", "seconds", "env_steps_per_second", "mean_return", "policy_version", "weights_sha256", "ledger",
    "lag", "restarts", "skipped_steps",
}  # fmt: skip


def test_two_learners_train_as_the_readme_says(tmp_path: Path) -> None:
    code, out, said = command("train", "CartPole-v1", "--learners", "2", "--stop.updates", "20", "--run-dir", "run", "--json", cwd=tmp_path)
    assert code == 0, said
    result = json.loads(out)
    assert set(result) == RESULT
    assert (result["reason"], result["updates"], result["restarts"]) == ("updates", 20, 0)
    code, out, _ = command("show", "run", "--json", cwd=tmp_path)
    assert json.loads(out)["configuration"]["learners"] == 2
    assert (tmp_path / "run" / "logs" / "learner-1.log").exists()


ALONE = """
from shoal.algorithms.base import Algorithm

class Alone(Algorithm):
    def update(self, batch, context):
        return {}
"""


OWN = """
from shoal.algorithms.dqn import DQN
from shoal.config import DQNConfig

class OwnConfig(DQNConfig):
    name: str = "own"

class Own(DQN):
    Config = OwnConfig
    shares = False
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["--algorithm", "dqn", "--learners", "3", "--algorithm.batch-size", "100"],
            "algorithm.batch_size: 100 transitions of a batch cannot be dealt evenly to 3 learners (learners); 99 or 102 can",
        ),
        (
            ["--algorithm", "dqn", "--learners", "2", "--algorithm.batch-size", "64", "--sampling.groups", "3"],
            "sampling.groups: 3 groups (each learner keeps and samples the rollouts of its own) cannot be dealt evenly to 2 learners (learners); 2 or 4 can",
        ),
        (["--algorithm", "own.py:Own", "--learners", "2"], "own.py:Own does not divide its work, as the built-in algorithms do"),
        (["--algorithm", "alone.py:Alone", "--learners", "2"], "does not divide its work"),
        (["--learners", "2", "--algorithm.minibatch-size", "1"], "1 rows cannot be divided among 2 learners"),
        (["--learners", "0"], "learners: should be greater than or equal to 1"),
    ],
)
def test_what_several_learners_cannot_do_is_refused_before_anything_is_made(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alone.py").write_text(ALONE)
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(SystemExit) as ended:
        main(["train", "CartPole-v1", *given, "--actors", "0", "--stop.updates", "1", "--run-dir", "run"])
    errors = capfd.readouterr().err
    assert (ended.value.code, said in errors) == (2, True), errors
    assert not (tmp_path / "run").exists()


def test_several_learners_learn_from_a_replay_as_the_guide_says(tmp_path: Path) -> None:
    args = ("train", "CartPole-v1", "--algorithm", "dqn", "--learners", "2", "--stop.updates", "20", "--run-dir", "run", "--json")
    code, out, said = command(*args, cwd=tmp_path)
    assert code == 0, said
    result = json.loads(out)
    assert (result["reason"], result["updates"], result["restarts"]) == ("updates", 20, 0)
    assert result["ledger"]["replayed"] == result["env_steps"]
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert {path.name for path in (newest / "replay").iterdir()} == {"0-of-2", "1-of-2"}


def test_each_learner_has_its_part_of_a_profile_and_of_what_control_says(tmp_path: Path) -> None:
    args = ("train", "CartPole-v1", *TINY, "--learners", "2", "--actors", "1", "--stop.updates", "5", "--run-dir", "run", "--profile")
    code, _, said = command(*args, cwd=tmp_path)
    assert code == 0, said
    names = {
        event["args"]["name"]
        for event in json.loads((tmp_path / "run" / "profile.json").read_text())["traceEvents"]
        if event["ph"] == "M" and event["name"] == "process_name"
    }
    assert names == {"supervisor", "learner", "learner 1", "actor 0"}
