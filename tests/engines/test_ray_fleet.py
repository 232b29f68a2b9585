"""Runs whose actors live on nodes, without Ray: the nodes are in this process, and the way to them is a call.

What is learned is what the local engine learns, whatever the number of nodes, and whatever becomes of them on the way.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shoal
from shoal.cli.control import tell_run
from shoal.engines import ray_cluster, ray_fleet, ray_link, ray_nodes, watch
from shoal.engines.ray_cluster import Cluster, ClusterNode
from shoal.engines.ray_link import NodeHandle
from shoal.engines.ray_node import ACTIVITY, Node
from shoal.engines.ray_roll import Roll
from shoal.engines.ray_words import Frame, Kind, decode, encode
from shoal.errors import ConfigError, ProcessError, TooFewNodesError
from shoal.supervision.heartbeat import RECORD
from shoal.types import Activity

SETTINGS: dict[str, Any] = {
    "preset": "none",
    "sampling": {"groups": 4, "group_size": 2, "rollout_length": 16},
    "algorithm": {"name": "ppo", "epochs": 2, "minibatch_size": 64},
    "stop": {"updates": 12},
    "checkpoint": {"every_updates": 4},
    "seed": 5,
}

SLEEPS = str(Path(__file__).parents[1] / "faults" / "simulated.py") + ":make"
CHATTY = str(Path(__file__).parents[1] / "faults" / "chatty.py") + ":make"


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
    """`names` are its nodes; more may be added while a run goes on. `kinds`: of those that are not like the others."""

    def __init__(self, names: list[str], actors_per_node: int = 2, num_nodes: int | None = None) -> None:
        super().__init__(num_nodes, actors_per_node)
        self.names, self.here, self.kinds = names, dict[str, NodeHere](), dict[str, type[NodeHere]]()
        self.going: dict[str, float | None] = {}  # nodes that Ray is about to take away
        self.gpus: list[str] = []  # nodes of whose GPUs the run has one
        self.looks = 0  # how often the run asked which nodes are to go
        self.spoil: Callable[[Frame], Frame | None] = lambda frame: frame

    def nodes(self) -> list[ClusterNode]:
        return [ClusterNode(name, name, float(self.actors_per_node), "127.0.0.1") for name in self.names]

    def driver(self) -> tuple[str, str]:
        return "", "127.0.0.1"

    def draining(self) -> dict[str, float | None] | None:
        self.looks += 1
        return dict(self.going)

    def start(self, node: ClusterNode, setup: bytes, pickled: bytes | None, *, gpu: bool) -> NodeHandle:
        self.gpus += [node.name] if gpu else []
        self.here[node.id] = self.kinds.get(node.id, NodeHere)(setup, pickled, self.spoil)
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


def at(update: int, act: Callable[[], None]) -> Callable[[Any], None]:
    """A callback that acts after this update."""
    return lambda facts: act() if facts["update"] == update else None


def events(run: shoal.Run, kind: str) -> list[dict[str, Any]]:
    from shoal.monitoring.store import RunReader

    with RunReader(run.path / "run.db") as reader:
        return list(reader.events(kind))


def test_of_a_run_that_found_too_few_nodes_to_begin_nothing_is_left(run_on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "NODES_SECONDS", 0.0)
    with pytest.raises(TooFewNodesError, match="the cluster has 2"):
        run_on(ClusterHere(["a", "b"], num_nodes=3))
    assert list(tmp_path.iterdir()) == [], "so that the same command can be given again"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = shoal.train("CartPole-v1", run_dir=str(tmp_path_factory.mktemp("local") / "run"), actors=2, **SETTINGS)
    return str(run.result["weights_sha256"])


def learned_as_on_one_machine(run: shoal.Run) -> None:
    """As in one process, which makes the same updates again."""
    again = shoal.replay(run.path)
    assert (again["updates"], again["equal"]) == (run.result["updates"], True)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]], ids=len)  # two in most tests below
def test_a_sync_run_learns_the_same_bits_on_any_number_of_nodes(names: list[str], run_on: Any, expected: str) -> None:
    cluster, heard = ClusterHere(names), list[int]()

    def spoil(frame: Frame) -> Frame:
        if frame.kind is Kind.WORD and frame.body:
            heard.append(len(frame.body))
        return frame

    cluster.spoil = spoil
    run = run_on(cluster)
    assert run.result["weights_sha256"] == expected
    assert run.result["ledger"]["produced"] == run.result["ledger"]["trained"]
    assert len(heard) == run.result["updates"] * 4, "what is under way is what is leased"


def test_a_node_that_is_lost_takes_its_rollouts_along_and_they_are_made_again(run_on: Any, expected: str) -> None:
    cluster = ClusterHere(["a", "b"])
    run = run_on(cluster, callbacks=[at(5, lambda: cluster.pull("b"))])
    assert run.result["weights_sha256"] == expected
    (lost,) = events(run, "node_lost")
    assert lost["node"] == "b"
    assert "pulled its plug" in lost["reason"]


def test_a_node_that_comes_later_is_taken_in(run_on: Any) -> None:
    cluster = ClusterHere(["a"])
    heard: list[Frame] = []

    def spoil(frame: Frame) -> Frame:
        if frame.kind is Kind.WORD and frame.body and "b" in cluster.here and frame.index in cluster.here["b"]._node._actors:
            heard.append(frame)
        return frame

    cluster.spoil = spoil

    def watch(numbers: Any) -> bool:
        if numbers["update"] == 5:
            cluster.names.append("b")
        return len(heard) < 20

    run = run_on(cluster, stop={"updates": 100_000}, callbacks=[watch])
    learned_as_on_one_machine(run)
    assert [event["node"] for event in events(run, "node_joined")] == ["b"]


def test_nothing_waits_for_a_node_that_comes_and_does_not_answer(run_on: Any) -> None:
    answers = threading.Event()

    class Mute(NodeHere):
        def hear(self) -> bytes:
            answers.wait()
            raise ProcessError("it has not answered")

        def look(self) -> bytes:
            return self.hear()

    cluster = ClusterHere(["a"])
    cluster.kinds["b"] = Mute
    made: list[int] = []  # since the node was asked

    def watch(numbers: Any) -> bool:
        if numbers["update"] == 5:
            cluster.names.append("b")
        if "b" in cluster.here:
            made.append(numbers["update"])
        return len(made) < 50

    run = run_on(cluster, stop={"updates": 100_000}, callbacks=[watch])
    answers.set()
    learned_as_on_one_machine(run)
    assert events(run, "node_joined") + events(run, "node_lost") == []


def test_a_cluster_whose_head_is_lost_ends_the_run_with_a_word_and_it_goes_on_without(run_on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, lost, over = ClusterHere(["a"]), threading.Event(), threading.Event()
    cluster.roll = Roll(lambda: [{"never": over.wait(600.0)}] if lost.is_set() else [])

    def lose() -> None:
        lost.set()
        monkeypatch.setattr(ray_cluster, "HEAD_SECONDS", 1.0)

    with pytest.raises(ProcessError, match=r"the head of the cluster has not answered .* goes on from") as raised:
        run_on(cluster, stop={"updates": 100_000}, callbacks=[at(5, lose)])
    over.set()
    cluster.roll.close()
    (path,) = re.findall("`shoal resume (.*?)`", str(raised.value))
    updates = 10 + max(int(each.name.rpartition("-")[2]) for each in (Path(path) / "checkpoints").glob("update-*"))
    resumed = shoal.resume(path, engine="local", actors=2, stop={"updates": updates})
    assert (resumed.config.engine, resumed.config.ray.address) == ("local", None)
    learned_as_on_one_machine(resumed)


def test_an_actor_is_not_blamed_for_words_that_are_long_under_way(
    run_on: Any, monkeypatch: pytest.MonkeyPatch, expected: str, tmp_path: Path
) -> None:
    """Patience is short only meanwhile: nobody else has an order then that he has not taken up."""
    patient, weights, blamed = watch.UNHEARD_SECONDS, [], []

    class Slow(NodeHere):
        def say(self, message: bytes) -> None:
            weights.extend(frame for frame in decode(message) if frame.kind is Kind.WEIGHTS)
            if len(weights) == 2:
                weights.append(None)  # once
                monkeypatch.setattr(watch, "UNHEARD_SECONDS", 2.5)
                time.sleep(4.0)
                blamed.extend(tell_run(tmp_path / "run0", "stalls")["stalls"]["blamed"])
                time.sleep(2.0)
                monkeypatch.setattr(watch, "UNHEARD_SECONDS", patient)
            super().say(message)

    cluster = ClusterHere(["a", "b"])
    cluster.kinds["b"] = Slow
    run = run_on(cluster)
    assert None in weights
    assert sum("(what it is told is on its way: 0 of " in text for text in blamed) == 2, "both actors of that node"
    assert (run.result["weights_sha256"], run.result["restarts"]) == (expected, 0)


def test_weights_that_go_in_parts_are_the_same_bits(run_on: Any, monkeypatch: pytest.MonkeyPatch, expected: str) -> None:
    monkeypatch.setattr(ray_link, "FIRST_PART_BYTES", 512)
    monkeypatch.setattr(ray_link, "MOST_PART_BYTES", 4096)
    said = []

    class Weighing(NodeHere):
        def say(self, message: bytes) -> None:
            said.append(message)
            super().say(message)

    cluster = ClusterHere(["a", "b"])
    cluster.kinds["b"] = Weighing
    assert run_on(cluster).result["weights_sha256"] == expected
    assert max(map(len, said)) < 4200
    assert sum(frame.kind is Kind.PART and not frame.head for message in said for frame in decode(message)) >= SETTINGS["stop"]["updates"]


def test_logs_of_a_node_come_to_the_run_and_lie_in_no_directory_there(run_on: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    lies: list[str] = []
    monkeypatch.setenv("RAY_AUTH_TOKEN", "c0ffee")
    look = at(5, lambda: lies.extend(os.listdir(tmp_path / "temporary")))
    run = run_on(ClusterHere(["a"]), CHATTY, callbacks=[look, at(6, lambda: lies.append("looked"))], env={"form": "python"})
    assert lies == ["looked"]
    log = (run.path / "logs" / "actor-0.log").read_text()
    assert "step 1 xxx" in log
    assert "***warning***" in log
    assert "c0ffee" not in log


def test_an_actor_is_not_blamed_while_nobody_hears_of_it(run_on: Any) -> None:
    silent = []
    few = {"stop": {"updates": 4}}

    def steps(seconds: float) -> dict[str, Any]:
        return {"kwargs": {"seconds": seconds, "simulators": False}, "form": "python", "step_timeout_seconds": 3.0}

    class Silent(NodeHere):
        def hear(self) -> bytes:
            message = super().hear()
            activities = [frame.body for frame in decode(message) if frame.kind is Kind.ACTIVITIES]
            if not silent and any(np.frombuffer(body, RECORD, 1, ACTIVITY.size)["activity"][0] == Activity.STEPPING for body in activities):
                silent.append(message)
                time.sleep(5.0)
            return message

    cluster = ClusterHere(["a", "b"])
    cluster.kinds["b"] = Silent
    run = run_on(cluster, SLEEPS, env=steps(0.01), **few)
    assert len(silent) == 1
    assert run.result["restarts"] == 0
    assert run.result["weights_sha256"] == run_on(None, SLEEPS, env=steps(0.0), actors=2, **few).result["weights_sha256"]


def test_reports_of_a_node_that_nobody_hears_do_not_pile_up(run_on: Any) -> None:
    quiet, waiting = threading.Event(), list[int]()

    class Unheard(NodeHere):
        def hear(self) -> bytes:
            if not quiet.is_set() or len(waiting) == 20:
                return super().hear()
            time.sleep(0.1)
            waiting.append(sum(frame.kind in (Kind.ACTIVITIES, Kind.LOG) for frame in list(self._node._reports)))
            return b""

    cluster = ClusterHere(["a"], actors_per_node=1)
    cluster.kinds["a"] = Unheard
    run_on(cluster, callbacks=[at(5, quiet.set)])  # the next updates wait for what nobody hears
    assert len(waiting) == 20
    assert 1 <= max(waiting) <= 2, "one of activities, one of a log"


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
    monkeypatch.setattr(ray_nodes, "NODELESS_SECONDS", 0.5)
    cluster = ClusterHere(["a"])
    with pytest.raises(ProcessError, match="no node of the cluster is left") as raised:
        run_on(cluster, callbacks=[at(5, lambda: cluster.pull("a"))])
    (path,) = re.findall("`shoal resume (.*?)`", str(raised.value))
    cluster.names.append("b")
    resumed = shoal.resume(path)
    assert (resumed.result["updates"], resumed.result["weights_sha256"]) == (12, expected)
    assert set(resumed.result["network"]["nodes"]) == {"b"}


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
