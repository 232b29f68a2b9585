"""Random streams: every random number of a run is a function of who asks for what, and of nothing that happened before.

A stream is named by (run seed, purpose, group, environment, index, epoch). `index` counts whatever the purpose counts (rollouts,
episodes, updates), so there is no generator state to save, move or restore: a group that is made again elsewhere draws the same
numbers. `epoch` is raised by a roll-back after divergence, so that the run does not walk into the same wall again.
Philox (Salmon et al. 2011) under numpy's SeedSequence with spawn keys.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np


class Purpose(IntEnum):
    """What a stream is for. Values are part of a run's bits: never renumber."""

    EPISODE = 0  # the seed of an environment's n-th episode
    ACTION = 1  # exploration noise of a group's n-th rollout
    PARAMETERS = 2  # initial weights
    MINIBATCH = 3  # permutations of the n-th update
    EVALUATION = 4
    ENVIRONMENT = 5  # construction of an environment that takes one seed for all (native vector forms)
    REPLAY = 6  # what the n-th update samples from the replay


def seed_sequence(run_seed: int, purpose: Purpose, group: int = 0, env: int = 0, index: int = 0, epoch: int = 0) -> np.random.SeedSequence:
    """The seed sequence of one stream; spawn keys have a fixed length, so no two names collide by concatenation."""
    return np.random.SeedSequence(entropy=run_seed, spawn_key=(int(purpose), group, env, index & 0xFFFFFFFF, index >> 32, epoch))


def stream(run_seed: int, purpose: Purpose, group: int = 0, env: int = 0, index: int = 0, epoch: int = 0) -> np.random.Generator:
    """A fresh generator at the beginning of one stream."""
    return np.random.Generator(np.random.Philox(seed_sequence(run_seed, purpose, group, env, index, epoch)))


_BLOCK = 256  # episode seeds are drawn this many at a time: a seed sequence costs as much as twenty steps of CartPole


@lru_cache(maxsize=4096)
def _episode_seed_block(run_seed: int, group: int, env: int, block: int, epoch: int) -> list[int]:
    words = seed_sequence(run_seed, Purpose.EPISODE, group, env, block, epoch).generate_state(_BLOCK)
    return [int(word) >> 1 for word in words]


def episode_seed(run_seed: int, group: int, env: int, episode: int, epoch: int = 0) -> int:
    """What the n-th episode of an environment is reset with: in [0, 2**31), which every simulator accepts."""
    block, place = divmod(episode, _BLOCK)
    return _episode_seed_block(run_seed, group, env, block, epoch)[place]


def group_seed(run_seed: int, group: int, episodes: int, epoch: int = 0) -> int:
    """What all environments of a group in its native form are reset with, which began so many episodes before (of all together)."""
    return int(stream(run_seed, Purpose.ENVIRONMENT, group, index=episodes, epoch=epoch).integers(2**31 - 2**16))
