"""The model against closed forms, in each of which one thing alone bounds the run; what holds for all of them; and few nodes for many.

Costs are in microseconds. e + i + x is `acting`, l is `learning`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cluster import US, cluster
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.planning.levers import moves
from shoal.planning.pipeline import REPRESENTATIVES, Prediction, simulate, spread
from shoal.planning.system import System, Way

costs = st.integers(1, 200).map(float)


def rate(system: System) -> float:
    return simulate(system, updates=60).env_steps_per_second


# ---- one node --------------------------------------------------------------------------------------------------------
@given(costs, costs, st.integers(1, 6), st.integers(1, 3))
def test_sync_actors_and_learner_take_turns(acting: float, learning: float, cores: int, groups_of_core: int) -> None:
    system = cluster("sync", cores=cores, groups=cores * groups_of_core, acting=acting, learning=learning)
    assert rate(system) == pytest.approx(1e6 / (acting / cores + learning))


@given(st.integers(40, 200).map(float), st.floats(0.1, 0.8), st.integers(1, 6))
def test_async_every_core_is_busy_while_the_learner_keeps_up(acting: float, share: float, cores: int) -> None:
    learning = share * acting / cores
    system = cluster("async", cores=cores, groups=2 * cores, acting=acting, learning=learning)
    found = simulate(system)
    assert found.env_steps_per_second == pytest.approx(cores * 1e6 / (acting + learning), rel=0.02)
    assert found.utilisation["cores"] == pytest.approx(1.0, abs=0.01)


def test_cores_that_are_busy_together_cost_more_and_a_learner_alone_does_not() -> None:
    crowded = {"cores": 4, "acting": 40.0, "learning": 20.0, "costs__crowding": 1.5}
    assert rate(cluster("sync", **crowded)) == pytest.approx(1e6 / (1.5 * 40.0 / 4 + 20.0))
    light = {**crowded, "learning": 5.0}
    assert rate(cluster("async", groups=8, **light)) == pytest.approx(4e6 / (1.5 * 45.0), rel=0.02)


def test_async_a_learner_with_one_thread_bounds_a_run_by_its_own_speed() -> None:
    found = simulate(cluster("async", cores=4, acting=20.0, learning=100.0))
    assert found.env_steps_per_second == pytest.approx(1e4, rel=0.02)
    assert found.utilisation["learner"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(("learning", "expected"), [(5.0, 1 / 20.0), (80.0, 1 / 80.0)])
def test_a_learner_with_a_device_of_its_own_takes_no_core(learning: float, expected: float) -> None:
    options = {"acting": 40.0, "learning": learning, "costs__own_device": True}
    assert rate(cluster("async", **options)) == pytest.approx(1e6 * expected, rel=0.02)
    assert rate(cluster("sync", **options)) == pytest.approx(1e6 / (20.0 + learning))


def test_threads_of_the_learner_take_as_many_cores() -> None:
    fast = cluster("sync", cores=2, acting=40.0, learning=40.0 / 1.6, costs__learning_cores=1.6)
    assert rate(fast) == pytest.approx(1e6 / (20.0 + 25.0))
    assert simulate(fast).utilisation["learner_cores"] == pytest.approx((20.0 + 25.0 * 0.8) / 45.0)


@given(st.integers(1, 4), st.integers(1, 16), st.integers(2, 20))
def test_environments_that_wait_are_as_many_as_they_are_over_how_long_they_wait(groups: int, size: int, wait_ms: int) -> None:
    waiting = cluster("async", groups=groups, actors=groups, size=size, acting=0.01, learning=0.01, blocking=1e3 * wait_ms)
    assert rate(waiting) == pytest.approx(groups * size / (1e-3 * wait_ms), rel=0.01)


def test_environments_that_wait_learn_in_turns_in_sync_mode_and_are_bounded_by_the_core_that_answers_them() -> None:
    turns = cluster("sync", groups=2, size=4, rows=32, acting=0.0, learning=500.0, blocking=1000.0)
    assert rate(turns) == pytest.approx(8 / (1e-3 + 8 * 500e-6))
    many = cluster("async", cores=4, groups=2, actors=2, size=100, acting=20.0, learning=0.01, blocking=1000.0)
    assert rate(many) == pytest.approx(2e6 / 20.0, rel=0.01)


def test_an_actor_makes_its_groups_one_after_the_other() -> None:
    assert rate(cluster("sync", cores=2, groups=3, acting=40.0, learning=0.0)) == pytest.approx(3 * 1e6 / (2 * 40.0))


def test_sync_a_pause_is_a_part_of_every_update_and_nobody_works_in_it() -> None:
    system = cluster("sync", acting=40.0, learning=20.0, pause=0.01)
    batch = system.batch_steps
    seconds = batch * 40 * US + 0.01
    found = simulate(system)
    assert found.env_steps_per_second == pytest.approx(batch / seconds)
    shares = (batch * 20 * US / seconds, batch * 20 * US / seconds)
    assert (found.utilisation["actors"], found.utilisation["learner"]) == pytest.approx(shares)
    assert rate(cluster("async", pause=0.01)) == rate(cluster("async"))


# ---- several nodes ---------------------------------------------------------------------------------------------------
def test_nodes_that_need_nobody_add_up() -> None:
    one = cluster("async", learning=0.01)
    assert rate(cluster("async", nodes=16, learning=0.01)) == pytest.approx(16 * rate(one), rel=0.02)


@pytest.mark.parametrize("nodes", [2, 5, 40])
def test_sync_the_learners_link_carries_every_rollout_but_its_own_nodes(nodes: int) -> None:
    system = cluster("sync", nodes=nodes, groups=1, cores=1, rollout_bytes=10**6, links__learner_bandwidth=1e9, links__latency=50 * US)
    steps, carried = 256, (nodes - 1) * 1e6 / 1e9
    made, latency = steps * 40 * US, 2 * 50e-6  # a lease there, a rollout back
    assert rate(system) == pytest.approx(nodes * steps / (made + latency + carried + nodes * steps * 20 * US))


@pytest.mark.parametrize("nodes", [2, 5, 40])
def test_sync_every_version_crosses_the_learners_link_once_for_each_other_node(nodes: int) -> None:
    system = cluster("sync", nodes=nodes, groups=1, cores=1, weights_bytes=10**6, links__learner_bandwidth=1e9)
    time = 256 * 40 * US + (nodes - 1) * 1e6 / 1e9 + nodes * 256 * 20 * US
    assert rate(system) == pytest.approx(nodes * 256 / time)


def test_async_a_link_that_is_too_slow_gives_its_bandwidth_over_the_bytes_of_a_rollout() -> None:
    found = simulate(cluster("async", nodes=40, learning=0.01, rollout_bytes=10**6, links__learner_bandwidth=1e8))
    carried = (
        100 * 256.0
    )  # env steps per second over the link; the head's own, two rollouts of each group in a batch at most, do not cross it
    assert carried < found.env_steps_per_second < carried * 40 / 38 * 1.01
    assert found.utilisation["learner_link"] == pytest.approx(1.0, abs=0.01)


def test_a_node_whose_link_is_too_slow_gives_its_bandwidth_over_the_bytes_of_a_rollout() -> None:
    found = simulate(cluster("async", nodes=40, learning=0.01, rollout_bytes=10**6, links__node_bandwidth=1e7))
    assert found.env_steps_per_second == pytest.approx(39 * 10 * 256.0, rel=0.06)  # and the head's
    assert found.utilisation["node_links"] == pytest.approx(1.0, abs=0.01)


def test_a_driver_gives_no_more_rollouts_than_it_has_time_for() -> None:
    found = simulate(cluster("async", nodes=40, acting=1.0, learning=0.001, driver__rollout=1e-3))
    assert found.env_steps_per_second == pytest.approx(256 / 1e-3, rel=0.05)
    assert found.utilisation["driver"] == pytest.approx(1.0, abs=0.02)


# ---- several learners ------------------------------------------------------------------------------------------------
def of_an_update(system: System) -> float:
    """Seconds of a sync update of nodes with one group of 256 steps and one actor each, without what a test adds."""
    return 256 * 40 * US + system.batch_steps * 20 * US / system.learners


@pytest.mark.parametrize("learners", [2, 4, 8])
def test_learners_on_nodes_share_the_batch_and_add_their_gradients_in_a_ring(learners: int) -> None:
    system = cluster(
        "sync", nodes=8, groups=1, cores=1, learners=learners, learners_on="nodes", links__learner_bandwidth=1e9, epochs=4, minibatch_size=256,
    )  # fmt: skip
    alone = of_an_update(system)
    assert rate(system) == pytest.approx(8 * 256 / alone)
    with_latency = replace(system, links=replace(system.links, latency=10 * US))
    ways = 3 + (4 * 8 + 2) * 2 * (learners - 1)  # a lease, a rollout to the head, and on; values, 32 gradients and the agreement
    assert rate(with_latency) == pytest.approx(8 * 256 / (alone + ways * 10 * US))
    ring, weights = replace(system, weights_bytes=10**6), 7 * 1e6 / 1e9
    moved = 32 * 2 * (learners - 1) / learners * 1e6 / 1e9
    assert rate(ring) == pytest.approx(8 * 256 / (alone + weights + moved))
    copied = replace(system, costs=replace(system.costs, consume=3 * US), exchange=1e-4)
    assert rate(copied) == pytest.approx(8 * 256 / (alone + 8 * 256 * 3 * US + 33 * 1e-4)), "each copies all of the batch"


@pytest.mark.parametrize(("learners", "cores"), [(2, 8), (4, 2), (8, 2), (8, 8)])
def test_learners_on_the_drivers_machine_share_its_cores(learners: int, cores: int) -> None:
    """Each learns its part, copies all of the batch, and adds up 1 + 4 times."""
    turns = max(1.0, learners / cores)
    system = cluster(
        "sync", nodes=3, groups=1, cores=cores, learners=learners, costs__consume=3 * US, exchange=1e-4, epochs=4, weights_bytes=10**6,
        links__learner_bandwidth=1e9, links__latency=10 * US,
    )  # fmt: skip
    learning = turns * (system.batch_steps * (20 / learners + 3) * US + 5e-4)
    seconds = 256 * 40 * US + learning + 2 * 10 * US + 2 * 1e6 / 1e9  # what they add up crosses no link
    found = simulate(system)
    assert found.env_steps_per_second == pytest.approx(3 * 256 / seconds)
    busy = 256 * 40 * US + min(learners, cores) * learning
    assert found.utilisation["learner_cores"] == pytest.approx(busy / cores / seconds)
    assert found.utilisation["learner"] == pytest.approx(learning / seconds)


def test_a_learners_share_is_as_measured_and_a_device_of_its_own_shares_no_core() -> None:
    measured = cluster("sync", cores=2, learners=2, costs__share=0.6)
    assert rate(measured) == pytest.approx(1e6 / (20.0 + 0.6 * 20.0))
    apart = cluster("sync", cores=2, learners=4, costs__own_device=True)
    assert rate(apart) == pytest.approx(1e6 / (20.0 + 20.0 / 4))


@pytest.mark.parametrize(("learners_on", "bound"), [("driver", 2.0), ("nodes", 4.0)])
def test_async_learners_bound_a_run_by_what_their_cores_give(learners_on: str, bound: float) -> None:
    """Four learners of one thread, on two cores or on one and more each, where actors have nothing to do."""
    found = simulate(cluster("async", nodes=8, groups=1, actors=1, acting=1.0, learning=100.0, learners=4, learners_on=learners_on))
    assert found.env_steps_per_second == pytest.approx(bound * 1e4, rel=0.05)
    assert found.utilisation["learner"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("learners", [2, 3, 5])
def test_sync_every_rollout_crosses_the_heads_link_once_more_for_each_learner_elsewhere(learners: int) -> None:
    system = cluster(
        "sync",
        nodes=6,
        groups=1,
        cores=8,
        actors=1,
        learners=learners,
        learners_on="nodes",
        rollout_bytes=10**6,
        links__learner_bandwidth=1e9,
    )
    sent_on = 6 * (learners - 1) * 1e6 / 1e9  # the head's own too, with which it begins
    assert rate(system) == pytest.approx(6 * 256 / (of_an_update(system) + sent_on))
    here = replace(system, learners_on="driver")
    assert rate(here) == pytest.approx(6 * 256 / (of_an_update(here) + 5 * 1e6 / 1e9)), "rollouts of five nodes, once"


@pytest.mark.parametrize("learners", [3, 5])
def test_async_a_heads_link_gives_its_bandwidth_over_the_bytes_that_it_sends_on(learners: int) -> None:
    options = {"learning": 0.01, "rollout_bytes": 10**6, "links__learner_bandwidth": 1e8}
    found = simulate(cluster("async", nodes=40, learners=learners, learners_on="nodes", **options), updates=200)
    assert found.env_steps_per_second == pytest.approx(100 * 256 / (learners - 1), rel=0.005)
    assert found.utilisation["learner_link"] == pytest.approx(1.0, abs=0.01)
    assert found.utilisation["node_links"] < 0.01


def test_the_driver_packs_a_rollout_for_every_learner_elsewhere_and_their_nodes_unpack_it() -> None:
    """The head's own first: packed (1), then the other node's: unpacked and packed (3 + 1), and unpacked by the learner's node (3)."""
    system = cluster("sync", nodes=2, groups=1, cores=1, learners=2, learners_on="nodes", way=Way(0.0, pack=0.001, unpack=0.003))
    assert rate(system) == pytest.approx(512 / (of_an_update(system) + 0.001 + 0.004 + 0.003))
    here = replace(system, learners_on="driver")  # of whose two learners each has half of the only core
    assert rate(here) == pytest.approx(512 / (256 * 40 * US + 512 * 20 * US + 0.001 + 0.003))


