"""Whole runs that learn from a replay: where numbers diverge, memory is short, the replay is lost, and how long their rollouts are."""

from __future__ import annotations

import io
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import shoal
from rollout_fakes import SMALL_DQN, Drift
from shoal.cli.report import print_show
from shoal.config import OffPolicyConfig
from shoal.errors import ConfigError, DivergedError, RunError
from shoal.files import CheckpointDirectory
from shoal.monitoring.live import LineView, SilentView
from shoal.monitoring.store import RunReader
from shoal.runs import show

DQN: dict[str, Any] = {**SMALL_DQN, "seed": 3}


def train(directory: Path, environment: Any, actors: int = 0, **more: Any) -> Any:
    return shoal.train(environment, actors=actors, run_dir=str(directory), progress=SilentView(io.StringIO()), **{**DQN, **more})


class Huge(Drift):
    """After its first steps, rewards whose sum over three steps no float32 holds."""

    made = 0

    def step(self, action: Any) -> Any:
        type(self).made += 1
        observation, _, *ends = super().step(action)
        return (observation, 3e38 if type(self).made > 60 else 1.0, *ends)


@pytest.mark.parametrize("samples_per_insert", [8.0, 2.0], ids=["a step each update", "one every fourth"])
def test_a_run_whose_numbers_diverge_ends_so_also_where_most_updates_make_no_step(samples_per_insert, tmp_path):
    Huge.made = 0
    replay = {"learning_starts": 8, "capacity_steps": 1_000, "samples_per_insert": samples_per_insert}
    sampling = {"groups": 1, "group_size": 1, "rollout_length": 1}
    with pytest.raises(DivergedError, match="not finite in 10 updates in a row"):
        train(tmp_path / "run", Huge, sampling=sampling, replay=replay, stop={"updates": 900})
    newest = CheckpointDirectory(tmp_path / "run" / "checkpoints").newest()
    with RunReader(tmp_path / "run" / "run.db") as reader:
        refused = [event["update"] for event in reader.events("not_finite")]
    assert newest.json("learner")["version"] <= min(refused)  # none is made of what came after


@pytest.mark.parametrize("how", ["interrupted", "whole"])
def test_a_run_that_went_on_without_its_replay_says_that_it_cannot_be_executed_again(how, tmp_path):
    ends = [lambda facts: facts["update"] < 5] if how == "interrupted" else []
    run = train(tmp_path / "run", Drift, checkpoint={"replay": False}, stop={"updates": 9}, callbacks=ends)
    if how == "whole":
        assert shoal.replay(run.path, env=Drift)["equal"]
        return
    assert shoal.replay(run.path, env=Drift)["equal"]  # so far
    run = shoal.resume(run.path, env=Drift, progress=SilentView(io.StringIO()))
    assert run.result["updates"] == 9
    with pytest.raises(RunError, match=r"checkpoint\.replay false.* cannot be replayed from the beginning"):
        shoal.replay(run.path, env=Drift)


