"""Nodes and actors that come and go while a run goes on, without Ray: the nodes are in this process (test_ray_fleet.py).

Whatever moves, nothing of it is lost, and the weights are those of the local engine.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_ray_fleet import SETTINGS, ClusterHere, events, learned_as_on_one_machine

import shoal
from shoal.cli.control import tell_run
from shoal.engines import autoscale, ending, ray_fleet, ray_link, ray_nodes
from shoal.engines.fleet import Process
from shoal.engines.ray_cluster import ClusterNode
from shoal.errors import RunError
from shoal.monitoring.store import RunReader


def wait_for(true: Callable[[], object], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Scene:
    """A run on nodes in this process, and what a thread beside it does with them."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(ending, "UPDATE_SECONDS", 300.0)  # an end gives up no update, however slow the machine
        monkeypatch.setattr(ray_nodes, "REJOIN_SECONDS", 3600.0)  # what was left is not taken again here
        self.run = directory / "run"

    def train(self, cluster: ClusterHere, beside: Callable[[], Any], **settings: Any) -> shoal.Run:
        """`beside` begins once the run has made three updates; when it is done, the run makes three more and ends. What it raises is raised."""
        failed: list[BaseException] = []

        def do() -> None:
            try:
                wait_for(self.answers)
                self.until_updates(3)
                beside()
                self.until_updates(3)
            except BaseException as error:
                failed.append(error)
            tell_run(self.run, "stop")

        self._monkeypatch.setattr(ray_fleet, "connect", lambda config, warn: cluster)
        thread = threading.Thread(target=do)
        thread.start()
        run = shoal.train("CartPole-v1", run_dir=str(self.run), **{**SETTINGS, "engine": "ray", "stop": {"updates": 10**6}, **settings})
        thread.join()
        if failed:
            raise failed[0]
        return run

    def answers(self) -> bool:
        try:
            return bool(self.state())
        except RunError:  # it does not listen yet
            return False

    def until_updates(self, more: int) -> None:
        before = self.state()["update"]
        wait_for(lambda: self.state()["update"] >= before + more)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = tell_run(self.run, "state")["state"]
        return found

    def scale(self, **what: Any) -> dict[str, Any]:
        return tell_run(self.run, "scale", what)

    def happened(self, kind: str) -> list[dict[str, Any]]:
        with RunReader(self.run / "run.db") as reader:
            return list(reader.events(kind))

    def hosting(self) -> int:
        """Actors that have groups."""
        return sum(bool(actor["groups"]) for actor in self.state()["actors"])


def looked_at_again(cluster: ClusterHere) -> None:
    """The run has looked at the cluster twice since: the first look may have begun before."""
    before = cluster.looks
    wait_for(lambda: cluster.looks >= before + 2)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def nothing_was_lost(run: shoal.Run) -> None:
    """But for what was being made as the run ended."""
    ledger = run.result["ledger"]
    assert set(ledger["dropped"]) <= {"shutdown"}
    assert (ledger["trained"] + sum(ledger["dropped"].values()), ledger["in_flight"]) == (ledger["produced"], 0)
    assert run.result["restarts"] == 0
    assert events(run, "died") == []


def test_actors_are_scaled_evenly_over_the_nodes_down_and_up_again_with_the_same_bits(scene: Scene) -> None:
    def beside() -> None:
        assert scene.scale(actors=2) == {"ok": True, "actors": 2, "nodes": {"a": 1, "b": 1}}
        wait_for(lambda: scene.hosting() == 2)
        assert scene.scale(actors=3)["nodes"] in ({"a": 2, "b": 1}, {"a": 1, "b": 2})
        wait_for(lambda: scene.hosting() == 3)

    run = scene.train(ClusterHere(["a", "b"]), beside)
    assert [(event["before"], event["actors"]) for event in events(run, "scaled")] == [(4, 2), (2, 3)]
    nothing_was_lost(run)
    learned_as_on_one_machine(run)


