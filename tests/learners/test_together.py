"""Learners of one group: the same weights, their comparison, what is kept for those who come after them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_learner import World

from several import several
from shoal.algorithms.ranks import LostRank, Ranks
from shoal.engines.keeping import keep, load_kept
from shoal.errors import CheckpointError, LearnersError
from shoal.learners.distributed import file_store, meet
from shoal.learners.learner import CHECK_EVERY
from shoal.learners.together import Together
from shoal.supervision.memory import anonymous_file


@pytest.fixture
def kept() -> Iterator[tuple[int, int]]:
    fds = anonymous_file("kept-0"), anonymous_file("kept-1")
    yield fds
    for fd in fds:
        os.close(fd)


def test_learners_in_threads_make_the_same_weights_and_those_of_learners_elsewhere() -> None:
    worlds = [World() for _ in range(3)]
    together = Together([world.learner for world in worlds], threads=1, timeout_seconds=300.0)
    shas = []
    for sequence in range(3):
        for world in worlds:
            world.rollouts(sequence)
        together.update(together.consume(worlds[0].rollouts(sequence)))
        shas.append({learner.weights_sha256 for learner in together.all})
    assert [len(sha) for sha in shas] == [1, 1, 1]

    others = [World() for _ in range(3)]

    def work(ranks: Ranks) -> str:
        world = others[ranks.rank]
        world.learner.join(ranks)
        for sequence in range(3):
            world.learner.update(world.learner.consume(world.rollouts(sequence)))
        return world.learner.weights_sha256

    assert set(several(3, work)) == shas[-1]
    assert World().learner.weights_sha256 not in shas[-1]


def test_one_that_holds_other_weights_is_named_by_all() -> None:
    worlds = [World(), World()]

    def work(ranks: Ranks) -> str:
        world = worlds[ranks.rank]
        world.learner.join(ranks)
        world.learner.version = CHECK_EVERY
        world.learner.agree()
        with torch.no_grad():
            next(iter(world.policy.parameters())).view(-1)[0] += float(ranks.rank == 1)
        world.learner.version = CHECK_EVERY + 1  # not compared
        world.learner.agree()
        world.learner.version = 2 * CHECK_EVERY
        with pytest.raises(LearnersError) as caught:
            world.learner.agree()
        return str(caught.value)

    one, two = several(2, work)
    assert one == two
    assert "after update 20 the learners do not hold the same weights (learner-0 " in one
    assert ", learner-1 " in one


def test_one_that_is_killed_is_missed_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from shoal.learners.distributed import file_store, meet\n"
        "fd = int(sys.argv[1])\n"
        "ranks = meet(file_store(fd, 2), 1, 2, timeout_seconds=600.0)\n"
        "ranks.sum(torch.ones(1))\n"
        "print('there', flush=True)\n"
        "import time; time.sleep(600)\n"
    )
    fd = anonymous_file("meeting")
    paths = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2] / "src"), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", script, str(fd)]
    with subprocess.Popen(command, pass_fds=(fd,), env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True) as other:
        ranks = meet(file_store(fd, 2), 0, 2, timeout_seconds=600.0)
        ranks.sum(torch.ones(1))
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        other.kill()
        begun = time.monotonic()
        with pytest.raises(LostRank, match="learner-0 lost the others"):
            ranks.sum(torch.ones(100_000))
        assert time.monotonic() - begun < 300.0, "it waited as long as for one that lives"
    os.close(fd)


def test_what_is_kept_is_all_that_the_next_update_depends_on(kept: tuple[int, int]) -> None:
    straight, other = World(), World()
    for sequence in range(3):
        straight.learner.update(straight.learner.consume(straight.rollouts(sequence)))
        keep(straight.learner, kept)
    load_kept(other.learner, kept, 3)
    assert (other.learner.version, other.learner.env_steps) == (3, straight.learner.env_steps)
    for world in (straight, other):
        world.learner.update(world.learner.consume(world.rollouts(3)))
    assert other.learner.weights_sha256 == straight.learner.weights_sha256


def test_the_version_before_stays_whole_while_the_next_is_written(kept: tuple[int, int]) -> None:
    world = World()
    for sequence in range(2):
        world.learner.update(world.learner.consume(world.rollouts(sequence)))
        keep(world.learner, kept)
    os.ftruncate(kept[1], 100)  # version 1's place, where version 3 would be written: torn
    load_kept(world.learner, kept, 2)
    with pytest.raises(CheckpointError):
        load_kept(world.learner, kept, 3)
    with pytest.raises(CheckpointError, match="it holds version 2"):
        load_kept(world.learner, kept, 4)
