"""What `import shoal` offers: a user's own objects, callbacks, ends, resuming, and scripts as people write them."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import shoal
import shoal.runs
from rollout_fakes import Drift
from shoal.config import AlgorithmConfig
from shoal.errors import ConfigError, RunError
from shoal.monitoring.live import SilentView
from shoal.monitoring.store import RunReader

TINY: dict[str, Any] = {
    "actors": 0,
    "preset": "none",
    "sampling": {"groups": 2, "group_size": 2, "rollout_length": 8},
    "policy": {"hidden_sizes": [8]},
}
PPO = {"name": "ppo", "minibatch_size": 16, "epochs": 1}
BATCH = 2 * 2 * 8


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(target: Any = Drift, **settings: Any) -> shoal.Run:
    return shoal.train(target, progress=SilentView(io.StringIO()), **{**TINY, "algorithm": PPO, **settings})


def resume(run: Any, **settings: Any) -> shoal.Run:
    return shoal.resume(run, progress=SilentView(io.StringIO()), **settings)


def test_arguments_of_an_environment_that_are_secrets_by_their_names_are_warned_of_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text("import gymnasium\n\ndef make(api_key, tokens):\n    return gymnasium.make('CartPole-v1')\n")
    run = train("asks.py:make", env={"kwargs": {"api_key": "sk-c0ffee", "tokens": 3}}, stop={"updates": 1})
    with RunReader(run.path / "run.db") as reader:
        (said,) = (event["message"] for event in reader.events("warning"))
    assert said.startswith("env.kwargs.api_key: by its name a secret")
    assert b"c0ffee" not in (run.path / "run.db").read_bytes()


# ---- callbacks -------------------------------------------------------------------------------------------------------
def test_each_callback_is_called_after_each_update_and_false_ends_the_run():
    seen: list[dict[str, Any]] = []
    also: list[int] = []

    def until_three(facts: Any) -> Any:
        seen.append(dict(facts))
        return facts["update"] < 3 or False

    run = train(callbacks=[until_three, lambda facts: also.append(facts["update"])], stop={"updates": 9})
    assert [facts["update"] for facts in seen] == also == [1, 2, 3]
    assert run.result["reason"] == "interrupted"
    assert {"update", "env_steps", "seconds", "mean_return", "episodes", "value_loss", "approx_kl"} <= set(seen[0])
    assert not any(name.startswith("lag/") for name in seen[0])
    assert seen[-1]["env_steps"] == 3 * BATCH
    ended = [episode for facts in seen for episode in facts["episodes"]]
    assert ended
    assert all(3 <= episode.num_steps <= 9 for episode in ended)


@pytest.mark.parametrize("answer", [None, 0, True, ""])
def test_any_other_answer_of_a_callback_lets_the_run_go_on(answer):
    assert train(callbacks=[lambda facts: answer], stop={"updates": 2}).result["reason"] == "updates"


# ---- ends ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stop", "reason", "updates"),
    [
        ({"updates": 3}, "updates", 3),
        ({"env_steps": BATCH * 2}, "env_steps", 2),
        ({"env_steps": BATCH * 2 + 1}, "env_steps", 3),
        ({"seconds": 1e-9}, "seconds", 1),
        ({"return": -1e9}, "return", None),
    ],
)
def test_a_run_ends_by_the_condition_that_is_met(stop, reason, updates):
    run = train(stop=stop)
    assert run.result["reason"] == reason
    if updates is not None:
        assert (run.result["updates"], run.result["env_steps"]) == (updates, updates * BATCH)
    assert run.result["policy_version"] == run.result["updates"]


# ---- the user's own --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("actors", [0, 1])
def test_a_lambda_is_an_environment(actors):
    limit = 17
    run = train(lambda: gymnasium.make("CartPole-v1", max_episode_steps=limit), actors=actors, stop={"updates": 2})
    assert run.result["updates"] == 2
    assert run.policy().predict([0.0, 0.0, 0.0, 0.0], deterministic=True)[0] in (0, 1)
    assert run.evaluate(episodes=3)["max"] <= limit


class OwnConfig(AlgorithmConfig):
    step: float = 0.5


def own_algorithm() -> Any:
    from shoal.algorithms.base import Algorithm

    class Shift(Algorithm[OwnConfig]):
        """Moves every parameter by a fixed step: what it did is seen in the weights."""

        Config = OwnConfig
        modes = ("sync",)

        def update(self, batch: Any, context: Any) -> dict[str, float]:
            import torch

            with torch.no_grad():
                for parameter in self.policy.parameters():
                    parameter += self.config.step
            return {"moved": self.config.step * (context.update + 1)}

    return Shift


@pytest.mark.parametrize("actors", [0, 1])
def test_a_class_is_an_algorithm(actors):
    seen: list[float] = []
    run = train(
        algorithm={"name": own_algorithm(), "step": 0.25}, actors=actors, callbacks=[lambda f: seen.append(f["moved"])], stop={"updates": 3}
    )
    assert seen == [0.25, 0.5, 0.75]
    again = train(algorithm={"name": own_algorithm(), "step": 0.25}, stop={"updates": 3})
    assert run.result["weights_sha256"] == again.result["weights_sha256"]
    other = train(algorithm={"name": own_algorithm(), "step": 0.5}, stop={"updates": 3})
    assert run.result["weights_sha256"] != other.result["weights_sha256"]


def test_a_callable_is_a_network():
    def network(spec: Any, config: Any) -> Any:
        from torch import nn

        class Trunk(nn.Module):
            num_features = 5

            def __init__(self) -> None:
                super().__init__()
                self.only_mine = nn.Linear(3, 5)

            def forward(self, observation: Any) -> Any:
                return self.only_mine(observation["observation"]).tanh()

        return Trunk()

    run = train(policy={"network": network}, stop={"updates": 1})
    names = [name for name, _ in run.policy().module.named_parameters()] if hasattr(run.policy(), "module") else []
    assert run.result["updates"] == 1
    assert not names or any("only_mine" in name for name in names)


def test_an_object_that_cannot_travel_is_named():
    lock = threading.Lock()

    def factory() -> Any:
        assert lock
        return Drift()

    with pytest.raises(ConfigError, match=r"cannot be sent to other processes: .*lock.* pass a function that makes it, or an import path"):
        train(factory, actors=1, stop={"updates": 1})


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("callbacks", [print, [3], "ab", [print, None]])
def test_callbacks_are_a_list_of_functions(callbacks):
    with pytest.raises(ConfigError, match="callbacks: a list of functions was expected"):
        train(callbacks=callbacks, stop={"updates": 1})


@pytest.mark.parametrize("actors", [0, 1])
def test_a_refused_start_leaves_nothing_that_it_made(actors, tmp_path):
    for settings in ({}, {"run_dir": "new/run"}, {"run_dir": "mine"}):
        Path("mine/logs").mkdir(parents=True, exist_ok=True)
        Path("mine/logs/kept").touch()
        with pytest.raises(ConfigError, match="CartPole"):
            train("CartPole-v9", actors=actors, **settings)
        assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["mine", "mine/logs", "mine/logs/kept"]


def test_what_ran_is_kept_whatever_ends_it():
    def fails(facts: Any) -> None:
        raise ZeroDivisionError if facts["update"] == 2 else None

    with pytest.raises(TypeError):
        train(callbacks=[fails], stop={"updates": 3}, run_dir="mine")
    assert Path("mine/config.yaml").exists()


# ---- loading and resuming --------------------------------------------------------------------------------------------
def test_a_run_is_found_again_with_its_result_configuration_and_policy():
    run = train(stop={"updates": 2}, run_dir="mine", seed=4)
    again = shoal.load("mine")
    assert dict(again.result) == dict(run.result) == json.loads(Path("mine/result.json").read_text())
    assert again.path.resolve() == Path("mine").resolve()
    assert (again.config.seed, again.config.sampling.groups, again.config.stop.updates) == (4, 2, 2)
    action, _ = again.policy().predict([0.1, 0.0, 5.0], deterministic=True)
    assert 0 <= int(action) < 5


def test_what_is_no_run_is_refused():
    for act in (shoal.load, shoal.resume, shoal.replay):
        with pytest.raises(RunError):
            act("nowhere")


def test_a_resumed_run_may_end_otherwise_and_goes_on_where_it_was():
    run = train(stop={"updates": 2}, run_dir="mine")
    resumed = resume("mine", env=Drift, stop={"env_steps": 5 * BATCH})
    assert (resumed.result["reason"], resumed.result["updates"]) == ("env_steps", 5)
    assert resumed.config.stop.updates is None
    assert resumed.result["weights_sha256"] == train(stop={"updates": 5}).result["weights_sha256"]
    assert resumed.path == run.path.resolve() or resumed.path == run.path


def test_a_run_stands_for_its_directory():
    run = train(algorithm=PPO, stop={"updates": 1})
    assert shoal.load(run).path == run.path
    assert shoal.resume(run, stop={"updates": 2}, progress=SilentView(io.StringIO())).result["updates"] == 2
    assert shoal.replay(run, env=Drift)["equal"]


def test_a_run_that_met_its_end_ends_at_once_when_resumed():
    run = train(stop={"updates": 2}, run_dir="mine")
    resumed = resume("mine", env=Drift)
    assert (resumed.result["reason"], resumed.result["updates"]) == ("updates", 2)
    assert resumed.result == run.result == json.loads(Path("mine/result.json").read_text())  # its seconds too
    assert resume("mine", env=Drift, stop={"updates": 3}).result["updates"] == 3


def test_a_damaged_file_of_a_run_is_named_with_what_to_do_and_the_run_goes_on_without_it():
    train(stop={"updates": 2}, run_dir="mine")
    for name, what in (("run.json", r"run\.json is damaged.*Move it away"), ("run.db", r"run\.db.*Move it away")):
        whole = Path("mine", name).read_bytes()
        Path("mine", name).write_bytes(b'{"run_id": ' + bytes(500))
        with pytest.raises(RunError, match=what):
            resume("mine", env=Drift, stop={"updates": 3})
        shown = shoal.runs.show("mine")
        assert (shown["results"]["updates"], bool(shown["warnings"])) == (2, name == "run.db")
        Path("mine", name).write_bytes(whole)
    Path("mine/run.json").unlink()
    Path("mine/run.db").unlink()
    ledger = resume("mine", env=Drift, stop={"updates": 3}).result["ledger"]
    assert ledger == {"produced": 3 * BATCH, "trained": 3 * BATCH, "dropped": {}, "in_flight": 0}


@pytest.mark.parametrize("damaged", ["", '{"reason": "upd', "[]", "{}"])
def test_a_damaged_result_is_none_and_blocks_nothing(damaged):
    train(stop={"updates": 1}, run_dir="mine")
    Path("mine/result.json").write_text(damaged)
    with pytest.warns(RuntimeWarning, match=r"result\.json is damaged"):
        assert shoal.load("mine", env=Drift).evaluate(episodes=1)["episodes"] == 1
    assert "result.json is damaged" in shoal.runs.show("mine")["warnings"][0]
    with pytest.warns(RuntimeWarning, match=r"result\.json is damaged"):
        assert resume("mine", env=Drift, stop={"updates": 2}).result["updates"] == 2


def test_a_profile_that_is_refused_costs_nothing_else():
    Path("mine/profile.json").mkdir(parents=True)
    assert train(stop={"updates": 1}, run_dir="mine", profile=True).result["updates"] == 1
    Path("yours").mkdir()
    Path("yours/profile").touch()
    assert train(stop={"updates": 1}, run_dir="yours", profile=True).result["updates"] == 1
    for name, says in (("mine", "profile.json could not be written (cannot write"), ("yours", "there will be no profile.json: ")):
        (warning,) = (event for event in shoal.runs.show(name)["faults"]["newest"] if event["kind"] == "warning")
        assert warning["message"].startswith(says)


def test_a_run_without_a_checkpoint_begins_again_and_says_so():
    run = train(stop={"updates": 2}, run_dir="mine")
    shutil.rmtree("mine/checkpoints")
    resumed = resume("mine", env=Drift)
    warning, event = shoal.runs.show("mine")["faults"]["newest"]
    assert warning["message"] == "this run has no checkpoint: it begins again from the start"
    assert (event["kind"], event["update"], event["updates_undone"]) == ("resumed", 0, 2)
    assert resumed.result["weights_sha256"] == run.result["weights_sha256"]
    assert resumed.result["ledger"] == {"produced": 4 * BATCH, "trained": 2 * BATCH, "dropped": {"rolled_back": 2 * BATCH}, "in_flight": 0}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 9}, "seed was 0"),
        ({"policy": {"hidden_sizes": [9]}}, "policy.hidden_sizes was"),
        ({"sampling": {"groups": 3}}, "sampling.groups was"),
        ({"algorithm": {"learning_rate": 0.5}}, "algorithm.learning_rate was"),
        ({"max_policy_lag": 9}, "max_policy_lag was"),
    ],
)
def test_what_the_bits_depend_on_cannot_change_on_the_way(changes, key):
    train(stop={"updates": 1}, run_dir="mine")
    with pytest.raises(ConfigError, match=rf"^{key}.* and cannot become .*; start a new run for it$"):
        resume("mine", env=Drift, **changes)
    assert shoal.load("mine").result["updates"] == 1


def test_where_roles_run_and_when_they_save_may_change():
    train(stop={"updates": 1}, run_dir="mine")
    resumed = resume("mine", env=Drift, actors=1, checkpoint={"keep": 5, "every_updates": 1}, stop={"updates": 3})
    assert resumed.result["updates"] == 3
    assert (resumed.config.actors, resumed.config.checkpoint.keep) == (1, 5)


def test_a_run_that_is_alive_is_not_resumed():
    refused: list[str] = []

    def try_it(facts: Any) -> None:
        try:
            resume("mine", env=Drift)
        except RunError as error:
            refused.append(str(error))

    train(stop={"updates": 1}, run_dir="mine", callbacks=[try_it])
    assert len(refused) == 1


def test_check_looks_at_an_environment():
    report = shoal.check(Drift)
    assert {finding.severity for finding in report.findings} <= {"note", "warning"}


# ---- scripts as people write them ------------------------------------------------------------------------------------
SCRIPT = """
import torch
import gymnasium, shoal
torch.ones(64, 64) @ torch.ones(64, 64)
limit = 20
run = shoal.train(
    lambda: gymnasium.make("CartPole-v1", max_episode_steps=limit), algorithm="ppo", stop={"updates": 2}, actors=2, preset="none",
    **{"sampling.groups": 2, "sampling.group_size": 2, "sampling.rollout_length": 8, "policy.hidden_sizes": [8]},
)
action, state = run.policy().predict([0.0, 0.0, 0.0, 0.0], deterministic=True)
print("made", run.result["updates"], int(action) in (0, 1), __name__)
"""


def test_two_lines_in_a_plain_script_after_the_users_own_torch_work_without_a_main_guard():
    Path("script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["made 2 True __main__"]  # once: nothing imports the script again


@pytest.mark.parametrize("actors", [0, 1])
def test_a_training_runs_in_a_thread(actors):
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(train(actors=actors, stop={"updates": 2}).result))
    thread.start()
    thread.join()
    assert [result["updates"] for result in found] == [2]
