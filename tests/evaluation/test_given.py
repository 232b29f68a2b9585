"""What `predict` is given and does not fit: the documented error, which names what it was, what was expected and what came."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

sys.path.append(str(Path(__file__).parent))
from helpers import Spaces, bundle, learned_bundle

from shoal.config import DQNConfig, PolicyConfig, R2D2Config, SACConfig
from shoal.errors import SchemaError
from shoal.evaluation import LoadedPolicy, load_policy

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
PARTS = spaces.Dict(
    {
        "box": VECTOR,
        "wide": spaces.Box(-np.inf, np.inf, (2,), np.float64),
        "image": spaces.Box(0, 255, (4, 4), np.uint8),
        "choice": spaces.Discrete(5, start=-2),
        "choices": spaces.MultiDiscrete([3, 4]),
        "bits": spaces.MultiBinary(2),
    }
)
WHOLE: dict[str, Any] = {
    "box": np.zeros(3, np.float32),
    "wide": np.zeros(2),
    "image": np.zeros((4, 4), np.uint8),
    "choice": -2,
    "choices": np.array([2, 3]),
    "bits": np.array([0, 1], np.int8),
}


class Unreadable:
    """Neither an array nor a mapping, and it says so in its own way."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no\narray")

    def __getitem__(self, key: Any) -> Any:
        raise AttributeError("no parts")


@pytest.fixture(scope="module")
def of_parts(tmp_path_factory: pytest.TempPathFactory) -> LoadedPolicy:
    path = tmp_path_factory.mktemp("parts")
    bundle(path, lambda: Spaces(PARTS, spaces.Discrete(4)), config=PolicyConfig(hidden_sizes=[8]))
    return load_policy(path)


@pytest.fixture(scope="module")
def of_masks(tmp_path_factory: pytest.TempPathFactory) -> LoadedPolicy:
    path = tmp_path_factory.mktemp("masks")
    bundle(path, lambda: Spaces(VECTOR, spaces.Discrete(4), mask=np.ones(4, np.int8)), config=PolicyConfig(hidden_sizes=[8]))
    return load_policy(path)


REMEMBERING: dict[str, Any] = {
    "lstm": PolicyConfig(memory="lstm", memory_size=6),
    "gru": PolicyConfig(memory="gru", memory_size=6),
    "gsde": PolicyConfig(exploration="gsde", hidden_sizes=[6]),
    "lstm and gsde": PolicyConfig(memory="lstm", memory_size=6, exploration="gsde"),
}


def remembering(path: Path, name: str) -> LoadedPolicy:
    bundle(path, lambda: Spaces(VECTOR, spaces.Box(-1.0, 1.0, (2,), np.float32)), config=REMEMBERING[name])
    return load_policy(path)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("box", np.array([0.0, np.nan, 0.0]), r"^observation/box: expected finite numbers, at most 3.4e\+38 in size; got nan at \[1\]$"),
        ("box", [0.0, 0.0, np.inf], r"^observation/box: expected finite numbers.*; got inf at \[2\]$"),
        ("box", np.array([1e300, 0.0, 0.0]), r"^observation/box: expected finite numbers.*; got inf at \[0\]$"),
        ("wide", np.array([0.0, -1e300]), r"^observation/wide: expected finite numbers.*; got -1e\+300 at \[1\]$"),
        ("box", [[1.0], [1.0, 2.0]], r"^observation/box: expected float32 \[3\]; got a list, which is no array \(ValueError: "),
        ("box", None, r"^observation/box: expected shape \[3\], .*; got \[\]$"),
        ("box", "abc", r"^observation/box: expected shape \[3\]"),
        ("box", np.array(["a", "b", "c"]), r"^observation/box: expected float32; got <U1 with values that do not fit"),
        ("box", np.array([1j, 0, 0]), r"^observation/box: expected float32; got complex128"),
        (
            "box",
            torch.zeros(3, requires_grad=True),
            r"^observation/box: expected float32 \[3\]; got a Tensor, which is no array \(RuntimeError",
        ),
        ("box", Unreadable(), r"^observation/box: .* got a Unreadable, which is no array \(RuntimeError: no\)$"),
        ("image", np.full((4, 4), np.nan), r"^observation/image: expected uint8; got float64 with values that do not fit"),
        ("image", np.full((4, 4), 256), r"^observation/image: expected uint8; got int64 with values that do not fit"),
        ("choice", 3, r"^observation/choice: expected integers with -2 <= value < 3; got 3$"),
        ("choice", -3, r"^observation/choice: expected integers with -2 <= value < 3; got -3$"),
        ("choice", None, r"^observation/choice: expected int64; got object"),
        ("choice", 2**70, r"^observation/choice: expected int64; got object"),
        ("choice", 1e20, r"^observation/choice: expected int64; got float64"),
        ("choices", [2, 4], r"^observation/choices: expected integers with \[0, 0\] <= value < \[3, 4\]; got 4 at \[1\]$"),
        ("bits", [0, 2], r"^observation/bits: expected only 0 and 1; got 2 at \[1\]$"),
    ],
)
def test_a_part_that_no_environment_returns_is_refused(of_parts: LoadedPolicy, part: str, value: Any, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SchemaError, match=message):
            of_parts.predict({**WHOLE, part: value})