def test_a_node_without_actors_is_given_back_and_taken_again_when_they_come_back(scene: Scene) -> None:
    cluster = ClusterHere(["a", "b"], actors_per_node=1)

    def beside() -> None:
        first = dict(cluster.here)
        scene.scale(actors=1)
        wait_for(lambda: any(node.left for node in first.values()))
        assert sum(node.left for node in first.values()) == 1
        answer = scene.scale(actors=2)
        assert (answer["actors"], answer["there"], list(answer["nodes"].values())) == (2, 1, [1]), "the other one has no node yet"
        wait_for(lambda: scene.hosting() == 2)

    run = scene.train(cluster, beside)
    (left,), (joined,) = events(run, "node_left"), events(run, "node_joined")
    assert (left["node"], left["reason"]) == (joined["node"], "no actor is to live there")
    assert [(event["actors"], event.get("there")) for event in events(run, "scaled")] == [(1, None), (2, 1)]
    nothing_was_lost(run)
    learned_as_on_one_machine(run)


def test_of_a_node_that_is_lost_again_and_again_figures_are_kept_and_no_links(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_nodes, "REJOIN_SECONDS", 0.1)
    cluster, links = ClusterHere(["a", "b"]), list[weakref.ref[ray_link.NodeLink]]()
    rounds = 4

    class Watched(ray_link.NodeLink):
        def __init__(self, *of: Any, **how: Any) -> None:
            super().__init__(*of, **how)
            links.append(weakref.ref(self))

    monkeypatch.setattr(ray_fleet, "NodeLink", Watched)

    def kept() -> int:
        gc.collect()
        return sum(link() is not None for link in links)

    def beside() -> None:
        for count in range(1, rounds + 1):
            wait_for(lambda: scene.hosting() == 4)
            scene.until_updates(1)
            cluster.pull("b")
            wait_for(lambda count=count: len(scene.happened("node_lost")) == count)
            cluster.names.append("b")
            wait_for(lambda count=count: len(scene.happened("node_joined")) == count)
        wait_for(lambda: scene.hosting() == 4)
        wait_for(lambda: kept() == 2, 60.0)

    run = scene.train(cluster, beside)
    assert len(links) == 2 + rounds
    network = run.result["network"]
    assert set(network["nodes"]) == {"a", "b"}
    assert network["env_steps"] == network["nodes"]["a"]["env_steps"] + network["nodes"]["b"]["env_steps"]
    assert network["env_steps"] >= run.result["updates"] * 4 * 16 * 2, "of all times that it was there"
    learned_as_on_one_machine(run)


class Twins(ClusterHere):
    """Nodes of one name."""

    def nodes(self) -> list[ClusterNode]:
        return [ClusterNode(node.id, "same", node.cpus) for node in super().nodes()]


def test_more_actors_than_the_nodes_have_cpus_are_spread_evenly_and_nodes_of_one_name_are_told_apart(scene: Scene) -> None:
    run = scene.train(Twins(["first-node", "second-node"], actors_per_node=1), lambda: scene.scale(actors=4))
    (event,) = events(run, "scaled")
    assert event["nodes"] == {"same first-": 2, "same second": 2}
    nothing_was_lost(run)


@pytest.mark.parametrize("how", ["Ray", "SIGTERM"])
def test_a_node_that_is_to_go_is_drained_first_and_nothing_is_lost(scene: Scene, how: str) -> None:
    cluster = ClusterHere(["a", "b"])

    def beside() -> None:
        if how == "Ray":
            cluster.going["b"] = 30.0
        else:
            cluster.here["b"].announce("its process got SIGTERM")
        wait_for(lambda: cluster.here["b"].left)
        looked_at_again(cluster)  # it is there still, and not taken again

    run = scene.train(cluster, beside)
    (noticed,), (left,) = events(run, "node_draining"), events(run, "node_left")
    assert (noticed["node"], noticed["reason"], len(noticed["actors"])) == ("b", "preempted", 2)
    assert noticed["seconds"] == (30.0 if how == "Ray" else None)
    assert (left["node"], left["reason"]) == ("b", "preempted")
    assert events(run, "node_lost") == events(run, "node_joined") == []
    nothing_was_lost(run)
    learned_as_on_one_machine(run)


