"""What crosses the way to a node is counted: against the messages themselves, taken apart once more, and against what the wire format packs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_ray_fleet import SETTINGS, ClusterHere

import shoal
from shoal.engines import ray_fleet, ray_link, ray_node
from shoal.engines.messages import Kind as Told
from shoal.engines.messages import Word
from shoal.engines.ray_cluster import ClusterNode
from shoal.engines.ray_link import LEAST_PART_BYTES, MOST_PART_BYTES, NodeHandle, NodeLink, next_part_bytes
from shoal.engines.ray_words import Frame, Kind, decode
from shoal.engines.traffic import Counted, Traffic, summary
from shoal.errors import ProcessError
from shoal.experience.ring import Slot
from shoal.experience.wire import pack, packed_bytes
from shoal.monitoring.store import RunReader
from shoal.supervision.channel import wait


class Weighed:
    """A node whose messages are kept on the way."""

    def __init__(self, node: NodeHandle) -> None:
        self._node = node
        self.said: list[bytes] = []
        self.heard: list[bytes] = []

    def say(self, message: bytes) -> None:
        self.said.append(message)
        self._node.say(message)

    def hear(self) -> bytes:
        self.heard.append(self._node.hear())
        return self.heard[-1]

    def look(self) -> bytes:
        return self._node.look()

    def end(self) -> None:
        self._node.end()


class WeighingCluster(ClusterHere):
    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.weighed: dict[str, Weighed] = {}

    def start(self, node: ClusterNode, setup: bytes, pickled: bytes | None, *, gpu: bool) -> NodeHandle:
        self.weighed[node.name] = Weighed(super().start(node, setup, pickled, gpu=gpu))
        return self.weighed[node.name]


def frames(messages: list[bytes]) -> Iterator[Frame]:
    for message in messages:
        yield from decode(message)


def first(messages: list[bytes], size_bytes: int) -> list[bytes]:
    """As many of the first messages as make so many bytes."""
    for count in range(len(messages) + 1):
        if sum(map(len, messages[:count])) == size_bytes:
            return messages[:count]
    raise AssertionError(f"{size_bytes} bytes are no number of whole messages: {[len(message) for message in messages]}")


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every rollout that a node packs."""
    lengths: list[int] = []

    def packing(slot: Slot) -> bytes:
        message = pack(slot)
        assert len(message) == packed_bytes(slot.schema, slot.envelope)
        lengths.append(len(message))
        return message

    monkeypatch.setattr(ray_node, "pack", packing)
    return lengths


def test_a_run_tells_the_bytes_and_messages_of_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: list[int]) -> None:
    cluster = WeighingCluster(["a", "b"])
    monkeypatch.setattr(ray_fleet, "connect", lambda config, warn: cluster)
    run = shoal.train("CartPole-v1", run_dir=str(tmp_path / "run"), engine="ray", **SETTINGS)
    network = run.result["network"]
    assert set(network["nodes"]) == {"a", "b"}
    for name, node in network["nodes"].items():
        said, heard = (first(kept, node[key]) for kept, key in
                       ((cluster.weighed[name].said, "bytes_said"), (cluster.weighed[name].heard, "bytes_heard")))  # fmt: skip
        while len(said) + len(heard) < node["messages"] and cluster.weighed[name].heard[len(heard)] == b"":
            heard.append(b"")  # an empty answer is a message too
        assert node["messages"] == len(said) + len(heard)
        assert (node["bytes_said"], node["bytes_heard"]) == tuple(sum(f.size for f in frames(way)) for way in (said, heard))
        assert node["bytes_per_env_step"] == pytest.approx((node["bytes_said"] + node["bytes_heard"]) / node["env_steps"])
        versions = [len(frame.body) for frame in frames(said) if frame.kind is Kind.WEIGHTS]
        assert 1 <= len(versions) <= run.result["updates"] + 1, "weights go once for each version"
    rollouts = [len(frame.body) for w in cluster.weighed.values() for frame in frames(w.heard) if frame.kind is Kind.WORD and frame.body]
    assert sorted(rollouts) == sorted(packed)
    assert len(packed) == 4 * run.result["updates"]
    for key in ("env_steps", "messages", "bytes_said", "bytes_heard"):
        assert network[key] == sum(node[key] for node in network["nodes"].values())
    assert network["env_steps"] == run.result["ledger"]["produced"]
    assert sum(packed) < network["bytes_heard"]

    with RunReader(run.path / "run.db") as reader:
        latest = reader.latest()
        assert len(reader.series("network/bytes_per_env_step")) >= 1
    assert latest["network/env_steps"] == network["env_steps"]
    assert latest["network/messages"] >= network["messages"], "what was said after the result is in the last metrics"
    assert {"network/a/bytes_per_env_step", "network/b/messages_per_env_step"} <= set(latest)


def test_a_run_on_one_machine_has_no_network(tmp_path: Path) -> None:
    run = shoal.train("CartPole-v1", run_dir=str(tmp_path / "run"), actors=0, **{**SETTINGS, "stop": {"updates": 2}})
    assert "network" not in run.result
    with RunReader(run.path / "run.db") as reader:
        assert [name for name in reader.latest() if name.startswith("network")] == []


