"""What a machine could do at most, reckoned from the costs of the parts alone.

Costs are microseconds of one core per environment step: e environment, i inference, l learning, x transport (all that moves a transition from
`env.step` to the learner and weights back). C cores, of which learning can use C_l.

    async     C / (e + i + l + x)                     every core is busy all the time
    sync      1 / ((e + i + x) / C + l / C_l)         actors and learner take turns
    waiting   N / w                                   N environments, each of which is blocked for w per step

The last one bounds a run beside the one of its mode where environments wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ceilings:
    """Environment steps per second. `of_mode` is what a run in this mode can reach; `waiting` is None where environments do not wait."""

    async_: float
    sync: float
    waiting: float | None
    of_mode: float

    def to_json(self) -> dict[str, float | None]:
        return {"async": self.async_, "sync": self.sync, "waiting": self.waiting, "of_mode": self.of_mode}


def ceilings(
    costs: Mapping[str, float],
    mode: str,
    *,
    cores: int,
    learning_cores: float,
    num_envs: int,
    blocking_us: float | None = None,
    own_device: bool = False,
) -> Ceilings:
    """Ceilings from costs {e, i, l, x} in microseconds per environment step.

    Args:
      learning_cores: C_l, at least 1.
      num_envs: N, of all groups together. blocking_us: w, wall time of one step of one environment that waits; None where it does not.
      own_device: learning runs on an accelerator, beside all cores; `l` is then wall time.
    """
    acting, learning = costs["e"] + costs["i"] + costs["x"], costs["l"]
    if own_device:
        asynchronous = 1e6 / max(acting / cores, learning)
        synchronous = 1e6 / (acting / cores + learning)
    else:
        asynchronous = cores * 1e6 / (acting + learning)
        synchronous = 1e6 / (acting / cores + learning / learning_cores)
    waiting = None if blocking_us is None else num_envs * 1e6 / blocking_us
    bound = asynchronous if mode == "async" else synchronous
    return Ceilings(asynchronous, synchronous, waiting, bound if waiting is None else min(bound, waiting))
