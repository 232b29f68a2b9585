"""The policy: what goes in, what comes out, how it begins, and how its tensors are named."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shoal.config import PolicyConfig
from shoal.errors import ConfigError
from shoal.networks.heads import NoiseSpec
from shoal.networks.policy import Policy, build_policy, named_tensors, weights_sha256
from shoal.ops.moments import Moments
from shoal.types import EnvironmentSpec, FieldSpec, LeafSpec

VECTOR = LeafSpec((), "box", "float32", (4,), low=(-1.0,), high=(1.0,))
IMAGE = LeafSpec((), "box", "uint8", (40, 44, 3), low=(0.0,), high=(255.0,))
TWO = LeafSpec((), "discrete", "int64", (), nvec=(2,), start=(0,))
DICT = (
    LeafSpec(("camera",), "box", "uint8", (8, 9), low=(0.0,), high=(255.0,)),
    LeafSpec(("nested.key", 0), "multi_discrete", "int64", (2,), nvec=(2, 3), start=(0, 5)),
    LeafSpec(("vector",), "box", "float64", (2, 2), low=(-math.inf,), high=(math.inf,)),
)
ACTIONS = {
    "discrete": (TWO, NoiseSpec("uniform", 1), FieldSpec("action", "int64", (), "T"), 2),
    "multi_discrete": (
        LeafSpec((), "multi_discrete", "int64", (2, 1), nvec=(2, 3), start=(0, 0)),
        NoiseSpec("uniform", 2),
        FieldSpec("action", "int64", (2, 1), "T"),
        5,
    ),
    "multi_binary": (LeafSpec((), "multi_binary", "int8", (3,)), NoiseSpec("uniform", 3), FieldSpec("action", "int8", (3,), "T"), 3),
    "box": (
        LeafSpec((), "box", "float64", (2, 2), low=(-1.0,), high=(1.0,)),
        NoiseSpec("normal", 4),
        FieldSpec("action", "float32", (2, 2), "T"),
        0,
    ),
    "box_of_nothing": (
        LeafSpec((), "box", "float32", (), low=(-1.0,), high=(1.0,)),
        NoiseSpec("normal", 1),
        FieldSpec("action", "float32", (), "T"),
        0,
    ),
}


def spec(observation: LeafSpec | tuple[LeafSpec, ...] = VECTOR, action: LeafSpec = TWO) -> EnvironmentSpec:
    return EnvironmentSpec("test", observation if isinstance(observation, tuple) else (observation,), action)


def raw(environment: EnvironmentSpec, n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    fields = {}
    for leaf in environment.observation:
        shape = (n, *leaf.shape)
        if leaf.kind == "box":
            value = rng.integers(0, 256, shape) if leaf.dtype == "uint8" else rng.normal(size=shape)
        elif leaf.kind == "multi_binary":
            value = rng.integers(0, 2, shape)
        else:
            value = np.array(leaf.start).reshape(leaf.shape) + rng.integers(0, np.array(leaf.nvec).reshape(leaf.shape), shape)
        fields[leaf.name("observation")] = torch.from_numpy(value.astype(leaf.dtype))
    return fields


def noise(policy: Policy, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (n, policy.noise.size)
    return torch.rand(shape, generator=generator) if policy.noise.kind == "uniform" else torch.randn(shape, generator=generator)


@pytest.mark.parametrize("observation", [VECTOR, IMAGE, DICT], ids=["vector", "image", "dict"])
@pytest.mark.parametrize("kind", ACTIONS)
def test_every_kind_acts_in_the_stored_form(observation: LeafSpec, kind: str) -> None:
    leaf, noise_spec, field, mask_size = ACTIONS[kind]
    environment = spec(observation, leaf)
    policy = build_policy(environment, PolicyConfig())
    assert policy.noise == noise_spec
    assert policy.fields() == [field, FieldSpec("log_prob", "float32", (), "T")]
    assert policy.initial_state(5) == {}
    with torch.inference_mode():
        mask = torch.ones(5, mask_size, dtype=torch.bool) if mask_size else None
        action, log_prob = policy.act(raw(environment, 5), noise(policy, 5), mask)
        value = policy.value(raw(environment, 5))
    assert action.shape == (5, *leaf.shape)
    assert str(action.dtype) == f"torch.{field.dtype}"
    assert log_prob.shape == value.shape == (5,)
    assert log_prob.dtype == value.dtype == torch.float32


@pytest.mark.parametrize("share", [None, True, False])
@pytest.mark.parametrize("observation", [VECTOR, IMAGE, DICT], ids=["vector", "image", "dict"])
def test_both_at_once_equal_one_at_a_time(observation: LeafSpec, share: bool | None) -> None:
    environment = spec(observation)
    policy = build_policy(environment, PolicyConfig(share_encoder=share))
    distribution, value = policy.distribution_and_value(raw(environment, 3))
    assert torch.equal(value, policy.value(raw(environment, 3)))
    action = torch.tensor([0, 1, 0])
    assert torch.equal(distribution.log_prob(action), policy.distribution(raw(environment, 3)).log_prob(action))
    shared_by_default = observation is not VECTOR
    assert (policy.critic is None) == (shared_by_default if share is None else share)


def test_a_mask_reaches_the_distribution() -> None:
    policy = build_policy(spec(), PolicyConfig())
    mask = torch.tensor([[True, False], [False, True]])
    for distribution in (policy.distribution(raw(spec(), 2), mask), policy.distribution_and_value(raw(spec(), 2), mask)[0]):
        assert distribution.mode().tolist() == [0, 1]
        assert distribution.entropy().abs().max() < 1e-6


def test_the_beginning_is_orthogonal_and_nearly_uniform() -> None:
    policy = build_policy(spec(), PolicyConfig(hidden_sizes=[32, 32]))
    tensors = named_tensors(policy)
    weight = tensors["actor.mlp.layers.1.weight"]
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(32), rtol=1e-4, atol=1e-4)
    head, value_head = tensors["action_head.linear.weight"], tensors["value_head.weight"]
    torch.testing.assert_close(head @ head.T, 1e-4 * torch.eye(2), rtol=1e-3, atol=1e-7)
    assert value_head.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert all((tensor == 0).all() for name, tensor in tensors.items() if name.endswith("bias"))
    assert policy.distribution(raw(spec(), 9)).entropy().min() > 0.69
    other = build_policy(spec(), PolicyConfig(hidden_sizes=[32, 32], orthogonal_init=False))
    assert not torch.allclose(named_tensors(other)["value_head.weight"].norm(), torch.tensor(1.0), atol=1e-3)


def test_seed_alone_decides_the_parameters() -> None:
    before = torch.random.get_rng_state()
    first = weights_sha256(build_policy(spec(), PolicyConfig(), seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert weights_sha256(build_policy(spec(), PolicyConfig(), seed=3)) == first
    assert weights_sha256(build_policy(spec(), PolicyConfig(), seed=4)) != first


def test_names_are_sorted_float32_and_writable() -> None:
    policy = build_policy(spec(DICT), PolicyConfig(normalise_observations=True))
    tensors = named_tensors(policy)
    assert list(tensors) == sorted(tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {"inputs.leaves.2.mean", "inputs.leaves.2.inverse_std"} <= set(tensors)
    before = weights_sha256(policy)
    for tensor in tensors.values():
        saved = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[0] += 1.0
        assert weights_sha256(policy) != before
        with torch.no_grad():
            tensor.copy_(saved)
    assert weights_sha256(policy) == before == weights_sha256(copy.deepcopy(policy))


def test_a_copy_is_apart() -> None:
    policy = build_policy(spec(), PolicyConfig())
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        for tensor in named_tensors(twin).values():
            tensor.zero_()
    assert (twin.value(raw(spec(), 2)) == 0).all()
    assert (policy.value(raw(spec(), 2)) != 0).all()


def test_statistics_normalise_boxes_that_are_no_images() -> None:
    environment = spec(DICT)
    policy = build_policy(environment, PolicyConfig(normalise_observations=True))
    assert policy.normalised == ("observation/vector",)
    assert build_policy(environment, PolicyConfig()).normalised == ()
    moments = Moments((2, 2))
    moments.merge(np.random.default_rng(1).normal(loc=[[1, 2], [3, 4]], scale=[[1, 2], [3, 4]], size=(100, 2, 2)))
    observation = raw(environment, 6)
    observation["observation/vector"][0] = 1e6
    policy.set_statistics({"observation/vector": moments})
    prepared = policy.inputs(observation)["observation/vector"]
    expected = (observation["observation/vector"].numpy() - moments.mean) / np.sqrt(moments.variance + 1e-8)
    np.testing.assert_allclose(prepared.numpy(), np.clip(expected, -10, 10).reshape(6, 4), rtol=1e-4, atol=1e-5)
    assert (prepared[0] == 10.0).all()


def test_inputs_prepare_images_choices_and_vectors() -> None:
    environment = spec(DICT)
    observation = raw(environment, 7)
    prepared = build_policy(environment, PolicyConfig()).inputs(observation)
    torch.testing.assert_close(prepared["observation/camera"], observation["observation/camera"].unsqueeze(1).float() / 255)
    for n in range(7):
        first, second = observation["observation/nested.key/0"][n].tolist()
        expected = [float(first == i) for i in (0, 1)] + [float(second == i) for i in (5, 6, 7)]
        assert prepared["observation/nested.key/0"][n].tolist() == expected
    torch.testing.assert_close(prepared["observation/vector"], observation["observation/vector"].float().flatten(1))


@pytest.mark.parametrize(
    ("shape", "expected"), [((84, 84, 4), (4, 84, 84)), ((4, 84, 84), (4, 84, 84)), ((84, 84), (1, 84, 84)), ((3, 40, 40), (3, 40, 40))]
)
def test_channels_come_first(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    environment = spec(LeafSpec((), "box", "uint8", shape, low=(0.0,), high=(255.0,)))
    policy = build_policy(environment, PolicyConfig())
    observation = raw(environment, 2)
    image = policy.inputs(observation)["observation"]
    assert image.shape == (2, *expected)
    assert image.max() <= 1.0
    if len(shape) == 3 and shape[0] != expected[0]:
        torch.testing.assert_close(image[1, 2], observation["observation"][1, :, :, 2].float() / 255)


def test_uint8_vectors_are_scaled_by_their_bound() -> None:
    ram = LeafSpec((), "box", "uint8", (3,), low=(0.0,), high=(255.0, 255.0, 200.0))
    prepared = build_policy(spec(ram), PolicyConfig()).inputs({"observation": torch.tensor([[0, 255, 51]], dtype=torch.uint8)})
    torch.testing.assert_close(prepared["observation"], torch.tensor([[0.0, 1.0, 0.2]]))


def test_encoders_follow_the_configuration() -> None:
    names = set(named_tensors(build_policy(spec(IMAGE), PolicyConfig())))
    assert "actor.cnns.0.convolutions.2.weight" in names
    assert not any(name.startswith(("actor.mlp", "critic")) for name in names)
    flat = named_tensors(build_policy(spec(IMAGE), PolicyConfig(encoder="mlp")))
    assert flat["actor.mlp.layers.0.weight"].shape == (64, 40 * 44 * 3)
    float_image = LeafSpec((), "box", "float32", (40, 40, 3), low=(0.0,), high=(1.0,))
    assert "actor.cnns.0.out.weight" in named_tensors(build_policy(spec(float_image), PolicyConfig(encoder="nature_cnn")))
    with pytest.raises(ConfigError, match=r"policy.encoder: nature_cnn needs .* got observation box \(4,\)"):
        build_policy(spec(), PolicyConfig(encoder="nature_cnn"))
    compact = named_tensors(build_policy(spec(IMAGE), PolicyConfig(encoder="compact_cnn")))
    assert compact["actor.cnns.0.convolutions.0.weight"].shape == (16, 3, 8, 8)
    assert "actor.cnns.0.convolutions.2.weight" not in compact


def test_no_hidden_layers_is_a_linear_policy() -> None:
    policy = build_policy(spec(), PolicyConfig(hidden_sizes=[]))
    assert set(named_tensors(policy)) == {"action_head.linear.bias", "action_head.linear.weight", "value_head.bias", "value_head.weight"}


@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "silu"])
def test_the_mlp_equals_torchs_own_layers(activation: str) -> None:
    policy = build_policy(spec(), PolicyConfig(activation=activation, hidden_sizes=[8, 5]))
    kind = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}[activation]
    layers = policy.critic.mlp.layers  # type: ignore[union-attr]
    expected = nn.Sequential(layers[0], kind(), layers[1], kind(), policy.value_head)
    observation = raw(spec(), 4)
    torch.testing.assert_close(policy.value(observation), expected(observation["observation"]).squeeze(-1))


def test_gsde_draws_one_matrix_per_rollout() -> None:
    leaf = ACTIONS["box"][0]
    policy = build_policy(spec(VECTOR, leaf), PolicyConfig(exploration="gsde", hidden_sizes=[16], log_std_init=-1.5))
    assert policy.noise == NoiseSpec("normal", 16 * 4, "rollout")
    log_std = named_tensors(policy)["action_head.log_std"]
    assert log_std.shape == (16, 4)
    assert (log_std == -1.5).all()
    observation = {"observation": torch.ones(3, 4)}
    action, log_prob = policy.act(observation, noise(policy, 1).expand(3, -1))
    assert torch.equal(action[0], action[2])
    torch.testing.assert_close(log_prob, policy.distribution(observation).log_prob(action))
    with pytest.raises(ConfigError, match=r"^policy\.exploration: gsde is for continuous actions"):
        build_policy(spec(), PolicyConfig(exploration="gsde"))


class Trunk(nn.Module):
    num_features = 6

    def __init__(self, environment: EnvironmentSpec, config: PolicyConfig) -> None:
        super().__init__()
        self.layer = nn.Linear(environment.observation[0].size, 6)

    def forward(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.relu(self.layer(observation["observation"]))


def test_a_network_of_ones_own_replaces_the_encoder() -> None:
    policy = build_policy(spec(), PolicyConfig(), Trunk, seed=2)
    assert set(named_tensors(policy)) >= {"actor.layer.weight", "action_head.linear.weight", "value_head.weight"}
    action, _ = policy.act(raw(spec(), 3), noise(policy, 3))
    assert action.shape == policy.value(raw(spec(), 3)).shape == (3,)
    assert weights_sha256(build_policy(spec(), PolicyConfig(), Trunk, seed=2)) == weights_sha256(policy)


def test_a_network_by_path(tmp_path: Path) -> None:
    (tmp_path / "trunk.py").write_text(
        "from torch import nn\n"
        "class Trunk(nn.Module):\n"
        "    num_features = 4\n"
        "    def __init__(self, spec, config):\n        super().__init__()\n"
        "    def forward(self, observation):\n        return observation['observation']\n"
    )
    policy = build_policy(spec(), PolicyConfig(network=f"{tmp_path / 'trunk.py'}:Trunk"))
    assert policy.value(raw(spec(), 2)).shape == (2,)


def test_a_policy_of_ones_own_is_taken_as_it_is() -> None:
    own = build_policy(spec(), PolicyConfig())
    assert build_policy(spec(), PolicyConfig(), lambda environment, config: own) is own


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy.network: expected a callable .* got Linear with num_features None"):
        build_policy(spec(), PolicyConfig(), lambda environment, config: nn.Linear(4, 2))

    class Counting(Trunk):
        def __init__(self, environment: EnvironmentSpec, config: PolicyConfig) -> None:
            super().__init__(environment, config)
            self.norm = nn.BatchNorm1d(6)

    with pytest.raises(ConfigError, match=r"actor.norm.num_batches_tracked is torch.int64"):
        build_policy(spec(), PolicyConfig(), Counting)
