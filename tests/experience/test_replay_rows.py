"""Rows in columns, spread over shards: what is put is taken, touched chunks are known, and a journal undoes what was touched."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from shoal.experience import replay_rows
from shoal.experience.replay_memory import KeptMemory
from shoal.experience.replay_rows import Rows, row_bytes
from shoal.supervision.memory import anonymous_file

FIELDS = {"image": ("uint8", (2, 3)), "number": ("float32", ()), "count": ("int64", (2,))}
GROUPS, ENVS, ROWS = 5, 2, 7


@pytest.fixture
def fds() -> Iterator[tuple[int, int]]:
    made = anonymous_file("rows"), anonymous_file("journal")
    yield made
    for fd in made:
        os.close(fd)


def place(group: int, env: int, position: int) -> int:
    return (group * ENVS + env) * ROWS + position


def filled(shards: int) -> tuple[Rows, np.ndarray]:
    """Every row's number is its place. Returns the rows and all places, in a random order."""
    rows = Rows(FIELDS, GROUPS, ENVS, ROWS, shards)
    for group in range(GROUPS):
        places = np.array([place(group, env, position) for env in range(ENVS) for position in range(ROWS)])
        rows.touch(places)
        rows.put(group, "number", places, places.astype(np.float32))
        rows.put(group, "count", places, np.stack([places, -places], axis=1))
        rows.put(group, "image", places, 3)
    return rows, np.random.default_rng(0).permutation(GROUPS * ENVS * ROWS)


def test_a_row_takes_the_bytes_of_all_its_fields() -> None:
    assert row_bytes(FIELDS) == 6 + 4 + 16
    assert row_bytes({}) == 0


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8])
def test_what_was_put_is_taken_from_any_number_of_shards(shards: int) -> None:
    rows, places = filled(shards)
    assert (rows.take("number", places) == places).all()
    assert (rows.take("count", places.reshape(-1, 7)) == np.stack([places, -places], axis=1).reshape(-1, 7, 2)).all()
    image = rows.take("image", places)
    assert (image.dtype, image.shape, set(image.ravel().tolist())) == (np.uint8, (len(places), 2, 3), {3})
    out = np.zeros(len(places), np.float32)
    assert rows.take("number", places, out) is out
    assert (out == places).all()


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_block_is_a_view_of_one_groups_rows(shards: int) -> None:
    rows, _ = filled(shards)
    for group in range(GROUPS):
        block = rows.block("number", group, 2, 5)
        assert block.tolist() == [[place(group, env, position) for position in (2, 3, 4)] for env in range(ENVS)]
        block[1, 0] = -1.0
        assert rows.take("number", np.array([place(group, 1, 2)])).tolist() == [-1.0]


@pytest.mark.parametrize(("mebibytes", "chunks"), [(0.4, 1), (0.6, 1), (1.2, 1), (2.1, 2), (5.1, 5), (64.1, 64), (200.0, 64)])
def test_there_is_a_chunk_for_each_mebibyte_and_64_at_most(mebibytes: float, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (replay_rows._MOST_CHUNKS, replay_rows._LEAST_CHUNK_BYTES) == (64, 2**20)
    monkeypatch.setattr(replay_rows, "_LEAST_CHUNK_BYTES", 2**10)  # so that it is kibibytes here
    num_rows = int(mebibytes * 2**10 / 4)
    rows = Rows({"number": ("float32", ())}, 1, 1, num_rows, 1)
    assert rows.chunk_rows == -(-num_rows // chunks)
    assert len(rows.touched) == len(rows.used) == -(-num_rows // rows.chunk_rows)
    assert not rows.touched.any()
    assert not rows.used.any()
    whole = np.concatenate([block.ravel() for index in range(len(rows.used)) for _, blocks in rows.chunk(index) for block in blocks])
    assert len(whole) == num_rows


def test_chunks_are_the_same_positions_of_all_columns_and_those_that_were_touched_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_rows, "_LEAST_CHUNK_BYTES", GROUPS * ENVS * ROWS * row_bytes(FIELDS) // 3)
    rows, _ = filled(2)
    assert (rows.chunk_rows, len(rows.touched)) == (3, 3)
    for index, positions in enumerate([(0, 1, 2), (3, 4, 5), (6,)]):
        chunk = dict(rows.chunk(index))
        assert list(chunk) == list(FIELDS)
        expected = [[[place(group, env, position) for position in positions] for env in range(ENVS)] for group in range(GROUPS)]
        assert [block.tolist() for block in chunk["number"]] == expected
    rows.touched[:] = False
    rows.touch(np.array([place(3, 1, 6), place(0, 0, 6)]))
    assert rows.touched.tolist() == [False, False, True]
    rows.touch(np.array([place(4, 0, 2)]))
    assert rows.touched.tolist() == [True, False, True]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_journal_holds_what_lay_where_it_was_touched(shards: int, fds: tuple[int, int]) -> None:
    memory = KeptMemory(*fds)
    memory.begin(4)
    rows = Rows(FIELDS, GROUPS, ENVS, ROWS, shards, memory)
    every = np.arange(GROUPS * ENVS * ROWS)
    for group in range(GROUPS):
        rows.put(group, "number", every[group * ENVS * ROWS : (group + 1) * ENVS * ROWS], 1.5)
    some = np.array([place(0, 1, 3), place(1, 0, 6), place(4, 1, 0)])
    rows.touch(some)
    for group, one in ((0, some[:1]), (1, some[1:2]), (4, some[2:])):
        rows.put(group, "number", one, 9.0)
        rows.put(group, "count", one, 7)
        rows.put(group, "image", one, 200)
    assert rows.take("number", some).tolist() == [9.0] * 3
    memory.back_to(4)
    assert (rows.take("number", every) == 1.5).all()
    assert not rows.take("count", every).any()
    assert not rows.take("image", every).any()
