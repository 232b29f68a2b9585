"""One suite for every engine: with the same configuration, the same training, also when it is interrupted and resumed."""

from __future__ import annotations

import io
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

import shoal
from rollout_fakes import Drift
from shoal.errors import EnvironmentFault
from shoal.monitoring.live import SilentView

ENGINES = {"inline": 0, "local, one actor": 1, "local, two actors": 2}
apart = pytest.mark.parametrize("actors", [0, 2], ids=["inline", "local"])  # what one actor would show, two do, too
SMALL = {
    "sampling": {"groups": 3, "group_size": 2, "rollout_length": 8},
    "policy": {"hidden_sizes": [8], "normalise_observations": True, "normalise_rewards": True},
    "seed": 5,
    "preset": "none",
}
PPO = {**SMALL, "algorithm": {"name": "ppo", "minibatch_size": 16, "epochs": 2}}
APPO = {**SMALL, "algorithm": {"name": "appo", "minibatch_size": 16, "epochs": 2}, "mode": "async"}
DQN = {
    "sampling": {"groups": 3, "group_size": 2, "rollout_length": 8},
    "policy": {"hidden_sizes": [8]},
    "algorithm": {"name": "dqn", "batch_size": 8, "target_tau": None, "target_update_steps": 5},
    "replay": {"learning_starts": 60, "capacity_steps": 240, "samples_per_insert": 0.7},
    "seed": 5,
    "preset": "none",
}
R2D2 = {
    **DQN,
    "policy": {"hidden_sizes": [8], "memory": "gru", "memory_size": 4},
    "algorithm": {"name": "r2d2", "batch_size": 4},
    "replay": {"learning_starts": 60, "capacity_steps": 240, "samples_per_insert": 3.0, "sequence_length": 12, "burn_in": 3},
}
COMPARED = ("reason", "env_steps", "updates", "mean_return", "policy_version", "weights_sha256", "ledger", "lag", "restarts")


def quiet() -> SilentView:
    return SilentView(io.StringIO())