@pytest.mark.parametrize(("learners_on", "messages"), [("driver", 3), ("nodes", 6)])
def test_messages_to_learners_elsewhere_take_of_the_cores_at_both_ends(learners_on: str, messages: int) -> None:
    """Of an update of two nodes: a lease, a rollout, the weights; with a learner on the other node two rollouts and an order besides."""
    system = cluster("sync", nodes=2, groups=1, cores=8, actors=1, learners=2, learners_on=learners_on, way=Way(0.0005))
    learned = 512 * 20 * US / (1 if learners_on == "driver" else 2)
    used, made = simulate(system).utilisation, 256 * 40 * US
    assert used["learner_cores"] == pytest.approx((made + learned + messages * 0.0005) / 8 / of_an_update(system), rel=0.001)
    assert used["cores"] == pytest.approx((2 * (made + messages * 0.0005) + 512 * 20 * US) / 16 / of_an_update(system), rel=0.001)


def test_rollouts_lie_on_the_head_once_and_with_each_learner_there_as_a_copy() -> None:
    system = cluster("sync", nodes=4, groups=1, cores=1, learners=3, rollout_bytes=1000)
    assert simulate(system).learner_bytes == 1000 * (4 + 3 * 4)
    assert simulate(replace(system, learners_on="nodes")).learner_bytes == 1000 * (4 + 4)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_for_one_learner_nothing_of_several_counts(mode: str) -> None:
    way = Way(1e-4, pack=2e-4, unpack=3e-4)
    system = cluster(
        mode, nodes=5, way=way, rollout_bytes=10**5, weights_bytes=10**5, links__learner_bandwidth=1e9, links__latency=1e-4, driver__rollout=1e-4,
    )  # fmt: skip
    other = replace(system, exchange=1.0, costs=replace(system.costs, share=9.0))
    assert simulate(other) == simulate(system) == simulate(replace(other, learners_on="nodes"))


