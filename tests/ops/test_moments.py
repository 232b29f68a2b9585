"""Running moments equal those of everything at once, whatever the portions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ShapeError
from shoal.ops.moments import Moments


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    shape=st.sampled_from([(), (1,), (3,), (2, 2)]),
    offset=st.sampled_from([0.0, 1e6]),
)
def test_portions_equal_the_whole(seed: int, sizes: list[int], shape: tuple[int, ...], offset: float) -> None:
    values = np.random.default_rng(seed).normal(size=(sum(sizes), *shape)) + offset
    moments = Moments(shape)
    for part in np.split(values, np.cumsum(sizes)[:-1]):
        moments.merge(part)
    assert moments.count == len(values)
    if len(values):
        np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.variance, values.var(0), rtol=1e-6, atol=1e-9)


def test_by_hand() -> None:
    moments = Moments()
    moments.merge(np.array([1.0, 3.0]))
    moments.merge(np.array([8.0]))
    assert (moments.count, float(moments.mean), float(moments.m2)) == (3.0, 4.0, 26.0)
    assert moments.inverse_std(epsilon=0.0) == pytest.approx((26 / 3) ** -0.5)


def test_nothing_seen_scales_nothing() -> None:
    moments = Moments((2,))
    assert moments.count == 0.0
    assert moments.mean.tolist() == [0.0, 0.0]
    assert moments.m2.tolist() == [0.0, 0.0]
    assert moments.variance.tolist() == [1.0, 1.0]
    np.testing.assert_allclose(moments.inverse_std(), [1.0, 1.0], rtol=1e-7)
    assert Moments().mean.shape == ()


def test_a_constant_does_not_divide_by_zero() -> None:
    moments = Moments((1,))
    moments.merge(np.full((5, 1), 7.0))
    assert moments.variance.tolist() == [0.0]
    assert moments.inverse_std().tolist() == pytest.approx([1e4])


def test_any_dtype_is_summed_in_float64() -> None:
    moments = Moments()
    moments.merge(np.array([250, 255], np.uint8))
    moments.merge(np.array([2**24 + 1], np.int64))
    assert float(moments.mean) == (250 + 255 + 2**24 + 1) / 3
    assert np.asarray(moments.mean).dtype == np.asarray(moments.m2).dtype == np.float64


def test_nothing_merged_changes_nothing() -> None:
    moments = Moments((2,))
    moments.merge(np.ones((3, 2)))
    before = moments.get_state()
    moments.merge(np.zeros((0, 2)))
    assert all(np.array_equal(before[k], v) for k, v in moments.get_state().items())


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_state_goes_round_exactly_and_shares_no_memory(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    moments, other = Moments(shape), Moments(shape)
    moments.merge(rng.normal(size=(5, *shape)))
    state = moments.get_state()
    assert {k: (v.dtype, v.shape) for k, v in state.items()} == {
        "count": (np.dtype(np.float64), ()),
        "mean": (np.dtype(np.float64), shape),
        "m2": (np.dtype(np.float64), shape),
    }
    other.set_state(state)
    more = rng.normal(size=(4, *shape))
    for array in state.values():
        array[...] = -1.0
    moments.merge(more)
    other.merge(more)
    assert moments.count == other.count == 9.0
    np.testing.assert_array_equal(moments.mean, other.mean)
    np.testing.assert_array_equal(moments.m2, other.m2)


def test_a_wrong_shape_is_refused() -> None:
    moments = Moments((2,))
    for wrong in (np.zeros(2), np.zeros((4, 3)), np.zeros((4, 2, 1)), np.zeros(())):
        with pytest.raises(ShapeError, match=r"expected values \[n, 2\], got"):
            moments.merge(wrong)
    with pytest.raises(ShapeError, match=r"got \(\)"):
        Moments().merge(np.float64(3.0))
    good = moments.get_state()
    for key in ("mean", "m2"):
        with pytest.raises(ShapeError, match=r"expected moments of shape \(2,\)"):
            moments.set_state({**good, key: np.zeros(3)})


def test_values_of_any_dtype_are_merged_in_float64():
    values = np.float32(1e4) + np.arange(1000, dtype=np.float32) / np.float32(7)
    narrow, wide = Moments(), Moments()
    narrow.merge(values)
    wide.merge(values.astype(np.float64))
    assert narrow.mean.tobytes() == wide.mean.tobytes()
    assert narrow.m2.tobytes() == wide.m2.tobytes()
    restored = Moments()
    restored.set_state({"count": np.array(2), "mean": np.array(1, np.float32), "m2": np.array(3, np.int64)})
    state = restored.get_state()
    assert {n: v.dtype.name for n, v in state.items()} == {"count": "float64", "mean": "float64", "m2": "float64"}
