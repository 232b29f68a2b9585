"""The weight board: layout, versions, and that no reader ever sees a mix."""

from __future__ import annotations

import multiprocessing
import os
import threading

import numpy as np
import pytest

from shoal.errors import SchemaError
from shoal.supervision.memory import SharedMemory
from shoal.weights.board import WeightBoard, WeightLayout

SIZE = 1500


def board(size: int = SIZE, fill: int = 0xFF) -> tuple[WeightBoard, np.ndarray]:
    buffer = np.full(WeightBoard.size_bytes(size), fill, np.uint8)
    made = WeightBoard(size, buffer)
    made.reset()
    return made, buffer


def flat(value: float, size: int = SIZE) -> np.ndarray:
    return np.full(size, value, np.float32)


# ---- layout ----------------------------------------------------------------------------------------------------------
def test_a_layout_is_sorted_by_name_and_fills_the_array_without_gaps():
    layout = WeightLayout.of([("b", (2, 3)), ("c", ()), ("a", (4,)), ("d", (0, 5))])
    assert layout.entries == (("a", (4,)), ("b", (2, 3)), ("c", ()), ("d", (0, 5)))
    assert layout.size == 11
    numbers = np.arange(11, dtype=np.float32)
    views = layout.views(numbers)
    assert list(views) == ["a", "b", "c", "d"]
    assert {n: v.shape for n, v in views.items()} == {"a": (4,), "b": (2, 3), "c": (), "d": (0, 5)}
    assert views["a"].tolist() == [0, 1, 2, 3]
    assert views["b"].tolist() == [[4, 5, 6], [7, 8, 9]]
    assert float(views["c"]) == 10
    views["b"][1, 2] = 99
    assert numbers[9] == 99
    assert WeightLayout.of([("x", [2, 3])]).entries == (("x", (2, 3)),)
    assert WeightLayout(()).size == 0


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.zeros(4, np.float64), r"float64 \[4\]"),
        (np.zeros(3, np.float32), r"float32 \[3\]"),
        (np.zeros((4, 1), np.float32), r"float32 \[4, 1\]"),
    ],
)
def test_views_refuse_another_array(array, what):
    with pytest.raises(SchemaError, match=rf"^weights are float32 \[4\], not {what}$"):
        WeightLayout.of([("a", (4,))]).views(array)


def test_the_hash_tells_layouts_apart_and_does_not_depend_on_the_order_given():
    base = [("a", (4,)), ("b", (2, 3))]
    others = [[("a", (4,)), ("b", (3, 2))], [("a", (4,)), ("c", (2, 3))], [("a", (4,))], [("a", (4, 1)), ("b", (2, 3))]]
    hashes = {WeightLayout.of(entries).hash for entries in (base, *others)}
    assert len(hashes) == 5
    assert WeightLayout.of(base).hash == WeightLayout.of(reversed(base)).hash == "36233cb21f334154"


# ---- versions --------------------------------------------------------------------------------------------------------
def test_memory_is_whole_pages_with_the_header_on_its_own():
    sizes = {0: 4096, 1: 8192, 512: 8192, 513: 12288, 1024: 12288, 2**24: 4096 + 8 * 2**24}
    assert {size: WeightBoard.size_bytes(size) for size in sizes} == sizes
    made, buffer = board(512)
    made.publish(0, flat(1.0, 512))
    made.publish(1, flat(2.0, 512))
    assert (buffer[4096 : 4096 + 2048].view(np.float32) == 1.0).all()
    assert (buffer[4096 + 2048 :].view(np.float32) == 2.0).all()
    assert (buffer[32:4096] == 0xFF).all()


def test_before_the_first_version_there_is_nothing_to_read():
    made, _ = board()
    assert made.version == -1
    with pytest.raises(LookupError, match=r"^no version was published on the weight board yet$"):
        made.read(flat(0))


@pytest.mark.parametrize("last", [0, 1, 2, 3, 8])
def test_the_newest_version_is_read(last):
    made, _ = board()
    out = flat(-1)
    for version in range(last + 1):
        made.publish(version, flat(10 + version))
        assert made.version == version
        assert made.read(out) == version
        assert (out == 10 + version).all()


def test_a_version_is_not_seen_before_it_is_committed():
    made, _ = board()
    made.publish(3, flat(3))
    made.publish(4, flat(4))
    copy = made.begin(5)
    assert (copy == 3).all()
    copy[:700] = 5
    assert made.version == 4
    out = flat(-1)
    assert made.read(out) == 4
    assert (out == 4).all()
    copy[700:] = 5
    made.commit(5)
    assert made.version == 5
    assert made.read(out) == 5
    assert (out == 5).all()


def test_a_version_that_is_being_replaced_is_whole_no_more():
    made, buffer = board()
    made.publish(0, flat(0))
    made.publish(1, flat(1))
    made.begin(2)
    assert buffer[:32].view(np.int64).tolist() == [2, -1, 1, 1]
    made.commit(2)
    assert buffer[:32].view(np.int64).tolist() == [2, 2, 1, 1]


def test_a_writer_that_died_in_mid_publish_leaves_the_version_before_it():
    made, buffer = board()
    made.publish(6, flat(6))
    made.begin(7)[:] = np.nan
    successor = WeightBoard(SIZE, buffer)
    out = flat(-1)
    assert successor.read(out) == 6
    assert (out == 6).all()
    successor.reset()
    assert successor.version == -1
    with pytest.raises(LookupError):
        successor.read(out)
    successor.publish(2, flat(2))
    assert successor.read(out) == 2
    assert (out == 2).all()


def test_publishing_copies():
    made, _ = board()
    mine = flat(1)
    made.publish(0, mine)
    mine[:] = 2
    out = flat(0)
    made.read(out)
    assert (out == 1).all()
    out[:] = 7
    again = flat(0)
    made.read(again)
    assert (again == 1).all()


