"""Replay: what an inline async run consumed, executed again, gives the same weights; and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rollout_fakes import Drift
from shoal.config import RunConfig
from shoal.engines.coordinator import Coordinator
from shoal.engines.looking import look
from shoal.engines.plan import Plan
from shoal.engines.replay import WeightHistory, replay
from shoal.engines.roles import Blueprint, UserObjects
from shoal.engines.rollouts import version_runs
from shoal.errors import RunError
from shoal.experience.envelope import Fate
from shoal.experience.ring import allocate
from shoal.types import EnvironmentSpec
from shoal.weights.board import WeightBoard

UPDATES = 7


class Breaking(Drift):
    """Raises where the next count would be 5: a fault that comes again on re-stepping."""

    def step(self, action: Any):
        if self.count == 4 and self.length > 7:
            raise RuntimeError("the fifth step of a long episode")
        return super().step(action)


def blueprint_of(mode: str, factory: Any = Drift) -> Blueprint:
    name = "appo" if mode == "async" else "ppo"
    config = RunConfig(mode=mode, max_policy_lag=3, seed=3, algorithm={"name": name, "minibatch_size": 8, "epochs": 2})
    config.env.id, config.env.form = "drift", "python"
    config.sampling.groups, config.sampling.group_size, config.sampling.rollout_length = 2, 2, 4
    config.sampling.batch_rollouts = 2
    config.policy.hidden_sizes = [8]
    config.policy.normalise_observations = config.policy.normalise_rewards = True
    objects = UserObjects(env=factory)
    probed = UserObjects(env=Drift)
    return Blueprint(config, EnvironmentSpec.from_json(look(config, probed)["spec"]), objects, bytes(16))


def run(blueprint: Blueprint, *, slow: int = -1, drop: tuple[int, ...] = (), give_up: bool = False) -> tuple[dict[int, list[Any]], str]:
    """The engine in small. Rollouts of group `slow` are made with the versions of three updates, and closed early. `drop`: turns whose first
    rollout is dropped. Returns (log, weights_sha256)."""
    plan, policy = Plan.of(blueprint.config), blueprint.policy()
    ring = allocate(blueprint.schema(policy), plan.num_slots)
    size = blueprint.layout(policy).size
    board = WeightBoard(size, np.zeros(WeightBoard.size_bytes(size), np.uint8))
    board.reset()
    behaviour = blueprint.behaviour(board)
    actor, learner = blueprint.actor(ring, behaviour), blueprint.learner(ring, board, plan.max_policy_lag)
    learner.publish()
    behaviour.refresh()
    coordinator = Coordinator(plan, blueprint.spec, ring, blueprint.config.stop)
    coordinator.place([0])
    log: dict[int, list[Any]] = {}

    def learn() -> None:
        batch = coordinator.next_batch()
        if batch is None:
            return
        consumed = learner.consume(batch)
        if coordinator.version in drop and len(batch) > 1:
            lost = batch[0]
            consumed = learner.consume(batch[1:])
            consumed.dropped[lost[1]] = Fate.OVER_LAG
        coordinator.consumed(consumed.dropped)
        metrics = learner.update(consumed)
        entries = coordinator.consumption
        coordinator.trained(metrics)
        log[coordinator.version] = entries

    def slowly(first_version: int) -> bool:
        learn()
        behaviour.refresh()
        asked.append(first_version)
        return len(asked) % 5 == 3  # closed early, now and then

    asked: list[int] = []

    from shoal.errors import EnvironmentFault

    while coordinator.version < UPDATES:
        for lease in coordinator.next_leases():
            if coordinator.groups[lease.identity.group].leased.get(lease.slot) != lease.identity:
                continue
            if lease.restore is not None:
                assert actor.restore(lease.identity.group, lease.restore) == []
            behaviour.refresh()
            try:
                actor.fill(lease.slot, lease.identity, slowly if lease.identity.group == slow else None, lease.give_up)
            except EnvironmentFault as fault:
                assert give_up
                coordinator.faulted(lease.identity, fault.report["row"], fault.report["env"])
            else:
                coordinator.filled(lease.slot, lease.identity)
        learn()
    return log, learner.weights_sha256


@pytest.mark.parametrize(("slow", "drop"), [(-1, ()), (1, ()), (0, (2, 4))])
def test_an_async_run_ends_with_the_same_weights_when_its_log_is_followed(slow, drop):
    log, sha = run(blueprint_of("async"), slow=slow, drop=drop)
    if slow >= 0:
        assert any(len(e["versions"]) > 1 for entries in log.values() for e in entries), "a rollout with several versions is among them"
        assert {sum(n for _, n in e["versions"]) for entries in log.values() for e in entries} > {4}, "and one that was closed early"
    assert [e["fate"] for entries in log.values() for e in entries].count("over_lag") == len(drop)
    told: list[int] = []
    last = max(log)
    assert replay(blueprint_of("async"), log, last, told.append) == sha
    assert told == list(range(1, last + 1))
    if last > 2:
        assert replay(blueprint_of("async"), log, last - 1) != sha


def test_a_sync_run_needs_no_log():
    log, sha = run(blueprint_of("sync"))
    assert replay(blueprint_of("sync"), {}, max(log)) == sha


def test_an_episode_that_was_given_up_is_given_up_again():
    log, sha = run(blueprint_of("async", Breaking), give_up=True)
    assert any(e.get("give_up") for entries in log.values() for e in entries)
    assert replay(blueprint_of("async", Breaking), log, max(log)) == sha


def test_a_gap_in_the_log_is_refused():
    log, _ = run(blueprint_of("async"))
    del log[4]
    with pytest.raises(RunError, match=r"^the log has no update 4: .* cannot be replayed beyond 3$"):
        replay(blueprint_of("async"), log, UPDATES)


def test_a_run_whose_environments_acted_when_ready_is_refused():
    with pytest.raises(RunError, match="cannot be replayed"):
        replay(blueprint_of("async"), {1: [{"id": [0, 0, 0], "steps": 4, "fate": "trained", "paced": True}]}, 1)


def test_weights_are_kept_for_as_long_as_they_are_asked_for():
    history = WeightHistory(2)
    for version in range(4):
        history.begin(version)[:] = version
        history.commit(version)
    out = np.zeros(2, np.float32)
    history.wanted = 1
    assert history.read(out) == 1
    assert out.tolist() == [1, 1]
    history.forget_before(2)
    with pytest.raises(RunError, match=r"policy version 1, which is not among those kept \(\[2, 3\]\)"):
        history.read(out)


@pytest.mark.parametrize(
    ("versions", "runs"),
    [([5], [[5, 1]]), ([5, 5], [[5, 2]]), ([5, 6, 6, 5], [[5, 1], [6, 2], [5, 1]]), ([0, 1, 2], [[0, 1], [1, 1], [2, 1]])],
)
def test_versions_are_written_as_runs(versions, runs):
    assert version_runs(np.array(versions)) == runs
