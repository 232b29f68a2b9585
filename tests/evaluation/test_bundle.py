"""The policy bundle: what is saved is what predicts, for every kind of observation and action."""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

sys.path.append(str(Path(__file__).parent))
from helpers import Spaces, bundle

from shoal.config import EnvConfig, PolicyConfig
from shoal.environments.spaces import flatten_observation, to_environment_action
from shoal.errors import CheckpointError, ConfigError, RunError, SchemaError
from shoal.evaluation import LoadedPolicy, load_policy
from shoal.files import CheckpointDirectory
from shoal.networks.policy import weights_sha256
from shoal.ops.moments import Moments

OBSERVATIONS = {
    "vector": spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "float64": spaces.Box(-2.0, 2.0, (2, 2), np.float64),
    "image": spaces.Box(0, 255, (36, 40, 3), np.uint8),
    "discrete": spaces.Discrete(5, start=-2),
    "multi_discrete": spaces.MultiDiscrete([3, 4]),
    "multi_binary": spaces.MultiBinary(4),
    "nested": spaces.Dict({"b": spaces.Tuple((spaces.Discrete(3), spaces.Box(-1, 1, (2,), np.float32))), "a": spaces.MultiBinary(2)}),
}
ACTIONS = {
    "discrete": spaces.Discrete(4, start=3),
    "multi_discrete": spaces.MultiDiscrete([3, 2]),
    "multi_binary": spaces.MultiBinary(3),
    "bounded": spaces.Box(np.float32([-2, 0]), np.float32([2, 10])),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,), np.float32),
}


def stack(observations: list[Any]) -> Any:
    """A batch in the form of its elements."""
    first = observations[0]
    if isinstance(first, dict):
        return {key: stack([o[key] for o in observations]) for key in first}
    if isinstance(first, tuple):
        return tuple(stack([o[i] for o in observations]) for i in range(len(first)))
    return np.stack(observations)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_predict_gives_what_the_environment_takes_one_by_one_and_in_batches(tmp_path: Path, observation: str, action: str) -> None:
    env = Spaces(OBSERVATIONS[observation], ACTIONS[action])
    module = bundle(tmp_path, lambda: env)
    policy = load_policy(tmp_path)
    seen = [env.observation_space.sample() for _ in range(5)]
    for deterministic in (True, False):
        single, state = policy.predict(seen[0], deterministic=deterministic)
        assert state is None
        assert env.action_space.contains(single)
        batch, _ = policy.predict(stack(seen), deterministic=deterministic)
        assert len(batch) == 5
        assert all(env.action_space.contains(row) for row in batch)
    batch, _ = policy.predict(stack(seen))
    for i, one in enumerate(seen):
        rows = {name: torch.from_numpy(array[None]) for name, array in flatten_observation(policy.spec, one).items()}
        with torch.inference_mode():
            expected = to_environment_action(policy.spec.action, module.distribution(rows).mode().numpy())[0]
        np.testing.assert_allclose(policy.predict(one)[0], expected, rtol=1e-5)
        np.testing.assert_allclose(batch[i], expected, rtol=1e-4, atol=1e-6)


def test_weights_and_statistics_come_back_bit_for_bit(tmp_path: Path) -> None:
    env = EnvConfig(id="CartPole-v1", kwargs={"sutton_barto_reward": True})
    config = PolicyConfig(normalise_observations=True, hidden_sizes=[8], activation="relu")
    module = bundle(tmp_path / "plain", env=env, config=config, seed=7)
    moments = Moments((4,))
    moments.merge(np.random.default_rng(0).normal(3.0, 2.0, (100, 4)))
    module.set_statistics({"observation": moments})
    from shoal.evaluation import save_bundle
    from shoal.networks.policy import named_tensors

    first = load_policy(tmp_path / "plain")
    save_bundle(tmp_path / "b", {n: t.detach().numpy() for n, t in named_tensors(module).items()}, first.spec, config, env)
    loaded = load_policy(tmp_path / "b")
    assert weights_sha256(loaded.network) == weights_sha256(module) != weights_sha256(first.network)
    assert (loaded.env_config, loaded.policy_config, loaded.spec) == (env, config, first.spec)


def test_drawn_actions_follow_the_generator_given_and_nothing_else(tmp_path: Path) -> None:
    bundle(tmp_path, lambda: Spaces(OBSERVATIONS["vector"], ACTIONS["unbounded"]))
    policy = load_policy(tmp_path)
    observation = np.zeros(3, np.float32)
    before = torch.random.get_rng_state()
    one, two = (policy.predict(observation, deterministic=False, rng=5)[0] for _ in range(2))
    assert (one == two).all()
    rng = np.random.default_rng(5)
    assert (policy.predict(observation, deterministic=False, rng=rng)[0] == one).all()
    assert (policy.predict(observation, deterministic=False, rng=rng)[0] != one).any()
    assert (policy.predict(observation, deterministic=False)[0] != policy.predict(observation, deterministic=False)[0]).any()
    assert torch.equal(before, torch.random.get_rng_state())


