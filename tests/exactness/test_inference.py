"""A server that chooses the actions of all actors leaves what is promised: exact in sync mode, accounted for in async mode, through every death."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from .harness import PPO, SAMPLING, SAVING, TASKS, TIMEOUT_SECONDS, Killer, Outcome, made_once, shoal, start, train

UPDATES = 20
SERVER = ["--policy.inference", "server", "--device", "cpu"]
TASK = {"images": [*TASKS["images"], *SERVER], "dict": [*TASKS["dict"], *SERVER, "--policy.memory", "gru"]}
KILLS = {"actor": 3, "inference": 3, "learner": 2}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    with sqlite3.connect(run / "run.db") as connection:
        return [json.loads(row[0]) for row in connection.execute("SELECT json FROM events WHERE kind = ?", (kind,))]


@pytest.fixture
def alone(shared: Path) -> Outcome:
    return made_once(f"served-{UPDATES}", [*TASK["dict"], "--stop.updates", str(UPDATES)], shared)


def test_weights_do_not_depend_on_the_number_of_actors(alone: Outcome, tmp_path: Path) -> None:
    """One here; two of them live through the kills below."""
    found = train([*TASK["dict"], "--stop.updates", str(UPDATES), "--actors", "1"], tmp_path / "run")
    assert found.sha == alone.sha
    assert found.result["restarts"] == 0


@pytest.mark.parametrize("role", KILLS)
def test_weights_do_not_depend_on_kills(role: str, alone: Outcome, tmp_path: Path) -> None:
    killer = Killer.of(f"shoal:{role}", KILLS[role], UPDATES, seed=41)
    found = train([*TASK["dict"], "--stop.updates", str(UPDATES), "--actors", "2"], tmp_path / "run", killer)
    assert found.sha == alone.sha
    if role == "inference":
        back = [e for e in events(tmp_path / "run", "recovered") if e["role"] == "inference"]
        assert back
        assert all(e["after"] == "killed by SIGKILL" and 0 <= e["ready_seconds"] <= e["seconds"] for e in back)


def test_images_that_are_chosen_for_by_a_server_are_resumed_and_replayed(tmp_path: Path) -> None:
    ends = [*TASK["images"], "--stop.updates"]
    whole = train([*ends, "8", "--actors", "2"], tmp_path / "whole")
    half = train([*ends, "4", "--actors", "1"], tmp_path / "half")
    resumed = shoal("resume", str(tmp_path / "half"), "--stop.updates", "8", log=tmp_path / "resumed.log")
    assert half.sha != whole.sha
    assert Outcome(resumed).sha == whole.sha
    assert shoal("replay", str(tmp_path / "whole"), log=tmp_path / "replay.log")["equal"] is True


def test_the_choice_is_part_of_a_run_and_on_a_processor_it_falls_on_the_actors(tmp_path: Path) -> None:
    train(["CartPole-v1", *PPO, "--stop.updates", "1", "--actors", "1", "--device", "cpu"], tmp_path / "run")
    assert "inference: actor" in (tmp_path / "run" / "config.yaml").read_text()
    process = start(["resume", str(tmp_path / "run"), "--stop.updates", "2", "--policy.inference", "server"], tmp_path / "resume.log")
    assert process.wait(TIMEOUT_SECONDS) == 2
    assert "policy.inference was actor when the run began" in (tmp_path / "resume.log").read_text()


def test_an_async_run_balances_and_keeps_its_lag_while_its_server_is_killed(tmp_path: Path) -> None:
    algorithm = ["CartPole-v1", *SAMPLING, *SAVING, "--algorithm", "impala", "--max-policy-lag", "3", *SERVER]
    killers = [Killer.of("shoal:inference", 3, 40, seed=42), Killer.of("shoal:actor", 2, 40, seed=43)]
    found = train([*algorithm, "--stop.updates", "40", "--actors", "3"], tmp_path / "run", *killers)
    assert found.result["updates"] == 40
    assert found.result["lag"]["max"] <= 3
    process = start(["replay", str(tmp_path / "run")], tmp_path / "replay.log")
    assert process.wait(TIMEOUT_SECONDS) != 0
    said = (tmp_path / "replay.log").read_text()
    assert "cannot be replayed: its actions were chosen for all who had asked together" in said
    assert "Traceback" not in said
