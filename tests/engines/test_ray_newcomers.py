"""Nodes that are not as the driver's machine is, without Ray: refused at the start, not used when they come later."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_ray_fleet import SETTINGS, ClusterHere, NodeHere, events, learned_as_on_one_machine

import shoal
from shoal.engines import ray_fleet, ray_nodes
from shoal.engines.node_report import report_here
from shoal.engines.ray_cluster import Cluster, ClusterNode, RemoteNode
from shoal.engines.ray_link import NodeHandle
from shoal.errors import ConfigError, ProcessError
from shoal.monitoring.live import SilentView

HOST = socket.gethostname()


class Unlike(NodeHere):
    """A node that says of itself what `answer` says, when asked; the others say the truth."""

    answer: Callable[[NodeHere], bytes]

    def look(self) -> bytes:
        return type(self).answer(self)


class MixedCluster(ClusterHere):
    """`unlike`: the answers of some nodes, by name."""

    def __init__(self, names: list[str], unlike: dict[str, Callable[[NodeHere], bytes]]) -> None:
        super().__init__(names)
        self.unlike = unlike
        self.started: list[str] = []

    def start(self, node: ClusterNode, setup: bytes, pickled: bytes | None, *, gpu: bool) -> NodeHandle:
        self.started.append(node.name)
        kind = type("Node", (Unlike,), {"answer": staticmethod(self.unlike[node.name])}) if node.name in self.unlike else NodeHere
        self.here[node.id] = kind(setup, pickled, self.spoil)
        return self.here[node.id]


class MisplacedCluster(ClusterHere):
    """On the nodes of these names, the environment's file is not where it is here."""

    def __init__(self, names: list[str], without: set[str]) -> None:
        super().__init__(names)
        self.without = without

    def start(self, node: ClusterNode, setup: bytes, pickled: bytes | None, *, gpu: bool) -> NodeHandle:
        facts = json.loads(setup)
        if node.name in self.without:
            facts["config"]["env"]["id"] = facts["config"]["env"]["id"].replace("/here/", "/there/")
        return super().start(node, json.dumps(facts).encode(), pickled, gpu=gpu)


@pytest.fixture
def run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., shoal.Run]:
    """Train on a cluster."""
    numbers = iter(range(100))

    def run(cluster: ClusterHere, target: Any = "CartPole-v1", **settings: Any) -> shoal.Run:
        monkeypatch.setattr(ray_fleet, "connect", lambda config, warn: cluster)
        return shoal.train(
            target,
            run_dir=str(tmp_path / f"run{next(numbers)}"),
            progress=SilentView(io.StringIO()),
            **{**SETTINGS, "engine": "ray", **settings},
        )

    return run


def other_torch(node: NodeHere) -> bytes:
    report = json.loads(report_here([]).to_json())
    report["versions"]["torch"] = "2.0.1"
    return json.dumps(report).encode()


def gone(node: NodeHere) -> bytes:
    raise ProcessError("it has not answered for 120 s")


def test_a_node_that_is_gone_before_it_took_part_is_left_out(run_on: Any) -> None:
    cluster = MixedCluster(["a", "b"], {"b": gone})
    run = run_on(cluster, stop={"updates": 4})
    learned_as_on_one_machine(run)
    (lost,) = events(run, "node_lost")
    assert (lost["node"], lost["reason"], lost["actors"]) == ("b", "it has not answered for 120 s", [])
    assert set(run.result["network"]["nodes"]) == {"a"}
    assert cluster.here["b"].dead.is_set()


class Busy(NodeHere):
    """A node whose CPUs are taken: it is not made before they are free, and answers nothing. Of two, each is asked while the other is."""

    both = threading.Barrier(2)

    def hear(self) -> bytes:
        time.sleep(1.0)
        raise ProcessError("it has not answered for 1 s")

    def look(self) -> bytes:
        self.both.wait(60.0)
        self.dead.wait(30.0)  # who asks is patient
        raise ProcessError("it has ended")


def test_nodes_whose_cpus_are_taken_cost_the_patience_with_one_link_and_are_named(run_on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_nodes, "SILENT_SECONDS", 0.1)
    cluster = ClusterHere(["a", "b", "c"])
    cluster.kinds |= {"b": Busy, "c": Busy}
    run = run_on(cluster, stop={"updates": 4})
    learned_as_on_one_machine(run)
    assert [(lost["node"], lost["reason"]) for lost in events(run, "node_lost")] == [(node, "it has not answered for 1 s") for node in "bc"]
    (named,) = [event["message"] for event in events(run, "warning") if "have not said" in event["message"]]
    assert named.endswith("b, c; are their CPUs taken?")


