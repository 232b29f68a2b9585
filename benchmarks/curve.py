"""One training whose curve is kept whole: `python benchmarks/curve.py ENV SETTINGS [DEPTH]`, for asynchrony.py.

SETTINGS is a JSON object of keys as `shoal.train` takes them. One JSON object on standard output: env_steps, seconds and mean_return (of the last
100 training episodes) after every update, and the run's `result`.

With DEPTH, the learner of an async run takes a batch only once DEPTH batches lie ready, and rollouts are never closed early. So samples are about
DEPTH updates old when they are trained, and only their age differs between two depths. A run as users have it keeps at most two batches ahead of the
learner, whatever max_policy_lag allows, and its samples never come to such an age unless its environments are uneven.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import shoal
from shoal.config import RunConfig
from shoal.engines.coordinator import Coordinator, Plan
from shoal.experience.envelope import Identity
from shoal.experience.limiter import Rate
from shoal.monitoring.live import open_view


def keep_full(depth: int) -> None:
    """Let every run of this process (the supervisor) keep its queue `depth` batches deep."""
    plan_of, next_batch = Plan.of, Coordinator.next_batch

    def deep_plan(config: RunConfig, rate: Rate | None = None) -> Plan:
        plan = plan_of(config, rate)
        return replace(plan, batches_ahead=depth, slots_per_group=-(-plan.batch_rollouts * depth // plan.num_groups) + 1)

    def next_old_batch(self: Coordinator) -> list[tuple[int, Identity]] | None:
        full = len(self.ready) >= self.plan.batch_rollouts * depth
        return next_batch(self) if full or not any(group.leased for group in self.groups) else None

    Plan.of = staticmethod(deep_plan)  # type: ignore[method-assign,assignment]
    Plan.close_after_lag = property(lambda plan: 1 << 30)  # type: ignore[method-assign,assignment]
    Coordinator.next_batch = next_old_batch  # type: ignore[method-assign]


def train(environment: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The curve and the result of one training."""
    env_steps: list[int] = []
    seconds: list[float] = []
    mean_return: list[float] = []

    def watch(numbers: Mapping[str, Any]) -> None:
        if math.isfinite(numbers["mean_return"]):
            env_steps.append(int(numbers["env_steps"]))
            seconds.append(float(numbers["seconds"]))
            mean_return.append(float(numbers["mean_return"]))

    run = shoal.train(environment, callbacks=[watch], progress=open_view("silent"), **settings)
    return {"env_steps": env_steps, "seconds": seconds, "mean_return": mean_return, "result": dict(run.result)}


if __name__ == "__main__":
    if len(sys.argv) > 3:
        keep_full(int(sys.argv[3]))
    print(json.dumps(train(sys.argv[1], json.loads(sys.argv[2]))))
