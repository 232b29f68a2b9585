"""The log of a process on a node."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.engines import ray_node_log
from shoal.engines.ray_node_log import KEPT_BYTES, READ_BYTES, NodeLog


@pytest.fixture
def log() -> Iterator[NodeLog]:
    made = NodeLog()
    yield made
    made.close()


def append(log: NodeLog, text: bytes) -> None:
    """As a role's process does: opened once for each."""
    with log.path.open("ab") as file:
        file.write(text)


def read(log: NodeLog) -> bytes:
    return b"".join(iter(log.read, b""))


def test_what_is_written_is_read_once_in_pieces(log: NodeLog) -> None:
    said = os.urandom(3 * READ_BYTES // 2)
    append(log, said)
    assert log.read() == said[:READ_BYTES]
    assert log.read() == said[READ_BYTES:]
    append(log, b"more")
    assert (log.read(), log.read()) == (b"more", b"")


def test_a_log_that_is_read_slowly_keeps_its_size_and_says_what_is_missing(log: NodeLog) -> None:
    with log.path.open("ab", buffering=0) as file:  # the process has it open all the time
        for megabyte in range(40):
            file.write(bytes([65 + megabyte % 26]) * (1 << 20))
            heard = log.read()
            assert log.path.stat().st_size <= KEPT_BYTES
            if b"shoal" in heard:
                assert re.search(rb"\[shoal: [\d,]+ bytes were left out here: more was written than is read\]\n$", heard)
        file.write(b"the end")
    rest = read(log)
    assert rest.endswith(b"the end")
    assert b"\0" not in rest


def test_nothing_is_said_to_be_missing_where_all_was_read(log: NodeLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_node_log, "KEPT_BYTES", 1000)
    for _ in range(10):
        append(log, b"x" * 600)
        assert log.read() == b"x" * 600
        assert log.path.stat().st_size <= 1000


def test_it_has_no_name(log: NodeLog) -> None:
    assert os.readlink(log.path).endswith("(deleted)")
    assert not Path(os.readlink(log.path)).exists()
