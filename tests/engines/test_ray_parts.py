"""Messages of a node that come in parts: the same frames, the same bits of a run, and a node that sends what is no part is given up."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_ray_fleet import SETTINGS, ClusterHere, NodeHere

import shoal
from shoal.engines import ray_cluster, ray_fleet
from shoal.engines.ray_cluster import RemoteNode
from shoal.engines.ray_link import FIRST_PART_BYTES, LEAST_PART_BYTES, NodeLink
from shoal.engines.ray_words import Frame, Kind, Parts, decode, encode, part

FRAMES = [Frame(Kind.WORD, 1, 2, b"filled", bytes(range(256))), Frame(Kind.LOG, 1, 2, body=b"said")]
MESSAGE = encode(FRAMES)


@given(st.integers(1, 2 * len(MESSAGE)))
def test_however_a_message_is_cut_its_frames_are_the_same_and_come_with_the_last_part(size: int) -> None:
    parts, cuts = Parts(len(MESSAGE)), range(0, len(MESSAGE), size)
    for _ in range(2):
        heard = [parts.take(part(MESSAGE, at, size)) for at in cuts]
        assert heard == [[]] * (len(cuts) - 1) + [FRAMES]
    assert parts.take(MESSAGE) == FRAMES
    assert parts.take(b"") == []


def test_what_is_no_part_is_refused() -> None:
    first = part(MESSAGE, 0, 50)
    for messages, why in (
        ([first, MESSAGE], "between the parts"),
        ([first + MESSAGE], "comes alone"),
        ([encode([Frame(Kind.PART, head=b"less", body=b"x")])], "comes alone"),
        ([first] * 9, "at most 400 bytes, 450 came"),
        ([encode([Frame(Kind.LOG, body=bytes(373))])], "at most 400 bytes, 401 came"),
        ([part(bytes(402), 0, 401)], "at most 400 bytes, 401 came"),
        ([encode([Frame(Kind.LOG, body=bytes(200))] * 2)], "at most 400 bytes, 456 came"),
        ([part(first, 0, len(first))], "has no parts"),
        ([encode([Frame(Kind.PART, body=b"no message")])], "a frame has at least"),
    ):
        parts = Parts(400)
        with pytest.raises(ValueError, match=why):
            [parts.take(message) for message in messages]


def test_a_node_whose_parts_are_more_than_a_message_may_have_is_lost() -> None:
    class Endless:
        def hear(self) -> bytes:
            time.sleep(0.001)
            return part(bytes(200), 0, 100)

    node: Any = Endless()
    link = NodeLink("a", node, lambda version: (version, b""), 1000)
    deadline = time.monotonic() + 60.0
    while not link.lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert link.lost == "a message has at most 1,000 bytes, 1,100 came"
    assert link.take() == []
    link.close()


def test_a_node_is_asked_for_no_more_while_a_message_waits_to_be_taken() -> None:
    message = encode([Frame(Kind.LOG, body=bytes(300))])

    class Chatty:
        def __init__(self) -> None:
            self.asked = 0

        def hear(self) -> bytes:
            self.asked += 1
            return message

    def asked(times: int) -> None:
        deadline = time.monotonic() + 60.0
        while node.asked < times:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        assert node.asked == times

    node: Any = Chatty()
    link = NodeLink("a", node, lambda version: (version, b""), 1000)
    try:
        asked(4)  # three are less than it may say at once
        assert [frame.size for frame in link.take()] == [len(message)] * 4
        asked(8)
        assert len(link.take()) == 4
        asked(12)
    finally:
        link.close()
    for thread in threading.enumerate():
        if thread.name == "link-a":
            thread.join(60.0)
            assert not thread.is_alive(), "one that waits ends with the link"


class Slow:
    """A Ray actor behind a link of so many bytes a second; two answers that wait share it."""

    def __init__(self, bytes_a_second: float) -> None:
        self.asked: list[int] = []
        self.clock = 0.0
        self._bytes_a_second = bytes_a_second
        self.hear = self

    def options(self, concurrency_group: str) -> Slow:
        return self

    def remote(self, most_bytes: int) -> int:
        self.asked.append(most_bytes)
        return most_bytes

    def answer(self, most_bytes: int) -> bytes:
        self.clock += most_bytes / self._bytes_a_second
        return part(bytes(most_bytes + 1), 0, most_bytes)


@pytest.mark.parametrize(("bytes_a_second", "seconds"), [(2.5e5, 5.0), (4e6, 5.0), (1e9, 5.0)])
def test_parts_are_as_large_as_a_link_carries_in_a_few_seconds(
    bytes_a_second: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow: Any = Slow(bytes_a_second)
    node = RemoteNode(slow)
    monkeypatch.setattr(node, "_get", lambda asked, timeout, *advice: slow.answer(asked))
    monkeypatch.setattr(node, "_wait", slow.answer)
    monkeypatch.setattr(ray_cluster.time, "monotonic", lambda: slow.clock)
    for _ in range(30):
        node.hear()
    assert slow.asked[0] == FIRST_PART_BYTES
    assert slow.asked[-1] * ray_cluster.ASKED_AHEAD / bytes_a_second < seconds
    assert slow.asked[-1] > FIRST_PART_BYTES or bytes_a_second < 1e6
    assert slow.asked[-1] >= LEAST_PART_BYTES


def test_a_run_whose_rollouts_come_in_parts_learns_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[bytes] = []

    class Cutting(NodeHere):
        def hear(self) -> bytes:
            self._live()
            heard.append(self._node.hear(500))
            return heard[-1]

    cluster = ClusterHere(["a"])
    cluster.kinds["a"] = Cutting
    monkeypatch.setattr(ray_fleet, "connect", lambda config, warn: cluster)
    few = {**SETTINGS, "stop": {"updates": 4}}
    run = shoal.train("CartPole-v1", run_dir=str(tmp_path / "run"), engine="ray", **few)
    alone = shoal.train("CartPole-v1", run_dir=str(tmp_path / "alone"), actors=0, **few)
    assert run.result["weights_sha256"] == alone.result["weights_sha256"]
    assert run.result["restarts"] == 0
    assert max(map(len, heard)) < 600
    assert sum(frame.kind is Kind.PART for message in heard for frame in decode(message)) > 4 * 4 * 2
