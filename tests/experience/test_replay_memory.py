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
