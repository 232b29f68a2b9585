"""Sync training gives the same weights, bit for bit, wherever its groups live and whoever is killed on the way."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import answer_here, said_here

from .harness import HERE, TASKS, TIMEOUT_SECONDS, Killer, Outcome, alone, balanced, reference, refused, start, train, train_through_kills
from .recording import DEATHS

UPDATES = {
    "cartpole": 14, "images": 12, "dict": 12, "dqn": 14, "sac": 12, "td3": 12, "r2d2": 12, "memory": 12, "learners": 12,
}  # fmt: skip
LONG = {
    "cartpole": 160, "images": 80, "dict": 120, "dqn": 120, "sac": 80, "discrete-sac": 80, "td3": 80, "r2d2": 80, "memory": 120, "learners": 120,
}  # fmt: skip
APART = ("dict", "r2d2")  # PPO, and a replay with memory: one thing happens to a run at a time; of dqn and sac in test_several.py, too
# They go the same ways, with another environment, form or network. Discrete actions of sac are in tests/contracts, and killed in the soak.
AT_ONCE = [task for task in TASKS if task not in (*APART, "discrete-sac")]
tasks, apart = pytest.mark.parametrize("task", TASKS), pytest.mark.parametrize("task", APART)
Soaked = Callable[..., None]


def arguments(task: str, updates: int, actors: int) -> list[str]:
    return [*TASKS[task], "--stop.updates", str(updates), "--actors", str(actors)]


def assert_same(outcome: Outcome, task: str, updates: int, shared: Path) -> None:
    expected = reference(task, updates, shared)
    assert outcome.result["updates"] == updates
    assert outcome.sha == expected.sha
    assert outcome.result["mean_return"] == expected.result["mean_return"]
    for consumed in ("trained", "replayed", "evicted"):
        assert outcome.result["ledger"].get(consumed) == expected.result["ledger"].get(consumed)


@pytest.mark.parametrize(("task", "actors"), [("dict", 4), ("r2d2", 1)])  # two of them, and four, are killed in the tests below
def test_weights_do_not_depend_on_the_number_of_actors(task: str, actors: int, tmp_path: Path, shared: Path) -> None:
    outcome = train(arguments(task, UPDATES[task], actors), tmp_path / "run")
    assert_same(outcome, task, UPDATES[task], shared)
    assert outcome.result["ledger"]["dropped"] == {}


@apart
def test_weights_do_not_depend_on_killed_actors(task: str, tmp_path: Path, shared: Path) -> None:
    killer = Killer.of("shoal:actor", 5, UPDATES[task], seed=1)
    assert_same(train(arguments(task, UPDATES[task], 2), tmp_path / "run", killer), task, UPDATES[task], shared)


@apart
def test_weights_do_not_depend_on_a_killed_learner(task: str, tmp_path: Path, shared: Path) -> None:
    killer = Killer.of("shoal:learner", 3, UPDATES[task], seed=2)
    assert_same(train(arguments(task, UPDATES[task], 2), tmp_path / "run", killer), task, UPDATES[task], shared)


@apart
def test_weights_do_not_depend_on_kills_of_the_whole_run(task: str, tmp_path: Path, shared: Path) -> None:
    outcome = train_through_kills(arguments(task, UPDATES[task], 2), tmp_path / "run", 2, UPDATES[task], seed=3)
    assert_same(outcome, task, UPDATES[task], shared)


@pytest.mark.parametrize("task", AT_ONCE)
def test_weights_do_not_depend_on_four_actors_kills_of_them_of_the_learner_and_of_the_whole_run(
    task: str, tmp_path: Path, shared: Path
) -> None:
    killers = (Killer.of("shoal:actor", 2, UPDATES[task], seed=7), Killer.of("shoal:learner", 1, UPDATES[task], seed=8))
    outcome = train_through_kills(arguments(task, UPDATES[task], 4), tmp_path / "run", 1, UPDATES[task], seed=9, killers=killers)
    assert_same(outcome, task, UPDATES[task], shared)


def dying(directory: Path, updates: int, *deaths: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a run on CartPole whose learner, or supervisor, dies inside those saves."""
    for death in deaths:
        (directory / death).parent.mkdir(exist_ok=True)
        (directory / death).touch()
    return [*arguments("cartpole", updates, 2), "--algorithm", f"{HERE / 'recording.py'}:DyingPPO"], {DEATHS: str(directory)}


def test_weights_do_not_depend_on_a_learner_that_is_killed_inside_saves_the_last_one_included(tmp_path: Path, shared: Path) -> None:
    updates = UPDATES["cartpole"]
    args, env = dying(tmp_path / "deaths", updates, "LEARNER-6", f"LEARNER-{updates}")
    outcome = train(args, tmp_path / "run", env=env)
    assert outcome.noticed == 2
    assert_same(outcome, "cartpole", updates, shared)


