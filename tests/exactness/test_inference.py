"""A server that chooses the actions of all actors leaves what is promised: exact in sync mode, accounted for in async mode, through every death."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from commands import answer_here

from .harness import PPO, SAMPLING, SAVING, TASKS, Killer, Outcome, alone, assert_replayed, made_once, refused, train

UPDATES = 12
SERVER = ["--policy.inference", "server", "--device", "cpu"]
TASK = {"images": [*TASKS["images"], *SERVER], "dict": [*TASKS["dict"], *SERVER, "--policy.memory", "gru"]}
KILLS = {"actor": 3, "inference": 3, "learner": 2}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    with sqlite3.connect(run / "run.db") as connection:
        return [json.loads(row[0]) for row in connection.execute("SELECT json FROM events WHERE kind = ?", (kind,))]


@pytest.fixture
def expected(shared: Path) -> Outcome:
    return made_once(f"served-{UPDATES}", [*TASK["dict"], "--stop.updates", str(UPDATES)], shared)


def test_weights_do_not_depend_on_the_number_of_actors(expected: Outcome, tmp_path: Path) -> None:
    """One here; two of them live through the kills below."""
    found = train([*TASK["dict"], "--stop.updates", str(UPDATES), "--actors", "1"], tmp_path / "run")
    assert found.sha == expected.sha
    assert found.result["restarts"] == 0


@pytest.mark.parametrize("role", KILLS)
def test_weights_do_not_depend_on_kills(role: str, expected: Outcome, tmp_path: Path) -> None:
    killer = Killer.of(f"shoal:{role}", KILLS[role], UPDATES, seed=41)
    found = train([*TASK["dict"], "--stop.updates", str(UPDATES), "--actors", "2"], tmp_path / "run", killer)
    assert found.sha == expected.sha
    if role == "inference":
        back = [e for e in events(tmp_path / "run", "recovered") if e["role"] == "inference"]
        assert back
        assert all(e["after"] == "killed by SIGKILL" and 0 <= e["ready_seconds"] <= e["seconds"] for e in back)


def test_images_that_are_chosen_for_by_a_server_are_resumed_and_replayed(tmp_path: Path) -> None:
    ends = [*TASK["images"], "--stop.updates"]
    whole = alone([*ends, "8"], tmp_path / "whole")
    half = train([*ends, "4", "--actors", "2"], tmp_path / "half")
    resumed = answer_here("resume", str(tmp_path / "half"), "--stop.updates", "8")
    assert half.sha != whole.sha
    assert Outcome(resumed).sha == whole.sha
    assert_replayed(tmp_path / "half")


def test_the_choice_is_part_of_a_run_and_on_a_processor_it_falls_on_the_actors(tmp_path: Path) -> None:
    train(["CartPole-v1", *PPO, "--stop.updates", "1", "--actors", "1", "--device", "cpu"], tmp_path / "run")
    assert "inference: actor" in (tmp_path / "run" / "config.yaml").read_text()
    said = refused("resume", str(tmp_path / "run"), "--stop.updates", "2", "--policy.inference", "server")
    assert "policy.inference was actor when the run began" in said


def test_an_async_run_balances_and_keeps_its_lag_while_its_server_is_killed(tmp_path: Path) -> None:
    algorithm = ["CartPole-v1", *SAMPLING, *SAVING, "--algorithm", "impala", "--max-policy-lag", "3", *SERVER]
    killers = [Killer.of("shoal:inference", 3, 24, seed=42), Killer.of("shoal:actor", 2, 24, seed=43)]
    found = train([*algorithm, "--stop.updates", "24", "--actors", "3"], tmp_path / "run", *killers)
    assert found.result["updates"] == 24
    assert found.result["lag"]["max"] <= 3
    assert "cannot be replayed: its actions were chosen for all who had asked together" in refused("replay", str(tmp_path / "run"), code=1)
