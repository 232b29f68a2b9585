"""What the coordinator knows of an environment group: its history, its slots, who has it, and what is being made of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from shoal.engines.placement import NOBODY
from shoal.engines.plan import Plan
from shoal.engines.poison import Suspects
from shoal.experience.envelope import Identity
from shoal.experience.group_state import GroupHistory
from shoal.experience.schema import Schema
from shoal.types import EnvironmentSpec


@dataclass
class Group:
    history: GroupHistory
    free: deque[int]
    actor: int = NOBODY
    target: int = NOBODY  # where it is to live once its leases are done
    hosted: bool = False  # its actor has it, standing at `next_sequence` once its leases are done
    attempt: int = 0
    next_sequence: int = 0
    leased: dict[int, Identity] = field(default_factory=dict)  # slot -> attempt, in order
    suspects: Suspects = field(default_factory=Suspects)


def new_groups(plan: Plan, spec: EnvironmentSpec, schema: Schema) -> list[Group]:
    """All groups of a run at its beginning, each with its slots."""
    states = {f.name: (f.shape, f.dtype) for f in schema.fields if f.name.startswith("policy_state/") and not f.name.endswith("/end")}
    action_dtype = next(f.dtype for f in schema.fields if f.name == "action")
    groups, per = [], plan.slots_per_group
    for index in range(plan.num_groups):
        begin = {name: np.zeros((plan.group_size, *shape), dtype) for name, (shape, dtype) in states.items()}
        history = GroupHistory(plan.group_size, spec.action.shape, action_dtype, begin)
        groups.append(Group(history, deque(range(index * per, (index + 1) * per))))
    return groups
