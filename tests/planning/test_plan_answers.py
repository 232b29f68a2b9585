"""From measured costs to the model, and from its figures to what bounds a run, what breaks first and what would move it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cluster import cluster, plan_of

from planning_costs import SMALL, costs
from shoal.config import RunConfig
from shoal.errors import ConfigError
from shoal.planning import inputs
from shoal.planning.inputs import Asked, check_same, learning_speed, measured_of, read_costs, systems
from shoal.planning.levers import LEVERS, bottleneck, moves
from shoal.planning.pipeline import simulate
from shoal.planning.plan import EXCHANGES, breaking_size, plan, too_busy
from shoal.planning.system import System, Way
from shoal.settings import resolve


def config_of(algorithm: str = "ppo", **given: Any) -> RunConfig:
    return resolve("CartPole-v1", {**SMALL, "algorithm": algorithm, **given})[0]


def system_of(
    nodes: int = 1, algorithm: str = "ppo", asked: Asked | None = None, given: dict[str, Any] | None = None, **changed: Any
) -> System:
    asked = replace(asked or Asked(), sizes=(nodes,))
    return systems(config_of(algorithm, **(given or {})), measured_of(costs(algorithm, **changed), "a file"), asked)[nodes]


def free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DRIVER_UPDATE_US", "DRIVER_LOOK_US", "MESSAGE_US"):
        monkeypatch.setattr(inputs, name, 0.0)


@pytest.fixture
def free_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch)


# ---- inputs ----------------------------------------------------------------------------------------------------------
def test_costs_become_seconds_of_a_core() -> None:
    transport = {"record": 8.0, "words": 1.0, "decide": 2.0, "consume": 3.0, "weights": 0.6}
    s = system_of(3, transport=transport, mixed=2.0)
    assert s.costs.acting == pytest.approx(40e-6)
    assert (s.costs.consume, s.costs.learning, s.costs.learning_cores) == pytest.approx((3e-6, 40e-6, 1.0))
    assert s.driver.rollout == pytest.approx(256 * 3e-6)
    assert (s.publish, s.refresh) == pytest.approx((1024 * 0.6e-6 / 3,) * 2)  # two actors and the learner
    assert (s.plan.num_groups, s.groups_of_node, s.plan.batch_rollouts, s.batch_steps) == (12, 4, 12, 3072)
    assert (s.optimizer_steps, s.rollout_bytes, s.weights_bytes) == (48, 10_000, 40_000)
    assert (s.links.node_bandwidth, s.links.learner_bandwidth, s.links.latency) == pytest.approx((1.25e9, 1.25e9, 1e-4))


def test_what_is_asked_for_goes_before_what_was_measured() -> None:
    asked = Asked(cores=16, link_latency_us=5.0, link_gbit=1.0, learner_gbit=100.0, driver_us=7.0)
    s = system_of(
        4, "impala", asked, {"sampling.groups": 32, "sampling.rollout_length": 64, "sampling.batch_rollouts": 6, "max_policy_lag": 2}
    )
    assert (s.cores, s.actors, s.learners) == (16, 16, 1)
    assert (s.links.node_bandwidth, s.links.learner_bandwidth, s.links.latency, s.driver.rollout) == pytest.approx(
        (1.25e8, 1.25e10, 5e-6, 7e-6)
    )
    assert (s.plan.batch_rollouts, s.plan.max_policy_lag, s.rollout_bytes, s.optimizer_steps) == (6, 2, 20_000, 1)
    assert system_of(given={"actors": 3}).actors == 3


def test_on_ray_the_actors_of_every_node_are_reached_by_messages() -> None:
    given = {"engine": "ray", "ray.actors_per_node": 3}
    s = system_of(1, asked=Asked(message_us=50.0, one_machine=True), given=given, crossing={"pack": 1.0, "unpack": 2.0})
    assert s.way is not None
    assert (s.way.message, s.way.pack, s.way.unpack) == pytest.approx((50e-6, 256e-6, 512e-6))
    assert (s.actors, s.one_machine) == (3, True)
    assert system_of(1).way is None, "the local engine has no messages but those through channels"
    assert isinstance(system_of(2).way, Way)
    assert system_of(1, given={"engine": "ray"}).actors == 2, "one for each core"


def test_waiting_environments_have_an_actor_for_each_group() -> None:
    waiting = {"wall_us": 10_000.0, "waits": True}
    answer = costs("impala", environment=waiting, settings__form="threads")
    s = systems(config_of("impala", **{"sampling.groups": 24}), measured_of(answer, "a file"), Asked(cores=2))[1]
    assert (s.costs.blocking, s.actors) == (0.01, 16)


def test_learning_with_more_threads_follows_amdahls_law_through_what_was_measured() -> None:
    assert learning_speed({1: 40.0, 2: 25.0}, 2) == pytest.approx(1.6)
    assert learning_speed({1: 40.0, 2: 25.0}, 4) == pytest.approx(1 / (0.25 + 0.75 / 4))
    assert learning_speed({1: 40.0}, 8) == learning_speed({1: 40.0, 2: 50.0}, 1) == 1.0
    assert learning_speed({1: 40.0, 2: 50.0}, 2) == 1.0  # a second thread that only disturbs
    s = system_of(given={"learner.threads": 2})
    assert (s.costs.learning, s.costs.learning_cores) == pytest.approx((25e-6, 1.6))


SEVERAL = {"learners": 4, "share_us": 15.0, "exchange_us": 2.0, "exchanges": 17}  # of an update of 1024 env steps


def test_several_learners_are_those_of_the_configuration_and_where_it_says() -> None:
    given = {"learners": 4, "engine": "ray", "ray.learners_on": "nodes"}
    alone, here, there = system_of(4), system_of(4, given={"learners": 4}), system_of(4, given=given)
    assert [(s.learners, s.learners_on, s.elsewhere) for s in (alone, here, there)] == [(1, "driver", 0), (4, "driver", 0), (4, "nodes", 3)]
    assert (system_of(1, "impala").plan.slots_per_group, system_of(1, "impala", given={"learners": 4}).plan.slots_per_group) == (2, 3)
    assert system_of(1, "impala", Asked(cores=8), {"learners": 4, "sampling.groups": 16}).actors == 5, "as a run leaves a core for each"


def test_what_was_measured_of_as_many_learners_is_taken_and_else_what_was_measured_once() -> None:
    s = system_of(4, given={"learners": 4}, several=SEVERAL)
    assert (s.part, s.exchange) == pytest.approx((15 / 40, 1024 * 2e-6 / 17))
    assert (s.optimizer_steps, s.exchange_seconds) == pytest.approx((64, 65 * 1024 * 2e-6 / 17))
    others = [system_of(given={"learners": 2}, several=several) for several in (None, SEVERAL)]
    once = 1e-6 * (inputs.EXCHANGE_US + 40_000 * inputs.EXCHANGE_BYTE_US)
    assert [(s.part, s.exchange) for s in others] == [pytest.approx((0.5, once))] * 2
    gpu = {"cores": 1.0, "wall_us": {"1": 40.0}, "own_device": True}
    assert system_of(given={"learners": 4}, several=SEVERAL, learning=gpu).part == 0.25, "what was measured is processor time"
    assert system_of(several=SEVERAL).part == 1.0


@pytest.mark.parametrize(("nodes", "fits"), [(3, False), (4, True)])
def test_learners_on_nodes_need_as_many_nodes_as_in_a_run(nodes: int, fits: bool) -> None:
    given = {"learners": 4, "engine": "ray", "ray.learners_on": "nodes"}
    if fits:
        assert system_of(nodes, given=given).elsewhere == 3
        return
    with pytest.raises(
        ConfigError, match=r"ray\.learners_on: the first of 4 learners .* has 2 nodes .*--learners 3 or --learners-on driver"
    ):
        system_of(nodes, given=given)
    with pytest.raises(ConfigError, match="has 2 nodes"):
        systems(config_of(**given), measured_of(costs(), "a file"), Asked(sizes=(100, 3)))


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"sampling.group_size": 4}, "sampling.group_size"), ({"algorithm.epochs": 2}, "algorithm.epochs"), ({"env.form": "native"}, "env.form"),
        ({"algorithm.minibatch_size": 128}, "algorithm.minibatch_size"), ({"algorithm": "impala"}, "algorithm"),
        ({"policy.hidden_sizes": [1024, 1024]}, "policy.hidden_sizes"), ({"policy.memory": "lstm"}, "policy.memory"), ({"device": "cuda"}, "device"),
        ({"env.kwargs": {"sutton_barto_reward": True}}, "env.kwargs"),
    ],
)  # fmt: skip
def test_costs_of_something_else_are_refused(given: dict[str, Any], key: str) -> None:
    config = config_of(**{"algorithm": "ppo", **given})
    with pytest.raises(ConfigError, match=f"a file: costs of {key} "):
        check_same(config, measured_of(costs(), "a file"), "a file")


def test_a_factory_in_a_file_is_the_same_wherever_the_file_lies() -> None:
    config = config_of()
    config.env.id = "/here/waiting.py:fixed"
    check_same(config, measured_of(costs(settings__env="/there/waiting.py:fixed"), "a file"), "a file")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"costs": 3}', json.dumps(costs(sizes={})), json.dumps(costs(mixed=None)),
                                  json.dumps(costs(costs__l=-1.0)), "[" * 100_000])  # fmt: skip
def test_a_file_without_costs_is_refused_with_how_to_make_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(ConfigError, match="shoal bench costs ENV --json"):
        read_costs(tmp_path / "costs.json")


@pytest.mark.parametrize("given", [{"actors": 0}, {"policy.inference": "server"}])
def test_what_the_model_does_not_have_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="plan"):
        system_of(given=given)


# ---- what bounds a run -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (cluster("async", nodes=8, learning=0.01), "cores"),
        (cluster("sync", acting=200.0, learning=10.0), "cores"),
        (cluster("async", nodes=8, learning=30.0), "learner"),
        (cluster("async", nodes=8, acting=40.0, learning=1.5, driver__rollout=4e-4), "learner_cores"),
        (cluster("sync", acting=10.0, learning=100.0), "learner"),
        (cluster("async", nodes=8, learning=0.01, rollout_bytes=10**6, links__learner_bandwidth=1e8), "learner_link"),
        (cluster("async", nodes=8, learning=0.01, rollout_bytes=10**6, links__node_bandwidth=1e7), "node_links"),
        (cluster("sync", nodes=8, learning=0.01, links__latency=0.1), "latency"),
        (cluster("async", nodes=8, learning=0.01, driver__rollout=0.01), "driver"),
        (cluster("async", actors=4, acting=1.0, learning=0.01, blocking=10_000.0), "waiting"),
        (cluster("async", nodes=8, learning=0.01, batch=2), "batches"),
        (cluster("async", nodes=8, learning=30.0, learners=8), "learner_cores"),
        (cluster("async", nodes=8, learning=60.0, learners=4, learners_on="nodes", cores=8, actors=2), "learner"),
        (cluster("sync", nodes=4, cores=4, learning=1.0, learners=4, exchange=0.02), "exchange"),
        (
            cluster("async", nodes=8, learning=0.01, learners=4, learners_on="nodes", rollout_bytes=10**6, links__learner_bandwidth=3e8),
            "learner_link",
        ),
    ],
)
def test_the_bottleneck_is_what_was_made_scarce(system: System, expected: str) -> None:
    found = moves(system, simulate(system).env_steps_per_second, simulate)
    most = bottleneck(found)
    assert most is not None
    assert most.lever.name == expected
    assert [move.gain for move in found] == sorted((move.gain for move in found), reverse=True)


@pytest.mark.parametrize("learners", [1, 3])
def test_levers_that_change_the_run_give_groups_the_slots_that_it_would_have(learners: int) -> None:
    pulled = {lever.name: lever.pull for lever in LEVERS}
    larger, turned = pulled["batches"](cluster("async", learners=learners)), pulled["turns"](cluster("sync", learners=learners))
    assert larger is not None
    assert turned is not None
    assert larger.plan == plan_of("async", batch=8, learners=learners)
    assert turned.plan == plan_of("async", learners=learners)


def test_twice_the_bottleneck_gives_twice_the_run_where_nothing_else_counts() -> None:
    system = cluster("async", nodes=4, learning=0.01)
    gains = {move.lever.name: move.gain for move in moves(system, simulate(system).env_steps_per_second, simulate)}
    assert gains["cores"] == pytest.approx(1.0, abs=0.05)
    assert all(abs(gain) < 0.05 for name, gain in gains.items() if name != "cores")
    assert set(gains) == {lever.name for lever in LEVERS} - {"waiting", "turns", "messages", "exchange"}


def test_in_sync_mode_it_is_said_what_taking_turns_costs() -> None:
    system = cluster("sync", acting=100.0, learning=20.0)
    gains = {move.lever.name: move.gain for move in moves(system, simulate(system).env_steps_per_second, simulate)}
    assert gains["turns"] == pytest.approx((2 / 120) * (50 + 20) - 1, abs=0.02)
    assert "batches" not in gains


# ---- what breaks first -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("full", "expected"), [(3, 6), (100, 200), (3000, 6000), (10_000, None)])
def test_the_size_at_which_a_node_gives_half_is_found(full: int, expected: int | None) -> None:
    def rate(nodes: int) -> float:
        return 7.0 * min(nodes, full)

    found = breaking_size(rate, {n: rate(n) for n in (1, 10, 100, 1000, 10_000)})
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert expected < found <= max(expected + 1, 1.06 * expected)


def planned(tmp_path: Path, asked: Asked, algorithm: str = "ppo", given: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(costs(algorithm, **changed)))
    return plan("CartPole-v1", {**SMALL, "algorithm": algorithm, **(given or {})}, asked, costs_file=file)


def test_a_plan_of_one_node_is_the_ceiling_of_its_costs(tmp_path: Path, free_driver: None) -> None:
    found = planned(tmp_path, Asked())
    (row,) = found["rows"]
    assert row["env_steps_per_second"] == pytest.approx(1e6 / (38 / 2 + 40))
    assert (row["lag"], row["over_lag"], row["learners"]) == ({"mean": 0.0, "max": 0}, 0.0, 1)
    assert found["breaks"] is None
    assert row["bottleneck"]["name"] == "learner"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plan of three sizes, with a free driver."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        free(monkeypatch)
        return planned(tmp_path_factory.mktemp("table"), Asked(sizes=(1, 10, 100)), "impala", costs__l=1.0)


def test_a_table_says_what_breaks_first_and_what_would_move_it(table: dict[str, Any]) -> None:
    found = table
    rates = [row["env_steps_per_second"] for row in found["rows"]]
    assert rates == sorted(rates)
    assert [row["bottleneck"]["name"] for row in found["rows"]] == ["cores", "cores", "learner"]
    breaks = found["breaks"]
    assert breaks["name"] == "learner"
    alone, shared = 1e6, 1e6 * 2 / 3  # steps a second of a learner that has a core for itself, and of one beside two actors on two cores
    half = rates[0] / 2
    assert shared / half <= breaks["nodes"] <= alone / half
    assert 2 * shared / half * 0.95 <= breaks["moved_to"] <= 2 * alone / half
    assert "--learners" in breaks["advice"]


def test_costs_that_are_measured_beside_other_programs_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert too_busy(1.9, 4) == []
    (warning,) = too_busy(8.0, 2)
    assert "load 8.0 on 2 cores" in warning
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    monkeypatch.setattr("shoal.benching.costs.bench_costs", lambda *args, **how: costs())
    assert "load 1000.0" in plan("CartPole-v1", {**SMALL, "algorithm": "ppo"}, Asked())["warnings"][0]


@pytest.mark.parametrize("learners", [1, 2, 4])
def test_costs_of_another_number_of_learners_are_warned_of(learners: int, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(costs("impala", several=SEVERAL)))
    found = plan("CartPole-v1", {**SMALL, "algorithm": "impala", "learners": learners}, Asked(sizes=(4,)), costs_file=file)
    assert found["warnings"][1:] == ([EXCHANGES.format(2)] if learners == 2 else [])
    assert [row["learners"] for row in found["rows"]] == [learners]
    assert (found["settings"]["learners"], found["settings"]["learners_on"]) == (learners, "driver")


def test_costs_are_measured_with_as_many_learners(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def bench(target: str, settings: dict[str, Any], **how: Any) -> dict[str, Any]:
        asked.append(settings)
        return costs("impala", several=SEVERAL)

    monkeypatch.setattr("shoal.benching.costs.bench_costs", bench)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    given = {"learners": 4, "engine": "ray", "ray.learners_on": "nodes", "ray.allow_plain_learners": True}
    found = plan("CartPole-v1", {**SMALL, "algorithm": "impala", **given}, Asked(sizes=(4,)))
    assert asked == [{**SMALL, "algorithm": "impala", "learners": 4}]
    assert found["costs"]["share"] == pytest.approx(15 / 40)
    assert found["settings"]["learners_on"] == "nodes"


def test_a_plan_of_several_learners_is_the_closed_form_of_its_costs(tmp_path: Path, free_driver: None) -> None:
    """On the two cores of one machine: 4 learners' parts and exchanges after all steps."""
    found = planned(tmp_path, Asked(), given={"learners": 4}, several=SEVERAL)
    learning = 4 * (15.0 + 2.0) / 2
    assert found["rows"][0]["env_steps_per_second"] == pytest.approx(1e6 / (38 / 2 + learning))


@pytest.mark.parametrize(
    ("where", "times", "bottleneck"),
    [({}, (1.0, 2.0), "learner_cores"), ({"engine": "ray", "ray.learners_on": "nodes"}, (2.5, 4.0), "learner")],
    ids=["on the driver's two cores", "on nodes"],
)
def test_more_learners_are_more_speed_where_they_have_cores(
    where: dict[str, Any], times: tuple[float, float], bottleneck: str, table: dict[str, Any], tmp_path: Path, free_driver: None
) -> None:
    (row,) = planned(tmp_path, Asked(sizes=(100,)), "impala", {"learners": 4, **where}, costs__l=1.0)["rows"]
    least, most = times
    one = table["rows"][2]["env_steps_per_second"]
    assert least * one < row["env_steps_per_second"] <= 1.01 * most * one
    assert (row["bottleneck"]["name"], row["learners"]) == (bottleneck, 4)


def test_without_the_simulator_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)
    with pytest.raises(ConfigError, match=r"pip install 'shoal\[plan\]'"):
        plan("CartPole-v1", {}, Asked())
