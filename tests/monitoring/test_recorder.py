"""What the recorder says of time by role."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.config import RunConfig
from shoal.engines.session import UpdateReport
from shoal.monitoring import recorder as recording
from shoal.monitoring.live import SilentView
from shoal.monitoring.recorder import Recorder
from shoal.types import Activity, ActivityRecord


class Session(SimpleNamespace):
    coordinator: Any


def test_time_by_role_is_told_of_whole_updates_however_long_they_are(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Roles take turns for ten seconds each; a look at any moment sees both turns."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(recording.time, "monotonic", lambda: clock.now)
    watcher = Recorder(RunConfig(), tmp_path, SilentView(io.StringIO()))
    monkeypatch.setattr(watcher, "snapshot", lambda: None)
    monkeypatch.setattr(watcher, "_view", lambda shown: None)
    coordinator = SimpleNamespace(version=0)
    watcher._session = Session(coordinator=coordinator)  # type: ignore[assignment]
    spent = {Activity.STEPPING: 0.0, Activity.LEARNING: 0.0}
    for update in range(4):
        for activity in spent:
            for _ in range(40):
                clock.now += 0.25
                spent[activity] += 0.25
                record = ActivityRecord(activity, 0, -1, -1, -1, 0.0, 0, dict(spent))
                watcher.tick([record])
                shares = watcher._shares
                if update > 1:
                    assert min(shares["environment"], shares["learning"]) >= 10.0
        coordinator.version += 1
    watcher.store.close()


@pytest.mark.parametrize(("actors", "learners", "served"), [(0, 2, False), (2, 1, False), (2, 3, False), (1, 2, True)])
def test_each_role_is_told_by_its_name(actors: int, learners: int, served: bool, tmp_path) -> None:
    config = RunConfig(actors=actors, learners=learners)
    config.policy.inference = "server" if served else "actor"
    watcher = Recorder(config, tmp_path, SilentView(io.StringIO()))
    names = ["learner", *(f"learner {n}" for n in range(1, learners)), *(f"actor {n}" for n in range(actors))] if actors else ["all roles"]
    names += ["inference"] if served else []
    watcher._activities = [ActivityRecord(Activity.LEARNING, 0, -1, -1, -1, 0.0, 0, {}, pid=place) for place in range(len(names))]
    assert [(role.role, role.pid) for role in watcher._roles()] == [(name, place) for place, name in enumerate(names)]
    assert [record.pid for record in watcher._of_actors] == [place for place, name in enumerate(names) if name.startswith("actor")]
    watcher.store.close()


def test_an_actor_without_groups_is_dead_where_it_is_wanted_and_else_it_was_let_go(tmp_path) -> None:
    watcher = Recorder(RunConfig(actors=4), tmp_path, SilentView(io.StringIO()))
    hosts = [0, 2, 0, 2]  # by group
    watcher._session = Session(coordinator=SimpleNamespace(version=0, groups=[SimpleNamespace(actor=actor) for actor in hosts]))  # type: ignore[assignment]
    activities = [ActivityRecord(Activity.STEPPING, 0, -1, -1, -1, 0.0, 0, {})] * 5
    expected = [
        ("running", "dead", "running", "dead"),
        ("running", "dead", "running", "stopped"),
        ("running", "stopped", "running", "stopped"),
    ]
    for wanted, states in zip((4, 3, 2), expected, strict=True):
        watcher.event("scaled", actors=wanted, reason="x", autoscale="1:4")
        watcher._activities = activities
        assert tuple(actor.state for actor in watcher._health()) == states
    assert (watcher._autoscale, watcher._scaled) == ("1:4", "x")
    watcher.store.close()


def test_the_time_that_is_left_is_reckoned_from_the_first_update_that_learned(tmp_path) -> None:
    watcher = Recorder(RunConfig(), tmp_path, SilentView(io.StringIO()))
    limiter = SimpleNamespace(sampled=0)
    plan = SimpleNamespace(mode="async")
    watcher._session = Session(coordinator=SimpleNamespace(version=0, limiter=limiter, plan=plan, mean_return=0.0, ledger=None))  # type: ignore[assignment]
    watcher._recorded = float("inf")  # no row of metrics

    def update(number: int, env_steps: int, seconds: float) -> None:
        watcher.updated(UpdateReport(number, env_steps, seconds, {}, [], []))

    update(1, 500, 0.1)
    update(2, 1000, 0.2)
    assert watcher._since is None, "the replay was filled"
    limiter.sampled = 256
    update(3, 1032, 1.0)
    update(4, 1064, 2.0)
    assert watcher._since == (3, 1032, 1.0)
    watcher.event("pause")
    watcher.event("continue")
    assert watcher._since is None
    update(5, 1096, 60.0)
    assert watcher._since == (5, 1096, 60.0)
    watcher._coordinator.limiter = None  # what learns from no replay learns at once
    watcher._since = None
    update(6, 1128, 61.0)
    assert watcher._since == (6, 1128, 61.0)
    watcher.store.close()
