"""What a run is asked for by the settings of its algorithm: advice that it takes, a replay that can begin, actors that share its groups."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest

import shoal
from rollout_fakes import Drift
from shoal.config import BUILT_IN, OffPolicyConfig, against_divergence
from shoal.engines.looking import look
from shoal.engines.roles import UserObjects
from shoal.errors import ConfigError
from shoal.monitoring.live import SilentView
from shoal.settings import resolve

LOWERED = {"algorithm.learning_rate": 1e-5, "algorithm.max_gradient_norm": 0.1}


def environment_of(algorithm: str) -> str:
    return "Pendulum-v1" if algorithm == "td3" else "CartPole-v1"


@pytest.mark.parametrize("algorithm", BUILT_IN)
def test_advice_against_divergence_names_keys_that_the_algorithm_takes(algorithm: str) -> None:
    config, _ = resolve(environment_of(algorithm), {"algorithm": algorithm, "preset": "none"})
    replayed = isinstance(config.algorithm, OffPolicyConfig)
    advice = against_divergence(config, replayed=replayed)
    keys = re.findall(r"\b(?:algorithm|policy)\.\w+", advice)
    assert "algorithm.learning_rate" in keys
    assert ("wrapper" in advice) == replayed
    followed = {key: LOWERED.get(key, True) for key in keys}
    config, _ = resolve(environment_of(algorithm), {"algorithm": algorithm, "preset": "none", **followed})
    look(config, UserObjects())
    again = against_divergence(config, replayed=replayed)
    assert replayed or "normalise" not in again, "what is set already is not advised"


TINY: dict[str, Any] = {
    "sampling": {"groups": 2, "group_size": 2, "rollout_length": 8},
    "policy": {"hidden_sizes": [8]},
    "algorithm": {"name": "dqn", "batch_size": 8},
    "preset": "none",
}


def train(directory: Path, actors: int = 0, environment: Any = Drift, **more: Any) -> Any:
    return shoal.train(environment, actors=actors, run_dir=str(directory), progress=SilentView(io.StringIO()), **{**TINY, **more})


@pytest.mark.parametrize("actors", [0, 1], ids=["inline", "local"])
def test_a_replay_whose_bytes_hold_less_than_learning_waits_for_is_refused_before_anything_runs(actors: int, tmp_path: Path) -> None:
    replay = {"learning_starts": 500, "capacity_bytes": 10_000}
    with pytest.raises(ConfigError) as caught:
        train(tmp_path / "run", actors, replay=replay, stop={"updates": 1})
    found = re.fullmatch(
        r"replay\.learning_starts: the replay holds (\d+) env steps in 10,000 bytes \(replay\.capacity_bytes\) and would never hold the 500 after "
        r"which learning starts; lower it, or raise the other",
        str(caught.value),
    )
    assert found is not None, caught.value
    assert not (tmp_path / "run").exists()
    holds = int(found[1])
    assert 0 < holds < 500
    if actors:  # the same from here on, and slower
        return
    run = train(tmp_path / "other", actors, replay={**replay, "learning_starts": holds}, stop={"updates": 12})
    facts = run.result["replay"]
    assert facts["capacity_steps"] == holds
    assert facts["sampled"] > 0
    with pytest.raises(ConfigError, match=rf"holds {holds} env steps .* never hold the {holds + 1} "):
        train(tmp_path / "more", actors, replay={**replay, "learning_starts": holds + 1}, stop={"updates": 1})


RECURRENT: dict[str, Any] = {
    "algorithm": {"name": "r2d2", "batch_size": 4},
    "policy": {"hidden_sizes": [8], "memory_size": 4},
    "replay": {"sequence_length": 12, "burn_in": 2},
}


@pytest.mark.parametrize(
    ("settings", "most", "message"),
    [
        (
            {"replay": {"capacity_steps": 400, "learning_starts": 40}},
            100,
            r"replay\.n_step: a return of 101 steps is longer than the 100 that the replay holds of each of the 4 environments "
            r"\(replay\.capacity_steps 400\); give --replay\.n-step 100 or less, or raise replay\.capacity_steps",
        ),
        (
            RECURRENT,
            12,
            r"replay\.n_step: a return of 13 steps is longer than the 12 that a sequence holds \(replay\.sequence_length\); "
            r"give --replay\.n-step 12 or less, or raise replay\.sequence_length",
        ),
    ],
    ids=["steps", "sequences"],
)
def test_a_return_is_no_longer_than_what_there_is_to_sum(settings: dict[str, Any], most: int, message: str) -> None:
    def looked_at(n: int | None) -> int:
        given = {**TINY, **settings, "replay": {**settings["replay"], "n_step": n}}
        facts = look(resolve("CartPole-v1", given)[0], UserObjects())
        return int(facts["replay"]["n_step"])

    assert looked_at(most) == most
    with pytest.raises(ConfigError) as caught:
        looked_at(most + 1)
    assert re.fullmatch(message, str(caught.value))


def test_the_default_of_returns_is_never_too_long() -> None:
    short = {
        **RECURRENT,
        "replay": {"sequence_length": 3},
        "sampling": {"groups": 1, "group_size": 1, "rollout_length": 2},
        "preset": "none",
    }
    config, _ = resolve("CartPole-v1", {**short, "replay.burn_in": 0})
    assert look(config, UserObjects())["replay"]["n_step"] == 5


@pytest.mark.parametrize("settings", [{}, RECURRENT], ids=["steps", "sequences"])
def test_a_batch_that_memory_does_not_hold_is_refused_before_anything_runs(settings: dict[str, Any], tmp_path: Path) -> None:
    algorithm = {**TINY["algorithm"], **settings.get("algorithm", {}), "batch_size": 10**10}
    with pytest.raises(ConfigError, match=r"a batch of it \(algorithm\.batch_size 10,000,000,000\) [\d,.]+ TiB, .* are free here$"):
        train(tmp_path / "run", **{**settings, "algorithm": algorithm}, stop={"updates": 1})
    assert not (tmp_path / "run").exists()


def test_bytes_that_do_not_bind_refuse_nothing(tmp_path: Path) -> None:
    replay = {"learning_starts": 42, "capacity_steps": 42, "capacity_bytes": 10**6}  # four environments hold 40 of them
    assert train(tmp_path / "run", replay=replay, stop={"updates": 2}).result["replay"]["capacity_steps"] == 40


@pytest.mark.parametrize("algorithm", BUILT_IN)
def test_up_to_four_actors_share_the_groups_of_every_algorithm_and_change_nothing_else(algorithm: str) -> None:
    given = {"algorithm": algorithm, "preset": "none", "mode": "sync"}
    configs = [resolve(environment_of(algorithm), {**given, "actors": actors})[0] for actors in (0, 1, 2, 4)]
    assert [config.actors for config in configs] == [0, 1, 2, 4]
    assert len({config.model_copy(update={"actors": None}).model_dump_json() for config in configs}) == 1


@pytest.mark.parametrize("algorithm", ["sac", "td3"])
def test_critics_learn_the_same_by_default_with_none_or_four_actors(algorithm: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "preset": "none",
        "algorithm": {"name": algorithm, "batch_size": 8},
        "replay": {"learning_starts": 40, "samples_per_insert": 1.0},
        "stop": {"updates": 4},
    }
    results = []
    for actors in (0, 4):
        run = shoal.train("Pendulum-v1", actors=actors, run_dir=str(tmp_path / str(actors)), progress=SilentView(io.StringIO()), **settings)
        results.append(run.result)
    assert results[0]["replay"]["sampled"] > 0
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]


def test_more_actors_than_groups_are_told_what_keeps_as_many_environments() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("HalfCheetah-v5", {"algorithm": "sac", "actors": 4})
    assert str(caught.value) == (
        "actors: 4 processes cannot share 2 groups; give --actors 2 or less, or --sampling.groups 4 --sampling.group-size 1 "
        "(as many environments as now)"
    )
    config, _ = resolve("HalfCheetah-v5", {"algorithm": "sac", "actors": 4, "sampling.groups": 4, "sampling.group-size": 1})
    assert (config.actors, config.sampling.groups, config.sampling.group_size) == (4, 4, 1)
    with pytest.raises(ConfigError, match=r"or --sampling\.groups 7$"):
        resolve("CartPole-v1", {"algorithm": "sac", "actors": 7})
