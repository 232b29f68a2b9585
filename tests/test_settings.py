"""Layers of settings, their order, and what each wrong one says."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.config import BUILT_IN, APPOConfig, PPOConfig, RunConfig
from shoal.errors import ConfigError
from shoal.keys import all_keys
from shoal.settings import PRESETS, Raw, adapt_actors, dump_config, load_config, load_object, object_path, preset_names, read_yaml, resolve

TUNED = read_yaml(PRESETS / "CartPole-v1.yaml")["algorithms"]["ppo"]["algorithm"]["learning_rate"]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_preset_lies_above_the_defaults_the_file_above_it_and_the_hand_above_all(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "env: CartPole-v1\nalgorithm: {epochs: 7, gamma: 0.5}\n")
    config, preset = resolve(file, {"algorithm.gamma": 0.25})
    assert preset == config.preset == "CartPole-v1"
    assert isinstance(config.algorithm, PPOConfig)
    assert config.algorithm.gamma == 0.25
    assert config.algorithm.epochs == 7
    assert config.algorithm.learning_rate == TUNED  # the preset's
    assert config.algorithm.clip_range == 0.2  # the default


def test_an_unknown_environment_takes_no_preset() -> None:
    config, preset = resolve("Blackjack-v1")
    assert (preset, config.preset, config.algorithm.name) == ("none", "none", "ppo")


def test_the_preset_of_a_namespace_serves_all_of_it() -> None:
    assert resolve("ALE/Breakout-v5")[1] == "ALE"


def test_preset_none_takes_none_and_another_name_takes_that() -> None:
    assert resolve("CartPole-v1", {"preset": "none"})[0].algorithm.learning_rate == 2.5e-4
    assert resolve("my_package:cart", {"preset": "CartPole-v1"})[0].algorithm.learning_rate == TUNED
    with pytest.raises(ConfigError, match="did you mean CartPole-v1"):
        resolve("CartPole-v1", {"preset": "CartPole-v0"})


def test_naming_another_algorithm_drops_the_keys_and_the_mode_of_the_one_below(tmp_path: Path) -> None:
    file = write(
        tmp_path / "run.yaml", "env: Blackjack-v1\nmode: async\nalgorithm: {name: appo, epochs: 9, vtrace_lambda: 0.5, gamma: 0.5}\n"
    )
    config, _ = resolve(file, {"algorithm": "ppo"})
    assert (config.mode, config.algorithm.gamma, config.algorithm.name) == ("sync", 0.99, "ppo")
    same, _ = resolve(file, {"algorithm": "appo"})
    assert isinstance(same.algorithm, APPOConfig)
    assert (same.mode, same.algorithm.epochs) == ("async", 9)


def test_keys_without_a_name_belong_to_the_algorithm_below(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "env: Blackjack-v1\nalgorithm: {gae_lambda: 0.5}\n")
    assert resolve(file)[0].algorithm.gae_lambda == 0.5  # type: ignore[attr-defined]
    assert resolve(file, {"algorithm": "impala"})[0].algorithm.name == "impala"


def test_a_stop_condition_of_the_users_drops_those_of_the_preset_and_keeps_its_length_of_schedules() -> None:
    config, _ = resolve("HalfCheetah-v5", {"stop": {"return": 1000}})
    assert (config.stop.return_, config.stop.env_steps, config.algorithm.schedule_env_steps) == (1000, None, 1_000_000)
    config, _ = resolve("HalfCheetah-v5", {"stop": {"env_steps": 5000}})
    assert (config.stop.env_steps, config.algorithm.schedule_env_steps) == (5000, 5000)


@pytest.mark.parametrize("algorithm", list(BUILT_IN))
@pytest.mark.parametrize("env", [*preset_names(), "Blackjack-v1"])
def test_a_resolved_configuration_comes_back_from_its_file_unchanged(env: str, algorithm: str, tmp_path: Path) -> None:
    given_by_hand = {
        "algorithm": algorithm,
        "env.kwargs": {"text": "1e-3", "number": 1e-3, "nested": {"a": [1, None]}},
        "stop": {"updates": 3},
    }
    if algorithm == "ppo":
        given_by_hand["stop"] = {"env_steps": 3}
    config, _ = resolve(env, given_by_hand)
    file = write(tmp_path / "config.yaml", dump_config(config))
    assert load_config(Path(file)) == config
    assert resolve(file)[0] == config
    assert resolve(str(tmp_path))[0] == config


def test_a_new_run_does_not_go_into_the_directory_whose_configuration_it_takes(tmp_path: Path) -> None:
    config, _ = resolve("CartPole-v1", {"run_dir": str(tmp_path)})
    write(tmp_path / "config.yaml", dump_config(config))
    assert resolve(str(tmp_path))[0].run_dir is None


def test_text_is_brought_to_the_type_of_its_key() -> None:
    config, _ = resolve(
        "CartPole-v1",
        {
            "seed": "7",
            "stop.env-steps": "1e6",
            "algorithm.learning-rate": "3e-4",
            "algorithm.target_kl": "none",
            "policy.hidden-sizes": "32,16",
            "policy.normalise_observations": "true",
            "checkpoint": {"every_seconds": "null"},
        },
    )
    assert (config.seed, config.stop.env_steps, config.algorithm.learning_rate) == (7, 1_000_000, 3e-4)
    assert (config.policy.hidden_sizes, config.policy.normalise_observations, config.checkpoint.every_seconds) == ([32, 16], True, None)


def test_arguments_of_the_environment_are_read_as_yaml_from_a_command_line_and_left_alone_from_python() -> None:
    raw, _ = resolve("CartPole-v1", {"env.kwargs.gravity": Raw("-3"), "env.kwargs.tiny": Raw("1e-3"), "env.kwargs.names": Raw("[a, b]")})
    assert raw.env.kwargs == {"gravity": -3, "tiny": 1e-3, "names": ["a", "b"]}
    typed, _ = resolve("CartPole-v1", {"env.kwargs": {"gravity": "-3", "a-b": 1}})
    assert typed.env.kwargs == {"gravity": "-3", "a-b": 1}


def test_what_follows_from_other_keys_is_filled_in() -> None:
    config, _ = resolve("Blackjack-v1")
    assert (config.mode, config.sampling.groups, config.sampling.group_size) == ("sync", 4, 8)
    assert config.actors is not None
    assert 1 <= config.actors <= 4
    assert resolve("Blackjack-v1", {"algorithm": "impala"})[0].mode == "async"
    assert (resolve("Blackjack-v1", {"algorithm": "appo"})[0].actors or 0) >= 2


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"sed": 1}, ["sed is no key", "did you mean seed?"]),
        ({"learning_rate": 1}, ["did you mean algorithm.learning_rate?"]),
        ({"stop": {"retrn": 1}}, ["stop.retrn", "did you mean stop.return?", "env_steps, updates, seconds"]),
        ({"algorithm": "pp0"}, ["'pp0'", "did you mean ppo?", "ppo, impala, appo"]),
        ({"algorithm": {"name": "impala", "gae_lambda": 1}}, ["algorithm.gae_lambda belongs to ppo", "impala"]),
        ({"algorithm.epochs": 0}, ["algorithm.epochs", "greater than 0", "got 0"]),
        ({"algorithm.epochs": 0, "seed": -1}, ["algorithm.epochs", "seed"]),
        ({"algorithm": "PPO"}, ["'PPO'", "did you mean ppo?"]),
        ({"mode": "asinc"}, ["'sync' or 'async'", "did you mean async?"]),
        ({"mode": "async"}, ["ppo runs in sync mode", "for async take --algorithm impala, appo, dqn, r2d2, sac or td3"]),
        ({"policy": 3}, ["policy is a section", "not 3"]),
        ({"policy.hidden_sizes": "64,x"}, ["policy.hidden_sizes", "x"]),
        ({"stop.return": "high"}, ["stop.return", "'high'"]),
        ({"algorithm.learning_rate": float("nan")}, ["algorithm.learning_rate"]),
        ({"env.id": "Acrobot-v1"}, ["two environments", "CartPole-v1", "Acrobot-v1"]),
        ({3: 4}, ["3 is no text"]),
        ({"seed": 2**64}, ["seed", "less than 9223372036854775808"]),
        ({"actors": 3, "sampling.groups": 2}, ["actors: 3 processes cannot share 2 groups", "--sampling.groups 3"]),
        ({"autoscale": "3"}, ["autoscale: should be MIN:MAX", "got '3'"]),
        ({"autoscale": "4:2"}, ["autoscale: should be MIN:MAX", "got '4:2'"]),
        ({"autoscale": "0:2"}, ["autoscale: should be MIN:MAX"]),
        ({"autoscale": 68}, ["autoscale: should be MIN:MAX", "got 68"]),
        ({"autoscale": "1:2000"}, ["autoscale: should be MIN:MAX", "1024"]),
        ({"autoscale": "2:9"}, ["autoscale: 9 processes cannot share 4 groups", "--autoscale 2:4", "--sampling.groups 9"]),
        ({"autoscale": "2:4", "actors": 1}, ["actors: 1 is outside of --autoscale 2:4", "from 2 to 4"]),
        ({"autoscale": "1:4", "actors": 0}, ["actors: 0 runs all roles in one process", "--autoscale none"]),
        ({"algorithm.minibatch_size": 5000}, ["algorithm.minibatch_size: 5000 is more than the 1024 env steps", "sampling.groups"]),
        ({"sampling.batch_rollouts": 3}, ["sampling.batch_rollouts belongs to async mode", "appo or impala"]),
        ({"max_policy_lag": 3}, ["max_policy_lag belongs to async mode"]),
        ({"replay.n_step": 3}, ["replay.n_step is for what learns from a replay (dqn, r2d2, sac, td3)", "ppo"]),
        ({"algorithm": "dqn", "replay.shards": 5000}, ["replay.shards: 4 groups", "over 5,000 parts; give --replay.shards 4 or less"]),
        ({"algorithm": "dqn", "replay.shards": 5, "sampling.groups": 4}, ["--replay.shards 4 or less"]),
        ({"algorithm": "dqn", "algorithm.target_tau": 0}, ["algorithm.target_tau", "greater than 0", "got 0"]),
        ({"algorithm": "r2d2", "algorithm.target_tau": 0}, ["algorithm.target_tau", "greater than 0", "got 0"]),
        ({"algorithm": "sac", "algorithm.target_tau": 0}, ["algorithm.target_tau", "greater than 0", "got 0"]),
        ({"algorithm": "td3", "algorithm.target_tau": 0}, ["algorithm.target_tau", "greater than 0", "got 0"]),
        ({"algorithm": {"name": "dqn", "value_min": 3, "value_max": 2}}, ["value_min 3 is not below value_max 2"]),
        ({"algorithm": "appo", "max_policy_lag": 0}, ["max_policy_lag", "greater than 0", "got 0"]),
        ({"sampling.rollout_length": "many"}, ["sampling.rollout_length: should be a whole number, got 'many'"]),
        ({"algorithm.entropy_coefficient": float("inf")}, ["algorithm.entropy_coefficient", "finite"]),
        ({"stop.return": float("nan")}, ["stop.return", "finite"]),
        ({"policy.log_std_init": float("nan")}, ["policy.log_std_init", "finite"]),
        ({"learner.threads": 100_000}, ["learner.threads", "less than or equal to 256"]),
        ({"checkpoint.keep": 1}, ["checkpoint.keep", "greater than or equal to 2"]),
        ({"stop": Raw("5")}, ["stop is a section", "stop.return", "not '5'"]),
        ({"stop": 5}, ["stop is a section", "not 5"]),
        ({"preset": 5}, ["preset", "5"]),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name_with_what_is_allowed(overrides: dict[Any, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("CartPole-v1", overrides)
    for part in parts:
        assert part in str(caught.value)


def test_what_concerns_several_keys_is_said_of_their_section_without_all_of_it() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("CartPole-v1", {"algorithm": {"name": "dqn", "value_min": 3, "value_max": 2}, "seed": -1})
    first, second = str(caught.value).splitlines()
    assert first == "algorithm: value_min 3 is not below value_max 2"
    assert second.startswith("seed: ")


@pytest.mark.parametrize(("algorithm", "end"), [("dqn", "async"), ("impala", "async"), ("ppo", "async with --algorithm appo or impala")])
def test_keys_of_async_mode_ask_for_no_other_algorithm_where_this_one_has_the_mode(algorithm: str, end: str) -> None:
    with pytest.raises(ConfigError, match=rf"^sampling\.batch_rollouts belongs to async mode.* or take --mode {end}$"):
        resolve("CartPole-v1", {"algorithm": algorithm, "mode": "sync", "sampling.batch_rollouts": 3})
    assert resolve("CartPole-v1", {"algorithm": "dqn", "mode": "async", "sampling.batch_rollouts": 3})[0].sampling.batch_rollouts == 3


@pytest.mark.parametrize("algorithm", ["appo", "impala"])
def test_what_a_preset_says_of_async_mode_does_not_count_in_sync_mode(algorithm: str) -> None:
    assert resolve("CartPole-v1", {"algorithm": algorithm})[0].sampling.batch_rollouts is not None
    config, preset = resolve("CartPole-v1", {"algorithm": algorithm, "mode": "sync"})
    assert (preset, config.sampling.batch_rollouts) == ("CartPole-v1", None)
    with pytest.raises(ConfigError, match=r"sampling\.batch_rollouts belongs to async mode"):
        resolve("CartPole-v1", {"algorithm": algorithm, "mode": "sync", "sampling.batch_rollouts": 2})


IDLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [  # what makes a key idle, the key, and what is to be given with it
    ({"algorithm": "dqn", "mode": "sync"}, {"replay.tolerance": 3}, "take --mode async"),
    ({"algorithm": "dqn"}, {"algorithm.target_update_steps": 500}, "--algorithm.target-tau none"),
    ({"algorithm": "r2d2"}, {"algorithm.target-update-steps": 500}, "--algorithm.target-tau none"),
    ({"algorithm": "dqn"}, {"algorithm.atoms": 11}, "--algorithm.distribution c51 or quantile"),
    ({"algorithm": "dqn"}, {"algorithm.value_min": -1}, "--algorithm.distribution c51"),
    ({"algorithm": "dqn", "algorithm.distribution": "quantile"}, {"algorithm.value_max": 1}, "--algorithm.distribution c51"),
    ({"algorithm": "dqn"}, {"algorithm.epsilon_base": 0.3}, "--algorithm.epsilon ladder"),
    ({"algorithm": "dqn"}, {"algorithm.epsilon_exponent": 3}, "--algorithm.epsilon ladder"),
    ({"algorithm": "dqn", "algorithm.epsilon": "ladder"}, {"algorithm.epsilon_final": 0.1}, "--algorithm.epsilon annealed"),
    ({"algorithm": "dqn", "algorithm.epsilon": "ladder"}, {"algorithm.epsilon_env_steps": 9}, "--algorithm.epsilon annealed"),
    ({"algorithm": "r2d2", "preset": "none"}, {"algorithm.epsilon_initial": 0.5}, "--algorithm.epsilon annealed"),
    ({"algorithm": "dqn", "replay.prioritised": False}, {"replay.alpha": 0.5}, "--replay.prioritised true"),
    ({"algorithm": "sac"}, {"replay.beta": 0.5}, "--replay.prioritised true"),
    ({"algorithm": "r2d2", "replay.prioritised": False}, {"algorithm.priority_eta": 0.5}, "--replay.prioritised true"),
    ({"algorithm": "sac", "algorithm.temperature": 0.1}, {"algorithm.target_entropy": -1}, "--algorithm.temperature none"),
    ({}, {"checkpoint.replay": False}, "take dqn, r2d2, sac or td3"),
    ({}, {"policy.memory_size": 8}, "--policy.memory lstm or gru"),
    ({"algorithm": "dqn"}, {"policy.memory_size": 8}, "take --algorithm r2d2"),
    ({"algorithm": "dqn", "mode": "async"}, {"max_policy_lag": 8}, "give --replay.tolerance, by which actors may run ahead, or"),
    ({"algorithm": "td3", "mode": "sync"}, {"max_policy_lag": 8}, "by which actors may run ahead with --mode async"),
    ({"algorithm": "dqn", "learners": 2}, {"replay.shards": 2}, "--learners 1"),
]


@pytest.mark.parametrize(("beside", "key", "instead"), IDLE)
def test_a_key_without_an_effect_is_refused_where_it_is_given_by_hand(
    beside: dict[str, Any], key: dict[str, Any], instead: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("CartPole-v1", {**beside, **key})
    name = next(iter(key)).replace("-", "_")
    assert str(caught.value).startswith(f"{name} has no effect: ")
    assert instead in str(caught.value)
    assert "\n" not in str(caught.value)
    config, _ = resolve("CartPole-v1", beside)
    file = write(tmp_path / "config.yaml", dump_config(config))
    assert resolve(file)[0] == config, "the whole configuration of a run has every key"
    tree = config.model_dump(mode="json", by_alias=True)
    assert resolve(None, {"stop.updates": 5}, {**tree, "stop": {}})[0].algorithm == config.algorithm, "and it goes on from it"


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "dqn", "mode": "async", "replay.tolerance": 3, "replay.alpha": 0.5, "checkpoint.replay": False, "replay.shards": 2},
        {"algorithm": "dqn", "algorithm.target_tau": Raw("none"), "algorithm.target_update_steps": 500},
        {"algorithm": "dqn", "algorithm.distribution": "quantile", "algorithm.atoms": 11, "algorithm.epsilon_final": 0.1},
        {"algorithm": "dqn", "algorithm.distribution": "c51", "algorithm.value_min": -1, "algorithm.value_max": 1},
        {"algorithm": "dqn", "algorithm.epsilon": "ladder", "algorithm.epsilon_base": 0.3},
        {"algorithm": "r2d2", "algorithm.priority_eta": 0.5, "policy.memory_size": 8},
        {"algorithm": "sac", "algorithm.temperature": 0.1, "algorithm.target_entropy": Raw("none")},  # which asks for nothing
        {"algorithm": "sac", "algorithm.target_entropy": -1, "replay.prioritised": True, "replay.beta": 0.5},
        {"policy.memory": "gru", "policy.memory_size": 8},
        {"policy.network": "somewhere:make", "policy.memory_size": 8},
        {"algorithm": "appo", "max_policy_lag": 8},
    ],
)
def test_a_key_with_an_effect_is_taken(settings: dict[str, Any]) -> None:
    resolve("CartPole-v1", settings)


def test_a_minibatch_that_nobody_asked_for_is_cut_to_the_batch(tmp_path: Path) -> None:
    config, _ = resolve("CartPole-v1", {"sampling.groups": 1, "sampling.rollout_length": 4})
    assert config.algorithm.minibatch_size == 32  # type: ignore[attr-defined]
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert resolve(str(file))[0] == config
    older = config.model_dump(mode="json", by_alias=True)
    older["algorithm"]["minibatch_size"] = 256
    assert resolve(None, {}, older)[0].algorithm.minibatch_size == 256  # type: ignore[attr-defined]  # a run goes on as it began


def test_a_linear_schedule_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"schedule_env_steps or stop\.env_steps"):
        resolve("Blackjack-v1", {"algorithm.learning_rate_schedule": "linear"})


@pytest.mark.parametrize(
    ("text", "part"),
    [("a: [", "not valid YAML"), ("- 1", "holds a list"), ("sed: 1\nenv: CartPole-v1", "did you mean seed"), ("seed: 1", "no environment")],
)
def test_a_wrong_file_is_refused_by_its_name(text: str, part: str, tmp_path: Path) -> None:
    file = write(tmp_path / "wrong.yaml", text)
    with pytest.raises(ConfigError, match=part):
        resolve(file)


def test_a_runs_empty_configuration_is_refused_by_its_name(tmp_path: Path) -> None:
    file = Path(write(tmp_path / "config.yaml", ""))
    with pytest.raises(ConfigError, match=r"config\.yaml names no environment"):
        load_config(file)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="No such file"):
        resolve("nowhere.yaml")
    with pytest.raises(ConfigError, match=r"nowhere\.py"):
        resolve("nowhere.py:make")
    with pytest.raises(ConfigError, match="name the factory"):
        resolve("nowhere.py")


def test_a_resuming_configuration_lies_below_what_is_given_by_hand() -> None:
    base = resolve("CartPole-v1", {"seed": 5})[0].model_dump(by_alias=True)
    config, _ = resolve(None, {"actors": 3}, base)
    assert (config.seed, config.actors, config.env.id) == (5, 3, "CartPole-v1")


def make_nothing() -> None:
    """Something with an import path."""


def test_an_object_becomes_its_import_path_and_comes_back_from_it() -> None:
    sys.modules.setdefault(__name__, sys.modules[make_nothing.__module__])
    assert load_object(object_path(make_nothing)) is make_nothing
    assert object_path(lambda: None).startswith("callable:")
    with pytest.raises(ConfigError, match="give it again from Python"):
        load_object(object_path(lambda: None))


def test_a_file_is_executed_once_and_its_neighbours_can_be_imported(tmp_path: Path) -> None:
    write(tmp_path / "neighbour_of_user_code.py", "value = 3\n")
    file = write(tmp_path / "user_code.py", "from neighbour_of_user_code import value\nclass Outer:\n  class Inner: pass\n")
    assert load_object(f"{file}:value") == 3
    inner = load_object(f"{file}:Outer.Inner")
    assert load_object(f"{file}:Outer.Inner") is inner
    assert object_path(inner) == f"{file}:Outer.Inner"


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("shoal.settings:resolv", "did you mean resolve"),
        ("shoal.settings", "no import path"),
        ("no_such_package_here:x", "cannot import"),
        ("{dir}/broken.py:x", "raised ZeroDivisionError"),
        ("{dir}/none.py:x", "there is no file"),
    ],
)
def test_an_import_path_that_leads_nowhere_says_where_it_ends(path: str, part: str, tmp_path: Path) -> None:
    write(tmp_path / "broken.py", "1 / 0\n")
    with pytest.raises(ConfigError, match=part):
        load_object(path.format(dir=tmp_path))


def test_every_key_is_listed_with_what_it_takes() -> None:
    keys = {key.name: key for name in BUILT_IN for key in all_keys(name)}
    assert keys["stop.return"].takes == "number"
    assert keys["policy.hidden_sizes"].takes == "int,int,..."
    assert keys["policy.hidden_sizes"].default == "64,64"
    assert keys["algorithm.gamma"].takes == "number >= 0 and <= 1"
    assert keys["mode"].takes == "sync|async"
    assert all(key.description for key in keys.values())


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("abé 1e-3.:#'\"\n[", max_size=8)
)


@given(st.dictionaries(st.text("abcxyz_", min_size=1, max_size=8), scalars | st.lists(scalars, max_size=3), max_size=5))
def test_any_plain_arguments_of_an_environment_survive_the_file(kwargs: dict[str, Any]) -> None:
    config = RunConfig.model_validate({"env": {"id": "X-v0", "kwargs": kwargs}})
    with TemporaryDirectory() as directory:
        file = Path(directory, "config.yaml")
        file.write_text(dump_config(config), encoding="utf-8")
        assert load_config(file) == config


json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab.", max_size=3), inner, max_size=2)
)
known_keys = st.sampled_from([key.name for key in all_keys()] + [key.name.partition(".")[0] for key in all_keys()] + ["algorithm.name"])


@settings(max_examples=40)
@given(st.dictionaries(known_keys, json_values | json_values.map(lambda value: Raw(str(value))), min_size=1, max_size=3), st.booleans())
@example({"env.id": 5}, True)
def test_values_of_any_kind_make_a_configuration_or_a_message(tree: dict[str, Any], from_file: bool) -> None:
    with suppress(ConfigError):
        resolve(None if from_file else "CartPole-v1", {} if from_file else tree, {"env.id": "CartPole-v1", **tree} if from_file else None)


def test_actors_are_one_per_core_but_never_fewer_than_two_that_run_async(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, sync, asynchronous in ((1, 1, 2), (3, 3, 3), (64, 4, 4)):
        monkeypatch.setattr("shoal.settings.completing.available_cores", lambda cores=cores: cores)
        assert resolve("Blackjack-v1")[0].actors == sync
        assert resolve("Blackjack-v1", {"algorithm": "appo"})[0].actors == asynchronous


def test_more_learners_leave_fewer_cores_to_actors_that_run_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.settings.completing.available_cores", lambda: 4)
    for learners, sync, asynchronous in ((1, 4, 4), (2, 4, 3), (3, 4, 2), (8, 4, 2)):
        assert resolve("Blackjack-v1", {"learners": learners})[0].actors == sync
        assert resolve("Blackjack-v1", {"algorithm": "appo", "learners": learners})[0].actors == asynchronous


def test_a_key_that_is_given_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("env: {id: CartPole-v1}\nseed: 1\nstop: {updates: 3}\nseed: 2\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml is not valid YAML: the key seed is given twice.*line 4"):
        resolve(str(tmp_path / "twice.yaml"))


@pytest.mark.parametrize("ends", ["raise ValueError('first\\nsecond')", "raise SystemExit('first')"])
def test_what_a_users_file_raises_is_one_line(ends: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ends)
    with pytest.raises(ConfigError, match=r"mine\.py raised \w+ while it was imported: first") as caught:
        load_object(f"{tmp_path / 'mine.py'}:make")
    assert "\n" not in str(caught.value)


def test_a_run_that_follows_the_load_begins_within_its_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.settings.completing.available_cores", lambda: 3)
    assert resolve("Blackjack-v1", {"autoscale": "1:2"})[0].actors == 2
    assert resolve("Blackjack-v1", {"autoscale": "4:4"})[0].actors == 4
    assert resolve("Blackjack-v1", {"autoscale": "1:4"})[0].actors == 3
    config, _ = resolve("Blackjack-v1", {"autoscale": "1:4", "actors": 1})
    assert (config.actors, config.autoscale) == (1, "1:4")
    assert resolve("Blackjack-v1", {"engine": "ray", "autoscale": "1:4"})[0].actors is None
    file = tmp_path / "config.yaml"
    file.write_text("env: Blackjack-v1\nautoscale: 1:4\nactors: 2\n")  # which other readers of YAML take for 64
    assert resolve(str(file))[0].autoscale == "1:4"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert yaml.safe_load(file.read_text())["autoscale"] == "1:4"


def test_a_resumed_run_follows_the_load_as_it_is_told_and_begins_within_its_bounds() -> None:
    base = resolve("Blackjack-v1", {"autoscale": "1:4", "actors": 1})[0].model_dump(mode="json", by_alias=True)
    assert resolve(None, {}, base)[0].autoscale == "1:4"
    assert resolve(None, {"autoscale": Raw("none")}, base)[0].autoscale is None
    config, _ = resolve(None, {"autoscale": "3:4"}, base)
    assert (config.actors, config.autoscale) == (3, "3:4")
    with pytest.raises(ConfigError, match="actors: 4 is outside of --autoscale 1:2"):
        resolve(None, {"autoscale": "1:2", "actors": 4}, base)


def test_environments_that_wait_get_no_more_actors_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.settings.completing.available_cores", lambda: 1)
    config, _ = resolve("Blackjack-v1", {"sampling.groups": 6, "autoscale": "1:3"})
    config.env.form = "threads"
    assert adapt_actors(config)
    assert config.actors == 3


@pytest.mark.parametrize(
    ("form", "asked", "expected"),
    [
        ("threads", {}, 6),
        ("python", {}, 1),
        ("threads", {"actors": 2}, 2),
        ("threads", {"actors": 0}, 0),
        ("threads", {"sampling.groups": 40}, 8),
    ],
)
def test_groups_of_environments_that_wait_get_an_actor_each_unless_asked_otherwise(
    form: Any, asked: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.settings.completing.available_cores", lambda: 1)
    config, _ = resolve("Blackjack-v1", {"sampling.groups": 6, **asked})
    before = config.actors
    config.env.form = form
    assert adapt_actors(config) == (expected != before)
    assert config.actors == expected


def test_an_algorithm_has_defaults_of_its_own_for_other_sections_below_every_other_layer() -> None:
    sac, _ = resolve("Blackjack-v1", {"algorithm": "sac"})
    assert (sac.policy.activation, sac.policy.hidden_sizes) == ("relu", [256, 256])
    assert (sac.sampling.groups, sac.sampling.group_size) == (4, 1)
    assert resolve("Blackjack-v1", {"algorithm": "sac", "policy.activation": "tanh"})[0].policy.activation == "tanh"
    assert resolve("CartPole-v1", {"algorithm": "dqn"})[0].policy.hidden_sizes == [128, 128]  # the preset's
    assert resolve("Blackjack-v1", {})[0].policy.activation == "tanh"