def test_weights_do_not_depend_on_a_run_that_is_killed_inside_saves_the_last_one_included(tmp_path: Path, shared: Path) -> None:
    updates, run = UPDATES["cartpole"], tmp_path / "run"
    args, env = dying(tmp_path / "deaths", updates, "RUN-8", f"RUN-{updates}")
    for command in (["train", *args, "--run-dir", str(run)], ["resume", str(run)]):
        process = start(command, run.with_suffix(".log"), env)
        assert process.wait(TIMEOUT_SECONDS) == -signal.SIGKILL
    for _ in range(2):  # the second time nothing is left to be done
        result = answer_here("resume", str(run), env=env)
        balanced(result)
        assert_same(Outcome(result), "cartpole", updates, shared)


def test_weights_do_not_depend_on_the_learner_and_actors_that_are_killed_at_once(tmp_path: Path, shared: Path) -> None:
    killer = Killer.of("shoal:", 3, UPDATES["cartpole"], seed=4)
    killer.together = True
    assert_same(train(arguments("cartpole", UPDATES["cartpole"], 2), tmp_path / "run", killer), "cartpole", UPDATES["cartpole"], shared)


def test_a_resume_without_the_replay_says_what_that_costs_and_goes_on(tmp_path: Path) -> None:
    run, args = tmp_path / "run", [*TASKS["dqn"], "--checkpoint.replay", "false", "--actors", "1"]
    first = answer_here("train", *args, "--stop.updates", "6", "--run-dir", str(run))
    said = said_here("resume", str(run), "--stop.updates", "12", "--json")
    resumed = json.loads(said.out)
    assert "the checkpoint of update 6 holds no replay (checkpoint.replay false)" in said.err
    assert resumed["weights_sha256"] != first["weights_sha256"]
    assert resumed["ledger"]["replayed"] == 12 * 4 * 4 * 24
    assert resumed["ledger"]["evicted"] >= 6 * 4 * 4 * 24  # all that was lost
    balanced(resumed)
    (refusal,) = refused("replay", str(run), code=1).strip().splitlines()
    assert "from a checkpoint without the replay that it learns from (checkpoint.replay false)" in refusal


def test_another_seed_gives_other_weights(tmp_path: Path, shared: Path) -> None:
    outcome = alone([*arguments("cartpole", UPDATES["cartpole"], 0), "--seed", "1"], tmp_path / "run")
    assert outcome.sha != reference("cartpole", UPDATES["cartpole"], shared).sha


# ---- soak ------------------------------------------------------------------------------------------------------------
@pytest.mark.soak
@tasks
@pytest.mark.parametrize(("actors", "seed"), [(2, 10), (4, 11)])
def test_soak_kills_of_actors(actors: int, seed: int, task: str, tmp_path: Path, shared: Path, soaked: Soaked) -> None:
    killer = Killer.of("shoal:actor", 20, LONG[task], seed)
    outcome = train(arguments(task, LONG[task], actors), tmp_path / "run", killer)
    assert_same(outcome, task, LONG[task], shared)
    soaked(what="actors", task=task, mode="sync", kills=outcome.noticed, ledger=outcome.result["ledger"])


@pytest.mark.soak
@tasks
def test_soak_kills_of_the_learner(task: str, tmp_path: Path, shared: Path, soaked: Soaked) -> None:
    killer = Killer.of("shoal:learner", 9, LONG[task], seed=12)
    outcome = train(arguments(task, LONG[task], 2), tmp_path / "run", killer)
    assert_same(outcome, task, LONG[task], shared)
    soaked(what="the learner", task=task, mode="sync", kills=outcome.noticed, ledger=outcome.result["ledger"])


@pytest.mark.soak
@tasks
def test_soak_kills_of_whole_runs(task: str, tmp_path: Path, shared: Path, soaked: Soaked) -> None:
    args = [*arguments(task, LONG[task], 2), "--checkpoint.every-updates", "1"]
    outcome = train_through_kills(args, tmp_path / "run", 18, LONG[task], seed=13)
    assert_same(outcome, task, LONG[task], shared)
    ledger = outcome.result["ledger"]
    soaked(what="whole runs", task=task, mode="sync", kills=outcome.sent, saves_hit=outcome.saves_hit, ledger=ledger)


@pytest.mark.soak
@tasks
def test_soak_kills_of_actors_and_the_learner_in_one_run(task: str, tmp_path: Path, shared: Path, soaked: Soaked) -> None:
    killers = [Killer.of("shoal:actor", 8, LONG[task], seed=14), Killer.of("shoal:learner", 4, LONG[task], seed=15)]
    outcome = train(arguments(task, LONG[task], 4), tmp_path / "run", *killers)
    assert_same(outcome, task, LONG[task], shared)
    soaked(what="actors and the learner", task=task, mode="sync", kills=outcome.noticed, ledger=outcome.result["ledger"])
