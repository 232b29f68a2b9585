"""What one of several learners does in an update: its part of every minibatch, and the exchanges in which all add up.

The part is made here as by the first of them, alone on a core, with somebody in the others' place who adds what they would, about: as much again. The exchanges
of an update are made by as many threads, over the same gloo, and their processor time is divided among them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from shoal.benching.measuring import Spent, median, spend
from shoal.engines.roles import Blueprint
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring
from shoal.learners.distributed import TorchRanks, meet, memory_store
from shoal.learners.learner import Learner, Unpublished

_MIN_REPEATS = 5
_TIMEOUT_SECONDS = 60.0


@dataclass
class Stand:
    """Stands for the others of a group. `lengths` are those of what was added up since it was last cleared."""

    size: int
    rank: int = 0
    lengths: list[int] = field(default_factory=list)

    def sum(self, tensor: Tensor) -> None:
        self.lengths.append(tensor.numel())
        if tensor.ndim == 1:  # gradients; what is put together of columns lacks the others' then
            tensor.mul_(self.size)

    def leave(self) -> None:
        """Nothing."""


class OneOf:
    """The first of `learners`, beside the learner that makes the updates. Keeps what each of its updates spent, with its env steps, in `found`."""

    def __init__(self, blueprint: Blueprint, ring: Ring, max_policy_lag: int, learners: int) -> None:
        self._learner = blueprint.learner(ring, Unpublished(blueprint.layout(blueprint.policy()).size), max_policy_lag)
        self._others = Stand(learners)
        self._learner.join(self._others)
        self.found: list[tuple[Spent, int]] = []

    def update(self, batch: Sequence[tuple[int, Identity]], beside: Learner) -> None:
        """The update that the other one makes next."""
        self._learner.set_state(*beside.get_state())
        consumed = self._learner.consume(batch)
        if consumed.batch is None:
            return
        steps = consumed.batch.num_env_steps
        self._others.lengths.clear()
        self.found.append((spend(partial(self._learner.update, consumed)), steps))

    @property
    def lengths(self) -> list[int]:
        """Of what is added up in an update."""
        return list(self._others.lengths)


@dataclass(frozen=True)
class Exchanged:
    """Of one update, in seconds: processor time of each learner, and wall time."""

    cpu: float
    wall: float


def exchange(lengths: Sequence[int], learners: int, seconds: float) -> Exchanged:
    """The exchanges of an update, whose float32 tensors have these lengths, again and again for about `seconds`: medians."""
    store, found = memory_store(), list[Spent]()
    ends = time.perf_counter() + seconds
    more = threading.Barrier(learners)
    over = False

    def work(rank: int) -> None:
        nonlocal over
        ranks = meet(store, rank, learners, timeout_seconds=_TIMEOUT_SECONDS)
        tensors = [torch.zeros(length) for length in lengths]
        while not over:
            if rank == 0:
                found.append(spend(partial(_add_up, ranks, tensors)))
                over = time.perf_counter() >= ends and len(found) > _MIN_REPEATS
            else:
                _add_up(ranks, tensors)
            more.wait(_TIMEOUT_SECONDS)

    others = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(1, learners)]
    for other in others:
        other.start()
    work(0)
    for other in others:
        other.join()
    return Exchanged(median([spent.cpu for spent in found[1:]]) / learners, median([spent.wall for spent in found[1:]]))


def _add_up(ranks: TorchRanks, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        ranks.sum(tensor)
