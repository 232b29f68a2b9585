"""Observations into named arrays, stored actions back to the environment."""

from __future__ import annotations

import numpy as np
import pytest
from environment_fakes import Nested
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_fakes import flatten_observation
from shoal.environments.spaces import SpaceMismatch, allocate, describe, random_action, to_environment_action
from shoal.errors import ConfigError
from shoal.types import EnvironmentSpec


def spec_of(observation_space: spaces.Space, action_space: spaces.Space | None = None) -> EnvironmentSpec:
    return describe("fake", observation_space, action_space or spaces.Discrete(2))


def test_nested_spaces_become_fields_in_sorted_order_without_the_mask():
    spec = describe("fake", Nested.observation_space, Nested.action_space)
    assert [leaf.name("observation") for leaf in spec.observation] == [
        "observation/camera/0", "observation/camera/1", "observation/inner/a", "observation/inner/b", "observation/z",
    ]  # fmt: skip
    assert [leaf.kind for leaf in spec.observation] == ["box", "multi_binary", "box", "multi_discrete", "discrete"]
    assert (spec.action_mask, spec.mask_size) == ("observation", 5)
    assert EnvironmentSpec.from_json(spec.to_json()) == spec


def test_a_nested_observation_is_copied_leaf_by_leaf():
    env = Nested()
    env.reset()
    env.count = 5
    rows = flatten_observation(describe("fake", Nested.observation_space, Nested.action_space), env.observe())
    assert rows["observation/z"] == 3  # counted from the space's own start, as the environment gives it
    assert rows["observation/z"].dtype == np.int64
    np.testing.assert_array_equal(rows["observation/camera/0"], np.full((2, 3), 5, np.uint8))
    np.testing.assert_array_equal(rows["observation/camera/1"], [1, 1, 0])
    assert rows["observation/inner/a"] == np.float32(0.5)
    np.testing.assert_array_equal(rows["observation/inner/b"], [1, 2])
    np.testing.assert_array_equal(rows["action_mask"], [True, True, False, True, True])


@pytest.mark.parametrize(
    ("space", "value", "kind"),
    [
        (spaces.Box(-1, 1, (3,), np.float32), np.zeros(4, np.float32), "shape"),
        (spaces.Box(-1, 1, (3,), np.float32), np.zeros((3, 1), np.float32), "shape"),
        (spaces.Box(-1, 1, (3,), np.float32), np.zeros(3, np.float64), "dtype"),
        (spaces.Box(0, 255, (3,), np.uint8), np.zeros(3, np.int64), "dtype"),
        (spaces.Box(-1, 1, (3,), np.float32), [0.0, 0.0, 0.0], "structure"),
        (spaces.Box(-1, 1, (3,), np.float32), None, "structure"),
        (spaces.Discrete(3), 3, "range"),
        (spaces.Discrete(3, start=5), 0, "range"),
        (spaces.Discrete(3), 1.0, "dtype"),
        (spaces.MultiDiscrete([2, 3]), np.array([1, 3]), "range"),
        (spaces.MultiDiscrete([2, 3]), np.array([1]), "shape"),
        (spaces.MultiBinary(2), np.array([0, 2], np.int8), "range"),
        (spaces.Dict({"a": spaces.Discrete(2)}), {"b": 0}, "structure"),
        (spaces.Dict({"a": spaces.Discrete(2)}), {"a": 0, "b": 0}, "structure"),
        (spaces.Dict({"a": spaces.Discrete(2)}), np.zeros(1), "structure"),
        (spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2))), (0,), "structure"),
    ],
)
def test_what_is_not_in_the_space_is_named(space, value, kind):
    with pytest.raises(SpaceMismatch) as caught:
        flatten_observation(spec_of(space), value)
    assert caught.value.kind == kind
    assert caught.value.field.startswith("observation")


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_whatever_a_space_samples_is_taken(seed):
    space = spaces.Dict(
        {
            "x": spaces.Box(-3, np.inf, (2, 2), np.float32),
            "t": spaces.Tuple((spaces.Discrete(5, start=-2), spaces.MultiDiscrete([[2, 3], [4, 5]]), spaces.MultiBinary((2, 2)))),
            "s": spaces.Box(-1, 1, (), np.float64),
        }
    )
    space.seed(seed)
    value = space.sample()
    rows = flatten_observation(spec_of(space), value)
    np.testing.assert_array_equal(rows["observation/x"], value["x"])
    for i in range(3):
        np.testing.assert_array_equal(rows[f"observation/t/{i}"], value["t"][i])
    assert rows["observation/s"] == value["s"]


