"""Runs whose actors live on nodes, without Ray: the nodes are in this process, and the way to them is a call.

What is learned is what the local engine learns, whatever the number of nodes, and whatever becomes of them on the way.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.engines import ray_fleet
from shoal.engines.ray_cluster import Cluster, ClusterNode
from shoal.engines.ray_link import NodeHandle
from shoal.engines.ray_node import Node
from shoal.engines.ray_words import Frame, Kind, decode, encode
from shoal.errors import ConfigError, ProcessError

SETTINGS: dict[str, Any] = {
    "preset": "none",
    "sampling": {"groups": 4, "group_size": 2, "rollout_length": 16},
    "algorithm": {"name": "ppo", "epochs": 2, "minibatch_size": 64},
    "stop": {"updates": 12},
    "checkpoint": {"every_updates": 4},
    "seed": 5,
}


class NodeHere:
    """A node in this process. `spoil` sees every frame that it says, and may change it."""

    def __init__(self, setup: bytes, pickled: bytes | None, spoil: Callable[[Frame], Frame | None]) -> None:
        self._node, self._spoil = Node(setup, pickled), spoil
        self.dead = threading.Event()
        self.left = False  # as it was told to

    def _live(self) -> None:
        if self.dead.is_set():
            raise ProcessError("the test pulled its plug")

    def say(self, message: bytes) -> None:
        self._live()
        self._node.say(message)

    def hear(self) -> bytes:
        message = self._node.hear()
        self._live()
        frames = [changed for frame in decode(message) if (changed := self._spoil(frame)) is not None]
        return encode(frames)

    def look(self) -> bytes:
        return self._node.look()

    def end(self) -> None:
        self.dead.set()
        self._node.close()

    def leave(self) -> None:
        self.left = True
        self.end()

    def announce(self, why: str) -> None:
        self._node.announce(why)


class ClusterHere(Cluster):
    """`names` are its nodes; more may be added while a run goes on."""

    def __init__(self, names: list[str], actors_per_node: int = 2, num_nodes: int | None = None) -> None:
        super().__init__(num_nodes, actors_per_node)
        self.names, self.here = names, dict[str, NodeHere]()
        self.going: dict[str, float | None] = {}  # nodes that Ray is about to take away
        self.spoil: Callable[[Frame], Frame | None] = lambda frame: frame

    def nodes(self) -> list[ClusterNode]:
        return [ClusterNode(name, name, float(self.actors_per_node)) for name in self.names]

    def draining(self) -> dict[str, float | None] | None:
        return dict(self.going)

    def start(self, node: ClusterNode, setup: bytes, pickled: bytes | None) -> NodeHandle:
        self.here[node.id] = NodeHere(setup, pickled, self.spoil)
        return self.here[node.id]

    def pull(self, name: str) -> None:
        """The node is gone, and does not come back."""
        self.names.remove(name)
        self.here[name].dead.set()

    def close(self) -> None:
        for node in self.here.values():
            node.end()


@pytest.fixture
def run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., shoal.Run]:
    """Train on a cluster; `cluster` None: on the local engine."""
    numbers = iter(range(100))

    def run(cluster: ClusterHere | None, target: Any = "CartPole-v1", **settings: Any) -> shoal.Run:
        monkeypatch.setattr(ray_fleet, "connect", lambda config, warn: cluster)
        engine = {} if cluster is None else {"engine": "ray"}
        return shoal.train(target, run_dir=str(tmp_path / f"run{next(numbers)}"), **{**SETTINGS, **engine, **settings})

    return run


def events(run: shoal.Run, kind: str) -> list[dict[str, Any]]:
    from shoal.monitoring.store import RunReader

    with RunReader(run.path / "run.db") as reader:
        return list(reader.events(kind))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = shoal.train("CartPole-v1", run_dir=str(tmp_path_factory.mktemp("local") / "run"), actors=2, **SETTINGS)
    return str(run.result["weights_sha256"])


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]], ids=len)
def test_a_sync_run_learns_the_same_bits_on_any_number_of_nodes(names: list[str], run_on: Any, expected: str) -> None:
    run = run_on(ClusterHere(names))
    assert run.result["weights_sha256"] == expected
    assert run.result["ledger"]["produced"] == run.result["ledger"]["trained"]


def test_a_node_that_is_lost_takes_its_rollouts_along_and_they_are_made_again(run_on: Any, expected: str) -> None:
    cluster = ClusterHere(["a", "b"])
    threading.Thread(target=lambda: (wait_for(lambda: len(cluster.here) == 2), time.sleep(1.0), cluster.pull("b"))).start()
    run = run_on(cluster, stop={"updates": 60})
    alone = run_on(None, stop={"updates": 60}, actors=1)
    assert run.result["weights_sha256"] == alone.result["weights_sha256"]
    (lost,) = events(run, "node_lost")
    assert lost["node"] == "b"
    assert "pulled its plug" in lost["reason"]


def test_a_node_that_comes_later_is_taken_in(run_on: Any) -> None:
    cluster = ClusterHere(["a"])
    threading.Thread(target=lambda: (wait_for(lambda: bool(cluster.here)), time.sleep(1.0), cluster.names.append("b"))).start()
    run = run_on(cluster, stop={"updates": 150})
    alone = run_on(None, stop={"updates": 150}, actors=2)
    assert run.result["weights_sha256"] == alone.result["weights_sha256"]
    assert [event["node"] for event in events(run, "node_joined")] == ["b"]


def test_a_rollout_that_was_changed_on_the_way_is_refused_and_made_again(run_on: Any, expected: str) -> None:
    cluster, spoiled = ClusterHere(["a", "b"]), []

    def spoil(frame: Frame) -> Frame:
        if frame.kind is Kind.WORD and len(frame.body) > 1000 and len(spoiled) < 2:
            spoiled.append(frame)
            body = frame.body[:700] + bytes([frame.body[700] ^ 1]) + frame.body[701:]
            return Frame(frame.kind, frame.index, frame.incarnation, frame.head, body)
        return frame

    cluster.spoil = spoil
    run = run_on(cluster)
    assert run.result["weights_sha256"] == expected
    assert len(spoiled) == 2
    assert all("no rollout" in event["reason"] for event in events(run, "killed"))
    assert run.result["restarts"] == 2


def test_an_actor_that_dies_on_a_node_is_started_again_there(run_on: Any, expected: str) -> None:
    cluster, killed = ClusterHere(["a", "b"]), []

    def spoil(frame: Frame) -> Frame:
        pids = [node._node._actors[frame.index].pid for node in cluster.here.values() if frame.index in node._node._actors]
        if frame.kind is Kind.WORD and frame.body and not killed and pids[0] > 1:
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)
        return frame

    cluster.spoil = spoil
    run = run_on(cluster)
    assert run.result["weights_sha256"] == expected
    (died,) = events(run, "died")
    assert (died["role"], died["how"]) == ("actor", "killed by SIGKILL")


def test_a_run_without_any_node_ends_with_a_word_and_can_be_resumed(run_on: Any, monkeypatch: pytest.MonkeyPatch, expected: str) -> None:
    monkeypatch.setattr(ray_fleet, "NODELESS_SECONDS", 0.5)
    cluster = ClusterHere(["a"])
    threading.Thread(target=lambda: (wait_for(lambda: bool(cluster.here)), time.sleep(2.0), cluster.pull("a"))).start()
    with pytest.raises(ProcessError, match="no node of the cluster is left"):
        run_on(cluster, stop={"updates": 5000})


def test_a_node_with_other_versions_is_named(run_on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ClusterHere(["a"])
    monkeypatch.setattr(NodeHere, "look", lambda self: b'{"host": "far", "pid": 1, "versions": {"python": "3.9", "torch": ""}}')
    with pytest.raises(ConfigError, match=r"node a \(far\) differs: python 3\.9 \(here .*torch is missing"):
        run_on(cluster)


def test_async_runs_learn_on_nodes_too_and_lag_stays_within_its_bound(run_on: Any) -> None:
    run = run_on(
        ClusterHere(["a", "b"]), algorithm={"name": "appo", "epochs": 2, "minibatch_size": 64}, max_policy_lag=2, stop={"updates": 40}
    )
    assert run.result["lag"]["max"] <= 2
    assert run.result["updates"] == 40


def test_what_is_under_way_is_what_is_leased(run_on: Any) -> None:
    heard = []
    cluster = ClusterHere(["a", "b"])

    def spoil(frame: Frame) -> Frame:
        if frame.kind is Kind.WORD and frame.body:
            heard.append(len(frame.body))
        return frame

    cluster.spoil = spoil
    run = run_on(cluster)
    assert len(heard) == run.result["updates"] * 4


def wait_for(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