# ---- through messages ------------------------------------------------------------------------------------------------
def test_actors_of_the_heads_own_node_have_no_way_to_go() -> None:
    alone = cluster("sync", groups=1, cores=1, links__latency=0.002)
    assert rate(alone) == pytest.approx(256 / (256 * 40 * US + 256 * 20 * US))
    assert rate(replace(alone, way=Way(0.001, pack=0.001, unpack=0.003))) == rate(alone)


def test_sync_a_lease_goes_to_another_node_and_a_rollout_comes_back() -> None:
    system = cluster("sync", nodes=2, groups=1, cores=1, links__latency=0.002)
    of_an_update = 256 * 40 * US + 2 * 256 * 20 * US + 2 * 0.002
    assert rate(system) == pytest.approx(512 / of_an_update)
    packed = replace(system, way=Way(0.0, pack=0.001, unpack=0.003))
    assert rate(packed) == pytest.approx(512 / (of_an_update + 0.004))


def test_messages_take_of_the_cores_at_both_ends() -> None:
    system = cluster("async", nodes=2, groups=4, cores=1, actors=1, learning=10.0, way=Way(0.001))

    def reckoned(message: float) -> float:
        """Each of the two nodes has one core, of which it makes so many rollouts a second."""
        made, learned = 256 * 40 * US, 256 * 10 * US
        version = message / system.plan.batch_rollouts  # at either end, of each rollout's share in it
        taken_there, taken_here = [made + 2 * message + version, version], [learned + 2 * message + version, made + learned + version]
        return float(256 * np.linalg.solve([taken_there, taken_here], [1.0, 1.0]).sum())

    assert rate(system) == pytest.approx(reckoned(0.001))
    gains = {move.lever.name: move.gain for move in moves(system, rate(system), simulate)}
    assert gains["messages"] == pytest.approx(reckoned(0.0005) / reckoned(0.001) - 1.0)
    assert "messages" not in {move.lever.name for move in moves(cluster("async", way=Way(0.001)), 1.0, simulate)}