def test_actions_go_to_the_space_and_back():
    box = spaces.Box(np.array([-2, 0, 5], np.float32), np.array([2, 1, 5.5], np.float32))
    leaf = spec_of(spaces.Discrete(2), box).action
    np.testing.assert_allclose(to_environment_action(leaf, np.array([-1, 0, 1], np.float32)), [-2, 0.5, 5.5])
    np.testing.assert_allclose(to_environment_action(leaf, np.array([-9, 9, 0], np.float32)), [-2, 1, 5.25])
    assert to_environment_action(leaf, np.zeros((4, 3), np.float32)).shape == (4, 3)
    mixed = spaces.Box(np.array([-np.inf, 0, -1], np.float32), np.array([np.inf, np.inf, 1], np.float32))
    leaf = spec_of(spaces.Discrete(2), mixed).action
    np.testing.assert_allclose(to_environment_action(leaf, np.array([7, -3, 2], np.float32)), [7, 0, 1])
    leaf = spec_of(spaces.Discrete(2), spaces.Discrete(3, start=-1)).action
    np.testing.assert_array_equal(to_environment_action(leaf, np.array([0, 1, 2])), [-1, 0, 1])


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4, start=3),
        spaces.MultiDiscrete([2, 5], start=[1, -1]),
        spaces.MultiBinary((2, 3)),
        spaces.Box(-1.7, 3.3, (2, 2), np.float32),
        spaces.Box(-1.7, 3.3, (2,), np.float64),
        spaces.Box(0, 10, (2,), np.int32),
        spaces.Box(0, np.inf, (2,), np.float32),
    ],
)
def test_every_random_action_is_in_its_space(space):
    leaf, rng = spec_of(spaces.Discrete(2), space).action, np.random.default_rng(0)
    stored = np.stack([random_action(leaf, rng) for _ in range(50)])
    for action in to_environment_action(leaf, stored * 3 if leaf.kind == "box" else stored):
        assert space.contains(action), action


def test_an_impossible_space_is_a_configuration_error():
    with pytest.raises(ConfigError, match="Text"):
        spec_of(spaces.Dict({"a": spaces.Text(3)}))
    with pytest.raises(ConfigError, match="action space"):
        spec_of(spaces.Discrete(2), spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2))))
    with pytest.raises(ConfigError, match="both be called"):
        spec_of(spaces.Dict({"a": spaces.Dict({"b": spaces.Discrete(2)}), "a/b": spaces.Discrete(2)}))


def test_masks_may_be_flat_or_one_array_per_component_and_must_allow_something():
    spec = describe("fake", spaces.Discrete(2), spaces.MultiDiscrete([2, 3]), mask_in_info=True)
    flat = flatten_observation(spec, 0, {"action_mask": np.array([1, 0, 1, 0, 0])})["action_mask"]
    parts = flatten_observation(spec, 0, {"action_mask": (np.array([1, 0], np.int8), np.array([1, 0, 0], np.int8))})["action_mask"]
    np.testing.assert_array_equal(flat, parts)
    assert flatten_observation(spec, 0)["action_mask"].all()
    with pytest.raises(SpaceMismatch, match="at least one"):
        flatten_observation(spec, 0, {"action_mask": np.array([1, 1, 0, 0, 0])})
    assert allocate(spec, 4)["action_mask"].shape == (4, 5)
