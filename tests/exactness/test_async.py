"""Async training accounts for every observation: what environments stamped, what was trained, and what the ledger says are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from commands import answer_here
from shoal.streams import episode_seed

from .environments import STAMPS, Stamps, stamps_stepped
from .harness import HERE, SAVING, Killer, Outcome, groups_of, shoal, train, train_through_kills
from .recording import RECORD, trained_in

ALGORITHM = ["--algorithm", f"{HERE / 'recording.py'}:RecordingAPPO", "--algorithm.epochs", "1"]
SMALL = ["--sampling.groups", "4", "--sampling.group-size", "4", "--sampling.rollout-length", "24", *SAVING]
UPDATES = 24
DROPPED_FOR_GOOD = {"over_lag", "invalid", "shutdown"}  # other rollouts that were dropped are made again, under the same stamps
Soaked = Callable[..., None]


@dataclass
class Recorded:
    """A run on stamped observations, and where its environments and its algorithm wrote them down."""

    run: Path
    stamps: Path
    record: Path

    @classmethod
    def in_(cls, directory: Path) -> Recorded:
        found = cls(directory / "run", directory / "stamps", directory / "record")
        for path in (found.stamps, found.record):
            path.mkdir(parents=True)
        return found

    @property
    def env(self) -> dict[str, str]:
        return {STAMPS: str(self.stamps), RECORD: str(self.record)}

    def arguments(self, *more: str, updates: int = UPDATES, actors: int = 2) -> list[str]:
        ends = ["--stop.updates", str(updates), "--actors", str(actors), "--preset", "none", "--mode", "async", *more]
        return [f"{HERE / 'environments.py'}:Stamps", *ALGORITHM, *ends]

    def replay(self, directory: Path, *, apart: bool = False) -> tuple[dict[str, object], Recorded]:
        """`shoal replay`, recorded in `directory`. apart: in a process of its own."""
        again = Recorded(self.run, directory / "stamps", directory / "record")
        for path in (again.stamps, again.record):
            path.mkdir(parents=True)
        if apart:
            return shoal("replay", str(self.run), log=directory / "replay.log", env=again.env), again
        return answer_here("replay", str(self.run), env=again.env), again


def assert_no_duplicate(stamps: np.ndarray[tuple[int], np.dtype[np.void]]) -> None:
    values, counts = np.unique(stamps, return_counts=True)
    assert (counts == 1).all(), f"trained more than once: {values[counts > 1][:5]}"


def assert_accounted_for(recorded: Recorded, outcome: Outcome, bound: int = 4, *, whole: bool = True) -> None:
    """The two sets against the ledger's figures.

    whole: the ledger saw everything that was stepped (a run that was killed as a whole has forgotten what came after its checkpoint).
    """
    ledger, lag = outcome.result["ledger"], outcome.result["lag"]
    updates = trained_in(recorded.record)
    assert len(updates) == outcome.result["updates"]
    trained = np.concatenate(updates)
    stepped = np.unique(stamps_stepped(recorded.stamps))
    assert_no_duplicate(trained["stamp"])
    assert len(trained) == ledger["trained"]
    assert np.isin(trained["stamp"], stepped).all()
    assert trained["lag"].min() >= 0
    assert trained["lag"].max() == lag["max"] <= bound
    if whole:
        for_good = sum(steps for reason, steps in ledger["dropped"].items() if reason in DROPPED_FOR_GOOD)
        assert len(stepped) == ledger["trained"] + for_good
    assert_streams_have_no_gap(trained["stamp"], outcome, recorded.run)


def assert_streams_have_no_gap(trained: np.ndarray[tuple[int], np.dtype[np.void]], outcome: Outcome, run: Path) -> None:
    """Each environment trained the beginning of its own stream of stamps, as long as its group's ledger says, but for what was too old."""
    seen = {tuple(stamp) for stamp in trained.tolist()}
    for group, account in groups_of(run).items():
        steps = account["steps"]
        wanted, size = steps.get("trained", 0), _group_size(run)
        rows = (wanted + steps.get("over_lag", 0)) // size
        stream = [stamp for env in range(size) for stamp in _stream(group, env, rows, seen)]
        assert len(stream) == wanted
        seen.difference_update(stream)
    assert not seen, f"stamps that belong to no group: {list(seen)[:5]}"


def _group_size(run: Path) -> int:
    from shoal.settings import load_config

    return load_config(run / "config.yaml").sampling.group_size or 0


