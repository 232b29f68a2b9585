"""One suite for every memory that a ring and a board may lie in: this process's own, and memory shared by descriptor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from rollout_fakes import RUN_ID, scripted_schema, write_rollout
from shoal.errors import SchemaError
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring
from shoal.supervision.memory import SharedMemory
from shoal.types import Array
from shoal.weights.board import WeightBoard

Look = Callable[[], Array]  # each call is the same bytes as another role sees them


@pytest.fixture(params=["own", "shared"])
def memory(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Look]]:
    opened: list[SharedMemory] = []

    def make(size_bytes: int) -> Look:
        if request.param == "own":
            buffer = np.zeros(size_bytes, np.uint8)
            return lambda: buffer
        mine = SharedMemory.create(size_bytes)
        opened.append(mine)

        def attach() -> Array:
            other = SharedMemory.attach(os.dup(mine.fd), size_bytes)
            opened.append(other)
            return other.buffer

        return attach

    yield make
    for one in opened:
        one.close()


def test_what_one_role_writes_into_a_slot_another_reads(memory):
    schema = scripted_schema()
    look = memory(Ring.size_bytes(schema, 3))
    writer, reader = Ring(schema, 3, look()), Ring(schema, 3, look())
    for index in range(3):
        writer.poison(index)
    assert np.isnan(reader.slots[1].arrays["reward"]).all()
    write_rollout(writer.slots[1], Identity(4, 5, 6), num_rows=3)
    reader.slots[1].check(RUN_ID, Identity(4, 5, 6))
    for name, array in writer.slots[1].arrays.items():
        assert reader.slots[1].arrays[name].tobytes() == array.tobytes()
    assert np.isnan(reader.slots[0].arrays["reward"]).all()
    assert np.isnan(reader.slots[2].arrays["reward"]).all()
    reader.slots[1].envelope["consumed_ns"] = 77
    assert int(writer.slots[1].envelope["consumed_ns"]) == 77


def test_bytes_that_change_under_way_are_seen_by_the_reader(memory):
    schema = scripted_schema()
    look = memory(Ring.size_bytes(schema, 1))
    writer, reader = Ring(schema, 1, look()), Ring(schema, 1, look())
    write_rollout(writer.slots[0], Identity(0, 0, 0))
    writer.slots[0].arrays["observation/camera"][0, 0, 0, 0] ^= 1
    with pytest.raises(SchemaError, match="it changed after"):
        reader.slots[0].check(RUN_ID)


def test_what_one_role_publishes_the_others_read(memory):
    look = memory(WeightBoard.size_bytes(700))
    writer, *readers = (WeightBoard(700, look()) for _ in range(3))
    writer.reset()
    for reader in readers:
        with pytest.raises(LookupError):
            reader.read(np.zeros(700, np.float32))
    for version in range(5):
        writer.publish(version, np.full(700, version + 0.5, np.float32))
        for reader in readers:
            out = np.zeros(700, np.float32)
            assert (reader.version, reader.read(out)) == (version, version)
            assert (out == version + 0.5).all()
    writer.begin(5)[:] = 0
    out = np.zeros(700, np.float32)
    assert readers[0].read(out) == 4
    assert (out == 4.5).all()


def test_a_ring_and_a_board_share_one_block_without_touching(memory):
    schema = scripted_schema()
    ring_bytes = Ring.size_bytes(schema, 2)
    look = memory(ring_bytes + WeightBoard.size_bytes(100))
    ring, board = Ring(schema, 2, look()[:ring_bytes]), WeightBoard(100, look()[ring_bytes:])
    board.reset()
    board.publish(0, np.ones(100, np.float32))
    for index in range(2):
        ring.poison(index)
    out = np.zeros(100, np.float32)
    assert board.read(out) == 0
    assert (out == 1).all()
    write_rollout(ring.slots[1], Identity(0, 0, 0))
    board.publish(1, np.full(100, np.nan, np.float32))
    ring.slots[1].check(RUN_ID)
