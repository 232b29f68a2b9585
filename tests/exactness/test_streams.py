"""Random streams: no two names give the same numbers, and a name gives the same numbers in every process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np

from shoal.streams import Purpose, episode_seed, stream

GROUPS, RUN_SEEDS = 1000, (0, 1)
DIGEST = f"""
from exactness.test_streams import digest
print(digest(range(0, {GROUPS}, 10), {RUN_SEEDS}))
"""


def heads(groups: range, run_seeds: tuple[int, ...]) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    """The first 128 bits of every stream that a group draws from: noise of two rollouts, two environments' own, [streams, 2]."""
    return np.array([
        stream(seed, purpose, group, env=env, index=index).integers(0, 2**64, 2, np.uint64)
        for seed, group, (purpose, env, index) in product(
            run_seeds, groups, [(Purpose.ACTION, 0, 0), (Purpose.ACTION, 0, 1), (Purpose.ENVIRONMENT, 0, 0), (Purpose.ENVIRONMENT, 1, 0)]
        )
    ])  # fmt: skip


def seeds(groups: range, run_seeds: tuple[int, ...]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """The seeds of the first eight episodes of four environments of each group, [environments, 8]."""
    return np.array([
        [episode_seed(seed, group, env, episode) for episode in range(8)] for seed, group, env in product(run_seeds, groups, range(4))
    ])  # fmt: skip


def digest(groups: range, run_seeds: tuple[int, ...]) -> str:
    return hashlib.sha256(heads(groups, run_seeds).tobytes() + seeds(groups, run_seeds).tobytes()).hexdigest()


def test_the_streams_of_a_thousand_groups_and_two_runs_are_pairwise_distinct() -> None:
    found = heads(range(GROUPS), RUN_SEEDS)
    assert len(np.unique(found, axis=0)) == len(found) == GROUPS * len(RUN_SEEDS) * 4
    assert len(np.unique(found[:, 0])) == len(found)  # 64 bits are enough to tell them apart


def test_environments_play_episodes_of_their_own() -> None:
    """Of 31 bits two seeds may be the same by chance; two sequences of eight are not, and seeds are hardly ever."""
    found = seeds(range(GROUPS), RUN_SEEDS)
    assert len(np.unique(found, axis=0)) == len(found)
    assert found.min() >= 0
    assert found.max() < 2**31
    assert len(np.unique(found)) >= found.size - 10


def test_ten_restarts_draw_the_same_streams() -> None:
    here = Path(__file__).resolve()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parents[2] / "src"), str(here.parents[1])])}
    expected = digest(range(0, GROUPS, 10), RUN_SEEDS)
    for restart in range(10):
        command = [sys.executable, "-c", DIGEST]
        environment["PYTHONHASHSEED"] = str(restart)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.stdout.strip() == expected, done.stderr


def test_an_epoch_and_a_purpose_make_streams_of_their_own() -> None:
    names = list(product(Purpose, range(3), range(3), range(3)))
    drawn = {stream(7, p, group=g, index=i, epoch=e).integers(0, 2**64, dtype=np.uint64).item() for p, g, i, e in names}
    assert len(drawn) == len(names)