def _stream(group: int, env: int, at_most: int, seen: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """The stamps among the first `at_most` of an environment's stream that were trained."""
    environment, out, place = Stamps(), [], 0
    for episode in count():
        environment.reset(seed=episode_seed(0, group, env, episode))
        for step in range(environment._length):
            if place == at_most:
                return out
            place += 1
            if (environment._seed, step) in seen:
                out.append((environment._seed, step))
    return out


def assert_replayed(recorded: Recorded, directory: Path, *, apart: bool = False) -> None:
    """`shoal replay` ends with the same weights, and its algorithm saw the same stamps in the same order."""
    answered, again = recorded.replay(directory, apart=apart)
    assert answered["equal"] is True
    assert answered["weights_sha256"] == answered["expected_sha256"]
    for update, (was, now) in enumerate(zip(trained_in(recorded.record), trained_in(again.record), strict=True)):
        assert np.array_equal(was, now), f"update {update}"


def test_every_stamp_is_trained_or_accounted_for_at_the_defaults(tmp_path: Path) -> None:
    recorded = Recorded.in_(tmp_path)
    outcome = train(recorded.arguments(updates=40), recorded.run, env=recorded.env)
    assert_accounted_for(recorded, outcome)
    assert outcome.noticed == 0
    assert len(stamps_stepped(recorded.stamps)) == outcome.result["ledger"]["produced"]
    assert_fair(outcome, recorded.run)


def assert_fair(outcome: Outcome, run: Path) -> None:
    """At most 1 % was too old to be trained, and no group's share is more than a tenth off the mean of all."""
    ledger = outcome.result["ledger"]
    assert ledger["dropped"].get("over_lag", 0) <= 0.01 * ledger["produced"]
    shares = np.array([row["steps"].get("trained", 0) / row["produced_steps"] for row in groups_of(run).values()])
    assert (np.abs(shares - shares.mean()) <= 0.1 * shares.mean()).all(), shares
    assert outcome.result["lag"]["mean"] > 0


def test_every_stamp_is_trained_or_accounted_for_when_actors_are_killed(tmp_path: Path) -> None:
    recorded = Recorded.in_(tmp_path)
    killer = Killer.of("shoal:actor", 5, UPDATES, seed=21)
    outcome = train(recorded.arguments(*SMALL), recorded.run, killer, env=recorded.env)
    assert_accounted_for(recorded, outcome)
    assert_replayed(recorded, tmp_path / "again", apart=True)


def test_a_run_whose_learner_was_killed_is_accounted_for_and_replayed(tmp_path: Path) -> None:
    recorded = Recorded.in_(tmp_path)
    killer = Killer.of("shoal:learner", 3, UPDATES, seed=22)
    outcome = train(recorded.arguments(*SMALL), recorded.run, killer, env=recorded.env)
    assert_accounted_for(recorded, outcome)
    assert outcome.result["ledger"]["dropped"].get("rolled_back", 0) > 0
    assert_replayed(recorded, tmp_path / "again")


def test_a_run_with_memory_that_was_killed_and_resumed_is_accounted_for_and_replayed(tmp_path: Path) -> None:
    recorded = Recorded.in_(tmp_path)
    arguments = recorded.arguments(*SMALL, "--policy.memory", "gru")
    outcome = train_through_kills(arguments, recorded.run, 2, UPDATES, seed=23, env=recorded.env)
    assert_accounted_for(recorded, outcome, whole=False)
    assert_replayed(recorded, tmp_path / "again")


# ---- soak ------------------------------------------------------------------------------------------------------------
LONG = 240


@pytest.mark.soak
def test_soak_shares_and_lag_at_the_defaults(tmp_path: Path, soaked: Soaked) -> None:
    recorded = Recorded.in_(tmp_path)
    outcome = train(recorded.arguments(updates=200, actors=4), recorded.run, env=recorded.env)
    assert_accounted_for(recorded, outcome)
    assert_fair(outcome, recorded.run)
    soaked(what="none, at the defaults", task="stamps", mode="async", kills=0, ledger=outcome.result["ledger"], lag=outcome.result["lag"])


@pytest.mark.soak
@pytest.mark.parametrize(("role", "kills"), [("actor", 24), ("learner", 8)])
def test_soak_kills_in_async_runs(role: str, kills: int, tmp_path: Path, soaked: Soaked) -> None:
    recorded = Recorded.in_(tmp_path)
    killer = Killer.of(f"shoal:{role}", kills, LONG, seed=31)
    outcome = train(recorded.arguments(*SMALL, updates=LONG, actors=4), recorded.run, killer, env=recorded.env)
    assert_accounted_for(recorded, outcome)
    assert_replayed(recorded, tmp_path / "again")
    what = {"actor": "actors", "learner": "the learner"}[role]
    soaked(what=what, task="stamps", mode="async", kills=outcome.noticed, ledger=outcome.result["ledger"], lag=outcome.result["lag"])


@pytest.mark.soak
def test_soak_kills_of_a_whole_async_run(tmp_path: Path, soaked: Soaked) -> None:
    recorded = Recorded.in_(tmp_path)
    outcome = train_through_kills(recorded.arguments(*SMALL, updates=LONG), recorded.run, 8, LONG, seed=32, env=recorded.env)
    assert_accounted_for(recorded, outcome, whole=False)
    assert_replayed(recorded, tmp_path / "again")
    soaked(
        what="whole runs", task="stamps", mode="async", kills=outcome.sent, saves_hit=outcome.saves_hit,
        ledger=outcome.result["ledger"], lag=outcome.result["lag"],
    )  # fmt: skip