def test_nodes_of_one_machine_share_its_cores_and_do_not_share_their_waits() -> None:
    busy, wide = cluster("async", nodes=4, groups=2, learning=1.0, one_machine=True), cluster("async", groups=8, learning=1.0)
    found = simulate(busy)
    assert found.env_steps_per_second == pytest.approx(rate(wide), rel=0.02)
    assert found.utilisation["cores"] == pytest.approx(1.0, abs=0.01)
    waiting = {"groups": 1, "actors": 1, "size": 32, "acting": 1.0, "learning": 0.5, "blocking": 10_000.0}
    one, four = (rate(cluster("async", nodes=n, one_machine=True, **waiting)) for n in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.01)
    slow = {**waiting, "acting": 200.0}
    assert rate(cluster("async", nodes=4, one_machine=True, **slow)) < 0.9 * rate(cluster("async", nodes=4, **slow))


def test_on_one_machine_every_node_is_simulated() -> None:
    many = cluster("async", nodes=12, groups=1, learning=0.5, one_machine=True)
    assert simulate(many, representatives=2).env_steps_per_second == pytest.approx(simulate(many, representatives=12).env_steps_per_second)


# ---- policy lag ------------------------------------------------------------------------------------------------------
def test_sync_samples_are_never_old() -> None:
    assert simulate(cluster("sync", nodes=3)).lag == {0: 1.0}


