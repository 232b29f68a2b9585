"""Run directories: their names, and what is said of runs that live, ended, died or are damaged."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal import runs
from shoal.config import RunConfig
from shoal.errors import ConfigError, RunError
from shoal.files import CheckpointDirectory, to_json, write_text_atomically
from shoal.locks import lock_run
from shoal.monitoring.store import RunStore
from shoal.settings import load_config


def config(env: str = "CartPole-v1", **settings: Any) -> RunConfig:
    return RunConfig.model_validate({"env": {"id": env}, **settings})


@pytest.mark.parametrize(
    ("env", "algorithm", "name"),
    [
        ("CartPole-v1", "ppo", "CartPole-v1__ppo__3__20240102-030405"),
        ("ALE/Pong-v5", "appo", "ALE-Pong-v5__appo__3__20240102-030405"),
        ("/home/me/my envs/robot.py:make", "impala", "robot-make__impala__3__20240102-030405"),
        ("callable:<lambda>", "file.py:Mine", "callable-lambda__file-Mine__3__20240102-030405"),
    ],
)
def test_a_run_is_named_after_what_it_trains(env: str, algorithm: str, name: str) -> None:
    when = time.strptime("2024-01-02 03:04:05", "%Y-%m-%d %H:%M:%S")
    assert runs.run_name(config(env, seed=3, algorithm={"name": algorithm}), when) == name


def test_runs_that_begin_in_the_same_second_do_not_share_a_directory(tmp_path: Path) -> None:
    made = [runs.create_run(config(seed=9), tmp_path) for _ in range(4)]
    assert len(set(made)) == 4
    assert all(load_config(path / "config.yaml") == config(seed=9) for path in made)
    assert all((path / "logs").is_dir() for path in made)


def test_a_chosen_directory_is_used_once(tmp_path: Path) -> None:
    chosen = config(run_dir=str(tmp_path / "a" / "b"))
    assert runs.create_run(chosen) == (tmp_path / "a" / "b").resolve()
    with pytest.raises(ConfigError, match=r"is a run already.*resume"):
        runs.create_run(chosen)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be made.*--run-dir"):
        runs.create_run(config(run_dir=str(tmp_path / "file")))


def test_a_run_is_found_from_anything_in_it(tmp_path: Path) -> None:
    path = runs.create_run(config(), tmp_path)
    checkpoint = path / "checkpoints" / "update-000000001"
    checkpoint.mkdir(parents=True)
    for inside in (path, path / "config.yaml", path / "checkpoints", checkpoint, str(path)):
        assert runs.find_run(inside) == path
    for outside, message in [(tmp_path, "is no run"), (path / "missing", "does not exist")]:
        with pytest.raises(RunError, match=message):
            runs.find_run(outside)


def finished(root: Path, balance: bool = True) -> Path:
    """A run with a database, a result and a checkpoint."""
    path = runs.create_run(config(seed=1), root)
    with RunStore(path / "run.db") as store:
        store.set_meta("spec", {"name": "CartPole-v1"})
        store.set_meta("schema", [{"name": "reward"}])
        if balance:
            store.set_meta("ledger", {"rollouts": {"produced": 5, "trained": 4, "dropped": {}, "in_flight": 1}})
        store.metrics(2, 2048, 1.5, {"time/total_timesteps": 2048.0, "rollout/ep_rew_mean": 30.0})
        store.event("checkpoint", 2, path="update-000000002")
        store.event("restart", 2, actor=1, reason="killed")
        store.event("restart", 2, actor=0, reason="killed")
        store.dropped(0, 1, 0, "actor_died", 1, 128)
    with CheckpointDirectory(path / "checkpoints").begin(2) as staging:
        staging.write_arrays("learner", {"w": np.zeros(3)})
        staging.commit()
    ledger = {"produced": 5, "trained": 4, "dropped": {"shutdown": 1}, "in_flight": 0}
    result = {"run": str(path), "reason": "return", "env_steps": 4096, "updates": 4, "seconds": 2.5, "mean_return": 480.0}
    write_text_atomically(path / "result.json", to_json({**result, "ledger": ledger, "lag": {"mean": 0.5}}))
    return path


def test_the_balance_is_that_of_the_database_which_says_more_than_the_result(tmp_path: Path) -> None:
    assert runs.show(finished(tmp_path))["ledger"]["rollouts"]["in_flight"] == 1


def test_a_finished_run_is_shown_with_its_result_ledger_lag_and_faults(tmp_path: Path) -> None:
    path = finished(tmp_path, balance=False)
    shown = runs.show(path)
    assert (shown["run"], shown["status"], shown["process"]) == (str(path), "return", None)
    assert shown["configuration"]["env"]["id"] == "CartPole-v1"
    assert (shown["environment"], shown["schema"]) == ({"name": "CartPole-v1"}, [{"name": "reward"}])
    assert (shown["results"]["mean_return"], shown["ledger"]["dropped"], shown["lag"]) == (480.0, {"shutdown": 1}, {"mean": 0.5})
    assert shown["faults"]["counts"] == {"restart": 2}
    assert [fault["actor"] for fault in shown["faults"]["newest"]] == [1, 0]
    assert shown["dropped"] == {"actor_died": 1}
    assert (shown["checkpoint"]["update"], shown["warnings"]) == (2, [])


def test_a_living_run_is_shown_from_its_database(tmp_path: Path) -> None:
    path = finished(tmp_path)  # and resumed
    with lock_run(path) as _:
        shown = runs.show(path)
        assert (shown["status"], shown["process"] is not None) == ("running", True)
        assert shown["results"] == {"env_steps": 2048, "updates": 2, "seconds": 1.5, "mean_return": 30.0}
        assert shown["ledger"]["rollouts"]["in_flight"] == 1
        assert runs.list_runs(tmp_path)[0]["status"] == "running"
    assert runs.list_runs(tmp_path)[0]["status"] == "return"


def test_every_run_of_a_directory_is_listed_also_those_that_died_or_are_damaged(tmp_path: Path) -> None:
    path = finished(tmp_path)
    died = runs.create_run(config("Acrobot-v1", seed=2), tmp_path)
    (died / "result.json").write_text("{ torn")
    damaged = runs.create_run(config(), tmp_path)
    (damaged / "config.yaml").write_text("]")
    (tmp_path / "no run").mkdir()
    rows = {row["run"]: row for row in runs.list_runs(tmp_path)}
    assert set(rows) == {path.name, died.name, damaged.name}
    assert rows[path.name] == {
        "run": path.name, "env": "CartPole-v1", "algorithm": "ppo", "seed": 1, "status": "return",
        "env_steps": 4096, "updates": 4, "seconds": 2.5, "mean_return": 480.0,
    }  # fmt: skip
    assert (rows[died.name]["env"], rows[died.name]["status"], rows[died.name]["env_steps"]) == ("Acrobot-v1", "stopped", None)
    assert rows[damaged.name]["status"] == "damaged"
    with pytest.raises(RunError, match="no directory"):
        runs.list_runs(tmp_path / "missing")


def test_a_run_without_database_or_whole_checkpoint_is_shown_with_warnings(tmp_path: Path) -> None:
    path = finished(tmp_path)
    (path / "run.db").unlink()
    (path / "checkpoints" / "update-000000002" / "learner.safetensors").write_bytes(b"")
    shown = runs.show(path)
    assert shown["results"]["mean_return"] == 480.0
    assert shown["checkpoint"] is None
    assert len(shown["warnings"]) == 2
    assert "run.db" in shown["warnings"][0]
    assert "no whole checkpoint" in shown["warnings"][1]


def test_reading_runs_brings_no_torch(tmp_path: Path) -> None:
    source = str(Path(runs.__file__).parents[1])
    code = "import sys; import shoal.runs; sys.exit('torch' in sys.modules or 'gymnasium' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}, check=False).returncode == 0


def test_what_crossed_the_network_is_shown_of_a_run_on_a_cluster_and_of_no_other(tmp_path: Path) -> None:
    path = finished(tmp_path)
    assert runs.show(path)["network"] is None
    network = {"messages": 3, "nodes": {}}
    result = runs.read_result(path)
    write_text_atomically(path / "result.json", to_json({**result, "network": network}))
    shown = runs.show(path)
    assert shown["network"] == network
    assert "network" not in shown["results"]


def test_a_replay_is_shown_as_the_database_has_it_or_else_the_result_and_beside_it(tmp_path: Path) -> None:
    path = finished(tmp_path)
    assert runs.show(path)["replay"] is None
    result = runs.read_result(path)
    write_text_atomically(path / "result.json", to_json({**result, "replay": {"steps": 5}}))
    shown = runs.show(path)
    assert shown["replay"] == {"steps": 5}
    assert "replay" not in shown["results"]
    with RunStore(path / "run.db") as store:
        store.set_meta("replay", {"steps": 7})
    with lock_run(path) as _:  # and resumed
        assert runs.show(path)["replay"] == {"steps": 7}
    with RunStore(path / "run.db") as store:
        store.set_meta("replay", {})  # of what learns from none
    write_text_atomically(path / "result.json", to_json(result))
    assert runs.show(path)["replay"] is None
