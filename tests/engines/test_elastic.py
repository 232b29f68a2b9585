"""Runs of the local engine whose number of actors changes on the way: by the load, and by hand. In sync mode the weights are those of one process."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shoal
from rollout_fakes import Drift
from shoal.cli.control import tell_run
from shoal.engines import autoscale, ending
from shoal.errors import RunError
from shoal.monitoring.live import SilentView
from shoal.monitoring.store import RunReader
from shoal.runs import show

SLOW_ALGORITHM = f"{Path(__file__).resolve().parents[1] / 'exactness' / 'drifting.py'}:Slow"  # an update takes a fifth of a second
SMALL: dict[str, Any] = {
    "sampling": {"groups": 4, "group_size": 2, "rollout_length": 8},
    "policy": {"hidden_sizes": [8]},
    "env": {"form": "python"},
    "checkpoint": {"every_updates": 20},
    "seed": 5,
    "preset": "none",
}
PPO: dict[str, Any] = {"name": "ppo", "minibatch_size": 16, "epochs": 2}


class Dawdling(Drift):
    """Each step takes its time, in which nothing else of its process goes on."""

    def step(self, action: Any) -> Any:
        time.sleep(0.004)
        return super().step(action)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions after a second rather than ten."""
    monkeypatch.setattr(autoscale, "WINDOW_SECONDS", 0.5)
    monkeypatch.setattr(autoscale, "COOL_DOWN_SECONDS", 1.0)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An end gives up no update, however slow the machine."""
    monkeypatch.setattr(ending, "UPDATE_SECONDS", 300.0)


@pytest.fixture
def _only_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is sent away again by a learner that a busy machine slows down."""
    monkeypatch.setattr(autoscale, "SETTLED", -1.0)


def train(directory: Path, env: Any = Drift, algorithm: dict[str, Any] = PPO, **settings: Any) -> shoal.Run:
    view = SilentView(io.StringIO())
    return shoal.train(env, run_dir=str(directory), progress=view, **{**SMALL, "algorithm": algorithm, **settings})


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    with RunReader(run / "run.db") as reader:
        return list(reader.events(kind))


def until_scaled(directory: Path, times: int, more: int = 20) -> Callable[[Any], bool]:
    """A callback that lets a run go on until its number of actors changed so often, and for some updates more: how long that takes is the machine's affair."""
    last: list[int] = []

    def goes_on(facts: Any) -> bool:
        if not last and len(events(directory, "scaled")) >= times:
            last.append(facts["update"] + more)
        return not last or facts["update"] < last[0]

    return goes_on


ENDLESS = {"updates": 10**6, "seconds": 300.0}


def weights_of_one_process(directory: Path, updates: int) -> str:
    return str(train(directory / "alone", actors=0, stop={"updates": updates}).result["weights_sha256"])


@pytest.mark.usefixtures("_only_more")
def test_a_run_whose_learner_waits_has_more_actors_and_the_same_bits(tmp_path: Path) -> None:
    scaled = until_scaled(tmp_path / "run", 2)
    run = train(tmp_path / "run", Dawdling, actors=1, autoscale="1:4", stop=ENDLESS, callbacks=[scaled])
    made = events(run.path, "scaled")
    assert [event["actors"] for event in made] == [2, 4]
    assert [event["before"] for event in made] == [1, 2]
    assert all(event["autoscale"] == "1:4" and event["reason"].startswith("the learner waited for data") for event in made)
    assert all(event["learner_waits"] >= autoscale.GROW and event["window_seconds"] >= 2 * autoscale.WINDOW_SECONDS for event in made)
    ledger = run.result["ledger"]
    assert (ledger["trained"], ledger["in_flight"], ledger["dropped"]) == (ledger["produced"], 0, {})
    assert run.result["restarts"] == 0
    assert run.result["weights_sha256"] == weights_of_one_process(tmp_path, run.result["updates"])


def test_a_run_whose_actors_wait_has_fewer_and_the_same_bits_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscale, "GROW", 0.9)  # on a busy machine the learner, too, waits for a part of its time
    monkeypatch.setattr(autoscale, "SETTLED", 0.8)
    slow, scaled = {**PPO, "name": SLOW_ALGORITHM}, until_scaled(tmp_path / "run", 1)
    run = train(tmp_path / "run", algorithm=slow, actors=4, autoscale="1:4", stop=ENDLESS, callbacks=[scaled])
    made = events(run.path, "scaled")
    counts = [event["actors"] for event in made]
    assert counts in ([2], [2, 1])  # the second perhaps within the updates after the first
    assert all(event["reason"].startswith("data waited for the learner") for event in made)
    assert run.result["ledger"]["dropped"] == {}
    assert run.result["restarts"] == 0
    assert run.result["weights_sha256"] == weights_of_one_process(tmp_path, run.result["updates"])
    shown = show(run.path)["faults"]
    assert shown["counts"]["scaled"] == len(made)
    assert [event["reason"] for event in shown["newest"] if event["kind"] == "scaled"] == [event["reason"] for event in made]


@pytest.mark.usefixtures("_only_more")
def test_an_async_run_follows_its_load_stays_within_its_lag_and_can_be_replayed(tmp_path: Path) -> None:
    appo = {"name": "appo", "minibatch_size": 16, "epochs": 1}
    more = {"max_policy_lag": 2, "actors": 1, "autoscale": "1:3", "stop": ENDLESS, "callbacks": [until_scaled(tmp_path / "run", 2)]}
    run = train(tmp_path / "run", Dawdling, appo, mode="async", **more)
    assert [event["actors"] for event in events(run.path, "scaled")] == [2, 3]
    assert run.result["lag"]["max"] <= 2
    assert set(run.result["ledger"]["dropped"]) <= {"shutdown", "over_lag"}
    assert shoal.replay(run.path, env=Drift)["equal"]