def test_actors_of_a_drained_node_are_made_anew_on_another_that_takes_its_part(scene: Scene) -> None:
    cluster = ClusterHere(["a", "b"], num_nodes=2)

    def beside() -> None:
        cluster.names.append("c")  # beyond --nodes, until another one goes
        looked_at_again(cluster)
        assert "c" not in cluster.here
        cluster.going["b"] = None
        wait_for(lambda: cluster.here["b"].left and "c" in cluster.here)
        wait_for(lambda: scene.hosting() == 4)

    run = scene.train(cluster, beside)
    assert [event["node"] for event in events(run, "node_joined")] == ["c"]
    nothing_was_lost(run)
    learned_as_on_one_machine(run)


def test_the_last_node_goes_on_until_another_comes_and_then_is_drained(scene: Scene) -> None:
    cluster = ClusterHere(["a"])

    def beside() -> None:
        cluster.going["a"] = 60.0
        wait_for(lambda: scene.happened("node_draining"))
        looked_at_again(cluster)
        scene.until_updates(5)
        cluster.names.append("b")
        wait_for(lambda: cluster.here["a"].left)

    run = scene.train(cluster, beside)
    assert [event["node"] for event in events(run, "node_left")] == ["a"]
    nothing_was_lost(run)
    learned_as_on_one_machine(run)


def test_a_node_that_is_gone_before_all_was_moved_is_lost_and_its_rollouts_are_made_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = ClusterHere(["a", "b"])
    retire = ray_nodes.Nodes._retire

    def pull_as_it_retires(nodes: ray_nodes.Nodes, process: Process) -> None:
        retire(nodes, process)
        if "b" in cluster.names:
            cluster.pull("b")

    monkeypatch.setattr(ray_nodes.Nodes, "_retire", pull_as_it_retires)

    def beside() -> None:
        cluster.going["b"] = 0.0
        wait_for(lambda: scene.happened("node_lost") and scene.hosting() == 2)

    run = scene.train(cluster, beside)
    (lost,) = events(run, "node_lost")
    assert lost["reason"].startswith("preempted (Ray takes the node away), and gone before all was moved: ")
    assert len(lost["actors"]) == 2
    assert set(run.result["ledger"]["dropped"]) <= {"shutdown", "actor_died"}
    learned_as_on_one_machine(run)


def test_a_ray_that_does_not_tell_which_nodes_go_is_warned_of_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ClusterHere(["a"])

    def blind() -> None:
        cluster.looks += 1

    monkeypatch.setattr(cluster, "draining", blind)
    run = scene.train(cluster, lambda: looked_at_again(cluster))
    assert sum("which nodes it takes away" in event["message"] for event in events(run, "warning")) == 1


def test_the_load_is_followed_up_to_the_room_that_nodes_have(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscale, "GROW", 0.0)  # on a machine of any speed the learner waits for too long
    monkeypatch.setattr(autoscale, "WINDOW_SECONDS", 0.3)
    monkeypatch.setattr(autoscale, "COOL_DOWN_SECONDS", 0.5)
    cluster = ClusterHere(["a"])

    def beside() -> None:
        scene.scale(actors=1)
        wait_for(lambda: scene.hosting() == 1)
        scene.scale(autoscale="1:4")
        wait_for(lambda: scene.hosting() == 2)
        cluster.names.append("b")
        wait_for(lambda: scene.hosting() == 4)

    run = scene.train(cluster, beside)
    by_load = [event for event in events(run, "scaled") if "learner_waits" in event]
    assert [(event["before"], event["actors"]) for event in by_load] == [(1, 2), (2, 4)]
    assert [event["node"] for event in events(run, "node_joined")] == ["b"]  # which had to say first what it is
    nothing_was_lost(run)
    learned_as_on_one_machine(run)


def test_a_run_that_follows_the_load_begins_with_no_more_than_its_bound(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscale, "COOL_DOWN_SECONDS", 3600.0)  # the load decides nothing here

    def beside() -> None:
        assert (len(scene.state()["actors"]), scene.hosting()) == (2, 2)

    run = scene.train(ClusterHere(["a", "b"]), beside, autoscale="1:2")
    learned_as_on_one_machine(run)
