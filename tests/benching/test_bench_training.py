"""What `shoal bench train` leaves out: the first fifth of the updates, whatever ends the training."""

from __future__ import annotations

import os

import pytest

from shoal.benching import training
from shoal.benching.training import Watch, processor, time_by_role
from shoal.errors import ConfigError
from shoal.monitoring.snapshot import RoleTime, Snapshot


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(training.time, "monotonic", lambda: self.now)


def snapshot(learning: float, phase: str = "training") -> Snapshot:
    return Snapshot(
        "run",
        "env",
        "ppo",
        "sync",
        phase=phase,
        roles=(RoleTime("learner", os.getpid(), {"learning": learning, "waiting_for_batch": 1.0}),),
    )


def watched(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Ten updates of 100 env steps: two that took ten seconds each, and eight that took one; a look after each."""
    clock, watch = Clock(monkeypatch), Watch()
    watch.ticked(snapshot(0.0))  # nothing is there yet
    for update in range(10):
        clock.now += 10.0 if update < 2 else 1.0
        watch.updated({"env_steps": 100 * (update + 1)})
        watch.ticked(snapshot(5.0 * update))
    watch.ticked(snapshot(1e9, phase="stopping"))
    return watch


def test_the_speed_is_that_after_the_first_fifth_of_the_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch).env_steps_per_second() == 100.0


def test_time_by_role_is_that_after_the_first_fifth_of_the_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watched(monkeypatch)
    ends = watch.ends()
    assert ends is not None
    assert (ends[0].at, ends[1].at) == (21.0, 28.0)
    assert time_by_role(watch)["learner"] == {"learning": 100.0}  # 35 s of it, and no second of waiting


def test_a_training_of_two_updates_or_one_tick_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch = Clock(monkeypatch), Watch()
    for update in range(2):
        with pytest.raises(ConfigError, match="too short"):
            watch.env_steps_per_second()
        clock.now += 1.0
        watch.updated({"env_steps": update})
    with pytest.raises(ConfigError, match="too short"):
        watch.env_steps_per_second()
    clock.now += 1.0
    watch.updated({"env_steps": 5})
    watch.ticked(snapshot(1.0))
    assert watch.env_steps_per_second() == 4.0
    assert watch.ends() is None
    assert time_by_role(watch) == processor(watch, 2) == {}