@given(st.integers(1, 5), st.none() | st.integers(1, 12), costs, costs, st.sampled_from([1, 3]))
@settings(max_examples=40)
def test_async_lag_stays_in_its_bound_and_every_step_has_one(
    lag: int, batch: int | None, acting: float, learning: float, nodes: int
) -> None:
    found = simulate(cluster("async", nodes=nodes, lag=lag, batch=batch, acting=acting, learning=learning))
    assert found.lag_max <= lag
    assert sum(found.lag.values()) == pytest.approx(1.0)
    assert 0.0 <= found.lag_mean <= min(lag, 3)


def test_where_the_learner_is_slow_samples_wait_for_two_updates() -> None:
    found = simulate(cluster("async", acting=4.0, learning=200.0))
    assert 1.5 < found.lag_mean <= 2.0
    assert simulate(cluster("async", acting=400.0, learning=2.0)).lag_mean < 1.0


# ---- what holds for all ----------------------------------------------------------------------------------------------
BUSY = {
    "cores": {"acting": 40.0, "learning": 0.5},
    "learner": {"acting": 40.0, "learning": 40.0},
    "link": {"learning": 0.5, "rollout_bytes": 10**6, "links__learner_bandwidth": 2e8},
    "weights": {"learning": 0.5, "weights_bytes": 10**7, "links__learner_bandwidth": 1e9},
    "driver": {"learning": 0.5, "driver__rollout": 1e-3},
    "latency": {"learning": 0.5, "links__latency": 0.01},
    "small batches": {"learning": 0.5, "batch": 4},
    "large batches": {"learning": 0.5, "batch": 60},
    "learners": {"learning": 10.0, "learners": 4, "weights_bytes": 10**6, "links__learner_bandwidth": 1e9, "exchange": 1e-4},
    "learners on nodes": {"learning": 10.0, "learners": 6, "learners_on": "nodes", "weights_bytes": 10**6, "links__learner_bandwidth": 1e9},
    "link of learners on nodes": {
        "learning": 0.5,
        "learners": 6,
        "learners_on": "nodes",
        "rollout_bytes": 10**6,
        "links__learner_bandwidth": 1e9,
    },
}


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("what", BUSY)
def test_a_few_nodes_stand_for_all(what: str, mode: str) -> None:
    system = cluster(mode, nodes=25, **{k: v for k, v in BUSY[what].items() if mode == "async" or k != "batch"})
    whole, few = (simulate(system, representatives=n, updates=60) for n in (25, REPRESENTATIVES))
    assert few.env_steps_per_second == pytest.approx(whole.env_steps_per_second, rel=0.03)
    assert few.lag_mean == pytest.approx(whole.lag_mean, abs=0.35)
    for name in ("cores", "learner", "learner_link"):
        assert few.utilisation[name] == pytest.approx(whole.utilisation[name], abs=0.04), name


