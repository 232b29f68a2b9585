"""A snapshot's numbers under the names that users know."""

from __future__ import annotations

import json
import math

import pytest

from shoal.config import StopConfig
from shoal.monitoring.snapshot import STEADY_SECONDS, ActorHealth, Pace, Snapshot, eta_seconds, scalars


def a_snapshot(**changes: object) -> Snapshot:
    facts = {"update": 4, "env_steps": 400, "seconds": 2.0, "env_steps_per_second": 200.0, "mean_return": 12.5, "std_return": 2.0}
    return Snapshot("runs/x", "CartPole-v1", "ppo", "sync", **{**facts, **changes})  # type: ignore[arg-type]


def test_metrics_have_the_tags_of_stable_baselines() -> None:
    values = scalars(a_snapshot(mean_length=9.0, train={"approx_kl": 0.01, "value_loss": math.inf}, dropped={"over_lag": 2}))
    assert values["rollout/ep_rew_mean"] == 12.5
    assert values["rollout/ep_len_mean"] == 9.0
    assert values["time/fps"] == 200.0
    assert values["time/total_timesteps"] == 400
    assert values["train/approx_kl"] == 0.01
    assert values["ledger/dropped_over_lag"] == 2
    assert "train/value_loss" not in values


def test_before_the_first_episode_there_is_no_return() -> None:
    assert "rollout/ep_rew_mean" not in scalars(a_snapshot(mean_return=math.nan))


def test_shares_of_time_sum_to_one() -> None:
    values = scalars(a_snapshot(time_by_role={"environment": 3.0, "learning": 1.0}))
    assert (values["share/environment"], values["share/learning"]) == (0.75, 0.25)


def test_a_snapshot_is_json_with_null_for_what_is_not_finite() -> None:
    snapshot = a_snapshot(mean_return=math.nan, actors=(ActorHealth(0, "running", groups=(0, 1)),))
    assert json.loads(json.dumps(snapshot.to_json(), allow_nan=False))["mean_return"] is None
    assert snapshot.to_json()["actors"] == [{"actor": 0, "state": "running", "incarnation": 0, "groups": [0, 1], "heartbeat_seconds": 0.0}]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ({}, None),
        ({"return": 475}, None),
        ({"env_steps": 1000}, 3.0),
        ({"updates": 6}, 1.0),
        ({"env_steps": 1000, "updates": 6, "seconds": 2.5}, 0.5),
        ({"env_steps": 100}, 0.0),
    ],
)
def test_the_nearest_stop_condition_says_how_long_it_takes(stop: dict[str, float], expected: float | None) -> None:
    begun = Pace(update=0, env_steps=0, seconds=0.0)
    assert eta_seconds(StopConfig.model_validate(stop), Pace(update=4, env_steps=400, seconds=2.0), begun) == expected


def test_the_time_that_is_left_goes_by_the_speed_since_the_run_went_as_it_goes() -> None:
    stop = StopConfig(env_steps=3000)
    filled = Pace(update=10, env_steps=1000, seconds=0.5)  # in no time, since nothing was learned
    assert eta_seconds(stop, Pace(20, 1100, 10.5), filled) == 190.0
    assert eta_seconds(stop, Pace(20, 1100, 10.5), None) is None
    assert eta_seconds(stop, Pace(20, 1100, 0.5 + STEADY_SECONDS - 0.1), filled) is None, "too soon to tell"
    assert eta_seconds(stop, filled._replace(seconds=60.0), filled) is None, "nothing was made since"
    assert eta_seconds(StopConfig(env_steps=3000, seconds=60.0), Pace(1, 1000, 0.5), None) == 59.5, "what a clock says is known at once"


def test_a_replay_has_tags_of_its_own() -> None:
    values = scalars(a_snapshot(replayed=7, evicted=2, replay={"age_updates_mean": 3.5, "surplus": -1.0}))
    named = {name: value for name, value in values.items() if name.startswith(("replay/", "ledger/replayed", "ledger/evicted"))}
    assert named == {"ledger/replayed": 7, "ledger/evicted": 2, "replay/age_updates_mean": 3.5, "replay/surplus": -1.0}
    assert not [name for name in scalars(a_snapshot()) if name.startswith("replay/")]


def test_a_cluster_has_tags_for_what_crosses_its_network_in_all_and_by_node() -> None:
    node = {
        "env_steps": 10,
        "messages": 5,
        "bytes_said": 100,
        "bytes_heard": 900,
        "bytes_per_env_step": 100.0,
        "messages_per_env_step": 0.5,
    }
    values = scalars(a_snapshot(network={**node, "nodes": {"a": node}}))
    named = {name.removeprefix("network/"): value for name, value in values.items() if name.startswith("network/")}
    assert named == {**node, "a/bytes_per_env_step": 100.0, "a/messages_per_env_step": 0.5}
    assert not [name for name in scalars(a_snapshot()) if name.startswith("network/")]
