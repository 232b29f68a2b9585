"""A sum tree: leaves with priorities, sampled in proportion to them (Schaul et al. 2016, arXiv:1511.05952, appendix B.2.1).

Every inner node is the sum of 16 children, and is always summed from them anew: sums never drift, and a tree is a function of its
leaves alone. So it needs no state but the leaves, and one that is rebuilt from them continues bit for bit. 16 instead of 2 children,
because numpy's cost is calls: a tree of a million leaves has three levels above them instead of twenty.

Legend: M leaves that are set or sampled at once.
"""

from __future__ import annotations

import numpy as np

from shoal.experience.replay_memory import OWN, Memory
from shoal.types import Array

FAN_OUT = 16
_WIDEST_TOP = 2048  # nodes that are searched at once, without a tree


class SumTree:
    """`num_leaves` priorities, float64, all 0 in the beginning, in `memory`. A leaf of priority 0 is never sampled."""

    def __init__(self, num_leaves: int, memory: Memory = OWN) -> None:
        self.num_leaves, self._memory = num_leaves, memory
        self._levels = [memory.array((_padded(num_leaves),), "float64")]  # leaves first; all padded with zeros to whole nodes
        while len(self._levels[-1]) > _WIDEST_TOP:
            self._levels.append(np.zeros(_padded(len(self._levels[-1]) // FAN_OUT), np.float64))
        self._nodes = [level.reshape(-1, FAN_OUT) for level in self._levels]
        self._top: Array | None = None  # running sums of the highest level, made when they are asked for

    @property
    def leaves(self) -> Array:
        """float64 [num_leaves], to be read only."""
        return self._levels[0][: self.num_leaves]

    @property
    def total(self) -> float:
        """The sum of all priorities."""
        return float(self._running()[-1])

    def set(self, index_M: Array, priority_M: Array | float) -> None:
        """Give leaves their priorities, finite and >= 0. Of a leaf that is named twice the last counts."""
        self._memory.changing(self._levels[:1], index_M)
        self._levels[0][index_M] = priority_M
        self._top = None
        for nodes, above in zip(self._nodes, self._levels[1:], strict=False):
            index_M = _distinct(index_M // FAN_OUT)
            above[index_M] = nodes.take(index_M, axis=0, mode="clip").sum(axis=1)

    def load(self, leaves: Array) -> None:
        """Set every leaf, float64 [num_leaves]."""
        self._levels[0][: self.num_leaves] = leaves
        for nodes, above in zip(self._nodes, self._levels[1:], strict=False):
            above[: len(nodes)] = nodes.sum(axis=1)
        self._top = None

    def sample(self, mass_M: Array) -> Array:
        """The leaves in whose share of the running sum `mass_M` lies: float64 [M] in [0, total), total > 0. Returns int64 [M]."""
        running = self._running()
        last = int(running.searchsorted(running[-1]))  # the last that is not empty
        index_M = np.minimum(running.searchsorted(mass_M, side="right"), last)
        mass_M = mass_M - np.where(index_M > 0, running[index_M - 1], 0.0)
        for nodes in self._nodes[-2::-1]:
            running_MF = nodes.take(index_M, axis=0, mode="clip").cumsum(axis=1)
            mass_M = np.minimum(mass_M, np.nextafter(running_MF[:, -1], 0.0))  # rounding must not reach past the last child
            child_M = (running_MF > mass_M[:, None]).argmax(axis=1)
            before_M = running_MF[np.arange(len(child_M)), np.maximum(child_M - 1, 0)]
            mass_M = mass_M - np.where(child_M > 0, before_M, 0.0)
            index_M = index_M * FAN_OUT + child_M
        return index_M

    def check_valid(self) -> None:
        """Raise AssertionError unless every node is the sum of its children, bit for bit."""
        leaves = self._levels[0]
        assert np.isfinite(leaves).all()
        assert (leaves >= 0).all()
        assert not leaves[self.num_leaves :].any()
        for nodes, above in zip(self._nodes, self._levels[1:], strict=False):
            assert (above[: len(nodes)] == nodes.sum(axis=1)).all()
            assert not above[len(nodes) :].any()

    def _running(self) -> Array:
        if self._top is None:
            self._top = self._levels[-1].cumsum()
        return self._top


def _padded(num_nodes: int) -> int:
    return -(-num_nodes // FAN_OUT) * FAN_OUT


def _distinct(index_M: Array) -> Array:
    """Fewer of them where neighbours are equal, as they are for rows of a rollout."""
    return np.concatenate([index_M[:1], index_M[1:][index_M[1:] != index_M[:-1]]])
