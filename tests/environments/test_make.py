"""From names to environments; what is wrong with a name is said with the nearest one or the command that installs it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from environment_fakes import Walk

from shoal.config import EnvConfig
from shoal.environments import choose_form, environment_factory, environment_spec, make_group, probe
from shoal.errors import ConfigError, EnvironmentFault
from shoal.types import EnvironmentGroup


def test_gymnasium_ids_take_their_kwargs():
    env = environment_factory(EnvConfig(id="Pendulum-v1", kwargs={"g": 3.0}))()
    assert env.unwrapped.g == 3.0


def test_a_file_and_a_module_lead_to_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = (
        "import gymnasium\ndef make(length=5):\n    env = gymnasium.make('CartPole-v1')\n    env.unwrapped.mark = length\n    return env\n"
    )
    (tmp_path / "my_environments.py").write_text(source)
    env = environment_factory(EnvConfig(id=f"{tmp_path}/my_environments.py:make", kwargs={"length": 9}))()
    assert env.unwrapped.mark == 9
    monkeypatch.syspath_prepend(str(tmp_path))
    assert environment_factory(EnvConfig(id="my_environments:make"))().unwrapped.mark == 5


def test_a_module_may_register_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "registers_walk.py").write_text(
        "import gymnasium\ngymnasium.register('RegisteredWalk-v0', entry_point='environment_fakes:Walk', max_episode_steps=2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    env = environment_factory(EnvConfig(id="registers_walk:RegisteredWalk-v0"))()
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("CartPol-v1", "did you mean CartPole-v1"),
        ("cartpole-v1", "did you mean CartPole-v1"),
        ("LunarLander-v2", "LunarLander-v3"),
        ("", "is empty"),
        ("nowhere.py:make", "no file"),
        ("no_such_module:make", "no_such_module"),
        ("no_such_module:CartPole-v1", "no_such_module"),
        ("shoal.config:EnvConfi", "EnvConfig"),
        ("shoal.config:BUILT_IN", "function or class"),
    ],
)
def test_an_unknown_environment_is_a_configuration_error_that_helps(env_id, message):
    with pytest.raises(ConfigError, match=message):
        environment_factory(EnvConfig(id=env_id))


def test_wrong_kwargs_are_a_configuration_error():
    with pytest.raises(ConfigError, match="gravty"):
        environment_factory(EnvConfig(id="CartPole-v1", kwargs={"gravty": 1}))()


def test_a_type_error_inside_the_users_factory_is_not_blamed_on_the_configuration():
    def factory(size=1):
        return len(size)

    with pytest.raises(EnvironmentFault, match="has no len"):
        environment_spec(EnvConfig(id="fake", kwargs={"size": 3}), factory)


@pytest.mark.parametrize(("env_id", "module", "extra"), [("LunarLander-v3", "Box2D", "box2d"), ("HalfCheetah-v5", "mujoco", "mujoco")])
def test_a_missing_extra_is_named_with_its_command(env_id, module, extra, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == module or name.startswith(f"gymnasium.envs.{module.lower()}")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'shoal\[{extra}\]'"):
        environment_factory(EnvConfig(id=env_id))()


def test_a_missing_emulator_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ConfigError, match=r"pip install 'shoal\[atari\]'"):
        environment_factory(EnvConfig(id="ALE/Pong-v5"))


def test_the_render_mode_goes_where_it_is_taken():
    assert environment_factory(EnvConfig(id="CartPole-v1"), render_mode="rgb_array")().render_mode == "rgb_array"
    assert isinstance(environment_factory(EnvConfig(id="fake"), Walk, render_mode="rgb_array")(), Walk)


def test_groups_of_every_form_keep_the_same_interface():
    for form in ("python", "threads", "native"):
        group: EnvironmentGroup = make_group(EnvConfig(id="CartPole-v1", form=form), 0, 2, 0)
        for name in ("restore", "observe", "step", "cursor", "snapshots", "give_up", "close"):
            assert callable(getattr(group, name))
        assert group.num_envs == 2
        assert group.spec.name == "CartPole-v1"
        group.close()


def test_probe_measures_and_auto_chooses_threads_only_for_environments_that_wait():
    found = probe(EnvConfig(id="CartPole-v1"), num_steps=50, seconds=60.0)
    assert found.num_steps == 50
    assert found.step_wall_us > 0
    assert found.step_cpu_us > 0
    assert found.reset_cpu_us > 0
    assert not found.waits
    assert choose_form(EnvConfig(id="CartPole-v1"), found) == "python"
    assert choose_form(EnvConfig(id="CartPole-v1", form="native"), found) == "native"

    class Sleeps(Walk):
        def step(self, action):
            time.sleep(0.003)
            return super().step(action)

    waiting = probe(EnvConfig(id="fake"), Sleeps, num_steps=20, seconds=60.0)
    assert waiting.waits
    assert choose_form(EnvConfig(id="fake"), waiting) == "threads"
    assert waiting.to_json()["spec"]["name"] == "fake"


def test_probe_plays_by_the_mask():
    class Strict(Walk):
        def reset(self, **given):
            return super().reset(**given)[0], {"action_mask": np.array([0, 0, 1], np.int8)}

        def step(self, action):
            assert action == 1
            return (*super().step(action)[:4], {"action_mask": np.array([0, 0, 1], np.int8)})

    assert probe(EnvConfig(id="fake"), Strict, num_steps=30, seconds=60.0).num_steps == 30


def test_probe_raises_the_fault_that_training_would_meet():
    class Fails(Walk):
        def step(self, action):
            raise RuntimeError("no licence")

    with pytest.raises(EnvironmentFault, match="no licence"):
        probe(EnvConfig(id="fake"), Fails)

    class FailsAtReset(gymnasium.Env):
        observation_space, action_space = Walk.observation_space, Walk.action_space

        def reset(self, *, seed=None, options=None):
            raise RuntimeError("no port")

    with pytest.raises(EnvironmentFault, match="no port"):
        probe(EnvConfig(id="fake"), FailsAtReset)