def test_state_dependent_exploration_keeps_its_matrix_while_the_state_is_passed_on(tmp_path: Path) -> None:
    bundle(tmp_path, lambda: Spaces(OBSERVATIONS["vector"], ACTIONS["unbounded"]), config=PolicyConfig(exploration="gsde"))
    policy = load_policy(tmp_path)
    observation = np.ones((2, 3), np.float32)
    first, state = policy.predict(observation, deterministic=False)
    again, state = policy.predict(observation, state, deterministic=False)
    other, _ = policy.predict(observation, deterministic=False)
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("exploration", ["gaussian", "gsde"])
def test_a_memory_is_passed_on_from_call_to_call(tmp_path: Path, exploration: Any) -> None:
    config = PolicyConfig(memory="lstm", memory_size=6, exploration=exploration, log_std_init=-3.0, orthogonal_init=False)
    module = bundle(tmp_path, lambda: Spaces(OBSERVATIONS["vector"], ACTIONS["unbounded"]), config=config)
    policy = load_policy(tmp_path)
    rows = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    expected, before = [], module.initial_state(2)
    with torch.inference_mode():
        for row in rows:
            distribution, before = module.next_distribution({"observation": torch.from_numpy(row)}, before)
            expected.append(distribution.mode().numpy())
    for deterministic in (True, False):
        state, states = None, []
        for t, row in enumerate(rows):
            action, state = policy.predict(row, state, deterministic=deterministic)
            np.testing.assert_allclose(action, expected[t], atol=1e-5 if deterministic else 1.0)
            assert state is not None
            states.append(state)
        drawn = [state["noise"] for state in states if "noise" in state]  # gSDE's matrix stays for the episode, beside the memory
        assert len(drawn) == (0 if deterministic or exploration == "gaussian" else len(rows))
        assert all(matrix is drawn[0] for matrix in drawn)
    first, one = policy.predict(rows[0, 1])
    second, _ = policy.predict(rows[1, 1], one)
    np.testing.assert_allclose([first, second], [expected[0][1], expected[1][1]], atol=1e-5)
    with pytest.raises(SchemaError, match=r"state: expected policy_state/h \[2, 6\].*got \[1, 6\]"):
        policy.predict(rows[0], one)
    with pytest.raises(SchemaError, match=r"state: expected policy_state/h \[2, 6\].*got none"):
        policy.predict(rows[0], {"h": np.zeros((2, 6))})


def test_masked_actions_are_never_chosen(tmp_path: Path) -> None:
    mask = np.array([0, 0, 1, 0], np.int8)
    bundle(tmp_path / "info", lambda: Spaces(OBSERVATIONS["vector"], spaces.Discrete(4), mask=mask))
    policy = load_policy(tmp_path / "info")
    batch = np.zeros((6, 3), np.float32)
    for deterministic in (True, False):
        assert policy.predict(batch[0], action_mask=mask, deterministic=deterministic)[0] == 2
        assert (policy.predict(batch, action_mask=np.stack([mask] * 6), deterministic=deterministic)[0] == 2).all()
    assert policy.predict(batch[0])[0] in range(4)
    observation = spaces.Dict({"x": OBSERVATIONS["vector"], "action_mask": spaces.Box(0, 1, (4,), np.int8)})
    bundle(tmp_path / "observation", lambda: Spaces(observation, spaces.Discrete(4)))
    policy = load_policy(tmp_path / "observation")
    assert policy.spec.action_mask == "observation"
    for deterministic in (True, False):
        assert policy.predict({"x": batch[0], "action_mask": mask}, deterministic=deterministic)[0] == 2
        both = {"x": batch[:2], "action_mask": np.stack([mask, mask[::-1]])}
        assert policy.predict(both, deterministic=deterministic)[0].tolist() == [2, 1]


