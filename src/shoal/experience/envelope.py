"""The envelope: the header that every rollout carries, and the closed list of what can become of it (design: the envelope)."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np


class Fate(IntEnum):
    """What became of an attempt of a rollout. The list is closed; values are written to files, so never renumber."""

    IN_FLIGHT = 0
    TRAINED = 1
    ACTOR_DIED = 2  # its actor died before it was finished; the sequence is made again
    OVER_LAG = 3  # older than max_policy_lag when it was to be trained
    INVALID = 4  # refused: wrong schema, checksum or non-finite numbers
    SUPERSEDED = 5  # another attempt of the same sequence became final
    ROLLED_BACK = 6  # trained or waiting, and undone by a return to a checkpoint; the sequence is made again
    SHUTDOWN = 7  # in flight when the run ended
    ENVIRONMENT_FAULT = 8  # its environment broke its contract; the sequence is made again from a fresh one
    REPLAYED = 9  # it went into the replay, from which it is sampled until it is evicted

    @property
    def label(self) -> str:
        return self.name.lower()


CONSUMED = frozenset({Fate.TRAINED, Fate.REPLAYED})  # what became of it is what it was made for
REMADE = frozenset(
    {Fate.ACTOR_DIED, Fate.ROLLED_BACK, Fate.SUPERSEDED, Fate.SHUTDOWN, Fate.ENVIRONMENT_FAULT}
)  # these leave the sequence open


class Source(IntEnum):
    STEPPED = 0  # by an actor of the run
    CLIENT = 1  # paced by a client outside


class Identity(NamedTuple):
    """The name of one attempt of a rollout; (group, sequence) has no gaps."""

    group: int
    sequence: int
    attempt: int


ENVELOPE = np.dtype(
    [
        ("schema_hash", "V16"),
        ("run_id", "V16"),
        ("policy_id", np.uint32),
        ("group", np.uint32),
        ("sequence", np.uint64),
        ("attempt", np.uint32),
        ("actor", np.uint32),
        ("incarnation", np.uint32),
        ("source", np.uint8),
        ("paced", np.bool_),  # each environment acted as soon as it was ready: they got differently far
        ("fate", np.uint8),
        ("num_rows", np.int32),  # rows begun so far; all rows when finished
        ("num_env_steps", np.int64),  # valid entries
        ("num_episodes", np.int32),
        ("num_finals", np.int32),
        ("version_min", np.int64),
        ("version_max", np.int64),
        ("stream_epoch", np.int64),  # with run seed, group, sequence: the random state at its start
        ("checksum", np.uint32),  # crc32 over all fields behind this header (Slot.checksum)
        ("begun_ns", np.int64),  # monotonic clock
        ("finished_ns", np.int64),
        ("received_ns", np.int64),
        ("consumed_ns", np.int64),
        # Room kept for what is to come (design: what the whole will hold).
        ("num_agents", np.uint32),
        ("member", np.uint32),
        ("behaviour_id", np.int64),
    ],
    align=True,
)