# ---- a writer in the middle of things --------------------------------------------------------------------------------
class Meddling(WeightBoard):
    """Publishes at the n-th memory barrier of a read: the moments at which another process could."""

    def __init__(self, size: int, buffer: np.ndarray) -> None:
        super().__init__(size, buffer)
        self.plans: list[list[int]] = []  # versions to publish at each coming barrier
        self.unfinished: int | None = None
        self._inside = False

    def _order(self) -> None:
        if self._inside or not self.plans:
            return
        self._inside = True
        for version in self.plans.pop(0):
            self.publish(version, flat(version, self._size))
        if self.unfinished is not None and not self.plans:
            self.begin(self.unfinished)[: self._size // 2] = np.nan
            self.unfinished = None
        self._inside = False


def meddling(*plans: list[int]) -> Meddling:
    made = Meddling(SIZE, np.zeros(WeightBoard.size_bytes(SIZE), np.uint8))
    made.reset()
    made.publish(0, flat(0))
    made.publish(1, flat(1))
    made.plans = list(plans)
    return made


@pytest.mark.parametrize(
    ("plans", "expected"),
    [
        ([[2], []], 1),  # one publication goes into the other copy and disturbs nobody
        ([[], [2]], 1),
        ([[2, 3], []], 3),  # the copy was written again before it was read ...
        ([[], [2, 3]], 3),  # ... or while it was read: the newer one is taken
        ([[], [2, 3], [], [4, 5]], 5),
        ([[2, 3], [4, 5], [], []], 5),
    ],
)
def test_a_read_that_was_disturbed_is_made_again(plans, expected):
    made = meddling(*plans)
    out = flat(-1)
    assert made.read(out) == expected
    assert (out == expected).all()


def test_a_copy_that_is_just_being_overwritten_is_not_taken():
    made = meddling([], [2])
    made.unfinished = 3  # over version 1, which is being read
    out = flat(-1)
    assert made.read(out) == 2
    assert (out == 2).all()


class Moments:
    """A header that is another one at each look, until the last."""

    def __init__(self, looks: list[list[list[int]]], then: np.ndarray) -> None:
        self._looks, self._then, self.looks_after = looks, then, 0

    def _now(self) -> np.ndarray:
        if self._looks:
            return np.array(self._looks.pop(0))
        self.looks_after += 1
        return self._then

    def __getitem__(self, key):
        return self._now()[key]

    def __iter__(self):
        return (self._now()[copy] for copy in (0, 1))

    def tolist(self):
        return [row.tolist() for row in self]


def test_a_writer_that_publishes_between_two_looks_at_the_header_confuses_nobody():
    """Copy 0 is looked at while it is written (2, -1), copy 1 one publication later (3, -1): to the reader, none is whole just now."""
    made, _ = board()
    for version in (0, 1, 2, 3):
        made.publish(version, flat(version))
    torn = [[[2, -1], [1, 1]], [[2, 2], [3, -1]]]
    for looks in (torn, [*torn, *torn]):
        out = flat(-1)
        assert reader_of(made, looks).read(out) in (2, 3)
        assert len(set(out.tolist())) == 1


def reader_of(made: WeightBoard, looks: list[list[list[int]]]) -> WeightBoard:
    """A reader of this board to whom its header seems like `looks`, one after the other, before it shows itself as it is."""
    reader = WeightBoard.__new__(WeightBoard)
    reader.__dict__.update(made.__dict__)
    reader._header = Moments(list(looks), made._header)
    return reader


def test_a_reader_that_comes_while_the_first_version_is_written_gets_it():
    made, _ = board()
    made.publish(0, flat(7))
    out = flat(-1)
    assert reader_of(made, [[[0, -1], [-1, -1]]] * 6).read(out) == 0
    assert (out == 7).all()


def test_a_copy_whose_header_is_just_being_taken_down_is_read_again():
    """The writer has stored that it begins version 5, and not yet that 3 is whole no more: its first bytes may be there already."""
    made, _ = board()
    for version in (2, 3):
        made.publish(version, flat(version))
    reader = reader_of(made, [[[2, 2], [3, 3]], [[2, 2], [3, 3]], [[2, 2], [5, 3]]])
    assert reader.read(flat(-1)) == 3
    assert reader._header.looks_after == 3


def _hammer(fd: int, size_bytes: int, go: object, done: object) -> None:
    memory = SharedMemory.attach(fd, size_bytes)
    writer = WeightBoard(SIZE, memory.buffer)
    go.wait()
    for version in range(1, 4000):
        writer.publish(version, flat(version))
    done.set()
    os._exit(0)


def test_no_reader_ever_sees_a_mix_while_a_process_publishes_without_pause():
    context = multiprocessing.get_context("fork")
    memory = SharedMemory.create(WeightBoard.size_bytes(SIZE))
    WeightBoard(SIZE, memory.buffer).reset()
    WeightBoard(SIZE, memory.buffer).publish(0, flat(0))
    go, done = context.Event(), context.Event()
    writer = context.Process(target=_hammer, args=(os.dup(memory.fd), memory.size_bytes, go, done))
    writer.start()
    faults: list[str] = []
    seen: set[int] = set()

    def read() -> None:
        reader, out, newest = WeightBoard(SIZE, memory.buffer), flat(-1), 0
        while True:
            last = done.is_set()
            version = reader.read(out)
            if version < newest or out.min() != version or out.max() != version:
                faults.append(f"version {version} after {newest} held {out.min()} to {out.max()}")
                return
            newest = version
            seen.add(version)
            if last:
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    go.set()
    for reader in readers:
        reader.join()
    writer.join()
    assert faults == []
    assert max(seen) == 3999
    memory.close()