def test_masks_of_several_components_are_given_as_a_tuple_or_flat(tmp_path: Path) -> None:
    bundle(tmp_path, lambda: Spaces(OBSERVATIONS["vector"], spaces.MultiDiscrete([3, 2]), mask=None))
    description = json.loads((tmp_path / "policy.json").read_text())
    description["spec"] |= {"action_mask": "info", "mask_size": 5}
    (tmp_path / "policy.json").write_text(json.dumps(description))
    policy = load_policy(tmp_path)
    parts = (np.array([False, True, False]), np.array([True, False]))
    for mask in (parts, np.concatenate(parts)):
        assert policy.predict(np.zeros(3, np.float32), action_mask=mask, deterministic=False)[0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.zeros(4, np.float32), r"observation/x: expected shape \[3\].*got \[4\]"),
        (np.zeros((2, 2, 3), np.float32), r"expected shape \[3\]"),
        (np.array(["a", "b", "c"]), "expected float32"),
    ],
)
def test_an_observation_that_does_not_fit_is_named(tmp_path: Path, observation: Any, message: str) -> None:
    space = spaces.Dict({"x": OBSERVATIONS["vector"], "y": spaces.Discrete(3)})
    bundle(tmp_path, lambda: Spaces(space, ACTIONS["discrete"]))
    policy = load_policy(tmp_path)
    with pytest.raises(SchemaError, match=message):
        policy.predict({"x": observation, "y": 1})
    with pytest.raises(SchemaError, match="observation/y: expected a part 'y'"):
        policy.predict({"x": np.zeros(3, np.float32)})
    with pytest.raises(SchemaError, match="values that do not fit"):
        policy.predict({"x": np.zeros(3), "y": 1.5})
    with pytest.raises(SchemaError, match="differ in length"):
        policy.predict({"x": np.zeros((2, 3)), "y": np.zeros(3, np.int64)})
    assert policy.predict({"x": [0.0, 1.0, 2.0], "y": 1})[0] in range(3, 7)  # lists and wider floats are taken


def checkpoint(root: Path, update: int, **kwargs: Any) -> Path:
    with CheckpointDirectory(root).begin(update) as staging:
        bundle(staging.path / "policy", lambda: Spaces(OBSERVATIONS["vector"], ACTIONS["discrete"]), **kwargs)
        return staging.commit()


def test_a_policy_is_found_in_a_run_a_checkpoint_and_a_bundle(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run" / "checkpoints", 1, seed=1)
    newest = checkpoint(tmp_path / "run" / "checkpoints", 2, seed=2)
    digests = {
        weights_sha256(load_policy(path).network)
        for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", newest, newest / "policy", str(newest))
    }
    assert len(digests) == 1


def test_a_torn_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoints", 1, seed=1)
    whole = weights_sha256(load_policy(tmp_path).network)
    torn = checkpoint(tmp_path / "checkpoints", 2, seed=2)
    weights = torn / "policy" / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.warns(RuntimeWarning, match="update-000000002 is not whole"):
        assert weights_sha256(load_policy(tmp_path).network) == whole
    with pytest.raises(CheckpointError):
        load_policy(torn)


def test_what_is_no_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run with a checkpoint"):
        load_policy(tmp_path)
    bundle(tmp_path / "b", lambda: Spaces(OBSERVATIONS["vector"], ACTIONS["discrete"]))
    file = tmp_path / "b" / "policy.json"
    description = json.loads(file.read_text())
    for change, message in [
        ({"format": 99}, "bundle format 99"),
        ({"weights_file_sha256": "0"}, "SHA-256"),
        ({"spec": {}}, "does not describe a policy"),
        ({"policy": {"hidden_sizes": [8, 8]}}, "it describes 253 weights, and 9,157 are there"),
        ({"policy": {"unknown": 1}}, "does not describe a policy"),
    ]:
        file.write_text(json.dumps(description | change))
        with pytest.raises(CheckpointError, match=message):
            load_policy(tmp_path / "b")
    file.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_policy(tmp_path / "b")


def test_a_network_given_as_an_object_must_be_given_again(tmp_path: Path) -> None:
    class Trunk(torch.nn.Module):
        num_features = 6

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 6)

        def forward(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.relu(self.layer(observation["observation"]))

    from shoal.environments.make import environment_spec
    from shoal.evaluation import save_bundle
    from shoal.networks.policy import build_policy, named_tensors

    def make() -> Spaces:
        return Spaces(OBSERVATIONS["vector"], ACTIONS["discrete"])

    spec, config = environment_spec(EnvConfig(id="callable:make"), make), PolicyConfig(network="callable:Trunk")
    module = build_policy(spec, config, lambda spec, config: Trunk())
    save_bundle(tmp_path, {n: t.detach().numpy() for n, t in named_tensors(module).items()}, spec, config, EnvConfig(id="callable:make"))
    with pytest.raises(ConfigError, match="give it again"):
        load_policy(tmp_path)
    assert weights_sha256(load_policy(tmp_path, network=lambda spec, config: Trunk()).network) == weights_sha256(module)


def test_loading_and_predicting_leave_torch_as_it_was_and_unpickle_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "checkpoints", 1)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for name in ("set_num_threads", "set_num_interop_threads", "set_default_dtype"):
        monkeypatch.setattr(torch, name, refuse)
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy: LoadedPolicy = load_policy(tmp_path)
        policy.predict(np.zeros(3, np.float32), deterministic=False)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.is_grad_enabled()
    assert not any(parameter.requires_grad for parameter in policy.network.parameters())
