"""What the slot of a rollout says to the coordinator: how far it came, which episodes ended, and what replay needs to make it again. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from shoal.engines.plan import Episode
from shoal.experience.envelope import Fate, Identity
from shoal.experience.ledger import Shares
from shoal.experience.ring import Slot
from shoal.types import Array


def steps_so_far(held: Slot, identity: Identity, most_rows: int) -> int:
    """Env steps of an attempt that may be under way; none where the slot holds another."""
    if held.identity != identity:
        return 0
    rows = max(0, min(int(held.envelope["num_rows"]), most_rows))
    return int(held.arrays["valid"][:rows].sum())


def version_min(held: Slot) -> int:
    return int(held.envelope["version_min"])


def oldest(ready: Sequence[tuple[int, Identity]], size: int, version_of: Callable[[int], int]) -> list[tuple[int, Identity]]:
    """As many (slot, identity) as `size` of those that are ready, in order of arrival: of the groups whose rollouts are the oldest, of each its
    first ones, since a group is consumed in sequence."""
    by_age = sorted(ready, key=lambda entry: version_of(entry[0]))
    wanted = Counter(identity.group for _, identity in by_age[:size])
    batch = []
    for slot, identity in sorted(ready, key=lambda entry: entry[1].sequence):
        if wanted[identity.group] > 0:
            wanted[identity.group] -= 1
            batch.append((slot, identity))
    arrived = {entry: place for place, entry in enumerate(ready)}
    return sorted(batch, key=arrived.__getitem__)


def shares_of(held: Slot, oldest_version: int, *, whole: bool) -> Shares | None:
    """What each environment of a paced rollout contributes to the update: its steps from `oldest_version` on; `whole`: nothing, it was dropped."""
    if not held.envelope["paced"]:
        return None
    made_B = held.timely(0).sum(0)
    timely_B = 0 * made_B if whole else held.timely(oldest_version).sum(0)
    return Shares(timely_B, made_B - timely_B)


def episodes_in(held: Slot) -> list[Episode]:
    rows = held.arrays["episode"][: int(held.envelope["num_episodes"])]
    group = int(held.envelope["group"])
    return [
        Episode(group, int(r["env"]), float(r["episode_return"]), int(r["num_steps"]), int(r["seed"]), bool(r["truncated"]))
        for r in rows
        if not r["invalid"]
    ]


def log_entry(held: Slot, identity: Identity, fate: Fate, given_up: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What replay needs to make this rollout again: its identity, rows, and the policy version of each row.

    given_up: (row, env) where episodes were ended as invalid.
    """
    versions = held.arrays["policy_version"][: int(held.envelope["num_rows"])]
    entry = {"id": list(identity), "steps": int(held.envelope["num_env_steps"]), "fate": fate.label}
    if held.envelope["paced"]:
        return {**entry, "paced": True}
    if given_up:
        entry["give_up"] = [list(place) for place in given_up]
    return {**entry, "versions": version_runs(versions[:, 0])}


def version_runs(version_T: Array) -> list[list[int]]:
    """Policy versions of a rollout's rows as runs [[version, rows], ...]."""
    edges = np.flatnonzero(np.diff(version_T)) + 1
    bounds = [0, *edges.tolist(), len(version_T)]
    return [[int(version_T[a]), b - a] for a, b in pairwise(bounds)]
