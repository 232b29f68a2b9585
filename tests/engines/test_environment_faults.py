"""What follows from an environment's fault: the budget, the same in every engine; warnings; snippets; and answers of any length."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import shoal
from shoal.config import RunConfig
from shoal.engines import environment_faults
from shoal.engines.errors_told import describe_error, encoded
from shoal.engines.snippets import with_snippet
from shoal.environments.faults import environment_fault
from shoal.errors import EnvironmentFault
from shoal.monitoring.live import SilentView
from shoal.monitoring.store import RunReader
from shoal.runs import show
from shoal.streams import group_seed
from shoal.supervision.channel import MAX_MESSAGE_BYTES

ZOO = f"{Path(__file__).parents[1] / 'environments' / 'faulty.py'}:make"
HANGS = ("sleeps",)  # faults that only the limit of a call ends
LIMIT_SECONDS = 3.0  # of such a call; others have that of every run, since the machine may stand still for a moment


def train(
    directory: Path, actors: int, updates: int = 4, env: dict[str, Any] | None = None, rollout_length: int = 16, **kwargs: Any
) -> shoal.Run:
    limit = {"step_timeout_seconds": LIMIT_SECONDS} if kwargs.get("fault") in HANGS else {}
    return shoal.train(
        ZOO, env={"kwargs": kwargs, **limit, **(env or {})}, actors=actors, sampling={"groups": 2, "group_size": 2,
        "rollout_length": rollout_length}, stop={"updates": updates}, preset="none", run_dir=str(directory), progress=SilentView(io.StringIO()),
    )  # fmt: skip


def events(run: shoal.Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in show(run.path)["faults"]["newest"] if event["kind"] == kind]


@pytest.fixture
def never_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_faults, "EARLY_SECONDS", -1.0)


@pytest.mark.usefixtures("never_early")
class TestALaterFault:
    def test_is_mended_counted_and_in_the_ledger_and_the_weights_are_those_without_it(self, tmp_path: Path) -> None:
        sound = train(tmp_path / "sound", 0)
        for actors in (0, 1):
            run = train(tmp_path / f"{actors}", actors, fault="raises", hidden=True, marker=str(tmp_path / f"marker{actors}"))
            ledger = run.result["ledger"]
            assert ledger["dropped"] == {"environment_fault": ledger["produced"] - ledger["trained"]}
            assert run.result["restarts"] == 1
            assert run.result["weights_sha256"] == sound.result["weights_sha256"]
            (event,) = events(run, "environment_fault")
            assert (event["report"]["count"], event["report"]["budget"]) == (1, 10)
            assert "1 of 10 times" in event["message"]

    @pytest.mark.parametrize(("fault", "actors"), [("nan", 0), ("sleeps", 0), ("segfaults", 1), ("stops", 1)])
    def test_ends_the_run_once_the_budget_is_spent(self, fault: str, actors: int, tmp_path: Path) -> None:
        with pytest.raises(EnvironmentFault, match=r"this was fault 2, and env\.restart_budget mends 1") as caught:
            train(tmp_path, actors, env={"restart_budget": 1}, fault=fault, hidden=True)
        assert Path(str(caught.value.report["snippet"])).name == "fault-2.py"

    def test_the_snippet_of_a_process_that_died_plays_each_environment_that_may_have_been_it(self, tmp_path: Path) -> None:
        with pytest.raises(EnvironmentFault) as caught:
            train(tmp_path, 1, env={"restart_budget": 0}, fault="exits", hidden=True)
        assert "environment 1: step 5 of its episode, seed" in str(caught.value)
        candidates = caught.value.report["candidates"]
        assert [(one["env"], one["step"], one["last_action"] in (0, 1)) for one in candidates] == [(0, 5, True), (1, 5, True)]
        assert all(f"seed {one['seed']}," in str(caught.value) for one in candidates)
        assert "leaves no traceback" in str(caught.value.report["traceback"])
        text = Path(str(caught.value.report["snippet"])).read_text()
        assert text.count("environment") > 2
        episodes = eval(text.split("EPISODES = ")[1].split("\n\nfor")[0])
        assert [len(played[-1][1]) for played in episodes.values()] == [5, 5]


@pytest.mark.parametrize("snapshots", [False, True])
def test_the_snippet_of_a_vector_form_plays_the_whole_group(snapshots: bool, tmp_path: Path, never_early: None) -> None:
    kwargs = {"fault": "snapshots_raise", "at": 2} if snapshots else {"fault": "nan", "at": 5}
    with pytest.raises(EnvironmentFault) as caught:
        shoal.train(
            ZOO.replace(":make", ":vector"), env={"kwargs": kwargs, "form": "native", "restart_budget": 0}, actors=0, preset="none",
            sampling={"groups": 2, "group_size": 2, "rollout_length": 16}, run_dir=str(tmp_path), progress=SilentView(io.StringIO()),
        )  # fmt: skip
    done = subprocess.run([sys.executable, str(caught.value.report["snippet"])], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert ("cannot be saved now" if snapshots else "the observation is not finite") in done.stderr
    assert str(caught.value).splitlines()[0] in done.stderr


def test_a_vector_form_that_ends_its_process_is_told_with_the_seed_that_it_was_reset_with(tmp_path: Path, never_early: None) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        shoal.train(
            ZOO.replace(":make", ":vector"), env={"kwargs": {"fault": "exits"}, "form": "native", "restart_budget": 0}, actors=1, preset="none",
            sampling={"groups": 1, "group_size": 2, "rollout_length": 16}, run_dir=str(tmp_path), progress=SilentView(io.StringIO()),
        )  # fmt: skip
    assert f"environment 1: step 5 of its episode, seed {group_seed(0, 0, 0)}" in str(caught.value)


@pytest.mark.usefixtures("never_early")
def test_a_hang_in_one_process_is_a_hang_with_its_limit(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"step\(\) has not returned for \d+\.\d s") as caught:
        train(tmp_path, 0, env={"restart_budget": 0}, fault="sleeps", hidden=True)
    assert {"kind": "hang", "expected": "at most 3 s"}.items() <= caught.value.report.items()
    assert "faulty.py" in str(caught.value.report["traceback"])


@pytest.mark.skipif(not Path("/proc/self/syscall").exists(), reason="the kernel does not say in which call a process stands")
def test_an_environment_that_stops_its_process_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"its process stopped itself \(SIGSTOP\) in step\(\)") as caught:
        train(tmp_path, 1, fault="stops", hidden=True)
    assert caught.value.report["kind"] == "hang"
    assert "environment 1: step 5 of its episode, seed" in str(caught.value)


def test_a_hang_in_close_is_told_by_the_look_and_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"close\(\) has not returned for \d+\.\d s"):
        train(tmp_path / "always", 0, fault="sleeps", where="close")
    run = train(tmp_path / "end", 0, updates=1, rollout_length=5, fault="sleeps", where="close", hidden=True)
    assert run.result["updates"] == 1
    (found,) = events(run, "warning")
    assert re.search(r"close\(\) has not returned for \d+\.\d s", found["message"]) is not None


@pytest.mark.usefixtures("never_early")
def test_a_hang_among_environments_that_act_on_their_own_is_told_in_full(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        shoal.train(
            ZOO, env={"kwargs": {"fault": "sleeps", "hidden": True}, "form": "threads", "step_timeout_seconds": LIMIT_SECONDS, "restart_budget": 0}, actors=1,
            algorithm="appo", sampling={"groups": 2, "group_size": 2, "rollout_length": 16}, preset="none", run_dir=str(tmp_path),
            progress=SilentView(io.StringIO()),
        )  # fmt: skip
    report = caught.value.report
    assert {"kind": "hang", "environment": ZOO, "step": 5, "expected": "at most 3 s"}.items() <= report.items()
    assert report["last_action"] in (0, 1)
    assert report["hint"]
    assert "faulty.py" in str(report["traceback"])
    assert "allowed are 3 s" in str(report["actual"])


def test_a_value_outside_of_its_box_and_a_seed_that_does_not_repeat_are_said_once(tmp_path: Path) -> None:
    (found,) = events(train(tmp_path / "range", 0, fault="range"), "warning")
    assert "its space says -1 to 1" in found["message"]
    (found,) = events(train(tmp_path / "unseeded", 0, fault="unseeded"), "warning")
    assert "for the same seed" in found["message"]
    assert not events(train(tmp_path / "sound", 0), "warning")


def test_an_episode_without_end_is_said_and_evaluated_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_faults, "LONG_EPISODE", 40)
    run = train(tmp_path, 0, fault="endless")
    (found,) = events(run, "warning")
    assert "env.max_episode_steps" in found["message"]
    assert shoal.evaluate(run, episodes=2, max_episode_steps=30)["mean_length"] == 30
    monkeypatch.setattr(sys.modules["shoal.evaluation.evaluate"], "ENDLESS_STEPS", 50)
    with pytest.raises(EnvironmentFault, match="has not ended after 50 steps"):
        shoal.evaluate(run, episodes=2)


def test_an_observation_space_that_no_message_holds_is_trained_on(tmp_path: Path) -> None:
    run = train(tmp_path, 1, updates=1, fault="wide")
    with RunReader(run.path / "run.db") as reader:
        assert len(str(reader.meta()["spec"])) > MAX_MESSAGE_BYTES


def test_whatever_an_environment_raises_fits_into_one_message() -> None:
    for text in ("\x00" * 10**6, "é" * 10**6):
        error = ValueError(text)
        fault = environment_fault(
            "raised", f"step() raised {error}", environment="e", group=0, env=0, step=0, seed=0, last_action=np.zeros(10**6), error=error
        )
        assert len(encoded(describe_error(fault))) < MAX_MESSAGE_BYTES
        assert len(encoded(describe_error(error))) < MAX_MESSAGE_BYTES


def test_a_snippet_of_many_numbers_keeps_them_in_a_file_beside_it(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"env": {"id": "CartPole-v1"}})
    fault = environment_fault("raised", 'it said """no"""\\', environment="CartPole-v1", group=0, env=0, step=0, seed=0)
    told = with_snippet(fault, config, tmp_path, {0: [(3, [0] * 50_100)]})
    assert (tmp_path / "faults" / "fault-1.json").exists()
    path = Path(str(told.report["snippet"]))
    shown = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "no fault this time" in shown.stdout


class OutOfRange(gymnasium.Env[Any, Any]):
    """Its observation leaves its bounds at the fourth step of every episode only."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return np.array([0, 9 * (self.count == 4)], np.float32), 0.0, self.count == 8, False, {}


@pytest.mark.parametrize("most", [environment_faults.LOOKED_AT_NUMBERS, 0])
def test_an_observation_out_of_its_bounds_is_told_once_whichever_row_it_is_in(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment_faults, "LOOKED_AT_NUMBERS", most)
    run = shoal.train(
        OutOfRange, actors=0, sampling={"groups": 1, "group_size": 2, "rollout_length": 8}, policy={"hidden_sizes": [4]}, stop={"updates": 10},
        preset="none", run_dir=str(tmp_path), progress=SilentView(io.StringIO()),
    )  # fmt: skip
    (warning,) = events(run, "warning")
    assert "observation[1] was 9 in group 0" in warning["message"]
