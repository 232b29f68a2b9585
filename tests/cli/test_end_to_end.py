"""The command line as a user starts it: each command in a process of its own, and once more in this one where its process is not what is asked."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from commands import answer_here, said_here
from shoal.cli.control import tell_run
from shoal.errors import RunError
from shoal.files import CheckpointDirectory
from shoal.monitoring.store import RunReader

RESULT = {
    "run", "reason", "env_steps", "updates", "seconds", "env_steps_per_second", "mean_return", "policy_version", "weights_sha256", "ledger",
    "lag", "restarts", "skipped_steps",
}  # fmt: skip


def shoal(*args: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "shoal.cli", *args]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    return done


def answer(*args: str, cwd: Path, code: int = 0) -> dict[str, Any]:
    found = json.loads(shoal(*args, "--json", cwd=cwd, code=code).stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A directory with one short run in it, and what its training answered."""
    cwd = tmp_path_factory.mktemp("work")
    return cwd, answer("train", "CartPole-v1", "--actors", "0", "--stop.updates", "4", "--seed", "3", "--run-dir", "runs/short", cwd=cwd)


def test_train_answers_with_exactly_the_promised_keys(trained: tuple[Path, dict[str, Any]]) -> None:
    _, result = trained
    assert set(result) == RESULT
    assert (result["reason"], result["updates"], result["policy_version"], result["env_steps"]) == ("updates", 4, 4, 4096)
    ledger = result["ledger"]
    assert set(ledger) == {"produced", "trained", "dropped", "in_flight"}
    assert ledger["produced"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["in_flight"]
    assert set(result["lag"]) == {"mean", "p99", "max"}
    assert len(result["weights_sha256"]) == 64


def test_a_runs_configuration_gives_the_same_weights_again(trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    cwd, first = trained
    second = answer("train", "runs/short/config.yaml", "--run-dir", "runs/again", cwd=cwd)
    assert second["weights_sha256"] == first["weights_sha256"]
    monkeypatch.chdir(cwd)
    other = answer_here("train", "runs/short/config.yaml", "--seed", "4")
    assert other["weights_sha256"] != first["weights_sha256"]


def test_a_run_can_be_listed_shown_evaluated_and_resumed(trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    cwd, _ = trained
    monkeypatch.chdir(cwd)
    rows = answer("runs", cwd=cwd)["runs"]
    assert {row["run"]: row["env"] for row in rows}["short"] == "CartPole-v1"
    shown = answer("show", "short", cwd=cwd)
    assert shown["configuration"]["seed"] == 3
    assert {"configuration", "schema", "results", "ledger", "lag", "faults"} <= set(shown)
    assert "CartPole-v1" in said_here("show", "short").out
    played = answer("evaluate", "short", "--episodes", "5", "--seed", "1", cwd=cwd)
    assert set(played) == {"episodes", "mean_return", "std_return", "iqm", "ci95", "min", "max", "mean_length"}
    assert played["episodes"] == 5
    assert played["min"] <= played["mean_return"] <= played["max"]
    assert math.isclose(played["mean_return"], played["mean_length"])  # CartPole pays one per step
    resumed = answer("resume", "short", "--stop.updates", "6", "--evaluation.episodes", "5", "--evaluation.seed", "1", cwd=cwd)
    assert (resumed["updates"], resumed["reason"]) == (6, "updates")
    assert resumed["evaluation"] == answer_here("evaluate", "short", "--episodes", "5", "--seed", "1")
    straight = answer_here("train", "CartPole-v1", "--actors", "0", "--stop.updates", "6", "--seed", "3", "--evaluation.episodes", "5")
    assert straight["weights_sha256"] == resumed["weights_sha256"]
    assert straight["evaluation"]["episodes"] == 5
    *older, newest = sorted((cwd / "runs/short/checkpoints").iterdir())
    (newest / "learner.json").write_text("torn")
    (said,) = shoal("evaluate", "short", "--episodes", "1", cwd=cwd).stderr.splitlines()
    assert said.startswith(f"warning: checkpoint {newest.name} is not whole (learner.json has 4 bytes")
    assert said.endswith("; taking the one before it")
    for path in older:
        (path / "learner.json").write_text("torn")
    refused = said_here("evaluate", "short", "--episodes", "1")
    assert refused.code == 1
    (said,) = refused.err.splitlines()
    assert "no whole checkpoint" in said
    assert "taking the one before" not in said


@pytest.mark.parametrize("algorithm", ["ppo", "impala"])
def test_what_a_killed_run_made_after_its_checkpoint_is_rolled_back_by_identity(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--sampling.groups", "2", "--sampling.group-size", "2", "--sampling.rollout-length", "8", "--policy.hidden-sizes", "8"]
    once = ["--checkpoint.every-seconds", "none", "--actors", "1"]  # but for the first, and when it is told to
    command = ["train", "CartPole-v1", "--preset", "none", "--algorithm", algorithm, *small, *once, "--run-dir", "run", "--view", "silent"]
    run = tmp_path / "run"

    def known() -> tuple[int, int, int]:
        """Update of the newest checkpoint, of the newest logged one, env steps between."""
        saved = [int(path.name.split("-")[1]) for path in CheckpointDirectory(run / "checkpoints").paths()]
        with contextlib.suppress(RunError), RunReader(run / "run.db") as reader:
            beyond = [(update, sum(entry["steps"] for entry in log)) for update, log in reader.consumed() if saved and update > saved[-1]]
            return (saved[-1], beyond[-1][0], sum(steps for _, steps in beyond)) if beyond else (0, 0, 0)
        return 0, 0, 0

    def save() -> bool:
        with contextlib.suppress(RunError):  # it does not listen yet
            return tell_run(run, "state")["state"]["update"] > 0 and bool(tell_run(run, "save"))
        return False

    with subprocess.Popen([sys.executable, "-m", "shoal", *command], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        try:
            for done in (save, lambda: known()[0] > 0):
                deadline = time.monotonic() + 300
                while not done():
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
        finally:
            process.kill()
    checkpoint, newest, steps = known()
    assert checkpoint > 0
    for _ in range(2):  # the second time, nothing is booked twice
        result = answer_here("resume", "run", "--stop.updates", str(checkpoint + 5))
        ledger = result["ledger"]
        assert result["updates"] == checkpoint + 5
        assert ledger["dropped"]["rolled_back"] == steps
        assert ledger["produced"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["in_flight"]
    events = answer_here("show", "run")["faults"]["newest"]
    assert next((e["update"], e["updates_undone"]) for e in events if e["kind"] == "resumed") == (checkpoint, newest - checkpoint)


SIGNALLING = """
import os, signal, time
import gymnasium

class Ends(gymnasium.Wrapper):
    sent = False

    def step(self, action):
        if os.path.exists("run/control.sock") and not os.path.exists("sent"):
            open("sent", "w").close()
            os.kill(int(open("supervisor").read()), signal.SIGHUP)
            self.sent = True
        if self.sent:
            time.sleep(0.02)  # its rollout takes more than a minute
        return self.env.step(action)

def ends_in_the_first_rollout():
    return Ends(gymnasium.make("CartPole-v1"))

def ends_while_it_is_looked_at():
    os.kill(int(open("supervisor").read()), signal.SIGINT)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["ends_in_the_first_rollout", "ends_while_it_is_looked_at"])
def test_a_run_that_is_interrupted_before_its_first_update_ends_well(name: str, tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text(SIGNALLING)
    script = (  # whoever started the tests may have SIGHUP ignored (nohup)
        "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\nopen('supervisor', 'w').write(str(os.getpid()))\n"
        "from shoal.cli import main\nmain()"
    )
    one = ["--sampling.groups", "1", "--sampling.group-size", "1"]  # what is resumed makes its whole update
    command = ["train", f"env.py:{name}", "--actors", "1", "--run-dir", "run", "--json", "--sampling.rollout-length", "4096", *one]
    done = subprocess.run(
        [sys.executable, "-c", script, *command], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    said = json.loads(done.stdout)
    if name == "ends_in_the_first_rollout":
        assert (said["reason"], said["updates"]) == ("interrupted", 0)
        assert {path.name.partition(".")[0] for path in (tmp_path / "run/checkpoints").iterdir()} == {"update-000000000"}
        assert answer_here("resume", str(tmp_path / "run"), "--stop.updates", "1")["updates"] == 1
    else:
        assert said["error"]["message"] == "interrupted before training began: nothing was kept"
        assert not (tmp_path / "run").exists()


def test_a_reward_whose_square_is_beyond_float32_makes_no_noise_and_a_run_that_ends_without_a_finite_step_diverged(tmp_path: Path) -> None:
    (tmp_path / "huge.py").write_text(
        "import gymnasium\ndef make():\n    return gymnasium.wrappers.TransformReward(gymnasium.make('CartPole-v1'), lambda reward: 1e30)\n"
    )
    done = shoal("train", "huge.py:make", "--actors", "0", "--stop.updates", "2", "--sampling.rollout-length", "64", cwd=tmp_path, code=4)
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "Going back to the last good checkpoint, once" in done.stderr
    assert "in its last update no loss or gradient was finite" in done.stderr.splitlines()[-1]


def test_a_factory_in_a_file_gets_its_arguments_and_its_printing_stays_out_of_the_answer(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import gymnasium\n"
        "def make(gravity):\n"
        "    print('made with', gravity)\n"
        "    env = gymnasium.make('CartPole-v1')\n"
        "    env.unwrapped.gravity = gravity\n"
        "    return env\n"
    )
    result = answer("train", "mine.py:make", "--env.kwargs.gravity", "-3", "--actors", "1", "--stop.updates", "1", cwd=tmp_path)
    assert result["reason"] == "updates"
    assert "mine-make" in result["run"]


@pytest.mark.parametrize(
    ("args", "code", "part"),
    [
        (["train", "CartPole-v9"], 2, "CartPole"),
        (["train", "nowhere.py:make"], 2, "nowhere.py"),
        (["train", "CartPole-v1", "--algorithm.epoch", "3"], 2, "did you mean algorithm.epochs"),
        (["resume", "nothing"], 2, "there is no run nothing"),
        (["show", "."], 2, "no run"),
    ],
)
def test_an_error_is_one_clear_message_with_its_code(args: list[str], code: int, part: str, tmp_path: Path) -> None:
    done = shoal(*args, cwd=tmp_path, code=code)
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_help_and_errors_load_nothing_heavy(tmp_path: Path) -> None:
    script = "import sys\nfrom shoal.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: print(*sorted(sys.modules))"
    heavy = {"torch", "gymnasium", "rich.live"}
    for args, more in (
        (["--help"], {"numpy", "pydantic", "yaml"}),
        (["train", "--help"], {"numpy"}),
        (["train", "CartPole-v1", "--sead", "1"], set()),
    ):
        done = subprocess.run([sys.executable, "-c", script, *args], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
        assert not set(done.stdout.splitlines()[-1].split()) & (heavy | more)


def test_the_process_of_a_training_with_actors_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom shoal.cli import main\n"
        "try: main(['train', 'CartPole-v1', '--actors', '1', '--stop.updates', '1', '--json'])\n"
        "except SystemExit as end: print('torch' in sys.modules, end.code)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr
