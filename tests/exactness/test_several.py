"""Several learners: one that is lost costs no update that was told, and whatever happens, the weights are those of the same run without it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from commands import answer_here
from faults.living import TINY, living, saved, updates_of
from shoal.supervision.injector import roles_below

from . import test_sync
from .harness import (
    HERE,
    SAVING,
    SEVERAL,
    TASKS,
    TIMEOUT_SECONDS,
    Killer,
    Outcome,
    alone,
    assert_replayed,
    balanced,
    noticed_deaths,
    reference,
    refused,
    start,
    train,
    train_through_kills,
)

UPDATES = test_sync.UPDATES["learners"]
REPLAYED = 12  # updates of what learns from replays: its capacity is reached in the eighth
replays = pytest.mark.parametrize("task", SEVERAL)
APPO = [
    "CartPole-v1", "--preset", "none", "--algorithm", "appo", "--algorithm.epochs", "2", "--algorithm.minibatch-size", "128",
    "--sampling.groups", "4", "--sampling.group-size", "4", "--sampling.rollout-length", "24", *SAVING, "--learners", "2", "--actors", "2",
]  # fmt: skip


def arguments(*more: str, actors: int = 2) -> list[str]:
    return [*TASKS["learners"], "--stop.updates", str(UPDATES), "--actors", str(actors), *more]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    with sqlite3.connect(run / "run.db") as connection:
        return [json.loads(row[0]) for row in connection.execute("SELECT json FROM events WHERE kind = ? ORDER BY rowid", (kind,))]


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_costs_no_update_and_no_rollout(victim: int, tmp_path: Path, shared: Path) -> None:
    killer = Killer.of(f"shoal:learner-{victim}", 3, UPDATES, seed=42 + victim)  # after the first update: before it nothing is kept
    outcome = train(arguments(), tmp_path / "run", killer)
    assert outcome.sha == reference("learners", UPDATES, shared).sha
    assert outcome.noticed == outcome.sent > 1
    assert set(noticed_deaths(tmp_path / "run")) == {f"learner-{victim}"}
    assert outcome.result["ledger"]["dropped"] == {}
    assert events(tmp_path / "run", "rolled_back") == []
    back = events(tmp_path / "run", "recovered")
    assert {(event["role"], event["index"]) for event in back} == {("learner", victim)}
    assert 1 <= len(back) <= outcome.sent  # one that is killed again before it is back comes back once


def test_all_that_are_killed_at_once_cost_nothing_either(tmp_path: Path, shared: Path) -> None:
    killer = Killer.of("shoal:learner", 2, UPDATES, seed=42)
    killer.together = True
    outcome = train(arguments(), tmp_path / "run", killer)
    assert outcome.sha == reference("learners", UPDATES, shared).sha
    assert events(tmp_path / "run", "rolled_back") == []


def test_weights_depend_on_the_number_of_learners_and_a_run_keeps_it(tmp_path: Path, shared: Path) -> None:
    run = tmp_path / "run"
    first = train([*arguments("--learners", "3"), "--stop.updates", "6"], run)
    assert first.sha != reference("learners", 6, shared).sha
    said = refused("resume", str(run), "--learners", "2", "--stop.updates", "8")
    assert "learners was 3 when the run began and cannot become 2" in said
    resumed = answer_here("resume", str(run), "--stop.updates", "8", "--actors", "1")
    straight = alone([*arguments("--learners", "3"), "--stop.updates", "8"], tmp_path / "straight")
    assert resumed["weights_sha256"] == straight.sha
    assert_replayed(run)


def test_an_async_run_whose_learners_are_killed_loses_nothing_and_is_replayed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    killer = Killer.of("shoal:learner", 3, 24, seed=44)
    outcome = train([*APPO, "--stop.updates", "24"], run, killer)
    assert "rolled_back" not in outcome.result["ledger"]["dropped"]
    assert events(run, "rolled_back") == []
    assert outcome.result["lag"]["max"] <= 4
    assert_replayed(run)


def test_an_async_run_with_several_learners_that_is_killed_and_resumed_is_replayed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_through_kills([*APPO, "--stop.updates", "24"], run, 2, 24, seed=45)
    assert_replayed(run)


def test_weights_that_are_no_longer_the_same_end_the_run_and_name_the_learners(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    algorithm = f"{HERE / 'drifting.py'}:Drifting"
    process = start(["train", *arguments(actors=1), "--algorithm", algorithm, "--run-dir", str(tmp_path / "run")], log)
    assert process.wait(TIMEOUT_SECONDS) == 1
    said = log.read_text()
    assert "after update 10 the learners do not hold the same weights (learner-0 " in said
    assert ", learner-1 " in said


def replayed(task: str, actors: int) -> list[str]:
    return [*SEVERAL[task], "--stop.updates", str(REPLAYED), "--actors", str(actors)]


def assert_same(outcome: Outcome, task: str, shared: Path) -> None:
    expected = reference(task, REPLAYED, shared)
    assert outcome.sha == expected.sha
    for name in ("replayed", "evicted"):
        assert outcome.result["ledger"][name] == expected.result["ledger"][name] > 0


@replays
def test_replays_of_several_are_the_same_with_three_actors_as_in_one_process(task: str, tmp_path: Path, shared: Path) -> None:
    outcome = train(replayed(task, 3), tmp_path / "run")  # those below have two
    assert_same(outcome, task, shared)
    assert outcome.result["ledger"]["dropped"] == {}


@replays
def test_a_learner_that_is_killed_leaves_its_replay_to_the_next(task: str, tmp_path: Path, shared: Path) -> None:
    killer = Killer.of("shoal:learner", 3, REPLAYED, seed=52)
    outcome = train(replayed(task, 2), tmp_path / "run", killer)
    assert_same(outcome, task, shared)
    assert outcome.noticed == outcome.sent > 1
    assert outcome.result["ledger"]["dropped"] == {}
    assert events(tmp_path / "run", "rolled_back") == []
    back = events(tmp_path / "run", "recovered")
    assert {event["role"] for event in back} == {"learner"}
    assert 1 <= len(back) <= outcome.sent  # who is killed again before he is back comes back once
    assert all(0 <= event["ready_seconds"] <= event["seconds"] for event in back)  # the update that is made again comes after


@replays
def test_replays_of_several_are_the_same_after_a_kill_of_the_whole_run(task: str, tmp_path: Path, shared: Path) -> None:
    assert_same(train_through_kills(replayed(task, 2), tmp_path / "run", 1, REPLAYED, seed=56), task, shared)
    assert {path.name for path in (tmp_path / "run").glob("checkpoints/*/replay/*")} == {"0-of-2", "1-of-2"}


def test_an_async_run_with_replays_of_several_is_replayed_and_keeps_its_number(tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = [*SEVERAL["dqn, two learners"], "--mode", "async", "--actors", "2", "--stop.updates", "14"]
    outcome = train(args, run, Killer.of("shoal:learner", 2, 14, seed=48))
    assert events(run, "rolled_back") == []
    assert "rolled_back" not in outcome.result["ledger"]["dropped"]
    assert_replayed(run)
    said = refused("resume", str(run), "--learners", "1", "--stop.updates", "30")
    assert "learners was 2 when the run began and cannot become 1" in said


def small(*more: str) -> list[str]:
    return ["CartPole-v1", *TINY, "--learners", "2", "--actors", "1", "--run-dir", "run", "--json", *more]


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_stopped_is_missed_and_made_anew(victim: int, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with living("train", *small("--stop.updates", "1000000"), cwd=tmp_path) as run:
        run.until(lambda: saved(run_dir), "checkpoint")
        run.until(lambda: len(roles_below(run.process.pid)) == 3, "roles")
        os.kill(roles_below(run.process.pid)["learner", victim], signal.SIGSTOP)
        run.until(lambda: events(run_dir, "recovered"), "recovery")
        assert [(event["role"], event["index"], event["reason"]) for event in events(run_dir, "killed")] == [
            ("learner", victim, "was stopped")
        ]
        assert events(run_dir, "rolled_back") == []


def test_ctrl_c_ends_all_of_them_and_in_an_update_too(tmp_path: Path) -> None:
    slow = ["--algorithm", f"{HERE / 'drifting.py'}:Slow"]
    for more in ([], slow):
        with living("train", *small("--stop.updates", "1000000", *more), cwd=tmp_path, mark=f"run{len(more)}") as run:
            run.until(lambda: saved(tmp_path / "run"), "checkpoint")
            run.until(lambda: updates_of(tmp_path / "run") > 0, "update")  # and the next is under way, where it takes its time
            run.process.send_signal(signal.SIGINT)
            assert run.ends() == 130
            run.gone()
            assert run.process.stdout is not None
            result = json.loads(run.process.stdout.read())
            assert result["reason"] == "interrupted"
            balanced(result)
        (tmp_path / "run").rename(tmp_path / f"run{len(more)}")


def test_numbers_that_are_not_finite_are_mended_once_and_then_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "huge.py").write_text(
        "import gymnasium\ndef make():\n    return gymnasium.wrappers.TransformReward(gymnasium.make('CartPole-v1'), lambda reward: 1e30)\n"
    )
    command = ["train", "huge.py:make", *TINY, "--learners", "2", "--actors", "1", "--stop.updates", "40"]
    with living(*command, cwd=tmp_path) as run:
        assert run.ends() == 4
        assert "Going back to the last good checkpoint, once" in run.said
        assert "died" not in run.said


def test_one_that_dies_again_and_again_before_it_has_met_the_others_ends_the_run(tmp_path: Path) -> None:
    with living("train", *small("--stop.updates", "1000000"), cwd=tmp_path) as run:
        killed: set[int] = set()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while run.process.poll() is None and time.monotonic() < deadline:
            pid = roles_below(run.process.pid).get(("learner", 1))
            if pid is not None and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.002)
        assert run.ends() == 1
        assert "the learner died 5 times without an update in between, the last killed by SIGKILL" in run.said
        run.gone()
