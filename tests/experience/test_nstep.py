"""n-step returns against the sum that defines them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.experience.nstep import n_step


@given(st.integers(1, 7), st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**32), st.floats(0, 1))
def test_a_return_is_summed_up_to_the_first_stop(n, num, gamma, seed, stop_share):
    rng = np.random.default_rng(seed)
    reward, stop = rng.normal(size=(n, num)), rng.random((n, num)) < stop_share
    found = n_step(reward, stop, gamma)
    for m in range(num):
        total, k = 0.0, 0
        while True:
            total += gamma**k * reward[k, m]
            k += 1
            if k == n or stop[k - 1, m]:
                break
        assert found.return_M[m] == pytest.approx(total, rel=1e-5, abs=1e-6)
        assert (found.length_M[m], found.discount_M[m]) == (k, pytest.approx(gamma**k))


def test_what_lies_beyond_a_stop_does_not_matter_not_even_where_it_is_not_finite():
    found = n_step(np.array([[1.0], [np.nan], [np.inf]]), np.array([[True], [False], [False]]), 0.5)
    assert (found.return_M[0], found.length_M[0], found.discount_M[0]) == (1.0, 1, 0.5)
