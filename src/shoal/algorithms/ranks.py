"""Several learners of one run: which of them this one is, which part of the work is its, and what they add up.

All hold the same policy and are given the same batch. Of every minibatch each evaluates its part; the gradients are added up over all, weighted by
the parts, so that all make the same step. Nothing else has to travel: whatever is reckoned from what all hold is the same everywhere.
"""

from __future__ import annotations

from typing import Protocol

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


class Alone:
    """There is no other."""

    rank = 0
    size = 1

    def sum(self, tensor: Tensor) -> None:
        """Nothing."""


ALONE: Ranks = Alone()


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
