"""Comparisons with a replay: that both sides are matched, where the peers' scripts are found, and what is counted. No speed is asserted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import observing
import peers
import pytest
from peers import COMPARISONS, OWN_SCRIPTS, Comparison, PeerError, Peers, find_scripts, peer_speed, shoal_speed
from rows import CommandError

from shoal.cli.options import split_settings
from shoal.config import RunConfig
from shoal.settings import Raw, resolve

OFF_POLICY = {
    c.algorithm: c for c in reversed(COMPARISONS) if c.scripts is not None
}  # DQN's first: with as many environments on both sides
NAMES = {
    "CartPole-v1 dqn / sb3 dqn (16 envs)",
    "CartPole-v1 dqn / sb3 dqn (1 envs)",
    "Pendulum-v1 sac / sb3 sac (4 envs)",
}
TICK_SECONDS = 0.01  # of the stand-in's clock, for each step of all its environments


def resolved(comparison: Comparison) -> RunConfig:
    """The configuration that the options of `shoal train` come to."""
    rest, settings = split_settings(["--algorithm", comparison.algorithm, *comparison.options.split()], {})
    assert rest == []
    return resolve(comparison.environment, {name: Raw(value) for name, value in settings.items()})[0]


class Callback:
    """In the place of BaseCallback."""

    def __init__(self) -> None:
        self.num_timesteps = 0
        self.model: Any = None


class Learner:
    """In the place of an off-policy algorithm: learns as its settings say, by a clock of its own, and keeps what it was given."""

    made: list[Learner]
    now = 0.0

    def __init__(self, policy: str, environments: tuple[str, int], **settings: Any) -> None:
        self.policy, self.environments, self.settings = policy, environments, settings
        self._n_updates = 0
        Learner.made.append(self)

    def learn(self, total: int, callback: Any) -> None:
        callback.model = self
        goes_on = True
        while goes_on:
            callback.num_timesteps += self.environments[1]
            Learner.now += TICK_SECONDS
            goes_on = callback._on_step()
            if callback.num_timesteps > self.settings["learning_starts"]:
                self._n_updates += self.settings["gradient_steps"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """peer_scripts/sb3_off_policy.py, with stand-ins for Stable-Baselines3."""
    parts = {
        "": {"DQN": type("DQN", (Learner,), {}), "SAC": type("SAC", (Learner,), {})},
        ".common": {},
        ".common.callbacks": {"BaseCallback": Callback},
        ".common.env_util": {"make_vec_env": lambda name, num, vec_env_cls: (name, num)},
        ".common.vec_env": {"DummyVecEnv": object},
    }
    for name, content in parts.items():
        module = ModuleType(f"stable_baselines3{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"stable_baselines3{name}", module)
    spec = importlib.util.spec_from_file_location("sb3_off_policy", OWN_SCRIPTS / "sb3_off_policy.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    Learner.made, Learner.now = [], 0.0
    monkeypatch.setattr(loaded, "time", SimpleNamespace(perf_counter=lambda: Learner.now))
    monkeypatch.setattr(loaded, "torch", SimpleNamespace(set_num_threads=lambda number: None))
    return loaded


def test_every_comparison_has_a_name_of_its_own_and_options_that_shoal_takes() -> None:
    assert len({c.name for c in COMPARISONS}) == len(COMPARISONS)
    for comparison in COMPARISONS:
        assert resolved(comparison).algorithm.name == comparison.algorithm
    assert {c.name for c in COMPARISONS if c.scripts is not None} == NAMES
    assert {c.peer_name for c in COMPARISONS if c.peer.startswith("sb3_matched")} == {"sb3 ppo"}


@pytest.mark.parametrize("algorithm", ["dqn", "sac"])
def test_both_sides_of_an_off_policy_comparison_have_the_same_settings(script: Any, algorithm: str) -> None:
    config, theirs = resolved(OFF_POLICY[algorithm]), script.SETTINGS[algorithm]
    ours: Any = config.algorithm
    sampling, replay, num_envs = config.sampling, config.replay, int(OFF_POLICY[algorithm].peer.split()[-1])
    assert (sampling.groups or 0) * (sampling.group_size or 0) == num_envs
    updates_per_step = {"dqn": 0.25, "sac": 1.0}[algorithm]
    for number in (1, 4, 6, 16):
        rhythm = script.rhythm(algorithm, number)
        assert rhythm["gradient_steps"] == updates_per_step * rhythm["train_freq"] * number
    assert replay.samples_per_insert == updates_per_step * ours.batch_size
    assert (ours.batch_size, ours.learning_rate, ours.gamma) == (theirs["batch_size"], theirs["learning_rate"], theirs["gamma"])
    assert (replay.capacity_steps, replay.learning_starts) == (theirs["buffer_size"], theirs["learning_starts"])
    assert (replay.n_step, replay.prioritised, ours.adam_epsilon) == (1, False, 1e-8)
    assert (config.policy.hidden_sizes, config.policy.activation) == (theirs["policy_kwargs"]["net_arch"], "relu")
    assert (config.device, theirs["device"]) == ("cpu", "cpu")
    if algorithm == "sac":
        assert (ours.target_tau, ours.temperature, ours.target_entropy) == (theirs["tau"], None, None)
        assert (theirs["target_update_interval"], theirs["ent_coef"]) == (1, "auto")
        return
    assert (ours.target_tau, theirs["tau"]) == (None, 1.0)
    assert ours.target_update_steps == theirs["target_update_interval"] * updates_per_step
    assert ours.epsilon_initial == ours.epsilon_final == theirs["exploration_initial_eps"] == theirs["exploration_final_eps"]
    assert (ours.max_gradient_norm, ours.double, ours.duelling, ours.distribution) == (theirs["max_grad_norm"], False, False, "none")


@pytest.mark.parametrize(("algorithm", "environment"), [("dqn", "CartPole-v1"), ("sac", "Pendulum-v1")])
def test_the_peers_clock_begins_with_learning(script: Any, algorithm: str, environment: str, capsys: pytest.CaptureFixture[str]) -> None:
    num_envs = 8
    script.main(algorithm, environment, 2.0, num_envs)
    (model,) = Learner.made
    assert type(model).__name__ == algorithm.upper()
    assert (model.policy, model.environments, model.settings) == (
        "MlpPolicy",
        (environment, num_envs),
        script.SETTINGS[algorithm] | script.rhythm(algorithm, num_envs),
    )
    said = capsys.readouterr().out
    assert f" sps={num_envs / TICK_SECONDS:.0f}\n" in said
    before = (model.settings["learning_starts"] // num_envs + 2) * TICK_SECONDS
    assert Learner.now == pytest.approx(before + 2.0, abs=2 * TICK_SECONDS)


def test_scripts_are_looked_for_where_a_comparison_says_or_where_the_command_does(tmp_path: Path) -> None:
    own = list(OFF_POLICY.values())
    assert all((c.scripts / c.peer.split()[0]).is_file() for c in own if c.scripts)
    assert find_scripts(tmp_path, own) == tmp_path
    with pytest.raises(PeerError, match=r"rllib_matched\.py, sb3_matched\.py are not in"):
        find_scripts(tmp_path, COMPARISONS)
    (tmp_path / "sb3_matched.py").touch()
    assert find_scripts(tmp_path, [*own, COMPARISONS[0]]) == tmp_path


def test_a_peers_speed_is_what_its_own_script_prints_last(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "fast.py").write_text("import sys; print('sps=7'); print(sys.argv[1:], 'sps=12')")
    (tmp_path / "fast.py").write_text("print('sps=99')")
    here = Peers(tmp_path, Path(sys.executable), {})
    comparison = Comparison("CartPole-v1", "dqn", "", "fast.py dqn CartPole-v1 SECONDS")
    assert peer_speed(comparison, 1.0, here, tmp_path) == 99.0
    own = Comparison("CartPole-v1", "dqn", "", "fast.py dqn CartPole-v1 SECONDS", scripts=tmp_path / "here")
    assert peer_speed(own, 1.0, here, tmp_path) == 12.0
    (tmp_path / "here" / "fast.py").write_text("print('sps=0')")
    with pytest.raises(CommandError, match="measured no speed"):
        peer_speed(own, 1.0, here, tmp_path)


@pytest.mark.parametrize("algorithm", ["dqn", "sac"])
def test_shoals_speed_with_a_replay_is_read_from_what_was_recorded_after_the_warm_up(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observing, "WARM_UP_SECONDS", 0.5)
    seen: list[float] = []
    steady_rate = observing.steady_rate

    def watched(run: Path) -> float:
        seen.append(steady_rate(run))
        return seen[-1]

    monkeypatch.setattr(peers, "steady_rate", watched)
    speed = shoal_speed(OFF_POLICY[algorithm], 4.0, tmp_path)
    assert [speed] == seen
    assert speed > 0
