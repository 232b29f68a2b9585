"""Several learners of one run: which of them this one is, which part of the work is its, and what they add up.

All hold the same policy. Of every minibatch each evaluates its part; the gradients are added up over all, weighted by the parts, so that all make the
same step. Where all are given the same batch nothing else has to travel: whatever is reckoned from what all hold is the same everywhere. What learns
from a replay is dealt its rollouts, and samples its part of every batch from those: all tell each other what they need to know of the others'.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class LostRank(Exception):
    """Another learner is gone, or did not come in time: what was to be added up is lost."""


class Ranks(Protocol):
    """Attributes:
    rank: which learner this is, from 0. size: how many there are.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all learners: the same bits for all of them, and in every run.

        Waits for the others, who call this in the same order, with tensors of the same shape and dtype. Raises LostRank.
        """

    def leave(self) -> None:
        """The others miss this one at once, where they wait for it."""


class Alone:
    """There is no other."""

    rank = 0
    size = 1

    def sum(self, tensor: Tensor) -> None:
        """Nothing."""

    def leave(self) -> None:
        """Nothing."""


ALONE: Ranks = Alone()


def said_by_all(ranks: Ranks, numbers: list[float]) -> Tensor:
    """What every learner says, exactly: float64 [N, numbers], by rank. An exchange, as `Ranks.sum` is."""
    said = torch.zeros(ranks.size, len(numbers), dtype=torch.float64)
    said[ranks.rank] = torch.tensor(numbers, dtype=torch.float64)
    ranks.sum(said)
    return said


def share_of(num_rows: int, ranks: Ranks) -> tuple[slice, float]:
    """Which of so many rows (or columns) this learner evaluates, and their share of all; parts differ by at most one.

    One for which none is left takes the first, with a share of 0: so nobody has to evaluate nothing.
    """
    whole, rest = divmod(num_rows, ranks.size)
    begin = ranks.rank * whole + min(ranks.rank, rest)
    end = begin + whole + (ranks.rank < rest)
    if begin == end:
        return slice(0, min(1, num_rows)), 0.0
    return slice(begin, end), (end - begin) / num_rows
