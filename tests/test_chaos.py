"""`shoal chaos`: faults that come, what is made of them, and how it is counted."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from click.testing import CliRunner
from gymnasium import spaces

import shoal.chaos
from shoal.chaos import Stretches, chaos, recoveries
from shoal.cli.chaos import Duration
from shoal.cli.main import cli
from shoal.cli.report import print_chaos
from shoal.config import EnvConfig
from shoal.engines import environment_faults
from shoal.environments.chaotic import spoil
from shoal.environments.instance import offered_snapshot_bytes
from shoal.environments.make import make_group
from shoal.errors import ConfigError
from shoal.monitoring.live import SilentView
from shoal.monitoring.store import RunReader
from shoal.supervision.injector import Injection, Injector


def test_a_training_under_all_faults_balances_and_learns_the_same(tmp_path, monkeypatch):
    """It goes on until a fault of each kind was sent and the two whose mending is told were mended, and no fault is sent before three updates were
    made since the one before it (all groups have made a rollout then): how busy the machine is changes how long that takes, and nothing else."""
    monkeypatch.setattr(environment_faults, "EARLY_SECONDS", 0.0)
    monkeypatch.setattr(shoal.chaos, "EARLY_SECONDS", 0.0)
    kinds = ("kill", "nan", "stop", "slow", "learner")
    sent: list[str] = []
    updates = sent_at = 0

    class InTurn(Injector):
        def _inject(self, kind: str) -> bool:
            nonlocal sent_at
            if kind != kinds[len(sent) % len(kinds)] or updates < sent_at + 3 or not super()._inject(kind):
                return False
            sent.append(kind)
            sent_at = updates
            return True

    class UntilMended(Stretches):
        def __call__(self, facts: Any) -> bool:
            nonlocal updates
            updates += 1
            goes_on = super().__call__(facts)
            return goes_on or len(sent) < len(kinds) or not mended()

    def mended() -> bool:
        with RunReader(tmp_path / "run" / "run.db") as reader:
            back = {(event["role"], event["after"]) for event in reader.events("recovered")}
        return {("actor", "killed by SIGKILL"), ("group", "not_finite")} <= back

    monkeypatch.setattr(shoal.chaos, "Injector", InTurn)
    monkeypatch.setattr(shoal.chaos, "Stretches", UntilMended)
    settings: dict[str, Any] = {
        "sampling": {"groups": 2, "group_size": 2, "rollout_length": 32}, "policy": {"hidden_sizes": [8]}, "seed": 3, "preset": "none",
        "algorithm": {"name": "ppo", "minibatch_size": 64, "epochs": 1}, "actors": 2, "run_dir": str(tmp_path / "run"),
        "env": {"kwargs": {"step_seconds": 0.0005}}, "checkpoint": {"every_updates": 10},
    }  # fmt: skip
    target = f"{Path(__file__).parent / 'engines' / 'walls.py'}:Wall"
    found = chaos(target, dict.fromkeys(kinds, 0.3), 3.0, progress=SilentView(io.StringIO()), **settings)
    assert found["ok"], found
    assert (found["balances"], found["weights_equal"]) == (True, True)
    assert all(found["faults"][kind]["injected"] >= 1 for kind in kinds)
    assert found["faults"]["kill"]["recovered"] >= 1
    assert found["faults"]["nan"]["recovered"] >= 1
    assert found["restarts"] >= 2
    assert found["seconds"]["faulty"] >= 3.0
    with RunReader(tmp_path / "run" / "run.db") as reader:
        assert reader.events("warning") == []


def test_a_run_that_is_not_to_be_compared_is_not_executed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shoal.chaos, "replay", None)
    small = (
        "--sampling.groups 1 --sampling.group-size 2 --policy.hidden-sizes 8 --preset none --algorithm ppo --algorithm.epochs 1 --actors 1"
    )
    words = ["chaos", "CartPole-v1", "--kill", "5s", "--seconds", "0.5", "--no-compare", "--json", *small.split()]
    done = CliRunner().invoke(cli, [*words, "--run-dir", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["balances"], found["weights_equal"], found["ok"]) == (True, None, True)


def test_stretches_take_turns_and_steps_count_where_they_were_trained():
    now = 0.0
    stretches = Stretches(6.0, 3.0, clock=lambda: now)
    assert not stretches.faulty
    goes_on, faulty = [], []
    for second in range(1, 14):
        now = float(second)
        goes_on.append(stretches({"update": second, "env_steps": 100 * second}))
        faulty.append(stretches.faulty)
    assert faulty == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3 + [False]
    assert goes_on == [True] * 12 + [False]
    assert stretches.seconds == {False: 6.0, True: 6.0}
    assert stretches.steps == {False: 600, True: 600}
    assert stretches.running_seconds == 12.0


def test_what_a_roll_back_undid_was_made_all_the_same():
    now = 0.0
    stretches = Stretches(6.0, 3.0, clock=lambda: now)
    for second, update in enumerate([1, 2, 3, 4, 5, 3, 4], 1):
        now = float(second)
        stretches({"update": update, "env_steps": 100 * update})
    assert stretches.steps == {False: 300, True: 300}
    assert stretches.speed(True) == 100.0


def test_a_kind_that_never_came_has_a_row_and_a_warning(tmp_path, capsys):
    settings: dict[str, Any] = {
        "sampling": {"groups": 1, "group_size": 2, "rollout_length": 32}, "policy": {"hidden_sizes": [8]}, "preset": "none",
        "actors": 1, "run_dir": str(tmp_path / "run"),
    }  # fmt: skip
    found = chaos("CartPole-v1", {"kill": 1e6}, 0.2, compare=False, progress=SilentView(io.StringIO()), **settings)
    assert found["faults"] == {"kill": {"injected": 0, "recovered": 0, "p50": None, "p99": None, "max": None}}
    print_chaos({**found, "faults": {**found["faults"], "slow": {**found["faults"]["kill"], "injected": 3}}})
    said = capsys.readouterr().out
    assert "never injected: kill;" in said
    assert "not missed" in said


def event(role: str, index: int, time: float, seconds: float, restoring: float = 0.0, after: str = "killed by SIGKILL") -> dict[str, Any]:
    return {"role": role, "index": index, "time": time, "seconds": seconds, "restoring_seconds": restoring, "after": after}


def test_a_recovery_lasts_from_the_injection_or_of_a_stop_from_its_detection():
    events = [
        event("actor", 1, 9.0, 0.1),
        event("actor", 0, 10.9, 0.4, 0.2),
        event("group", 3, 11.0, 0.3, after="not_finite"),
        event("actor", 1, 11.5, 0.6),
    ]
    assert recoveries([Injection("kill", "actor", 0, 10.0)], events) == pytest.approx(
        {"injected": 1, "recovered": 1, "p50": 0.7, "p99": 0.7, "max": 0.7}
    )
    assert recoveries([Injection("stop", "actor", 1, 10.0)], events)["p50"] == pytest.approx(0.6)
    assert recoveries([Injection("nan", "actor", 1, 10.0)], events)["p50"] == pytest.approx(0.3)
    nobody = {"injected": 1, "recovered": 0, "p50": None, "p99": None, "max": None}
    assert recoveries([Injection("slow", "actor", 0, 10.0)], events) == nobody
    assert recoveries([Injection("kill", "actor", 2, 10.0)], events) == nobody


def test_a_nan_takes_the_place_of_one_number_and_of_no_other():
    given = {"camera": np.zeros((2, 2), np.uint8), "place": (3, np.ones(2, np.float32))}
    spoiled = spoil(given)
    assert np.isnan(spoiled["place"][1][0])
    assert spoiled["place"][1][1] == 1
    assert given["place"][1][0] == 1
    assert spoil({"camera": np.zeros(3, np.uint8), "gear": 2}) is None


class Saving(gymnasium.Env[Any, Any]):
    """Counts; offers snapshots, so it is wrapped without losing them."""

    observation_space = spaces.Box(-1e9, 1e9, (1,), np.float32)
    action_space = spaces.Discrete(2)
    snapshot_bytes = 8

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def snapshot(self) -> bytes:
        return bytes(8)

    def restore_snapshot(self, data: bytes) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1, np.float32), {}


def test_what_is_wrapped_keeps_its_snapshots_and_its_time_limit(tmp_path):
    from shoal.environments.chaotic import ChaoticFactory, make_flags

    make_flags(tmp_path / "flags")
    env = EnvConfig(id="test_chaos:Saving", max_episode_steps=3)
    create = ChaoticFactory(env, tmp_path / "flags")
    assert offered_snapshot_bytes(create()) == offered_snapshot_bytes(Saving())
    group = make_group(env, 0, 1, 0, create)
    assert group.spec.snapshot_bytes > 0


@pytest.mark.parametrize(("text", "seconds"), [("5s", 5.0), ("500ms", 0.5), ("2m", 120.0), ("7", 7.0), ("1.5h", 5400.0)])
def test_times_are_written_with_their_unit(text, seconds):
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "soon", "0s", "-1s", "5 parsecs"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(Exception, match="is no time"):
        Duration().convert(text, None, None)


@pytest.mark.parametrize(
    ("every", "settings", "words"),
    [
        ({}, {}, "kind of fault"),
        ({"kill": 5.0}, {"actors": 0}, "--actors 1"),
        ({"kill": 5.0}, {"engine": "ray"}, "give --engine local"),
        ({"kill": 5.0}, {"engine": "ray", "actors": 2}, "give --engine local"),
        ({"kill": 5.0}, {"engine": "ray", "ray.actors_per_node": 2}, "give --engine local"),
    ],
)
def test_chaos_that_cannot_be_is_refused(every, settings, words):
    with pytest.raises(ConfigError, match=words):
        chaos("CartPole-v1", every, 1.0, **settings)


def test_chaos_that_is_refused_before_it_begins_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="did you mean CartPole"):
        chaos("CartPoel-v1", {"kill": 5.0}, 1.0, run_dir=str(tmp_path / "run"), actors=1, progress=SilentView(io.StringIO()))
    assert list(tmp_path.iterdir()) == []


def test_chaos_on_a_cluster_that_a_file_names_is_refused_too(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("env: {id: CartPole-v1}\nengine: ray\n")
    with pytest.raises(ConfigError, match="give --engine local"):
        chaos(str(file), {"kill": 5.0}, 1.0)