def test_ten_thousand_nodes_are_simulated_as_a_few() -> None:
    found = simulate(cluster("async", nodes=10_000, learning=0.0001, rollout_bytes=100, links__learner_bandwidth=1.25e9))
    assert found.env_steps_per_second == pytest.approx(1e4 * 2 / 40e-6, rel=0.03)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_same_system_gives_the_same_figures(mode: str) -> None:
    system = cluster(mode, nodes=30, rollout_bytes=10**5, weights_bytes=10**5, links__learner_bandwidth=1e9, driver__rollout=1e-4)
    assert simulate(system) == simulate(system)


def _cheaper(system: System, what: str) -> System:
    if what in ("acting", "learning"):
        return replace(system, costs=replace(system.costs, **{what: getattr(system.costs, what) / 2}))
    if what == "rollout":
        return replace(system, driver=replace(system.driver, rollout=system.driver.rollout / 2))
    links = {"learner_bandwidth": 2 * system.links.learner_bandwidth} if what == "link" else {"latency": system.links.latency / 2}
    return replace(system, links=replace(system.links, **links))


@given(
    st.sampled_from(["sync", "async"]), st.integers(1, 12), costs, costs, st.sampled_from([0.0, 1e5, 1e6]), st.sampled_from([0.0, 1e-4, 1e-2]),
    st.sampled_from([0.0, 1e-4, 1e-3]), st.sampled_from(["acting", "learning", "link", "latency", "rollout"]),
)  # fmt: skip
@settings(max_examples=30)
def test_nothing_that_gets_cheaper_makes_a_run_slower(
    mode: str, nodes: int, acting: float, learning: float, size: float, latency: float, rollout: float, what: str
) -> None:
    system = cluster(
        mode, nodes=nodes, acting=acting, learning=learning, rollout_bytes=int(size), links__latency=latency, links__learner_bandwidth=1e9,
        driver__rollout=rollout,
    )  # fmt: skip
    assert rate(_cheaper(system, what)) >= 0.97 * rate(system)


@given(st.sampled_from(["sync", "async"]), st.integers(1, 10), costs, costs)
@settings(max_examples=20)
def test_nothing_is_used_more_than_always(mode: str, nodes: int, acting: float, learning: float) -> None:
    system = cluster(
        mode, nodes=nodes, acting=acting, learning=learning, rollout_bytes=10**5, links__learner_bandwidth=1e8, driver__rollout=1e-4
    )
    found: Prediction = simulate(system)
    assert all(0.0 <= used <= 1.0 + 1e-6 for used in found.utilisation.values())
    assert found.learner_bytes <= 1e5 * (system.in_flight_limit + 2 * system.plan.batch_rollouts)


def test_numbers_are_spread_evenly_and_without_a_rest() -> None:
    assert spread(10, 4) == [3, 3, 2, 2]
    assert spread(3, 8) == [1, 1, 1]
    assert spread(0, 8) == []