def test_the_row_of_a_batch_is_named(of_parts: LoadedPolicy) -> None:
    batch = {name: np.stack([np.asarray(value)] * 3) for name, value in WHOLE.items()}
    assert len(of_parts.predict(batch)[0]) == 3
    batch["box"][2, 1] = np.nan
    with pytest.raises(SchemaError, match=r"got nan at \[2, 1\]$"):
        of_parts.predict(batch)


@pytest.mark.parametrize("observation", [None, 3, "text", [], np.zeros(3), Unreadable(), {**WHOLE, "box": {}}, {"box": WHOLE["box"]}])
def test_what_has_not_the_parts_is_refused(of_parts: LoadedPolicy, observation: Any) -> None:
    with pytest.raises(SchemaError, match=r"^observation/\w+: expected "):
        of_parts.predict(observation)


def test_what_is_beyond_the_bounds_of_a_box_is_taken_as_training_takes_it(tmp_path: Path) -> None:
    bundle(tmp_path, lambda: Spaces(spaces.Box(-1.0, 1.0, (3,), np.float32), spaces.Discrete(4)))
    assert load_policy(tmp_path).predict([9.0, -9.0, 0.0])[0] in range(4)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(3), r"^action_mask: expected 4 entries of 0 or 1; got float64 \[3\]$"),
        (np.ones((2, 4)), r"expected 4 entries of 0 or 1; got float64 \[8\]$"),
        ("abcd", r"expected 4 entries of 0 or 1; got <U4 \[1\]$"),
        ([1, [1, 0]], r"expected 4 entries of 0 or 1; got a list, which is no array"),
        ((), r"expected 4 entries of 0 or 1; got parts \[\]$"),
        ([1, np.nan, 0, 0], r"got float64 \[4\] with NaN or Inf$"),
        (np.zeros(4), r"expected at least one allowed action for each component of the action; got none$"),
        (Unreadable(), r"got a Unreadable, which is no array"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(of_masks: LoadedPolicy, mask: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        of_masks.predict(np.zeros(3), action_mask=mask)


def test_the_mask_of_a_batch_has_a_row_for_each_and_each_allows_something(of_masks: LoadedPolicy) -> None:
    rows = np.zeros((2, 3))
    mask = np.array([[0, 1, 0, 0], [0, 0, 0, 1]])
    assert of_masks.predict(rows, action_mask=mask)[0].tolist() == [1, 3]
    assert of_masks.predict(rows[0], action_mask=(0, 1, 0, 0))[0] == 1
    for wrong in (mask[0], mask.reshape(4, 2), mask.reshape(-1), (mask, mask)):
        with pytest.raises(SchemaError, match=r"^action_mask: expected 4 entries of 0 or 1 for each of 2 observations; got "):
            of_masks.predict(rows, action_mask=wrong)
    mask[1] = 0
    with pytest.raises(SchemaError, match=r"got none in row 1$"):
        of_masks.predict(rows, action_mask=mask)


def test_a_mask_for_a_policy_without_masks_is_refused_and_not_passed_over(of_parts: LoadedPolicy) -> None:
    with pytest.raises(SchemaError, match=r"^action_mask: expected None, .* has no mask; got int64 \[4\]$"):
        of_parts.predict(WHOLE, action_mask=np.ones(4, np.int64))


@pytest.mark.parametrize("algorithm", [DQNConfig(), SACConfig()])
def test_a_policy_that_remembers_nothing_takes_no_state_and_gives_none(algorithm: Any, tmp_path: Path) -> None:
    action = spaces.Discrete(3) if algorithm.name == "dqn" else spaces.Box(-1.0, 1.0, (2,), np.float32)
    learned_bundle(tmp_path, lambda: Spaces(VECTOR, action), algorithm)
    policy = load_policy(tmp_path)
    for nothing in (None, {}):
        for deterministic in (True, False):
            assert policy.predict(np.zeros(3), nothing, deterministic=deterministic)[1] is None
    for foreign in (
        {"policy_state/h": np.zeros((1, 6))},
        {"noise": np.zeros((1, 2))},
        {3: 4},
        (np.zeros(6), np.zeros(6)),
        np.zeros(6),
        5,
        "x",
        [],
    ):
        with pytest.raises(SchemaError, match=r"^state: expected None, since this policy remembers nothing; got "):
            policy.predict(np.zeros(3), foreign)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in REMEMBERING if "lstm" in name or "gru" in name])
