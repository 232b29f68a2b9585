"""The coordinator of a run that learns from a replay: rate, fate, running ahead, waiting, and what a checkpoint keeps of it."""

from __future__ import annotations

import json

import pytest
from test_coordinator import B, T, coordinator_of, finish
from test_stalls import found, seen

from shoal.config import RunConfig
from shoal.engines.coordinator import Coordinator
from shoal.engines.plan import Plan
from shoal.experience.envelope import Fate
from shoal.experience.limiter import Rate
from shoal.types import Activity


def replay_plan(mode: str, groups: int = 2, *, tolerance: float = 0.0, starts: int = 0, per_insert: float = 1.0) -> Plan:
    config = RunConfig(mode=mode)
    config.sampling.groups, config.sampling.group_size, config.sampling.rollout_length = groups, B, T
    return Plan.of(config, Rate(per_insert, 4, starts, tolerance))


def learn(c: Coordinator, **metrics: float) -> int:
    """One update; returns its optimizer steps."""
    batch = c.next_batch()
    assert batch is not None
    steps = c.optimizer_steps
    c.consumed({})
    made = sum(int(c.ring.slots[slot].envelope["num_env_steps"]) for slot, _ in batch)
    c.trained({"num_env_steps": float(made), **metrics})
    return steps


def fill(c: Coordinator) -> int:
    leases = c.next_leases()
    for lease in leases:
        finish(c, lease)
    return len(leases)


def test_an_update_brings_the_steps_that_are_due_and_rollouts_are_replayed():
    c = coordinator_of(replay_plan("sync", starts=20))
    c.place([0])
    steps = []
    for _ in range(4):
        fill(c)
        steps.append(learn(c))
    assert steps == [0, 3, 4, 4]  # 16 env steps each; after the first 20, one sample for each, four samples a step
    assert c.ledger.balance() == {"produced": 64, "trained": 0, "dropped": {}, "in_flight": 0, "replayed": 64, "evicted": 0}
    assert (c.version, c.env_steps) == (4, 64)
    assert c.replay_facts == {"inserted": 64.0, "sampled": 44.0, "surplus": 0.0}


def test_what_left_the_replay_is_told_to_the_ledger_and_its_ages_are_kept():
    c = coordinator_of(replay_plan("sync"))
    c.place([0])
    fill(c)
    learn(c, **{"evicted/1": 3.0, "replay/age_updates_mean": 2.5})
    assert c.ledger.by_group()[1]["evicted"] == 3
    assert c.replay_facts["age_updates_mean"] == 2.5


def test_in_async_mode_the_learner_goes_ahead_up_to_the_tolerance_and_says_so_in_the_log():
    c = coordinator_of(replay_plan("async", tolerance=20.0))
    c.place([0])
    assert c.next_batch() is None  # nothing to sample from
    fill(c)
    log = []
    taken = []
    while (batch := c.next_batch()) is not None:
        taken.append((len(batch), c.optimizer_steps))
        log.append([dict(entry) for entry in c.consumption])
        c.consumed({})
        c.trained({"num_env_steps": 16.0 if batch else 0.0})
    # 16 env steps a batch: the two batches that are ready bring 4 steps each, then 5 ahead in updates of 4 at most
    assert [steps for size, steps in taken if size] == [4] * len([1 for size, _ in taken if size])
    assert [steps for size, steps in taken if not size] == [4, 1]
    assert log[-1] == [{"optimizer_steps": 1}]
    assert log[0][0] == {"optimizer_steps": 4}
    assert log[0][1]["fate"] == "replayed"
    assert c.version == len(taken)


def test_in_async_mode_actors_wait_while_the_learner_is_behind_and_stalls_say_who():
    c = coordinator_of(replay_plan("async", tolerance=20.0))
    c.place([0, 1])
    fill(c)
    assert c.next_batch() is not None
    fill(c)
    assert fill(c) == 0
    learning = seen("learner-0", Activity.LEARNING, 0.5, order_seconds=0.5)
    idle = seen("actor-0", Activity.WAITING_FOR_LEASE)
    (wait,) = found(c, learning, idle, seen("actor-1", Activity.STEPPING, group=1, order_seconds=1.0))["waits"]
    assert (wait["who"], wait["for"]) == ("actor-0", ["learner-0"])
    assert "the learner is behind: it samples what is due" in wait["why"]


def test_a_learner_that_went_ahead_as_far_as_it_may_waits_and_says_how_far():
    c = coordinator_of(replay_plan("async", tolerance=20.0))
    c.place([0, 1])
    fill(c)
    while c.next_batch() is not None:
        made = sum(int(c.ring.slots[slot].envelope["num_env_steps"]) for slot, _ in c.training)
        c.consumed({})
        c.trained({"num_env_steps": float(made)})
    c.next_leases()
    waiting = seen("learner-0", Activity.WAITING_FOR_BATCH, 3.0)
    busy = [seen(f"actor-{i}", Activity.STEPPING, group=i, order_seconds=3.0) for i in range(2)]
    (wait,) = found(c, waiting, *busy)["waits"]
    assert (wait["who"], wait["for"]) == ("learner-0", ["actor-0", "actor-1"])
    assert "20 steps ahead of what was inserted, and may no more than 20 (replay.tolerance)" in wait["why"]


