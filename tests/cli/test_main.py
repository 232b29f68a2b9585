"""What each command hands on, what it prints where, and what it ends with."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.cli import main
from shoal.cli.output import find_run, plain
from shoal.errors import ConfigError, DivergedError, EnvironmentFault, ProcessError, RunError


@dataclass
class FakeRun:
    path: Path = Path("runs/x")
    result: dict[str, Any] = field(default_factory=lambda: {"run": "runs/x", "reason": "return", "mean_return": math.nan})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Every call of shoal.train, instead of a training."""
    made: list[tuple[Any, dict[str, Any]]] = []

    def train(target: str, **settings: Any) -> FakeRun:
        made.append((target, settings))
        os.write(1, b"an environment prints\n")
        print("a library prints")
        return FakeRun()

    monkeypatch.setattr(shoal, "train", train)
    return made


def ends_with(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    return int(caught.value.code or 0)


def test_train_hands_on_its_settings_and_ends_with_zero(calls: list[Any]) -> None:
    assert ends_with("train", "CartPole-v1", "--seed", "3", "--stop.env-steps", "1e6", "--env.kwargs.g", "-3", "--view", "silent") == 0
    ((target, settings),) = calls
    assert target == "CartPole-v1"
    settings.pop("progress").close()
    assert settings == {"seed": "3", "stop.env_steps": "1e6", "env.kwargs.g": "-3", "profile": False}


def test_which_preset_was_taken_is_said(calls: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    ends_with("train", "CartPole-v1", "--actors", "1")
    assert "CartPole-v1: ppo (sync), preset CartPole-v1, seed 0, 1 actor, " in capfd.readouterr().err
    ends_with("train", "Blackjack-v1", "--actors", "0")
    assert "no preset for it, seed 0, all in this process" in capfd.readouterr().err
    ends_with("train", "CartPole-v1", "--actors", "0", "--preset", "none")
    assert "(sync), no preset, seed 0" in capfd.readouterr().err
    ends_with("train", "CartPole-v1", "--actors", "0", "--algorithm", "td3")
    assert "CartPole-v1: td3 (sync), preset CartPole-v1 (which has nothing for td3 alone), seed 0" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "variable", "said"),
    [
        ((), "", "on a local Ray"),
        ((), "h:6379", "on all nodes of a cluster"),
        (("--address", "h:6379"), "", "on all nodes of a cluster"),
        (("--address", "h:6379", "--nodes", "1"), "", "on 1 node of a cluster"),
        (("--address", "h:6379", "--nodes", "2"), "", "on 2 nodes of a cluster"),
    ],
)
def test_where_on_a_cluster_a_run_is_placed_is_said(
    given: tuple[str, ...], variable: str, said: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    ends_with("train", "CartPole-v1", "--engine", "ray", *given)
    assert f", seed 0, {said}, " in capfd.readouterr().err


def test_with_json_standard_output_holds_one_object_whatever_else_prints(calls: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert ends_with("train", "CartPole-v1", "--json") == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"run": "runs/x", "reason": "return", "mean_return": None}
    assert "an environment prints" in captured.err
    assert "a library prints" in captured.err


def test_an_interrupted_training_ends_with_130_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shoal, "train", lambda *_, **__: FakeRun(result={"run": "runs/x", "reason": "interrupted"}))
    assert ends_with("train", "CartPole-v1") == 130
    assert "shoal resume runs/x" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x must be y"), 2),
        (EnvironmentFault("x must be y", {"env": 3, "actual": math.inf}), 3),
        (DivergedError("x must be y"), 4),
        (ProcessError("x must be y"), 1),
        (RunError("x must be y"), 1),
        (ValueError("x must be y"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_code_and_one_message(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def train(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(shoal, "train", train)
    assert ends_with("train", "CartPole-v1", "--json", "--view", "silent") == code
    captured = capfd.readouterr()
    said = json.loads(captured.out)["error"]
    assert said["exit_code"] == code
    assert "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    if code == 130:
        assert "interrupted" in captured.err
    else:
        assert "x must be y" in captured.err
        assert "x must be y" in said["message"]
    if code == 3:
        assert said["report"] == {"env": 3, "actual": None}


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shoal, "train", lambda *_, **__: 1 / 0)
    assert ends_with("train", "CartPole-v1", "--debug") == 1
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["train"], "Missing argument 'ENV_OR_CONFIG'"),
        (["train", "CartPole-v1", "--sead", "3"], "did you mean seed?"),
        (["train", "CartPole-v1", "--algorithm", "pppo"], "did you mean ppo?"),
        (["train", "CartPole-v1", "--algorithm.epochs", "-1"], "algorithm.epochs: should be greater than 0, got '-1'"),
        (["train", "CartPole-v1", "--algorithm.gamma", "abc"], "algorithm.gamma: should be a number, got 'abc'"),
        (["train", "CartPole-v1", "--actors", "1.5"], "actors: should be a whole number, got '1.5'"),
        (["train", "CartPole-v1", "--stop.return"], "--stop.return needs a value"),
        (["train", "CartPole-v1", "Acrobot-v1"], "unexpected extra argument"),
        (["train", "CartPole-v1", "--view", "loud"], "'loud' is not one of"),
        (["evaluate", "x", "--episodes", "0"], "--episodes"),
        (["trian"], "No such command 'trian'"),
        (["train", "nothing.yaml"], "nothing.yaml"),
    ],
)
def test_wrong_usage_ends_with_two_and_says_what_is_wrong(args: list[str], part: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert ends_with(*args) == 2
    assert part in capfd.readouterr().err


def test_help_lists_every_key_with_its_default(capfd: pytest.CaptureFixture[str]) -> None:
    assert ends_with("train", "--help") == 0
    text = " ".join(capfd.readouterr().out.split())
    for part in ("--algorithm.learning-rate number > 0", "--stop.return number", "--env.kwargs.NAME value", "Algorithm (impala)", "[0.99]"):
        assert part in text


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["--version"], ["resume", "--help"], ["check", "--help"], ["replay", "--help"]])
def test_help_ends_with_zero(args: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert ends_with(*args) == 0
    assert "shoal" in capfd.readouterr().out


def test_check_ends_with_three_where_something_is_wrong(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    finding = {"severity": "error", "name": "dtype", "message": "float64, not float32", "hint": "cast it"}
    report = {"findings": [finding], "seconds_per_step": 0.001}
    monkeypatch.setattr(shoal, "check", lambda *_, **__: report)
    assert ends_with("check", "CartPole-v1", "--env.kwargs.g", "1") == 3
    assert "dtype: float64, not float32" in capfd.readouterr().out
    finding["severity"] = "warning"
    assert ends_with("check", "CartPole-v1", "--json") == 0
    assert json.loads(capfd.readouterr().out)["findings"][0]["hint"] == "cast it"


def test_evaluate_prints_its_statistics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}

    def evaluate(run: Path, **how: Any) -> dict[str, Any]:
        seen.update(how, run=run)
        return {"episodes": 5, "mean_return": 1.5, "ci95": [1.0, 2.0]}

    monkeypatch.setattr(shoal, "evaluate", evaluate)
    (tmp_path / "config.yaml").write_text("{}")
    assert ends_with("evaluate", str(tmp_path), "--episodes", "5", "--seed", "7", "--json") == 0
    assert seen == {"run": tmp_path, "episodes": 5, "seed": 7, "video": None, "max_episode_steps": None}
    assert json.loads(capfd.readouterr().out)["ci95"] == [1.0, 2.0]
    assert ends_with("evaluate", str(tmp_path)) == 0
    assert "mean_return" in capfd.readouterr().out


def test_a_run_is_found_by_path_by_name_and_as_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="there is no run in runs"):
        find_run("latest")
    for age, name in ((200, "first"), (100, "second")):
        config = tmp_path / "runs" / name / "config.yaml"
        config.parent.mkdir(parents=True)
        config.write_text("{}")
        os.utime(config, (config.stat().st_mtime - age,) * 2)
    assert find_run("latest").resolve() == tmp_path / "runs/second"
    assert find_run("first").resolve() == find_run("runs/first/config.yaml").resolve() == tmp_path / "runs/first"
    with pytest.raises(RunError, match="did you mean second"):
        find_run("secnd")


def test_results_become_plain_json() -> None:
    import numpy as np

    value = {"a": np.float64(1.5), "b": np.arange(2), 3: (math.inf, None, True), "path": Path("x"), "run": FakeRun()}
    assert plain(value) == {
        "a": 1.5,
        "b": [0, 1],
        "3": [None, None, True],
        "path": "x",
        "run": {"path": "runs/x", "result": {"run": "runs/x", "reason": "return", "mean_return": None}},
    }
