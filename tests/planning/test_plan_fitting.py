"""The model fits a trial: given what a run that is known would show, it finds what that run was made of, and then predicts others of its kind.

The known run is simulated, with parts that take other times than the costs say. Costs are in microseconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planning_costs import SMALL, costs
from shoal.errors import ConfigError
from shoal.planning.fitting import Fit, fit, trial_system
from shoal.planning.inputs import Asked, Measured, Trial, measured_of, systems
from shoal.planning.pipeline import simulate
from shoal.planning.plan import ALONE, predict
from shoal.planning.system import System
from shoal.settings import resolve

ANY = {"env_steps_per_second": 1.0, "actors": 2, "acting": 0.5, "learning": 0.5, "acting_us": None, "update_us": None, "max_policy_lag": 4}


def answer(algorithm: str, **changed: Any) -> Measured:
    return measured_of(costs(algorithm, trial=ANY, crowding=1.2, **changed), "a file")


def shown(measured: Measured, truth: Fit, actors: int = 2) -> Measured:
    """The costs with a trial that shows what a run would that differs from its parts by `truth`."""
    assert measured.trial is not None
    trial = measured.trial.model_copy(update={"actors": actors})
    made = simulate(truth.of(trial_system(measured, trial)))
    seen = {
        "env_steps_per_second": made.env_steps_per_second, "acting": made.utilisation["actors"], "learning": made.utilisation["learner"],
        "update_us": None if truth.update is None else 1e6 * truth.update,
    }  # fmt: skip
    return measured.model_copy(update={"trial": trial.model_copy(update=seen)})


def planned_system(measured: Measured, algorithm: str, asked: Asked | None = None, **given: Any) -> System:
    config = resolve("CartPole-v1", {**SMALL, "algorithm": algorithm, **given})[0]
    asked = asked or Asked()
    return systems(config, measured, asked)[asked.sizes[0]]


def near(found: Fit, truth: Fit, rel: float) -> bool:
    return (found.acting, found.learning, found.update, found.pause) == pytest.approx(
        (truth.acting, truth.learning, truth.update, truth.pause), rel=rel, abs=1e-5
    )


times = st.floats(0.8, 2.0)


@given(times, times, st.floats(0.0, 0.003), st.floats(0.0, 0.005))
@settings(max_examples=25, deadline=None)
def test_of_a_sync_run_all_is_found(acting: float, learning: float, update: float, pause: float) -> None:
    truth = Fit(acting, learning, update=update, pause=pause)
    assert near(fit(shown(answer("ppo"), truth)), truth, rel=0.01)


@given(times, times)
@settings(max_examples=25, deadline=None)
def test_of_an_async_run_on_busy_cores_it_is_found_what_roles_take_beside_each_other(acting: float, learning: float) -> None:
    measured = answer("impala", costs__l=10.0, learning__wall_us={"1": 10.0})
    truth = Fit(acting, learning, update=0.001)
    seen = shown(measured, truth)
    found = fit(seen)
    assert found.pause == 0.0
    assert seen.trial is not None
    made = simulate(found.of(trial_system(seen, seen.trial)))
    assert made.env_steps_per_second == pytest.approx(seen.trial.env_steps_per_second, rel=0.02)
    assert made.utilisation["learner"] == pytest.approx(seen.trial.learning, rel=0.05)


def test_where_the_learner_is_slow_it_is_the_learner_that_is_fitted() -> None:
    truth = Fit(1.0, 1.5, update=0.001)
    found = fit(shown(answer("appo", costs__l=80.0, learning__wall_us={"1": 80.0}), truth))
    assert found.learning == pytest.approx(1.5, rel=0.03)


def test_of_environments_that_wait_processor_and_waits_are_told_apart() -> None:
    waiting = answer("impala", environment={"wall_us": 10_000.0, "waits": True}, settings__form="threads")
    seen = shown(waiting, Fit(acting=1.5, blocking=1.1, update=0.0))
    assert seen.trial is not None
    found = fit(seen.model_copy(update={"trial": seen.trial.model_copy(update={"acting_us": 1.5 * 38.0})}))
    assert (found.acting, found.blocking) == pytest.approx((1.5, 1.1), rel=0.01)


@pytest.mark.parametrize("algorithm", ["ppo", "impala"])
def test_what_was_found_holds_for_other_runs_than_the_trial(algorithm: str) -> None:
    truth = Fit(1.4, 1.2, update=0.0012, pause=0.002 if algorithm == "ppo" else 0.0)
    measured = answer(algorithm)
    seen = shown(measured, truth, actors=1)
    ways = ({"actors": 2}, {"sampling.groups": 8}, {"sampling.rollout_length": 128}, {"engine": "ray", "ray.actors_per_node": 2})
    for given_ in ways:
        real = simulate(truth.of(planned_system(measured, algorithm, **given_))).env_steps_per_second
        alone = simulate(planned_system(seen, algorithm, **given_)).env_steps_per_second
        fitted = simulate(fit(seen).of(planned_system(seen, algorithm, **given_))).env_steps_per_second
        assert fitted == pytest.approx(real, rel=0.02), given_
        assert alone > 1.1 * real, given_


def test_a_driver_that_takes_longer_than_was_left_of_an_update_worked_meanwhile() -> None:
    seen = shown(answer("ppo"), Fit(update=0.001))
    assert seen.trial is not None
    found = fit(seen.model_copy(update={"trial": seen.trial.model_copy(update={"update_us": 5000.0})}))
    assert found.update == pytest.approx(0.001, rel=0.02)
    assert found.pause == 0.0


def test_roles_that_were_at_work_at_once_in_a_sync_run_take_less_than_they_say() -> None:
    seen = shown(answer("ppo"), Fit(1.3, 1.2, update=0.001))
    assert seen.trial is not None
    said = {"acting": 1.08 * seen.trial.acting, "learning": 1.08 * seen.trial.learning}
    found = fit(seen.model_copy(update={"trial": seen.trial.model_copy(update=said)}))
    assert (found.acting / found.learning, found.update, found.pause) == pytest.approx((1.3 / 1.2, 0.0, 0.0), rel=0.01)
    made = simulate(found.of(trial_system(seen, seen.trial)))
    assert made.env_steps_per_second == pytest.approx(seen.trial.env_steps_per_second, rel=0.01)


def test_without_a_trial_nothing_is_changed_and_the_plan_warns(tmp_path: Any) -> None:
    measured = measured_of(costs(), "a file")
    system = planned_system(measured, "ppo")
    assert fit(measured) == Fit()
    assert Fit().of(system) == system
    assert "trial" in ALONE


def test_a_plan_of_the_trial_itself_is_the_trial() -> None:
    seen = shown(answer("ppo"), Fit(1.3, 1.2, update=0.002, pause=0.001))
    config = resolve("CartPole-v1", {**SMALL, "algorithm": "ppo", "actors": 2})[0]
    found = predict(config, seen, Asked())
    assert seen.trial is not None
    assert found["rows"][0]["env_steps_per_second"] == pytest.approx(seen.trial.env_steps_per_second, rel=0.002)
    assert found["fit"] == pytest.approx({"acting": 1.3, "learning": 1.2, "blocking": 1.0, "update": 0.002, "pause": 0.001}, rel=0.01)
    assert predict(config, seen.model_copy(update={"trial": None}), Asked())["fit"] is None


@pytest.mark.parametrize(
    "wrong", [{"acting": 1.2}, {"learning": -0.1}, {"env_steps_per_second": 0.0}, {"actors": 0}, {"max_policy_lag": None}]
)
def test_a_trial_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="trial"):
        measured_of(costs(trial={**ANY, **wrong}), "a file")


def test_a_trial_without_figures_of_the_processor_is_fitted_by_its_times() -> None:
    truth = Fit(1.3, 1.2, update=None, pause=0.003)
    found = fit(shown(answer("ppo"), truth))
    assert (found.acting, found.learning, found.pause) == pytest.approx((1.3, 1.2, 0.003), rel=0.02)
    assert found.update == pytest.approx(0.0012)
    assert Trial(**ANY).acting_us is None
    assert replace(found, update=None).of(planned_system(answer("ppo"), "ppo")).driver.update == pytest.approx(0.0012)