@pytest.mark.parametrize("holds_replay", [True, False])
def test_a_checkpoint_keeps_the_rate_and_one_without_the_replay_begins_it_again(holds_replay: bool):
    c = coordinator_of(replay_plan("sync", starts=20))
    c.place([0])
    for _ in range(2):
        fill(c)
        learn(c)
    arrays, facts = c.get_state()
    facts = json.loads(json.dumps({**facts, "holds_replay": holds_replay}))
    other = coordinator_of(replay_plan("sync", starts=20))
    other.set_state(arrays, facts)
    other.place([0])
    steps = []
    for _ in range(3):
        fill(other)
        steps.append(learn(other))
    assert steps == ([4, 4, 4] if holds_replay else [0, 3, 4])
    assert other.ledger.balance()["evicted"] == (0 if holds_replay else 32)
    assert (c.replay_lost, other.replay_lost) == (False, not holds_replay)
    later = coordinator_of(replay_plan("sync", starts=20))
    arrays, facts = other.get_state()
    later.set_state(arrays, json.loads(json.dumps({**facts, "holds_replay": True})))  # the one that was filled anew
    assert later.replay_lost == (not holds_replay)


def test_rollouts_that_were_replayed_and_undone_count_as_rolled_back():
    c = coordinator_of(replay_plan("sync"))
    c.place([0])
    fill(c)
    learn(c)
    mark = c.get_state()
    fill(c)
    learn(c)
    c.set_state(*mark, live=True)
    assert c.ledger.balance()["dropped"] == {Fate.ROLLED_BACK.label: 16}
    assert c.replay_facts["inserted"] == 16
    c.ledger.check()


def test_nothing_that_goes_into_a_replay_is_closed_or_hurried_for_its_age():
    plan = replay_plan("async")
    assert plan.close_after_lag > 10**9
    c = coordinator_of(plan)
    c.place([0])
    fill(c)
    c.version = 40  # all that is ready is far beyond max_policy_lag
    batch = c.next_batch()
    assert batch is not None
    assert len(batch) == plan.batch_rollouts == len(c.ready)


@pytest.mark.parametrize("lag", [1, 4])
@pytest.mark.parametrize(("tolerance", "batches"), [(0.5, 1), (2.0, 2), (4.0, 4), (6.5, 6.5)])
def test_inserting_runs_ahead_of_sampling_by_as_many_batches_as_the_tolerance_says(tolerance: float, batches: float, lag: int):
    config = RunConfig(mode="async", max_policy_lag=lag)
    config.sampling.groups, config.sampling.group_size, config.sampling.rollout_length = 2, B, T
    config.replay.tolerance = tolerance
    c = coordinator_of(Plan.of(config, Rate(1.0, 4, 0, 20.0)))
    c.place([0, 1])
    made = 0
    while leases := fill(c):
        made += leases
    assert made == batches * 2
    c.ledger.check()
    assert len(c.next_batch() or []) == 2
    c.consumed({})
    assert fill(c) == 2  # while the learner is at work
    assert fill(c) == 0


def test_counts_of_the_replay_are_whole_numbers_and_means_are_not():
    c = coordinator_of(replay_plan("sync", starts=20, per_insert=1.5))
    c.place([0])
    told = {
        "steps": 16.0,
        "capacity_steps": 60.0,
        "age_updates_mean": 1.0,
        "age_updates_p99": 2.0,
        "age_updates_max": 3.0,
        "age_steps_mean": 4.0,
    }
    for _ in range(2):
        fill(c)
        learn(c, **{f"replay/{name}": value for name, value in told.items()})
    said = json.loads(json.dumps(c.replay_facts))
    means = {"surplus", "age_updates_mean", "age_steps_mean"}
    assert {name for name, value in said.items() if isinstance(value, float)} == means
    assert said == {"inserted": 32, "sampled": 16, "surplus": -2.0, **told}


@pytest.mark.parametrize("live", [True, False], ids=["rolled back", "resumed"])
def test_what_the_replay_holds_goes_back_with_the_ledger(live: bool):
    c = coordinator_of(replay_plan("sync"))
    c.place([0])
    fill(c)
    learn(c, **{"replay/steps": 16.0, "replay/age_updates_mean": 0.5})
    before = c.replay_facts
    arrays, facts = c.get_state()
    facts = json.loads(json.dumps(facts))
    fill(c)
    learn(c, **{"replay/steps": 32.0, "replay/age_updates_mean": 1.5, "replay/age_steps_max": 20.0})
    again = c if live else coordinator_of(replay_plan("sync"))
    again.set_state(arrays, facts, live=live)
    assert again.replay_facts == before
    assert (before["steps"], before["inserted"], again.ledger.balance()["replayed"]) == (16, 16, 16)
    again.set_state(arrays, {**facts, "holds_replay": False}, live=live)
    assert again.replay_facts == {"inserted": 0, "sampled": 0, "surplus": 0.0}
