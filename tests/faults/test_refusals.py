"""Configurations that cannot be: code 2, quickly, with the key, what is allowed and what to do; and nothing is left of them."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import shoal
from faults.living import command
from shoal.config import EnvConfig, PolicyConfig, ReplayConfig
from shoal.engines.coordinator import Plan
from shoal.engines.sizes import batch_bytes, check_memory, rollout_bytes
from shoal.environments.make import check_registered
from shoal.environments.spaces import describe
from shoal.errors import ConfigError
from shoal.experience.schema import rollout_schema
from shoal.machine import available_bytes, in_words
from shoal.monitoring.live import SilentView
from shoal.networks.policy import build_policy, named_tensors, policy_size

BOX = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)


class Spaces(gymnasium.Env):  # type: ignore[type-arg]
    """Made to be looked at."""

    def __init__(self, observation: gymnasium.Space = BOX, action: gymnasium.Space = BOX) -> None:  # type: ignore[type-arg]
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["CartPole-v9"], ["env.id 'CartPole-v9'", "did you mean CartPole-v1"]),
        (["CartPole-v1", "--sampling.groups", "1000000000"], ["sampling.groups", "of memory", "are free here"]),
    ],
)
def test_what_only_a_look_shows_is_refused_in_one_line_and_leaves_no_run(args: list[str], parts: list[str], tmp_path: Path) -> None:
    code, out, said = command("train", *args, "--view", "silent", "--json", cwd=tmp_path)
    assert (code, len(said.strip().splitlines())) == (2, 1), said
    assert json.loads(out)["error"]["exit_code"] == 2
    for part in parts:
        assert part in said
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(
    ("env", "settings", "part"),
    [
        ("CartPole-v1", {"policy.hidden_sizes": [1000000, 1000000]}, "policy.hidden_sizes .* weights need .* are free here"),
        ("CartPole-v1", {"policy.hidden_sizes": [2**70]}, "policy.hidden_sizes: no layer can have"),
        ("CartPole-v1", {"policy.exploration": "gsde"}, "policy.exploration: gsde is for continuous actions"),
        ("CartPole-v1", {"policy.encoder": "nature_cnn"}, "policy.encoder: nature_cnn needs a box of two or three dimensions"),
        ("CartPole-v1", {"policy.network": "json:__name__"}, "policy.network: json:__name__ is str, not a callable"),
        ("CartPole-v1", {"env.kwargs": {"gravitas": 3}}, "env.kwargs of CartPole-v1: .*'gravitas'"),
        ("Acrobot-v1", {"env.form": "native"}, "env.form is native, but Acrobot-v1 has no vector form"),
        ("nowhere.at.all:make", {}, "cannot import nowhere.at.all"),
    ],
)
def test_what_cannot_go_with_this_environment_is_refused(
    env: str, settings: dict[str, Any], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^[^\n]*{part}"):
        shoal.train(env, actors=0, progress=SilentView(io.StringIO()), **settings)
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(
    ("factory", "part"),
    [
        (lambda: Spaces(action=gymnasium.spaces.Text(5)), "in its action space, Text"),
        (lambda: Spaces(action=gymnasium.spaces.Dict(a=BOX)), "the action space is Dict"),
        (lambda: Spaces(gymnasium.spaces.Dict(words=gymnasium.spaces.Sequence(BOX))), "in its observation space, words: Sequence"),
        (lambda: 3, "returned int, but a gymnasium.Env was expected"),
    ],
)
def test_an_environment_that_cannot_be_served_is_refused(factory, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        shoal.train(factory, actors=0, progress=SilentView(io.StringIO()))
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("env", "module", "extra"),
    [
        ("Ant-v5", "mujoco", "mujoco"),
        ("LunarLander-v3", "Box2D", "box2d"),
        ("ALE/Pong-v5", "cv2", "atari"),
        ("ALE/Pong-v5", "ale_py", "atari"),
    ],
)
def test_an_extra_that_is_not_installed_is_named_with_the_command(
    env: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("ale_py") is None and module == "cv2":
        pytest.skip("needs the atari extra")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"^env\.id {env} needs .*pip install 'shoal\[{extra}\]'$"):
        check_registered(EnvConfig(id=env))


def test_the_memory_that_is_counted_is_what_a_run_allocates() -> None:
    spec = describe("x", BOX, gymnasium.spaces.Discrete(3))
    config = PolicyConfig(hidden_sizes=[32, 16])
    policy = build_policy(spec, config)
    assert policy_size(spec, config) == sum(tensor.numel() for tensor in named_tensors(policy).values())
    schema = rollout_schema(spec, policy.fields(), 16, 4)
    sparse = sum(schema.views(np.zeros(schema.slot_bytes, np.uint8))[f.name].nbytes for f in schema.fields if f.axis == "final")
    assert rollout_bytes(schema) + sparse <= schema.slot_bytes < rollout_bytes(schema) + sparse + 4096 + 64 * len(schema.fields)
    plan = Plan("sync", 2, 4, 16, 2, 0, 1)
    check_memory(plan, schema, 1000, actors=2)
    free = available_bytes()
    if free is not None:
        with pytest.raises(ConfigError, match=r"sampling\.groups.*policy\.hidden_sizes.*free here"):
            check_memory(plan, schema, free, actors=2)
        check_memory(plan, schema, 1000, actors=2, replay=ReplayConfig())
        with pytest.raises(ConfigError, match=r"the replay \(replay\.capacity_steps 1,000,000,000,000; .* free here"):
            check_memory(plan, schema, 1000, actors=2, replay=ReplayConfig(capacity_steps=10**12))
        check_memory(plan, schema, 1000, actors=2, replay=ReplayConfig(capacity_steps=10**12, capacity_bytes=10**6))
    transitions = batch_bytes(schema, ReplayConfig(n_step=3), 10)
    assert transitions == 10 * (2 * 2 * (4 + 4) + 8 + 36 + 3 * 14), (
        "two observations of two numbers, an action, and the sums of three rewards"
    )
    sequences = batch_bytes(schema, ReplayConfig(sequence_length=5), 10)
    assert sequences == 10 * (6 * 2 * (4 + 4) + 5 * (8 + 36 + 14))
    assert [in_words(n) for n in (0, 1023, 1536, 5 * 2**30, 2**70)] == ["0 B", "1,023 B", "1.5 KiB", "5.0 GiB", "1,048,576.0 PiB"]