def train(directory: Path, actors: int, settings: dict[str, Any] = PPO, **more: Any) -> Any:
    return shoal.train(Drift, actors=actors, run_dir=str(directory), progress=quiet(), **{**settings, **more})


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reference: all roles in this process, without interruption."""
    return train(tmp_path_factory.mktemp("straight") / "run", 0, stop={"updates": 6})


@pytest.fixture(params=ENGINES, scope="module")
def actors(request: pytest.FixtureRequest) -> int:
    return ENGINES[request.param]


def test_the_same_configuration_gives_the_same_training(actors, straight, tmp_path):
    seen: list[dict[str, Any]] = []
    run = train(tmp_path / "run", actors, stop={"updates": 6}, callbacks=[seen.append])
    assert {k: run.result[k] for k in COMPARED} == {k: straight.result[k] for k in COMPARED}
    assert (run.result["reason"], run.result["env_steps"]) == ("updates", 6 * 3 * 2 * 8)
    assert run.result["ledger"] == {"produced": 288, "trained": 288, "dropped": {}, "in_flight": 0}
    assert run.result["lag"] == {"mean": 0.0, "p99": 0.0, "max": 0}
    assert [facts["update"] for facts in seen] == [1, 2, 3, 4, 5, 6]
    assert [facts["env_steps"] for facts in seen] == [48 * k for k in range(1, 7)]


class Dawdling(Drift):
    """Waits at each step, as long as it likes."""

    def step(self, action: Any) -> Any:
        time.sleep(random.random() * 0.003)
        return super().step(action)


def test_environments_that_act_as_soon_as_they_are_ready_give_the_same_training(actors, straight, tmp_path):
    settings = {**PPO, "env": {"form": "threads"}}
    run = shoal.train(Dawdling, actors=actors, run_dir=str(tmp_path / "run"), progress=quiet(), **settings, stop={"updates": 6})
    assert {k: run.result[k] for k in COMPARED} == {k: straight.result[k] for k in COMPARED}
    assert shoal.replay(run.path, env=Dawdling)["equal"]


def test_a_training_that_was_interrupted_goes_on_as_if_it_had_not_been(actors, straight, tmp_path):
    run = train(tmp_path / "run", actors, stop={"updates": 6}, callbacks=[lambda facts: facts["update"] < 2])
    assert (run.result["reason"], run.result["updates"]) == ("interrupted", 2)
    balance = run.result["ledger"]
    assert balance["trained"] == 96
    assert balance["produced"] == 96 + sum(balance["dropped"].values())
    elsewhere = {0: 1, 1: 2, 2: 0}[actors]
    resumed = shoal.resume(run.path, env=Drift, actors=elsewhere, progress=quiet())
    compared = [k for k in COMPARED if k != "ledger"]
    assert {k: resumed.result[k] for k in compared} == {k: straight.result[k] for k in compared}
    balance = resumed.result["ledger"]
    assert (balance["trained"], balance["in_flight"]) == (288, 0)
    assert balance["produced"] == 288 + sum(balance["dropped"].values())


@apart
def test_an_async_training_balances_stays_within_its_lag_and_can_be_replayed(actors, tmp_path):
    run = train(tmp_path / "run", actors, APPO, max_policy_lag=2, stop={"updates": 8})
    result = run.result
    ledger = result["ledger"]
    assert (result["reason"], result["updates"], ledger["in_flight"]) == ("updates", 8, 0)
    assert ledger["trained"] == result["env_steps"]
    assert ledger["produced"] == ledger["trained"] + sum(ledger["dropped"].values())
    assert 0 < result["lag"]["mean"] <= result["lag"]["max"] <= 2
    replayed = shoal.replay(run.path, env=Drift)
    assert replayed["equal"], replayed
    assert (replayed["updates"], replayed["weights_sha256"]) == (8, result["weights_sha256"])


@pytest.fixture(scope="module")
def straight_together(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tmp_path_factory.mktemp("together") / "run", 0, learners=3, stop={"updates": 6})


@apart
def test_several_learners_give_the_same_training_in_every_engine_and_with_a_replay(actors, straight, straight_together, tmp_path):
    run = train(tmp_path / "run", actors, learners=3, stop={"updates": 6})
    assert {k: run.result[k] for k in COMPARED} == {k: straight_together.result[k] for k in COMPARED}
    assert run.result["weights_sha256"] != straight.result["weights_sha256"]
    assert shoal.replay(run.path, env=Drift)["equal"]
    resumed = shoal.resume(run.path, env=Drift, actors={0: 1, 1: 2, 2: 0}[actors], stop={"updates": 8}, progress=quiet())
    assert resumed.result["updates"] == 8
    assert shoal.replay(run.path, env=Drift)["equal"]


@apart
def test_several_learners_in_async_mode_can_be_replayed(actors, tmp_path):
    run = train(tmp_path / "run", actors, APPO, learners=2, max_policy_lag=2, stop={"updates": 8})
    assert (run.result["ledger"]["in_flight"], run.result["lag"]["max"] <= 2) == (0, True)
    assert shoal.replay(run.path, env=Drift)["equal"]


@pytest.fixture(scope="module")
def replayed_straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tmp_path_factory.mktemp("replayed") / "run", 0, DQN, stop={"updates": 8})


def test_a_training_that_learns_from_a_replay_is_the_same_everywhere_and_can_be_executed_again(actors, replayed_straight, tmp_path):
    run = train(tmp_path / "run", actors, DQN, stop={"updates": 8})
    assert {k: run.result[k] for k in COMPARED} == {k: replayed_straight.result[k] for k in COMPARED}
    facts = run.result["replay"]
    ledger = {"produced": 384, "trained": 0, "dropped": {}, "in_flight": 0, "replayed": 384, "evicted": 384 - int(facts["steps"])}
    assert run.result["ledger"] == ledger
    assert 150 < facts["steps"] <= 240
    assert (facts["inserted"], facts["sampled"]) == (384.0, 8 * int(0.7 * (384 - 60) / 8))  # what a division leaves is owed
    assert facts["surplus"] == pytest.approx(facts["sampled"] - 0.7 * (384 - 60))
    assert 0 < facts["age_updates_mean"] <= facts["age_updates_max"] < 8
    assert shoal.replay(run.path, env=Drift)["equal"]


def test_a_training_that_learns_from_a_replay_goes_on_with_it_after_an_interruption(actors, replayed_straight, tmp_path):
    run = train(tmp_path / "run", actors, DQN, stop={"updates": 8}, callbacks=[lambda facts: facts["update"] < 4])
    assert run.result["updates"] == 4
    resumed = shoal.resume(run.path, env=Drift, actors={0: 1, 1: 2, 2: 0}[actors], progress=quiet())
    compared = [k for k in COMPARED if k != "ledger"]
    assert {k: resumed.result[k] for k in compared} == {k: replayed_straight.result[k] for k in compared}


@apart
def test_an_async_training_that_learns_from_a_replay_keeps_its_rate_and_can_be_executed_again(actors, tmp_path):
    settings = {
        **DQN,
        "algorithm": {**DQN["algorithm"], "epsilon": "ladder"},
        "mode": "async",
        "replay": {**DQN["replay"], "tolerance": 3.0},
    }
    run = train(tmp_path / "run", actors, settings, stop={"updates": 20})
    ledger, facts = run.result["ledger"], run.result["replay"]
    assert ledger["produced"] == ledger["replayed"] + sum(ledger["dropped"].values())
    assert ledger["replayed"] == run.result["env_steps"] == facts["inserted"]
    assert set(ledger["dropped"]) <= {"shutdown"}
    assert -8 < facts["surplus"] <= 3.0 * 0.7 * 48
    replayed = shoal.replay(run.path, env=Drift)
    assert (replayed["equal"], replayed["updates"]) == (True, 20)


class Push(Drift):
    """With a force in place of a choice."""

    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def step(self, action: Any) -> Any:
        return super().step(4.0 * float(action[0]) - float(action[1]))


ACTORS_WITH_CRITICS = {"td3": ("td3", Push), "sac": ("sac", Push), "discrete sac": ("sac", Drift)}


@pytest.fixture(params=ACTORS_WITH_CRITICS, scope="module")
def with_critics(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings, the environment, and the reference."""
    name, environment = ACTORS_WITH_CRITICS[request.param]
    settings = {**DQN, "algorithm": {"name": name, "batch_size": 8}}
    directory = tmp_path_factory.mktemp("critics") / "run"
    run = shoal.train(environment, actors=0, run_dir=str(directory), progress=quiet(), **settings, stop={"updates": 8})
    return settings, environment, run


