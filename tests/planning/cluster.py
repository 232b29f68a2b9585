"""Clusters for the tests of the planner, in round numbers: a microsecond is 1e-6, nothing costs anything unless a test says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.config import RunConfig
from shoal.engines.plan import Plan
from shoal.planning.system import Driver, Links, StepCosts, System

US = 1e-6
FAST = Links(latency=0.0, node_bandwidth=1e18, learner_bandwidth=1e18)


def plan_of(
    mode: str = "sync", groups: int = 4, size: int = 8, rows: int = 32, batch: int | None = None, lag: int = 4, learners: int = 1
) -> Plan:
    config = RunConfig(mode=mode, max_policy_lag=lag, learners=learners)
    config.sampling.groups, config.sampling.group_size, config.sampling.rollout_length = groups, size, rows
    config.sampling.batch_rollouts = batch
    return Plan.of(config)


def cluster(
    mode: str = "sync",
    *,
    nodes: int = 1,
    groups: int = 4,
    cores: int = 2,
    actors: int | None = None,
    acting: float = 40.0,
    learning: float = 20.0,
    blocking: float | None = None,
    batch: int | None = None,
    size: int = 8,
    rows: int = 32,
    lag: int = 4,
    learners: int = 1,
    **other: Any,
) -> System:
    """Costs in microseconds; `groups` of each node. Whatever else System has by its name, or as `costs__NAME`, `links__NAME`."""
    costs = StepCosts(acting * US, 0.0, learning * US, blocking=None if blocking is None else blocking * US)
    plan = plan_of(mode, nodes * groups, size, rows, batch, lag, learners)
    system = System(plan, nodes, cores, actors or cores, learners, costs, FAST, Driver(0.0))
    for name, value in other.items():
        part, _, key = name.rpartition("__")
        system = replace(system, **({part: replace(getattr(system, part), **{key: value})} if part else {name: value}))
    return system