class Planes(gymnasium.Env[Any, Any]):
    """Images of as many planes as stacks have, which are none."""

    observation_space = spaces.Box(0, 255, (8, 8, 8), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self._look(), {}

    def _look(self) -> Any:
        return self.np_random.integers(0, 256, (8, 8, 8)).astype(np.uint8)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return self._look(), 1.0, self.count >= 9, False, {}


def test_a_replay_that_does_not_fit_once_its_images_are_seen_ends_the_run_with_the_key(tmp_path, monkeypatch):
    replay = {**DQN["replay"], "capacity_steps": 40_000}
    monkeypatch.setattr("shoal.experience.replay.available_bytes", lambda: 10_000_000)  # as stacks they would take 5 MB, and take 22
    with pytest.raises(ConfigError, match=r"^replay\.capacity_steps 40,000 takes 2\d\.\d MiB of memory, since .* observation to be stacks"):
        train(tmp_path / "run", Planes, replay=replay, stop={"updates": 3})
    run = train(tmp_path / "other", Planes, replay={**replay, "capacity_bytes": 9_000_000}, stop={"updates": 4})
    assert run.result["replay"]["steps"] == run.result["env_steps"]


class Slow(Drift):
    """Takes its time, so that the learner is the faster side."""

    def step(self, action: Any) -> Any:
        time.sleep(0.006)
        return super().step(action)


@pytest.mark.parametrize("algorithm", ["dqn", "r2d2"])
def test_rollouts_are_whole_however_many_versions_pass_while_they_are_made(algorithm, tmp_path):
    sampling = {"groups": 3, "group_size": 2, "rollout_length": 8, "batch_rollouts": 1}
    settings: dict[str, Any] = {"mode": "async", "env": {"form": "python"}, "sampling": sampling, "checkpoint": {}}
    replay = {**DQN["replay"], "samples_per_insert": 1.0, "tolerance": 4.0, "learning_starts": 20}
    if algorithm == "r2d2":
        settings |= {"algorithm": {"name": "r2d2", "batch_size": 4}, "policy": {"hidden_sizes": [8], "memory": "gru", "memory_size": 4}}
        replay |= {"samples_per_insert": 9.0, "sequence_length": 12, "burn_in": 3}

    def rollouts() -> list[list[list[int]]]:
        """Of each that was consumed: versions, and how many rows each of them made."""
        with RunReader(tmp_path / "run" / "run.db") as reader:
            return [entry["versions"] for _, update in reader.consumed() for entry in update if "versions" in entry]

    def many_passed() -> bool:
        """More versions than any rollout of another algorithm is left open for."""
        return max((versions[-1][0] - versions[0][0] for versions in rollouts()), default=0) >= 2

    on = [lambda facts: facts["update"] < 36 or (facts["update"] < 1000 and not many_passed())]  # on a busy machine the learner is slower
    run = train(tmp_path / "run", Slow, actors=3, replay=replay, stop={"updates": 10**6}, callbacks=on, **settings)
    lengths = Counter(sum(rows for _, rows in versions) for versions in rollouts())
    assert many_passed()
    assert set(lengths) == {8}
    assert shoal.replay(run.path, env=Slow)["equal"]


class Alone:
    """What learns from a replay, but is no OffPolicyAlgorithm."""

    Config, modes, remembers = OffPolicyConfig, ("sync",), False

    def learn(self, rows: Any, context: Any) -> Any: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


def test_a_class_that_learns_from_a_replay_without_being_a_subclass_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^algorithm\.name: Alone is a class without update; .* a subclass of shoal\.algorithms\.OffPolicyAlgorithm"
    ):
        train(tmp_path / "run", Drift, algorithm={"name": Alone}, replay={}, stop={"updates": 1})


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "stopped"])
def test_what_a_run_holds_in_its_replay_and_how_old_that_is_stands_in_its_lines_and_is_shown_of_it(ended, tmp_path, capsys):
    said = io.StringIO()
    view = LineView(said, line_seconds=0.0)
    settings = {**DQN, "replay": {**DQN["replay"], "capacity_steps": 160}, "stop": {"updates": 9}}
    run = shoal.train(Drift, actors=0, run_dir=str(tmp_path / "run"), progress=view, **settings)
    view.close()
    facts = run.result["replay"]
    assert (facts["inserted"], facts["capacity_steps"]) == (288, 160)
    assert {name for name, value in facts.items() if not isinstance(value, int)} == {"surplus", "age_updates_mean", "age_steps_mean"}
    held = f"{facts['steps']} of 160"
    last = said.getvalue().splitlines()[-1]
    age = f"age {facts['age_updates_mean']:.1f} updates and {facts['age_steps_mean']:.0f} steps"
    assert f"| replay {held} steps, {facts['sampled'] / 288:.2f} samples for each, {age} |" in last
    assert "ETA" not in said.getvalue().partition("\n")[0], "nobody knows yet how fast it learns"
    if not ended:
        (run.path / "result.json").unlink()  # as of one that was killed
    shown = show(run.path)
    assert shown["replay"] == facts
    assert {row["replayed_share"] for row in shown["ledger"]["groups"].values()} == {1.0}
    print_show(shown)
    lines = [" ".join(text.split()) for text in capsys.readouterr().out.splitlines()]
    assert f"replay {held} env steps held; 288 in, {facts['sampled']} sampled ({facts['sampled'] / 288:.2f} for each)" in lines
    assert any(text.startswith(f"age mean {facts['age_updates_mean']:.1f}, p99 {facts['age_updates_p99']}, max ") for text in lines)


def test_the_advice_of_a_run_that_diverged_is_one_that_it_takes(tmp_path):
    Huge.made = 0
    sampling = {"groups": 1, "group_size": 1, "rollout_length": 1}
    replay = {"learning_starts": 8, "capacity_steps": 1_000, "samples_per_insert": 8.0}
    with pytest.raises(DivergedError, match=r"lower algorithm\.learning_rate or algorithm\.max_gradient_norm, or have a wrapper") as caught:
        train(tmp_path / "run", Huge, sampling=sampling, replay=replay, stop={"updates": 900})
    assert "policy." not in str(caught.value)
