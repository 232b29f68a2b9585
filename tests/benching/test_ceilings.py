"""Ceilings follow from the costs; what lies below one is accounted for without a rest."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shoal.benching.ceilings import ceilings
from shoal.benching.gap import explain

COSTS = {"e": 20.0, "i": 10.0, "l": 50.0, "x": 10.0}


def test_ceilings_are_those_of_the_formulas() -> None:
    found = ceilings(COSTS, "sync", cores=4, learning_cores=2.0, num_envs=32)
    assert found.async_ == pytest.approx(4e6 / 90)
    assert found.sync == pytest.approx(1e6 / (40 / 4 + 50 / 2))
    assert found.waiting is None
    assert found.of_mode == found.sync
    assert ceilings(COSTS, "async", cores=4, learning_cores=2.0, num_envs=32).of_mode == found.async_


def test_environments_that_wait_bound_a_run_by_their_number() -> None:
    found = ceilings(COSTS, "async", cores=2, learning_cores=1.0, num_envs=64, blocking_us=10_000.0)
    assert found.waiting == found.of_mode == pytest.approx(6400.0)
    quick = ceilings(COSTS, "async", cores=2, learning_cores=1.0, num_envs=64, blocking_us=100.0)
    assert quick.of_mode == quick.async_ < 640_000.0


def test_a_learner_on_a_device_of_its_own_takes_no_core() -> None:
    found = ceilings(COSTS, "async", cores=2, learning_cores=1.0, num_envs=8, own_device=True)
    assert found.async_ == pytest.approx(1e6 / 50)
    assert found.sync == pytest.approx(1e6 / (40 / 2 + 50))


def measured(shares: dict[str, float]) -> dict[str, Any]:
    """The whole answer of a bench, with two cores, half of the ceiling reached, and these shares of the cores."""
    bound = ceilings(COSTS, "sync", cores=2, learning_cores=1.0, num_envs=8)
    transport = {"record": 7.0, "words": 1.0, "decide": 1.0, "consume": 0.5, "weights": 0.5}
    found = {"env_steps_per_second": bound.sync / 2, "ceiling": bound.sync, "fraction": 0.5, "processor": shares}
    roles = {"actors": {"stepping": 30.0, "waiting": 70.0}, "learner": {"learning": 60.0, "waiting": 40.0}}
    costs = {
        "costs": COSTS, "transport": transport, "mixed": 3.0, "cores": 2, "ceilings": bound.to_json(),
        "learning": {"own_device": False}, "settings": {"mode": "sync"},
    }  # fmt: skip
    return {**found, "time_by_role": roles, **costs}


def test_what_is_missing_adds_up_to_what_is_missing() -> None:
    answer = measured({"actors": 25.0, "learner": 20.0, "supervisor": 5.0, "idle": 50.0, "queued": 0.0})
    missing = explain(answer, answer)["missing"]
    assert sum(missing.values()) == pytest.approx(50.0)
    assert missing["idle"] == max(missing.values())


def test_the_words_name_who_waits_for_whom() -> None:
    answer = measured({"actors": 25.0, "learner": 20.0, "supervisor": 5.0, "idle": 50.0, "queued": 9.0})
    words = "\n".join(explain(answer, answer)["words"])
    assert "50 % of the ceiling" in words
    assert "actors wait 70 % of their time for the learner" in words
    assert "waited for a processor for 9.0 %" in words


def test_without_the_systems_figures_there_is_no_account() -> None:
    answer = measured({})
    assert explain(answer, answer)["missing"] == {}
    assert not math.isnan(answer["fraction"])
