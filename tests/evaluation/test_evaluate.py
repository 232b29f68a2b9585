"""Evaluation: exactly the episodes that were asked for, each to its end, and statistics that a slow oracle confirms."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

sys.path.append(str(Path(__file__).parent))
from helpers import Spaces, bundle

from shoal.config import EnvConfig, PolicyConfig
from shoal.errors import ConfigError, EnvironmentFault, RunError
from shoal.evaluation import evaluate, load_policy
from shoal.evaluation.evaluate import summarise
from shoal.streams import Purpose, stream

KEYS = ["episodes", "mean_return", "std_return", "iqm", "ci95", "min", "max", "mean_length"]
VECTOR = spaces.Box(-1, 1, (3,), np.float32)


def counting(**kwargs: Any) -> Spaces:
    return Spaces(VECTOR, spaces.Discrete(4), **kwargs)


@pytest.mark.parametrize("num_envs", [1, 3, 8])
def test_exactly_the_episodes_asked_for_are_played_to_their_ends(tmp_path: Path, num_envs: int) -> None:
    bundle(tmp_path, counting)
    begun: list[int] = []

    class Recording(Spaces):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            result = super().reset(seed=seed)
            lengths[seed or 0] = self.left
            begun.append(seed or 0)
            return result

    lengths: dict[int, int] = {}
    result = evaluate(tmp_path, 21, seed=4, environment=lambda: Recording(VECTOR, spaces.Discrete(4)), num_envs=num_envs)
    seeds = [int(stream(4, Purpose.EVALUATION, index=episode).integers(2**31)) for episode in range(21)]
    assert set(seeds) <= set(begun)
    expected = np.array([lengths[seed] for seed in seeds], float)
    assert list(result) == KEYS
    assert result["episodes"] == 21
    assert (result["mean_return"], result["mean_length"]) == (expected.mean(), expected.mean())
    assert (result["std_return"], result["min"], result["max"]) == (expected.std(), expected.min(), expected.max())


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("env_id", "memory"), [("CartPole-v1", "none"), ("Pendulum-v1", "none"), ("Pendulum-v1", "gru")])
def test_the_result_does_not_depend_on_how_many_play_side_by_side(tmp_path: Path, env_id: str, memory: Any, deterministic: bool) -> None:
    config = PolicyConfig(hidden_sizes=[256, 256], memory=memory)
    bundle(tmp_path, env=EnvConfig(id=env_id, max_episode_steps=80), config=config)
    results = [evaluate(tmp_path, 10, num_envs=n, deterministic=deterministic) for n in (1, 3, 8)]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("exploration", ["gaussian", "gsde"])
def test_drawn_actions_are_a_function_of_the_seed(tmp_path: Path, exploration: str) -> None:
    bundle(tmp_path, env=EnvConfig(id="Pendulum-v1", max_episode_steps=30), config=PolicyConfig(exploration=exploration))  # type: ignore[arg-type]
    policy = load_policy(tmp_path)
    assert evaluate(policy, 3, deterministic=False) == evaluate(policy, 3, deterministic=False)
    assert evaluate(policy, 3, deterministic=False) != evaluate(policy, 3, deterministic=True)
    assert evaluate(policy, 3, deterministic=False) != evaluate(policy, 3, deterministic=False, seed=1)


def test_masks_in_info_are_obeyed(tmp_path: Path) -> None:
    def make() -> Spaces:
        return counting(mask=np.array([0, 1, 0, 1], np.int8))  # a step with a masked action fails there

    bundle(tmp_path, make)
    for deterministic in (True, False):
        assert evaluate(tmp_path, 5, environment=make, deterministic=deterministic)["episodes"] == 5


def test_statistics_agree_with_their_definitions() -> None:
    returns = np.array([3.0, -1.0, 10.0, 2.0, 4.0, 5.0, 100.0, 1.0])
    result = summarise(returns, np.arange(1, 9))
    assert result["iqm"] == (2.0 + 3.0 + 4.0 + 5.0) / 4
    assert (result["min"], result["max"], result["mean_length"], result["mean_return"]) == (-1.0, 100.0, 4.5, 15.5)
    assert result["std_return"] == pytest.approx(np.sqrt(sum((x - 15.5) ** 2 for x in returns) / 8))
    rng = np.random.default_rng(0)
    means = sorted(float(np.mean(rng.choice(returns, 8))) for _ in range(4000))
    low, high = result["ci95"]
    assert low == pytest.approx(means[100], abs=0.6)
    assert high == pytest.approx(means[3900], abs=2.5)
    assert summarise(returns, np.arange(1, 9)) == result
    assert all(type(result[key]) is float for key in KEYS[1:] if key != "ci95")


def test_one_episode_has_an_interval_of_no_width() -> None:
    result = summarise(np.array([7.0]), np.array([3]))
    assert (result["iqm"], result["ci95"], result["std_return"]) == (7.0, [7.0, 7.0], 0.0)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        low, high = summarise(rng.normal(5.0, 2.0, 50), np.ones(50))["ci95"]
        covered += low <= 5.0 <= high
    assert covered >= 50


@pytest.mark.parametrize(
    ("field", "fault"),
    [("reward", lambda: float("nan")), ("observation", lambda: np.full(3, np.nan, np.float32)), ("raises", lambda: 1 // 0)],
)
def test_a_fault_of_the_environment_is_one(tmp_path: Path, field: str, fault: Any) -> None:
    class Faulty(Spaces):
        def step(self, action: Any) -> Any:
            observation, reward, terminated, truncated, info = super().step(action)
            value = fault()
            return (value if field == "observation" else observation, value if field == "reward" else reward, terminated, truncated, info)

    bundle(tmp_path, counting)
    with pytest.raises(EnvironmentFault) as caught:
        evaluate(tmp_path, 3, environment=lambda: Faulty(VECTOR, spaces.Discrete(4)))
    assert "seed" in caught.value.report
    assert caught.value.report["field"] == {"raises": ""}.get(field, field)


def test_what_cannot_be_evaluated_says_what_to_do(tmp_path: Path) -> None:
    bundle(tmp_path, counting, env=EnvConfig(id="callable:<lambda>"))
    with pytest.raises(ConfigError, match=r"shoal\.load"):
        evaluate(tmp_path, 3)
    with pytest.raises(ConfigError, match="at least 1 episode"):
        evaluate(tmp_path, 0)
    with pytest.raises(RunError):
        evaluate(tmp_path / "nothing")
    policy = load_policy(tmp_path, environment=counting)
    assert evaluate(policy, 2)["episodes"] == 2


def test_atari_is_played_to_the_end_of_the_game_with_its_own_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ale_py")
    from shoal.environments import atari
    from shoal.evaluation import evaluate as module  # noqa: F401

    asked: list[bool] = []
    real = atari.atari_factory

    def watching(*args: Any, training: bool, **kwargs: Any) -> Any:
        asked.append(training)
        return real(*args, training=training, **kwargs)

    bundle(tmp_path, env=EnvConfig(id="ALE/Pong-v5", max_episode_steps=30))
    monkeypatch.setattr(atari, "atari_factory", watching)
    assert evaluate(tmp_path, 2, num_envs=2)["mean_length"] == 30
    assert set(asked) == {False}


class TestVideo:
    @pytest.mark.filterwarnings("ignore::ResourceWarning")  # imageio-ffmpeg's reader leaves its pipes to the collector
    def test_the_first_episode_is_filmed_and_the_result_is_the_same(self, tmp_path: Path) -> None:
        ffmpeg = pytest.importorskip("imageio_ffmpeg")

        def make(render_mode: str | None = None) -> Spaces:
            return counting(render_mode=render_mode)

        bundle(tmp_path, make)
        film = tmp_path / "videos" / "first.mp4"
        assert evaluate(tmp_path, 4, environment=make, video=film) == evaluate(tmp_path, 4, environment=make)
        frames = ffmpeg.read_frames(str(film))
        meta = next(frames)
        seed = int(stream(0, Purpose.EVALUATION, index=0).integers(2**31))
        first = make()
        first.reset(seed=seed)
        assert (meta["size"], meta["fps"]) == ((22, 16), 10)
        assert len(list(frames)) == first.left + 1

    def test_an_environment_that_renders_nothing_is_named(self, tmp_path: Path) -> None:
        pytest.importorskip("imageio_ffmpeg")
        bundle(tmp_path, counting)
        with pytest.raises(ConfigError, match="rgb_array"):
            evaluate(tmp_path, 1, environment=lambda: Spaces(VECTOR, spaces.Discrete(4)), video=tmp_path / "x.mp4")
        with pytest.raises(ConfigError, match=r"\.mp4"):
            evaluate(tmp_path, 1, environment=counting, video=tmp_path / "x.gif")

    def test_without_the_package_the_command_that_installs_it_is_given(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bundle(tmp_path, counting)
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
        with pytest.raises(ConfigError, match="pip install imageio-ffmpeg"):
            evaluate(tmp_path, 1, environment=counting, video=tmp_path / "x.mp4")