@pytest.mark.usefixtures("_only_more")
def test_a_run_that_is_resumed_follows_the_load_between_its_bounds_or_others(tmp_path: Path) -> None:
    followed = until_scaled(tmp_path / "run", 1)
    run = train(tmp_path / "run", Dawdling, actors=1, autoscale="1:2", stop=ENDLESS, callbacks=[followed])
    assert [event["actors"] for event in events(run.path, "scaled")] == [2]
    view = SilentView(io.StringIO())
    followed = until_scaled(run.path, 3)
    again = shoal.resume(run.path, env=Dawdling, progress=view, stop=ENDLESS, autoscale="1:4", callbacks=[followed])
    assert again.config.autoscale == "1:4"
    assert [event["actors"] for event in events(run.path, "scaled")] == [2, 2, 4]
    assert again.result["weights_sha256"] == weights_of_one_process(tmp_path, again.result["updates"])


# ---- by hand ---------------------------------------------------------------------------------------------------------
def told(directory: Path, say: Callable[[Callable[..., dict[str, Any]]], None], **settings: Any) -> shoal.Run:
    """A run that goes on until `say`, which talks to it, is done."""
    failed: list[BaseException] = []

    def answer(**what: Any) -> dict[str, Any]:
        return tell_run(directory, "state")["state"] if not what else tell_run(directory, "scale", what)

    def talk() -> None:
        try:
            wait_for(lambda: answers(directory))
            wait_for(lambda: answer()["update"] >= 2)
            say(answer)
        except BaseException as error:
            failed.append(error)
        tell_run(directory, "stop")

    thread = threading.Thread(target=talk)
    thread.start()
    run = train(directory, stop={"updates": 10**6}, **settings)
    thread.join()
    if failed:
        raise failed[0]
    return run


def answers(directory: Path) -> bool:
    try:
        return bool(tell_run(directory, "state"))
    except RunError:  # it does not listen yet
        return False


def wait_for(true: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_number_by_hand_ends_that_the_load_is_followed_until_bounds_are_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoscale, "COOL_DOWN_SECONDS", 3600.0)  # the load decides nothing here

    def say(answer: Callable[..., dict[str, Any]]) -> None:
        assert answer()["autoscale"] == "1:4"
        assert answer(actors=3) == {"ok": True, "actors": 3}
        assert answer()["autoscale"] == ""
        wait_for(lambda: [a["state"] for a in answer()["actors"]] == ["running"] * 3)
        assert answer(autoscale="1:2") == {"ok": True, "actors": 2, "autoscale": "1:2"}
        assert (answer()["autoscale"], answer()["scaled"]) == ("1:2", "asked for: it follows the load from 1 to 2")
        wait_for(lambda: [a["state"] for a in answer()["actors"]] == ["running"] * 2 + ["stopped"])
        assert answer(autoscale="none") == {"ok": True, "actors": 2}
        for wrong, part in (
            ({"actors": 5}, "1 to 4"), ({"actors": 0}, "1 to 4"), ({"actors": "2"}, "a number"), ({"autoscale": "1:9"}, "1 to 4"),
            ({"autoscale": "3"}, "MIN:MAX"), ({"autoscale": "4:2"}, "MIN:MAX"), ({"autoscale": "1:2", "actors": 2}, "either"),
        ):  # fmt: skip
            with pytest.raises(RunError, match=part):
                answer(**wrong)

    run = told(tmp_path / "run", say, actors=2, autoscale="1:4")
    assert [(event["actors"], event["autoscale"]) for event in events(run.path, "scaled")] == [(3, ""), (2, "1:2"), (2, "")]
    assert run.result["ledger"]["in_flight"] == 0
    assert set(run.result["ledger"]["dropped"]) <= {"shutdown"}


def test_actors_that_are_sent_away_and_wanted_again_at_once_cost_nothing(tmp_path: Path) -> None:
    def say(answer: Callable[..., dict[str, Any]]) -> None:
        for actors in (1, 4) * 15:
            answer(actors=actors)
            time.sleep(0.03)
        at = answer()["update"]
        wait_for(lambda: answer()["update"] > at + 5)

    run = told(tmp_path / "run", say, actors=4)
    assert events(run.path, "died") == []
    assert set(run.result["ledger"]["dropped"]) <= {"shutdown"}
    assert run.result["weights_sha256"] == weights_of_one_process(tmp_path, run.result["updates"])


def test_groups_that_went_and_came_back_during_a_pause_go_on_where_they_came_back_to(tmp_path: Path) -> None:
    directory = tmp_path / "run"

    def say(answer: Callable[..., dict[str, Any]]) -> None:
        tell_run(directory, "pause")
        time.sleep(0.5)
        answer(actors=1)
        answer(actors=4)
        time.sleep(0.5)
        tell_run(directory, "continue")
        at = answer()["update"]
        wait_for(lambda: answer()["update"] > at + 5)

    run = told(directory, say, actors=4)
    assert events(run.path, "killed") == events(run.path, "died") == []
    assert run.result["weights_sha256"] == weights_of_one_process(tmp_path, run.result["updates"])
