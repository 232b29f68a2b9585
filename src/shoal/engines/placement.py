"""Which actor hosts which group, and which node hosts how many actors: even, and with as few moves as can be. Pure."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

NOBODY = -1
Node = TypeVar("Node")


def spread(homes: Sequence[int], actors: Sequence[int]) -> list[int]:
    """Where each group is to live, of `actors`, whose numbers of groups differ by one at most. A group stays where it is as long as that is even.

    Args:
      homes: where each group is to live so far, by group; NOBODY, or an actor that is gone, for nowhere.
    """
    if not actors:
        return [NOBODY] * len(homes)
    share, more = divmod(len(homes), len(actors))
    have = Counter(homes)
    fullest = sorted(actors, key=lambda actor: -have[actor])  # those that have most may keep one more
    room = {actor: share + (place < more) for place, actor in enumerate(fullest)}
    out, taken = [NOBODY] * len(homes), dict.fromkeys(actors, 0)
    for group, home in enumerate(homes):
        if taken.get(home, 0) < room.get(home, 0):
            out[group] = home
            taken[home] += 1
    emptiest = [(taken[actor], place, actor) for place, actor in enumerate(actors) if taken[actor] < room[actor]]
    heapq.heapify(emptiest)
    for group in (group for group, home in enumerate(out) if home == NOBODY):
        count, place, actor = heapq.heappop(emptiest)
        out[group] = actor
        if count + 1 < room[actor]:
            heapq.heappush(emptiest, (count + 1, place, actor))
    return out


def shares(have: Mapping[Node, int], wanted: int, most: int) -> dict[Node, int]:
    """How many actors each node is to host: `wanted` in all, `most` on each, as even as it comes without moving any that may stay.

    What comes goes where the fewest are, what goes leaves where the most are; of equals the first of `have`.
    """
    counts = {node: min(count, most) for node, count in have.items()}
    while sum(counts.values()) > wanted:
        counts[max(counts, key=lambda node: counts[node])] -= 1
    while sum(counts.values()) < min(wanted, most * len(counts)):
        counts[min(counts, key=lambda node: counts[node])] += 1
    return counts