def test_an_empty_state_is_none_of_a_memory(name: str, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"^state: expected policy_state/\w+ \[.* or None; of policy_state/\w+ got none$"):
        remembering(tmp_path, name).predict(np.zeros(3), {})


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_state_that_is_none_of_its_own_is_refused(name: str, tmp_path: Path) -> None:
    policy = remembering(tmp_path, name)
    row = np.zeros(3)
    _, whole = policy.predict(row, deterministic=False)
    assert whole is not None
    policy.predict(row, whole)
    policy.predict(row, {key: array.tolist() for key, array in whole.items()})  # as JSON has it  # type: ignore[misc]
    wrong: list[Any] = [
        3,
        "x",
        np.zeros(6),
        np.zeros((1, 6)),
        (np.zeros((1, 6)),) * 2,
        [whole],
        {**whole, "other": np.zeros(1)},
        {"other": 1},
        Unreadable(),
    ]
    for key, array in whole.items():
        odd = [
            None,
            "x",
            np.zeros(3),
            array[0],
            np.repeat(array, 2, 0),
            np.full_like(array, np.nan),
            np.full(array.shape, 1e300),
            [[1.0], [1.0, 2.0]],
        ]
        wrong += [{**whole, key: value} for value in [*odd, array.astype(str), array.astype(object), Unreadable()]]
    for state in wrong:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(SchemaError, match=r"^state: "):
                policy.predict(row, state)
    if name in ("lstm", "lstm and gsde"):
        with pytest.raises(SchemaError, match=r"^state: expected policy_state/h \[1, 6\], .* or None; of policy_state/c got none$"):
            policy.predict(row, {key: array for key, array in whole.items() if key != "policy_state/c"})


@pytest.mark.parametrize("rng", ["x", 1.5, -1, True, np.random.RandomState(1), [1], np.random.PCG64(1)])
def test_what_no_numbers_can_be_drawn_from_is_refused(of_masks: LoadedPolicy, rng: Any) -> None:
    with pytest.raises(SchemaError, match=r"^rng: expected a numpy.random.Generator, a seed \(a whole number from 0 on\) or None, got "):
        of_masks.predict(np.zeros(3), deterministic=False, rng=rng)


def test_a_seed_may_be_a_number_of_numpys(of_masks: LoadedPolicy) -> None:
    drawn = [
        of_masks.predict(np.zeros((40, 3)), deterministic=False, rng=rng)[0].tolist() for rng in (0, np.int64(0), np.random.default_rng(0))
    ]
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_batch_of_none_is_answered_with_none(of_masks: LoadedPolicy) -> None:
    assert of_masks.predict(np.zeros((0, 3)), deterministic=False)[0].shape == (0,)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | arrays.arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_, "U2", "c8", "M8[s]"]),
        arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(
            st.sampled_from(["policy_state/h", "policy_state/c", "noise", "x", "action_mask"]) | st.integers(0, 2), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def of_sequences(tmp_path_factory: pytest.TempPathFactory) -> LoadedPolicy:
    path = tmp_path_factory.mktemp("sequences")
    observation = spaces.Dict({"x": spaces.MultiDiscrete([3, 4]), "action_mask": spaces.Box(0, 1, (4,), np.int8)})
    learned_bundle(
        path, lambda: Spaces(observation, spaces.Discrete(4)), R2D2Config(), PolicyConfig(memory="gru", memory_size=2, hidden_sizes=[4])
    )
    return load_policy(path)


@settings(max_examples=300, deadline=None)
@given(observation=anything, state=anything, mask=anything, rng=anything, fits=st.tuples(*[st.booleans()] * 3), deterministic=st.booleans())
def test_whatever_is_given_there_is_an_action_or_the_documented_error(
    of_sequences: LoadedPolicy, observation: Any, state: Any, mask: Any, rng: Any, fits: tuple[bool, bool, bool], deterministic: bool
) -> None:
    if fits[0]:
        observation = {"x": np.array([2, 3]), "action_mask": np.array([0, 1, 0, 1])}
    state, mask = None if fits[1] else state, None if fits[2] else mask
    try:
        with np.errstate(all="ignore"):
            action, after = of_sequences.predict(observation, state, action_mask=mask, rng=rng, deterministic=deterministic)
    except SchemaError:
        return
    assert np.asarray(action).dtype == np.int64
    assert after is not None
    assert set(after) == {"policy_state/h"}