@apart
def test_policies_with_critics_are_trained_alike_everywhere_through_an_interruption_and_again(actors, with_critics, tmp_path):
    settings, environment, straight = with_critics
    more = {"run_dir": str(tmp_path / "run"), "stop": {"updates": 8}, "callbacks": [lambda facts: facts["update"] < 4]}
    run = shoal.train(environment, actors=actors, progress=quiet(), **settings, **more)
    assert (run.result["updates"], run.result["replay"]["sampled"] > 0) == (4, True)
    resumed = shoal.resume(run.path, env=environment, actors={0: 1, 1: 2, 2: 0}[actors], progress=quiet())
    compared = [k for k in COMPARED if k != "ledger"]
    assert {k: resumed.result[k] for k in compared} == {k: straight.result[k] for k in compared}
    assert shoal.replay(resumed.path, env=environment)["equal"]


@apart
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_training_from_sequences_can_be_executed_again_and_its_policy_remembers(actors, mode, tmp_path):
    run = train(tmp_path / "run", actors, R2D2, mode=mode, stop={"updates": 8})
    assert run.result["replay"]["sampled"] >= 5 * 4 * 9  # sequences of nine trained rows
    assert shoal.replay(run.path, env=Drift)["equal"]
    policy, (observation, _) = run.policy(), Drift().reset(seed=1)
    _, state = policy.predict(observation)
    action, later = policy.predict(observation, state)
    assert Drift().action_space.contains(action)
    assert state["policy_state/h"].shape == later["policy_state/h"].shape
    assert (state["policy_state/h"] != later["policy_state/h"]).any()


class Breaking(Drift):
    """Raises at its third step, with a message of its own."""

    def step(self, action: Any) -> Any:
        if self.count == 2:
            raise RuntimeError("the spring broke")
        return super().step(action)


def test_an_environment_that_breaks_early_ends_the_run_with_its_own_words(actors, tmp_path):
    with pytest.raises(EnvironmentFault, match="the spring broke") as caught:
        shoal.train(Breaking, actors=actors, run_dir=str(tmp_path / "run"), progress=quiet(), **PPO, stop={"updates": 3})
    assert "spring broke" in str(caught.value.report["traceback"])
