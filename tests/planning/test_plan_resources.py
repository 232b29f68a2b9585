"""Cores are shared as a slow integration shares them; a link sends one thing after the other."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simpy import Environment, Event

from shoal.planning.resources import Cores, Link, Occupied

Job = tuple[float, float, int]  # when it comes, seconds of each thread, threads


def ends_of(jobs: list[Job], cores: int, crowding: float) -> list[float]:
    """When each job ends: from one arrival or end to the next, every thread gets the same share, one core at most; busy cores slow each other down."""
    left = [seconds for _, seconds, _ in jobs]
    ends = [0.0] * len(jobs)
    now = 0.0
    open_jobs = set(range(len(jobs)))
    while open_jobs:
        present = [j for j in open_jobs if jobs[j][0] <= now]
        arrivals = [jobs[j][0] for j in open_jobs if jobs[j][0] > now]
        width = sum(jobs[j][2] for j in present)
        others = max(0, min(width, cores) - 1)
        slower = 1.0 + (crowding - 1.0) * others / (cores - 1) if cores > 1 else 1.0
        rate = min(1.0, cores / width) / slower if width else 0.0
        step = min([left[j] / rate for j in present] + [at - now for at in arrivals])
        for j in present:
            left[j] -= rate * step
            if left[j] <= 1e-12:
                ends[j] = now + step
                open_jobs.discard(j)
        now = min((at for at in arrivals if at - now <= step), default=now + step)
    return ends


def simulated(jobs: list[Job], cores: int, crowding: float = 1.0) -> tuple[list[float], float]:
    env = Environment()
    shared, ends = Cores(env, cores, crowding), [0.0] * len(jobs)

    def run(number: int, job: Job):
        at, seconds, width = job
        yield env.timeout(at)
        yield shared.work(seconds, width)
        ends[number] = env.now

    for number, job in enumerate(jobs):
        env.process(run(number, job))
    env.run()
    return ends, shared.busy


_job = st.tuples(st.integers(0, 20).map(float), st.integers(1, 40).map(lambda n: n / 4), st.integers(1, 3))


@given(st.lists(_job, min_size=1, max_size=8), st.integers(1, 4), st.sampled_from([1.0, 1.5]))
def test_jobs_end_when_a_slow_integration_says(jobs: list[Job], cores: int, crowding: float) -> None:
    ends, busy = simulated(jobs, cores, crowding)
    assert ends == pytest.approx(ends_of(jobs, cores, crowding))
    if crowding == 1.0:
        assert busy == pytest.approx(sum(seconds * width for _, seconds, width in jobs))


def test_no_work_takes_no_time() -> None:
    assert simulated([(3.0, 0.0, 1)], 1)[0] == [3.0]


def test_a_link_sends_one_thing_after_the_other_and_knows_how_long_it_was_busy() -> None:
    env, ends = Environment(), []
    link = Link(env, 100.0)

    def send(at: float, size: float):
        yield env.timeout(at)
        yield link.send(size)
        ends.append(env.now)

    for at, size in ((0.0, 100.0), (0.5, 50.0), (9.0, 200.0)):
        env.process(send(at, size))
    env.run(until=10.0)
    assert ends == pytest.approx([1.0, 1.5])
    assert link.busy == pytest.approx(2.5)
    env.run()
    assert (ends[-1], link.busy) == pytest.approx((11.0, 3.5))


def test_what_is_at_something_is_counted_as_long_as_it_is() -> None:
    env = Environment()
    occupied = Occupied(env)

    def work() -> Generator[Event, None, None]:
        occupied.change(3)
        yield env.timeout(2.0)
        occupied.change(-2)
        yield env.timeout(4.0)
        occupied.change(-1)
        yield env.timeout(8.0)

    env.process(work())
    seen = []
    for until in (1.0, 5.0, 14.0):
        env.run(until=until)
        seen.append(occupied.seconds)
    assert seen == [3.0, 9.0, 10.0]