def test_a_node_that_comes_and_never_answers_is_tried_again_and_told_of_once(run_on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_nodes, "REJOIN_SECONDS", 0.1)
    cluster = MixedCluster(["a"], {"b": gone})

    def watch(numbers: Any) -> bool:
        if numbers["update"] == 5:
            cluster.names.append("b")
        return cluster.started.count("b") < 4

    run = run_on(cluster, stop={"updates": 100_000}, callbacks=[watch])
    learned_as_on_one_machine(run)
    (told,) = [event["message"] for event in events(run, "warning") if "node b" in event["message"]]
    assert told == "node b came, and is not used before it answers, for which it is tried again: it has not answered for 120 s"


def test_a_node_that_ray_has_never_started_says_what_that_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pending(Exception):
        pass

    def get(asked: Any, timeout: float) -> bytes:
        raise Pending

    ray: Any = types.ModuleType("ray")
    ray.get, ray.exceptions = get, SimpleNamespace(GetTimeoutError=Pending, RayError=Pending)
    monkeypatch.setitem(sys.modules, "ray", ray)
    method: Any = SimpleNamespace(remote=lambda *asked: None)
    method.options = lambda **how: method
    with pytest.raises(ProcessError, match=r"^it has not answered for 120 s; are its CPUs taken\? .*--nodes.*--actors-per-node"):
        RemoteNode(SimpleNamespace(hear=method)).hear()


def test_a_driver_whose_machine_the_cluster_does_not_list_says_so() -> None:
    roll: Any = SimpleNamespace(machines=[{"NodeID": "a", "NodeManagerAddress": "10.0.0.1"}])
    assert Cluster(None, 1, roll=roll, own="a").driver() == ("a", "10.0.0.1")
    with pytest.raises(ProcessError, match="does not list the machine of this process"):
        Cluster(None, 1, roll=roll, own="b").driver()


def test_a_cluster_where_no_node_answers_is_refused(run_on: Any) -> None:
    with pytest.raises(ConfigError, match=r"^ray: node a gives no report: it has not answered"):
        run_on(MixedCluster(["a"], {"a": gone}))


def test_all_nodes_that_differ_are_named_before_anything_runs(run_on: Any, tmp_path: Path) -> None:
    cluster = MixedCluster(["a", "b", "c"], {"b": other_torch, "c": gone})
    with pytest.raises(
        ConfigError, match=rf"^ray: node b \({HOST}\) differs: torch 2\.0\.1 \(here .*; node c gives no report: it has not"
    ) as said:
        run_on(cluster)
    assert "node a" not in str(said.value)
    assert said.value.exit_code == 2
    assert not (tmp_path / "run0").exists(), "a run that was refused leaves nothing"


def test_a_node_that_cannot_import_the_environment_says_why(run_on: Any, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    file = tmp_path / "here" / "worlds.py"
    file.write_text("import gymnasium\ndef make():\n    return gymnasium.make('CartPole-v1')\n")
    cluster = MisplacedCluster(["a", "b"], {"b"})
    with pytest.raises(
        ConfigError, match=r"^ray: node b \(.*\) cannot import what the run is made of: env\.id .*: there is no file .*/there/worlds"
    ):
        run_on(cluster, f"{file}:make")


def test_a_node_that_comes_later_and_differs_is_told_and_not_used(run_on: Any) -> None:
    cluster = MixedCluster(["a"], {"b": other_torch})
    later: list[int] = []

    def watch(numbers: Any) -> bool:
        if numbers["update"] == 5:
            cluster.names.append("b")
        if "b" in cluster.here and cluster.here["b"].dead.is_set():
            later.append(numbers["update"])
        return len(later) < 20

    run = run_on(cluster, stop={"updates": 100_000}, callbacks=[watch])
    learned_as_on_one_machine(run)
    assert events(run, "node_joined") == []
    (refused,) = events(run, "node_refused")
    assert refused["node"] == "b"
    assert "torch 2.0.1 (here " in refused["reason"]
    assert cluster.started == ["a", "b"], "it is asked once"
    assert cluster.here["b"].dead.is_set(), "its processes are ended"


def test_nobody_waits_while_a_node_that_came_is_asked(run_on: Any) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow(node: NodeHere) -> bytes:
        asked.set()
        answer.wait()
        return node._node.look()

    cluster = MixedCluster(["a"], {"b": slow})
    made: list[int] = []

    def watch(numbers: Any) -> bool:
        if numbers["update"] == 5:
            cluster.names.append("b")
        if asked.is_set():
            made.append(numbers["update"])
        if len(made) == 20:  # they were made while the node was asked
            answer.set()
        return "b" not in cluster.here or not cluster.here["b"]._node._actors

    run = run_on(cluster, stop={"updates": 100_000}, callbacks=[watch])
    assert len(made) > 20
    assert [event["node"] for event in events(run, "node_joined")] == ["b"]
