"""The trial run of `shoal bench costs`: what is read off it, and what it is asked for. No time is asserted."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.benching import training
from shoal.benching import trial as trials
from shoal.benching.training import Processor, Watch
from shoal.benching.trial import MOST_SECONDS, figures, trial
from shoal.config import RunConfig
from shoal.errors import ConfigError
from shoal.monitoring.snapshot import RoleTime, Snapshot
from shoal.settings import resolve

ACTORS, LEARNER = (101, 102), 103
SETTINGS = {"preset": "none", "sampling.groups": 2, "actors": 2}
COSTS: dict[str, Any] = {
    "settings": {"batch_env_steps": 1000}, "ceilings": {"of_mode": 10_000.0}, "transport": {"words": 1.0, "decide": 2.0}, "cores": 2,
}  # fmt: skip


def looked(second: float) -> Snapshot:
    """Of each second both actors step for 0.4 and choose for 0.1; the learner learns for 0.3 and publishes for 0.05."""
    acting = {"stepping": 0.4 * second, "inferring": 0.1 * second, "waiting_for_lease": 0.5 * second}
    roles = [RoleTime(f"actor {n}", pid, acting) for n, pid in enumerate(ACTORS)]
    learning = {"learning": 0.3 * second, "publishing": 0.05 * second, "waiting_for_batch": 0.65 * second}
    return Snapshot("run", "env", "ppo", "sync", phase="training", roles=(RoleTime("learner", LEARNER, learning), *roles))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Ten updates of 1000 env steps, one a second; an actor takes 0.5 of a core, the learner 0.3, the supervisor 0.01."""
    now = 0.0
    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    shares = {**dict.fromkeys(ACTORS, 0.5), LEARNER: 0.3}
    monkeypatch.setattr(Processor, "of", lambda pid: Processor(shares.get(pid, 0.01) * now, 0.0))
    seen = Watch()
    for update in range(10):
        now += 1.0
        seen.updated({"env_steps": 1000 * (update + 1)})
        seen.ticked(looked(now))
    return seen


def test_times_are_shares_of_each_role_and_processor_time_is_of_each_env_step(watch: Watch) -> None:
    found = figures(watch, cores=2, batch_env_steps=1000, words_us=3.0)
    assert found == {
        "env_steps_per_second": pytest.approx(1000.0),
        "actors": 2,
        "acting": pytest.approx(0.5),
        "learning": pytest.approx(0.35),
        "acting_us": pytest.approx(1000.0),  # two half cores for 1000 env steps
        "update_us": pytest.approx(10_000.0 - 1000 * 3.0),
    }


def test_where_the_system_tells_no_processor_times_the_others_are_there(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = Watch(watch.points)
    monkeypatch.setattr(Processor, "of", lambda pid: None)
    for at in (3.0, 9.0):
        monkeypatch.setattr(training.time, "monotonic", lambda at=at: at)
        blind.ticked(looked(at))
    found = figures(blind, cores=2, batch_env_steps=1000, words_us=3.0)
    assert found is not None
    assert (found["acting_us"], found["update_us"]) == (None, None)
    assert found["acting"] == pytest.approx(0.5)


def test_a_run_of_one_look_or_one_update_has_no_figures(watch: Watch) -> None:
    assert figures(Watch(watch.points, watch.looks[:1]), 2, 1000, 0.0) is None
    with pytest.raises(ConfigError, match="too short"):
        figures(Watch(watch.points[:1], watch.looks), 2, 1000, 0.0)


def asked_for(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, seconds: float, costs: dict[str, Any], **given: Any
) -> tuple[dict[str, Any], Any]:
    told: list[dict[str, Any]] = []

    def train(target: str, settings: dict[str, Any]) -> tuple[Any, Watch]:
        told.append(settings)
        return None, watch

    monkeypatch.setattr(trials, "watched_training", train)
    settings = {**SETTINGS, **given}
    config: RunConfig = resolve("CartPole-v1", settings)[0]
    return (told[0] if (found := trial("CartPole-v1", settings, config, costs, seconds)) and told else {}), found


def test_it_is_another_run_than_the_one_that_is_planned(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"stop.updates": 3, "run_dir": "kept", "seed": 7, "evaluation.episodes": 5, "sampling.rollout_length": 16}
    settings, found = asked_for(watch, monkeypatch, 6.0, COSTS, **given)
    assert settings == {
        **SETTINGS, "sampling.rollout_length": 16, "stop.seconds": 6.0, "seed": 6, "learners": 1, "policy.inference": "actor",
    }  # fmt: skip
    assert (found["max_policy_lag"], found["actors"]) == (4, 2)


def test_it_is_long_enough_for_some_updates_and_no_longer_than_half_a_minute(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    for batch, expected in ((10, 2.0), (10_000, 8.0), (10**6, MOST_SECONDS)):
        costs = {**COSTS, "settings": {"batch_env_steps": batch}}
        assert asked_for(watch, monkeypatch, 0.0, costs)[0]["stop.seconds"] == pytest.approx(expected)


def test_a_schedule_runs_as_far_as_in_the_run_itself_and_a_cluster_is_left_out(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"stop.env_steps": 5000, "algorithm.learning_rate_schedule": "linear"}
    settings, _ = asked_for(watch, monkeypatch, 6.0, COSTS, **given)
    assert settings["algorithm.schedule_env_steps"] == 5000
    resolve("CartPole-v1", settings)
    on_ray = {"actors": None, "engine": "ray", "ray.address": "HEAD:1"}
    assert not {key for key in asked_for(watch, monkeypatch, 6.0, COSTS, **on_ray)[0] if key.startswith(("engine", "ray"))}


def test_without_processes_there_is_no_trial(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_for(watch, monkeypatch, 0.0, COSTS, actors=0) == ({}, None)


def test_a_run_that_was_too_short_is_none(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_for(Watch(), monkeypatch, 0.0, COSTS)[1] is None


def test_a_look_at_processes_that_have_ended_is_not_the_last_one(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = Processor.of
    monkeypatch.setattr(training.time, "monotonic", lambda: 10.5)
    monkeypatch.setattr(Processor, "of", lambda pid: None if pid == LEARNER else alive(pid))
    watch.ticked(looked(10.5))
    ends = watch.ends()
    assert ends is not None
    assert (ends[0].at, ends[1].at) == (3.0, 10.0)
    found = figures(watch, cores=2, batch_env_steps=1000, words_us=3.0)
    assert found is not None
    assert found["acting_us"] == pytest.approx(1000.0)
