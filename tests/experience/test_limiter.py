"""The rate limiter against plain arithmetic: nothing is lost to rounding, nothing is sampled too early, and neither side runs away."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.experience.limiter import Rate, RateLimiter


def test_what_a_division_leaves_is_carried_on() -> None:
    limiter = RateLimiter(Rate(samples_per_insert=1.5, batch_size=4, learning_starts=0))
    assert [limiter.insert(2) for _ in range(8)] == [0, 1, 1, 1, 0, 1, 1, 1]
    assert (limiter.inserted, limiter.sampled) == (16, 24)


def test_nothing_is_sampled_before_learning_starts_and_nothing_is_owed_for_it() -> None:
    limiter = RateLimiter(Rate(samples_per_insert=1.0, batch_size=2, learning_starts=10, tolerance_samples=100.0))
    assert (limiter.ahead(5), limiter.insert(8), limiter.ahead(5)) == (0, 0, 0)
    assert limiter.insert(6) == 2


def test_sampling_runs_ahead_up_to_the_tolerance_and_is_paid_back() -> None:
    limiter = RateLimiter(Rate(samples_per_insert=1.0, batch_size=2, learning_starts=0, tolerance_samples=7.0))
    assert limiter.insert(4) == 2
    assert [limiter.ahead(2), limiter.ahead(2), limiter.ahead(2)] == [2, 1, 0]
    assert limiter.surplus == 6
    assert [limiter.insert(4), limiter.insert(4)] == [0, 1]


def test_a_replay_that_was_lost_is_filled_as_at_the_beginning() -> None:
    limiter = RateLimiter(Rate(samples_per_insert=1.0, batch_size=1, learning_starts=5))
    limiter.insert(9)
    limiter.begin_again()
    assert (limiter.inserted, limiter.sampled) == (0, 0)
    assert (limiter.insert(4), limiter.insert(3)) == (0, 2)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=60),
    st.sampled_from([0.25, 0.5, 1.5, 8.0, 32.0]),
    st.integers(1, 64),
    st.integers(0, 50),
    st.integers(0, 100),
)
def test_samples_stay_between_what_is_owed_and_the_tolerance(
    turns: list[tuple[int, bool]], rate: float, batch: int, starts: int, tolerance: int
) -> None:
    limiter = RateLimiter(Rate(rate, batch, starts, float(tolerance)))
    inserted = steps = 0
    for num, ahead in turns:
        if ahead:
            steps += limiter.ahead(num)
        else:
            inserted += num
            steps += limiter.insert(num)
        again = RateLimiter(limiter.rate)
        again.set_state(limiter.get_state())
        limiter = again
        owed = Fraction(rate) * max(0, inserted - starts) if inserted >= starts else Fraction(0)
        assert steps * batch <= owed + tolerance
        if not ahead and inserted >= starts and inserted:
            assert steps * batch > owed - batch
    assert limiter.sampled == steps * batch


def test_ahead_makes_no_more_steps_than_were_asked_for() -> None:
    limiter = RateLimiter(Rate(1.0, 1, 0, 50.0))
    limiter.insert(1)
    assert limiter.ahead(3) == 3
    assert limiter.surplus == pytest.approx(3)
