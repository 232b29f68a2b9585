"""A run whose driver's machine is one of the nodes, without Ray: actors there are the driver's own processes, and share its memory."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_ray_elastic import Scene, looked_at_again, nothing_was_lost, wait_for
from test_ray_fleet import ClusterHere, NodeHere, events, learned_as_on_one_machine

from shoal.engines import ray_nodes
from shoal.engines.node_report import NodeReport, report_here
from shoal.engines.ray_own_node import OwnNode
from shoal.engines.ray_words import Frame, Kind, decode


def own_node(setup: bytes) -> OwnNode:
    """Made here it leaves the signals of the tests as they are."""
    before = signal.getsignal(signal.SIGTERM)
    node = OwnNode(setup)
    signal.signal(signal.SIGTERM, before)
    return node


class OwnHere(NodeHere):
    def __init__(self, setup: bytes, pickled: bytes | None, spoil: Callable[[Frame], Frame | None]) -> None:
        super().__init__(setup, pickled, spoil)
        self._node.close()
        self._node: Any = own_node(setup)


def cluster_of(*names: str) -> ClusterHere:
    """The first is the driver's machine."""
    cluster = ClusterHere(list(names))
    cluster.own = names[0]
    cluster.kinds[names[0]] = OwnHere
    return cluster


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def own_actors() -> dict[int, int]:
    """Processes of the driver's fleet, by the actors' numbers: those that come from the zygote that the learner comes from."""
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            before, _, after = (entry / "stat").read_text().rpartition(")")
        except OSError:
            continue
        state, parent = after.split()[:2]
        name = before.partition("(")[2]
        if state != "Z" and name.startswith("shoal:"):
            parents[int(entry.name)], names[int(entry.name)] = int(parent), name
    learners = {
        parents[pid] for pid, name in names.items() if name.startswith("shoal:learner") and parents.get(parents[pid]) == os.getpid()
    }
    actors = {pid: name for pid, name in names.items() if name.startswith("shoal:actor") and parents[pid] in learners}
    return {int(name.rpartition("-")[2]): pid for pid, name in actors.items()}


def test_actors_of_the_drivers_machine_send_nothing_and_learn_the_same_bits(scene: Scene) -> None:
    cluster, bodies = cluster_of("a", "b"), list[str]()
    spoil = cluster.spoil

    def note(frame: Frame) -> Frame | None:
        if frame.body and frame.kind is Kind.WORD:
            bodies.append("b")
        return spoil(frame)

    cluster.spoil = note
    there: dict[int, int] = {}

    def look() -> None:
        wait_for(lambda: scene.hosting() == 4)
        wait_for(lambda: len(own_actors()) == 2)  # of four: an actor has groups before its process has its name
        there.update(own_actors())

    run = scene.train(cluster, look)
    assert len(there) == 2
    network = run.result["network"]["nodes"]
    assert network["a"]["bytes_said"] == network["a"]["bytes_heard"] == 0
    assert network["b"]["bytes_heard"] > len(bodies) > 0
    steps = run.result["updates"] * 4 * 16 * 2
    assert network["a"]["env_steps"] + network["b"]["env_steps"] >= steps
    assert abs(network["a"]["env_steps"] - steps / 2) <= 4 * 16 * 2
    nothing_was_lost(run)
    learned_as_on_one_machine(run)


def test_one_machine_alone_is_the_local_engine(scene: Scene) -> None:
    run = scene.train(cluster_of("a"), lambda: wait_for(lambda: len(own_actors()) == 2))
    assert run.result["network"]["bytes_per_env_step"] == 0.0
    learned_as_on_one_machine(run)


def test_an_actor_of_the_drivers_machine_that_is_killed_is_made_again_there(scene: Scene) -> None:
    def kill() -> None:
        wait_for(lambda: len(own_actors()) == 2)
        actor, pid = next(iter(own_actors().items()))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: own_actors().get(actor, pid) != pid)

    run = scene.train(cluster_of("a", "b"), kill)
    (died,) = events(run, "died")
    assert (died["role"], died["how"]) == ("actor", "killed by SIGKILL")
    learned_as_on_one_machine(run)


def test_the_drivers_machine_that_ray_has_lost_has_no_actors_until_it_is_there_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = cluster_of("a", "b")

    def lose() -> None:
        cluster.pull("a")
        wait_for(lambda: scene.happened("node_lost") and not own_actors() and scene.hosting() == 2)
        monkeypatch.setattr(ray_nodes, "REJOIN_SECONDS", 0.1)
        cluster.names.append("a")
        wait_for(lambda: scene.happened("node_joined") and scene.hosting() == 4)
        wait_for(lambda: len(own_actors()) == 2)  # an actor has groups before its process has its name

    run = scene.train(cluster, lose)
    (lost,) = events(run, "node_lost")
    assert (lost["node"], len(lost["actors"])) == ("a", 2)
    assert set(run.result["ledger"]["dropped"]) <= {"shutdown", "actor_died"}
    learned_as_on_one_machine(run)


def test_actors_move_from_the_drivers_machine_before_it_is_taken_away(scene: Scene) -> None:
    cluster = cluster_of("a", "b")

    def take_away() -> None:
        cluster.here["a"].announce("its process got SIGTERM")
        wait_for(lambda: scene.happened("node_left") and not own_actors())
        looked_at_again(cluster)
        assert scene.hosting() == 2

    run = scene.train(cluster, take_away)
    (draining,) = events(run, "node_draining")
    assert (draining["node"], draining["notice"], len(draining["actors"])) == ("a", "its process got SIGTERM", 2)
    nothing_was_lost(run)
    learned_as_on_one_machine(run)


def test_what_ray_runs_on_the_drivers_machine_says_what_that_is_and_when_it_goes() -> None:
    node = own_node(json.dumps({"packages": ["rich"]}).encode())
    assert NodeReport.from_json(node.look()) == report_here(["rich"])
    begun = time.monotonic()
    assert list(decode(node.hear())) == []
    assert time.monotonic() - begun >= 0.9, "it does not spin"
    node.announce("its process got SIGTERM")
    (told,) = decode(node.hear())
    assert (told.kind, told.head) == (Kind.LEAVING, b"its process got SIGTERM")
    node.beat()
    node.close()
