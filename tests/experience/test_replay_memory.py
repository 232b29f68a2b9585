"""A replay whose memory outlives it: whoever comes next stands where the last one stood before the update in which it was killed, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay_world import IMAGE, VECTOR, Kind, World
from shoal.config import ReplayConfig
from shoal.experience.replay import Replay
from shoal.experience.replay_memory import KeptMemory
from shoal.experience.ring import Ring, allocate
from shoal.experience.sum_tree import SumTree
from shoal.supervision.memory import anonymous_file
from shoal.types import Arrays

GAMMA = 0.9
STEPS = ReplayConfig(prioritised=True, n_step=3, capacity_steps=60)
KINDS = {
    "steps": (Kind(memory=True), STEPS),
    "frames": (Kind(leaves=(IMAGE, VECTOR), jumps=True), STEPS.model_copy(update={"capacity_steps": 90})),
    "sequences": (
        Kind(memory=True, next_step=True),
        ReplayConfig(prioritised=True, n_step=2, capacity_steps=120, sequence_length=8, burn_in=2),
    ),
}
VERSIONS = 7


class Killed(Exception):
    """The process is gone."""


class Dying(KeptMemory):
    """Is killed at a moment: before a record is written, or after it, when what it names is half overwritten."""

    def __init__(self, fds: tuple[int, int], moment: int) -> None:
        super().__init__(*fds)
        self.moment = moment

    def changing(self, arrays, entry_M) -> None:
        self._pass()
        super().changing(arrays, entry_M)
        if self.moment == 1:
            for array in arrays:
                array[np.asarray(entry_M)[::2]] = 77
        self._pass()

    def _pass(self) -> None:
        self.moment -= 1
        if self.moment == 0:
            raise Killed


@pytest.fixture
def fds() -> Iterator[tuple[int, int]]:
    made = anonymous_file("rows"), anonymous_file("journal")
    yield made
    for fd in made:
        os.close(fd)


class Rollouts:
    """Those of each update, which can be given again."""

    def __init__(self, kind: Kind) -> None:
        world = World(kind, seed=3)
        self.schema, self._updates = world.schema, list[Ring]()
        for version in range(VERSIONS):
            ring = allocate(world.schema, kind.groups)
            for group in range(kind.groups):
                slot, _ = world.rollout(group, version=version)
                for name, array in slot.arrays.items():
                    np.copyto(ring.slots[group].arrays[name], array)
            self._updates.append(ring)

    def update(self, replay: Replay, version: int) -> None:
        """The one that is made of `version`: rollouts go in, and three batches get new priorities."""
        replay.begin(version)
        for slot in self._updates[version].slots:
            replay.insert(slot, version)
        rng = np.random.default_rng(version)
        for _ in range(3 if replay.can_sample else 0):
            draw = replay.sample if replay._config.sequence_length is None else replay.sample_sequences
            index_M = draw(5, rng, beta=0.5).index_M
            replay.update_priorities(index_M, rng.random(5) * 3)


def kept_of(replay: Replay) -> tuple[Arrays, dict[str, Any]]:
    """As it was written down."""
    arrays, facts = replay.kept_state()
    return {name: array.copy() for name, array in arrays.items()}, facts


def contents(replay: Replay, directory: Path) -> dict[str, bytes]:
    replay.check_valid()
    replay.save(directory, None)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("what", KINDS)
def test_whoever_comes_after_a_kill_goes_on_with_the_same_bits(what: str, fds: tuple[int, int], tmp_path: Path) -> None:
    kind, config = KINDS[what]
    rollouts = Rollouts(kind)
    straight = Replay(rollouts.schema, kind.groups, config, gamma=GAMMA)
    for version in range(VERSIONS):
        rollouts.update(straight, version)
    expected = contents(straight, tmp_path / "straight")

    memory = Dying(fds, moment=-1)
    replay = Replay(rollouts.schema, kind.groups, config, gamma=GAMMA, memory=memory)
    replay.begin(0)
    kept, moments, deaths, version = kept_of(replay), iter(range(1, 1000, 5)), 0, 0
    while version < VERSIONS:
        try:
            rollouts.update(replay, version)
        except Killed:
            deaths += 1
            memory = Dying(fds, moment=next(moments) if deaths % 2 else -1)  # the next may be killed as well
            replay = Replay(rollouts.schema, kind.groups, config, gamma=GAMMA, memory=memory)
            replay.go_on(*kept, version)
            replay.check_valid()
            continue
        version += 1
        kept = kept_of(replay)
        memory.moment = next(moments)
    assert deaths >= VERSIONS - 1
    assert contents(replay, tmp_path / "killed") == expected


@pytest.mark.parametrize("what", KINDS)
def test_an_update_that_was_made_but_not_told_is_undone_and_one_that_was_told_is_not(
    what: str, fds: tuple[int, int], tmp_path: Path
) -> None:
    kind, config = KINDS[what]
    rollouts = Rollouts(kind)
    replay = Replay(rollouts.schema, kind.groups, config, gamma=GAMMA, memory=KeptMemory(*fds))
    kept = [kept_of(replay)]
    for version in range(4):
        rollouts.update(replay, version)
        kept.append(kept_of(replay))
    expected = contents(replay, tmp_path / "told")
    for told, name in ((4, "again"), (4, "and again")):
        other = Replay(rollouts.schema, kind.groups, config, gamma=GAMMA, memory=KeptMemory(*fds))
        other.go_on(*kept[told], told)
        assert contents(other, tmp_path / name) == expected

    straight = Replay(rollouts.schema, kind.groups, config, gamma=GAMMA)
    for version in range(3):
        rollouts.update(straight, version)
    undone = Replay(rollouts.schema, kind.groups, config, gamma=GAMMA, memory=KeptMemory(*fds))
    undone.go_on(*kept[3], 3)
    assert contents(undone, tmp_path / "undone") == contents(straight, tmp_path / "straight")
    third = Replay(rollouts.schema, kind.groups, config, gamma=GAMMA, memory=KeptMemory(*fds))
    with pytest.raises(ValueError, match="the journal is that of an update of version 3"):
        third.go_on(*kept[2], 2)


def test_one_that_is_killed_before_the_first_update_was_told_begins_anew(fds: tuple[int, int], tmp_path: Path) -> None:
    kind, config = KINDS["steps"]
    rollouts = Rollouts(kind)
    replay = Replay(rollouts.schema, kind.groups, config, gamma=GAMMA, memory=KeptMemory(*fds))
    kept = kept_of(replay)
    rollouts.update(replay, 0)
    other = Replay(rollouts.schema, kind.groups, config, gamma=GAMMA, memory=KeptMemory(*fds))
    other.go_on(*kept, 0)
    straight = Replay(rollouts.schema, kind.groups, config, gamma=GAMMA)
    for each in (other, straight):
        rollouts.update(each, 0)
    assert contents(other, tmp_path / "other") == contents(straight, tmp_path / "straight")


@given(content=st.binary(max_size=200), length=st.integers(-5, 250))
def test_a_journal_that_is_none_is_refused(content: bytes, length: int) -> None:
    fds = anonymous_file("rows"), anonymous_file("journal")
    try:
        memory = KeptMemory(*fds)
        memory.array((4, 2), "float32")
        memory.array((3,), "int64")
        os.pwrite(fds[1], (7).to_bytes(8, "little") + length.to_bytes(8, "little", signed=True) + content, 0)
        try:
            memory.back_to(7)
        except ValueError:
            return
        assert length == 0 or len(content) >= length
    finally:
        for fd in fds:
            os.close(fd)


def journal(fd: int, base: int, *numbers: int, length: int | None = None) -> None:
    """Written from its first byte. numbers: of the records, int64 each. length: of the records as the header says it, if not what it is."""
    records = np.array(numbers, np.int64).tobytes()
    os.pwrite(fd, np.array([base, len(records) if length is None else length], np.int64).tobytes() + records, 0)


@pytest.mark.parametrize(
    ("numbers", "length", "refusal"),
    [
        ((), -1, "is to hold -1 bytes of records, and holds 0"),
        ((1, 1, 0, 0), 33, "is to hold 33 bytes of records, and holds 32"),
        ((0, 1, 0, 0), None, "the record at byte 0 of the journal is of 0 arrays and 1 entries"),
        ((3, 1, 0, 1, 0, 0), None, "the record at byte 0 of the journal is of 3 arrays and 1 entries"),
        ((1, 0, 0, 0), None, "the record at byte 0 of the journal is of 1 arrays and 0 entries"),
        ((1, 33, 0, 0), None, "the record at byte 0 of the journal is of 1 arrays and 33 entries"),
        ((1, 1, -1, 0), None, "the journal names array -1 of 2"),
        ((1, 1, 2, 0), None, "the journal names array 2 of 2"),
        ((1, 1, 0, -1, 9), None, "names entries that array 0 has not"),
        ((1, 1, 0, 4, 9), None, "names entries that array 0 has not"),
        ((2, 1, 0, 1, 3, 9, 9), None, "names entries that array 1 has not"),
        ((1, 2, 1, 0, 1, 9), None, "the last record of the journal is cut off"),
        ((1, 1, 1, 0, 9, 1, 2, 1, 0, 1, 9), None, "the last record of the journal is cut off"),
    ],
)
def test_a_journal_of_no_records_of_these_arrays_is_refused_before_anything_is_undone(
    numbers: tuple[int, ...], length: int | None, refusal: str, fds: tuple[int, int]
) -> None:
    memory = KeptMemory(*fds)
    one, other = memory.array((4, 2), "float32"), memory.array((3,), "int64")
    one[:], other[:] = 5.0, 6
    journal(fds[1], 7, *numbers, length=length)
    with pytest.raises(ValueError, match=refusal):
        memory.back_to(7)
    assert (one == 5.0).all()
    assert (other == 6).all()


def test_records_are_undone_from_the_last_to_the_first(fds: tuple[int, int]) -> None:
    memory = KeptMemory(*fds)
    one, other = memory.array((4, 2), "int64"), memory.array((3,), "int64")
    one[:], other[:] = 5, 6
    # array 1, entry 2: 60. Arrays 0 and 1, entries 2 and 1: rows (1, 2) and (3, 4), then 61 and 62. Array 1, entry 1: 63.
    journal(fds[1], 7, 1, 1, 1, 2, 60, 2, 2, 0, 1, 2, 1, 1, 2, 3, 4, 61, 62, 1, 1, 1, 1, 63)
    memory.back_to(7)
    assert one.tolist() == [[5, 5], [3, 4], [1, 2], [5, 5]]
    assert other.tolist() == [6, 62, 60]
    one[:] = 8
    memory.back_to(7)  # the journal is empty now
    assert (one == 8).all()


def test_a_memory_that_was_never_written_goes_back_to_version_0_alone(fds: tuple[int, int]) -> None:
    memory = KeptMemory(*fds)
    array = memory.array((3,), "int64")
    memory.back_to(0)
    assert not array.any()
    for version in (-2, 1):
        with pytest.raises(ValueError, match="the journal is that of an update of version -1"):
            memory.back_to(version)


def test_what_is_cleared_is_zero_and_has_no_journal(fds: tuple[int, int]) -> None:
    memory = KeptMemory(*fds)
    for shape in ((5,), (3, 2)):
        array = memory.array(shape, "uint8")
        assert not array.any()
        memory.begin(2)
        memory.changing([array], np.arange(len(array)))
        array[:] = 255
        memory.clear()
    assert os.fstat(fds[0]).st_size == os.fstat(fds[1]).st_size == 0
    assert not memory.array((3, 2), "uint8").any()
    memory.back_to(0)


def test_arrays_are_there_again_in_the_order_in_which_they_were_asked_for(fds: tuple[int, int]) -> None:
    first = KeptMemory(*fds)
    made = [first.array((3,), "int64"), first.array((0, 4), "float32"), first.array((4097,), "uint8"), first.array((2, 2), "float32")]
    for number, array in enumerate(made, 1):
        array[:] = number
    again = KeptMemory(*fds)
    found = [again.array(array.shape, str(array.dtype)) for array in made]
    for one, other in zip(made, found, strict=True):
        assert one.tolist() == other.tolist()
        assert one.dtype == other.dtype


def test_of_a_sum_tree_only_the_leaves_are_kept_however_high_it_is(fds: tuple[int, int]) -> None:
    memory = KeptMemory(*fds)
    memory.begin(1)
    tree = SumTree(5000, memory)
    tree.set(np.arange(5000), 2.0)
    memory.begin(2)
    tree.set(np.array([7, 4999, 8]), np.array([1.0, 5.0, 0.0]))
    memory.back_to(2)
    tree.load(tree.leaves)
    tree.check_valid()
    assert (tree.leaves == 2.0).all()
    assert tree.total == 10_000.0