def test_nodes_of_one_name_are_numbered_and_nothing_is_divided_by_no_steps() -> None:
    one, other = Traffic("host", Counted(2, 100), Counted(3, 50), 10), Traffic("host", Counted(), Counted().plus(b"x"), 0)
    found = summary([one, other, Traffic("far", Counted(1, 10), Counted(1, 10), 10)])
    assert list(found["nodes"]) == ["host", "host#2", "far"]
    assert found["nodes"]["host"]["bytes_per_env_step"] == 15.0
    assert found["nodes"]["host#2"]["messages_per_env_step"] == 0.0
    figures: dict[str, Any] = {name: found[name] for name in ("env_steps", "messages", "bytes_said", "bytes_heard")}
    assert figures == {"env_steps": 20, "messages": 8, "bytes_said": 110, "bytes_heard": 61}
    assert summary([]) == {}
    again = Traffic("host", Counted(1, 7), Counted(2, 8), 5)
    assert one.plus(again) == Traffic("host", Counted(3, 107), Counted(5, 58), 15)


class Quiet:
    """A node that keeps what it is told, and says nothing."""

    def __init__(self) -> None:
        self.said: list[bytes] = []
        self.taken, self.ended = threading.Event(), threading.Event()

    def say(self, message: bytes) -> None:
        self.said.append(message)
        self.taken.set()

    def hear(self) -> bytes:
        self.ended.wait(600.0)
        raise ProcessError("the test is over")

    def look(self) -> bytes:
        return b"{}"

    def end(self) -> None:
        self.ended.set()


def test_what_is_posted_at_one_moment_goes_as_one_message_and_not_before_it_is_let_go() -> None:
    node = Quiet()
    link = NodeLink("a", node, lambda version: (version, b""), 1000)
    orders = [Frame(Kind.KILL, index) for index in range(3)]
    for order in orders:
        link.post(order)
    assert not node.taken.wait(0.2)
    link.flush()
    assert node.taken.wait(300.0)
    assert [list(decode(message)) for message in node.said] == [orders]
    node.taken.clear()
    link.flush()
    assert not node.taken.wait(0.2), "nothing is nothing"
    while link.said.messages < 1:
        time.sleep(0.01)
    assert link.traffic == Traffic("a", Counted(1, len(node.said[0])), Counted(), 0)
    link.close()
    node.end()


def test_a_large_message_goes_in_parts_of_which_each_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_link, "FIRST_PART_BYTES", 1000)
    monkeypatch.setattr(ray_link, "MOST_PART_BYTES", 3000)
    monkeypatch.setattr(ray_link, "PART_SECONDS", (600.0, 2400.0))  # a link that is fast, however slow the machine
    waits, go_on = threading.Event(), threading.Semaphore(0)

    class Waiting(Quiet):
        def say(self, message: bytes) -> None:
            super().say(message)
            waits.set()
            assert go_on.acquire(timeout=300.0)

    node = Waiting()
    link = NodeLink("a", node, lambda version: (version, b""), 1000)
    order = Frame(Kind.START, 1, 2, b"head", bytes(range(256)) * 32)
    link.post(order)
    link.flush()
    seen = []
    for count in range(1, 5):
        assert waits.wait(300.0)
        assert len(node.said) == count
        delivery = link.delivery
        assert delivery is not None
        seen.append(delivery[1:])
        waits.clear()
        go_on.release()
    go_on.release(100)  # of more parts than there should be
    while link.delivery is not None:
        time.sleep(0.01)
    assert seen == [(0, order.size), (1000, order.size), (3000, order.size), (6000, order.size)], "a link that is fast gets larger parts"
    parts = list(frames(node.said))
    assert [(part.kind, part.head) for part in parts] == [(Kind.PART, b"more")] * 3 + [(Kind.PART, b"")]
    assert list(decode(b"".join(part.body for part in parts))) == [order]
    assert link.said == Counted(4, sum(map(len, node.said)))
    link.close()
    node.end()


@pytest.mark.parametrize("bytes_a_second", [1e3, 1e5, 2.5e5, 1e7, 1.25e9])
def test_parts_take_some_seconds_each_however_fast_the_link_is(bytes_a_second: float) -> None:
    size = ray_link.FIRST_PART_BYTES
    for _ in range(40):
        size = next_part_bytes(size, size / bytes_a_second)
    assert 1.0 <= size / bytes_a_second <= 4.0 or size == (LEAST_PART_BYTES if bytes_a_second < 1e6 else MOST_PART_BYTES)


def test_all_leases_of_an_update_go_in_one_message_to_each_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = WeighingCluster(["a", "b"])
    monkeypatch.setattr(ray_fleet, "connect", lambda config, warn: cluster)
    shoal.train("CartPole-v1", run_dir=str(tmp_path / "run"), engine="ray", **SETTINGS)
    for weighed in cluster.weighed.values():
        with_leases = [
            sum(frame.kind is Kind.WORD and Word.decode(frame.head).kind is Told.LEASE for frame in decode(message))
            for message in weighed.said
        ]
        assert set(with_leases) <= {0, 2}, "two actors, each with one group"
        assert with_leases.count(2) == SETTINGS["stop"]["updates"]


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("lost", [False, True])
def test_a_link_has_its_descriptor_until_it_is_closed_and_its_threads_have_ended(lost: bool) -> None:
    node = Quiet()
    link = NodeLink("a", node, lambda version: (version, b""), 1000)
    descriptor = link.fileno()
    if lost:
        node.end()
        assert wait([link], 300.0) == [link]
        assert (link.lost, link.take()) == ("the test is over", [])
        time.sleep(0.1)
        assert is_open(descriptor), "whoever waits for it needs it"
    link.close()
    assert lost or is_open(descriptor), "a call is under way that may yet say something"
    node.end()
    deadline = time.monotonic() + 60.0
    while link.fileno() >= 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not is_open(descriptor)
    link.close()
    assert (link.take(), link.lost) == ([], "the test is over" if lost else "")
