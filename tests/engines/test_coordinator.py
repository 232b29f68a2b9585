"""The coordinator, driven by a world of fake actors and a fake learner in which everything may die at any moment.

Held at every moment: the ledger balances; a slot is with one owner; a group's sequences are trained in order, without gap and each
exactly once; lag stays within its bound; whatever happened, the run can go on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rollout_fakes import add_episode, poisoned_ring, scripted_schema, scripted_spec, write_rollout
from shoal.config import RunConfig, StopConfig
from shoal.engines.coordinator import Coordinator
from shoal.engines.plan import Plan
from shoal.engines.poison import WHILE_RESTORED
from shoal.experience.envelope import Fate, Identity

T, B = 4, 2


def plan_of(mode: str = "async", groups: int = 3, batch: int | None = None, lag: int = 4) -> Plan:
    config = RunConfig(mode=mode, max_policy_lag=lag)
    config.sampling.groups, config.sampling.group_size, config.sampling.rollout_length = groups, B, T
    config.sampling.batch_rollouts = batch
    return Plan.of(config)


def coordinator_of(plan: Plan, stop: StopConfig | None = None, **spec) -> Coordinator:
    ring = poisoned_ring(scripted_schema(T, B, **spec), plan.num_slots)
    return Coordinator(plan, scripted_spec(**spec), ring, stop or StopConfig())


def finish(c: Coordinator, lease, *, rows: int = T, version: int | None = None) -> bool:
    slot = c.ring.slots[lease.slot]
    write_rollout(slot, lease.identity, num_rows=rows, version=c.version if version is None else version)
    return c.filled(lease.slot, lease.identity)


def train(c: Coordinator, dropped: dict[Identity, Fate] | None = None):
    batch = c.next_batch()
    assert batch is not None
    c.consumed(dropped or {})
    steps = sum(int(c.ring.slots[s].envelope["num_env_steps"]) for s, i in batch if i not in (dropped or {}))
    return batch, c.trained({"num_env_steps": float(steps)} if steps else {})


# ---- the plan --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "batch", "lag", "expected"),
    [
        ("sync", None, 4, (3, 0, 1, 3)),
        ("sync", 9, 4, (3, 0, 1, 3)),
        ("async", None, 4, (3, 4, 2, 6)),
        ("async", 3, 1, (3, 1, 2, 6)),
        ("async", 4, 2, (4, 2, 3, 9)),
        ("async", 7, 4, (7, 4, 4, 12)),
        ("async", 1, 4, (1, 4, 2, 6)),
    ],
)
def test_a_plan_follows_from_the_configuration(mode, batch, lag, expected):
    plan = plan_of(mode, 3, batch, lag)
    assert (plan.batch_rollouts, plan.max_policy_lag, plan.slots_per_group, plan.num_slots) == expected
    assert (plan.mode, plan.num_groups, plan.group_size, plan.rollout_length) == (mode, 3, B, T)


def test_rollouts_are_closed_before_they_grow_too_old():
    assert [plan_of(lag=lag).close_after_lag for lag in (1, 2, 3, 4, 9)] == [1, 1, 1, 2, 7]


# ---- sync ------------------------------------------------------------------------------------------------------------
def test_sync_makes_one_rollout_of_every_group_and_trains_them_in_group_order():
    c = coordinator_of(plan_of("sync"))
    assert c.next_leases() == []  # nobody is there
    c.place([0, 1])
    for update in range(3):
        leases = c.next_leases()
        assert [(le.actor, le.slot, le.identity) for le in leases] == [(g % 2, g, Identity(g, update, 0)) for g in range(3)]
        assert [le.restore is not None for le in leases] == [update == 0] * 3
        assert c.next_leases() == []
        for lease in (leases[2], leases[0]):
            assert finish(c, lease)
            assert c.next_batch() is None
        assert finish(c, leases[1])
        assert c.next_leases() == []
        batch = c.next_batch()
        assert batch == [(g, Identity(g, update, 0)) for g in range(3)]
        assert c.next_batch() is None
        c.consumed({})
        assert c.next_leases() == []  # not before the new version is there
        c.trained({"num_env_steps": 24.0, "lag/0": 24.0})
        assert (c.version, c.env_steps, c.lag) == (update + 1, 24 * (update + 1), {0: 24 * (update + 1)})
    c.ledger.check()
    assert c.ledger.balance() == {"produced": 72, "trained": 72, "dropped": {}, "in_flight": 0}


def test_only_available_actors_get_orders():
    c = coordinator_of(plan_of("sync", 4))
    c.place([0, 1])
    assert [le.identity.group for le in c.next_leases({1})] == [1, 3]
    assert [le.identity.group for le in c.next_leases({1})] == []
    assert [le.identity.group for le in c.next_leases({0, 1})] == [0, 2]


# ---- async -----------------------------------------------------------------------------------------------------------
def test_only_who_makes_an_attempt_or_puts_its_group_back_for_it_is_heard():
    c = coordinator_of(plan_of("async", 2, 1, 2))
    c.place([0, 1])
    (put_back,) = c.next_restores({1})
    assert [c.makes(actor, put_back.identity) for actor in (0, 1)] == [False, True]
    assert not c.makes(1, Identity(1, 1, 0))
    leases = c.next_leases({0})
    assert [lease.identity for lease in leases] == [Identity(0, 0, 0), Identity(0, 1, 0)]
    assert [[c.makes(actor, lease.identity) for lease in leases] for actor in (0, 1)] == [[True, True], [False, False]]
    assert not c.makes(0, Identity(0, 2, 0)), "its turn comes once nothing is made"
    finish(c, leases[0])
    assert not c.makes(0, leases[0].identity), "it is made"
    c.lost(0)
    assert not c.makes(0, leases[1].identity)
    assert c.makes(0, Identity(0, 1, 1)), "the next attempt"


def test_async_orders_two_batches_ahead_and_groups_that_are_behind_first():
    c = coordinator_of(plan_of(groups=2, batch=2))
    c.place([0, 1])
    leases = c.next_leases()
    assert [le.identity[:2] for le in leases] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [le.restore is None for le in leases] == [False, False, True, True]
    assert len({le.slot for le in leases}) == 4
    for lease in (leases[1], leases[3]):  # group 1 is fast
        finish(c, lease)
    assert c.next_leases() == []  # two batches are unconsumed
    batch, _ = train(c)
    assert [i for _, i in batch] == [Identity(1, 0, 0), Identity(1, 1, 0)]
    assert [le.identity[:2] for le in c.next_leases()] == [(1, 2), (1, 3)]
    c.ledger.check()


def test_with_a_bound_of_one_only_one_batch_is_ahead():
    c = coordinator_of(plan_of(groups=2, batch=2, lag=1))
    c.place([0])
    assert len(c.next_leases()) == 2


def test_the_oldest_are_trained_first_and_in_order_of_arrival():
    c = coordinator_of(plan_of(groups=3, batch=2))
    c.place([0])
    c.version = 5
    leases = {le.identity.group: le for le in c.next_leases()[:3]}
    for group, version in ((2, 5), (0, 4), (1, 4)):
        finish(c, leases[group], version=version)
    batch, _ = train(c)
    assert [i.group for _, i in batch] == [0, 1]
    assert [i.group for _, i in c.ready] == [2]


def test_what_could_not_wait_another_update_joins_beyond_the_batch():
    c = coordinator_of(plan_of(groups=4, batch=2, lag=3))
    c.place([0])
    c.version = 7
    leases = {le.identity.group: le for le in c.next_leases()}
    assert sorted(leases) == [0, 1, 2, 3]
    for group, version in ((3, 5), (0, 4), (1, 4), (2, 4)):
        finish(c, leases[group], version=version)
    batch, _ = train(c)
    assert [i.group for _, i in batch] == [0, 1, 2]  # lag 3 now, 4 at the next update
    batch, _ = train(c)
    assert [i.group for _, i in batch] == [3]


def test_when_nobody_makes_anything_what_is_there_is_trained():
    c = coordinator_of(plan_of(groups=2, batch=3))
    c.place([0])
    leases = c.next_leases()
    finish(c, leases[0])
    assert c.next_batch() is None
    c.lost(0)
    assert [i for _, i in train(c)[0]] == [leases[0].identity]


def test_a_rollout_that_is_dropped_frees_its_slot_and_says_why():
    c = coordinator_of(plan_of(groups=2, batch=2))
    c.place([0])
    leases = c.next_leases()
    for lease in leases[:2]:
        finish(c, lease)
    dropped = {leases[0].identity: Fate.OVER_LAG}
    batch = c.next_batch()
    c.consumed(dropped)
    assert [entry["fate"] for entry in c.consumption] == ["over_lag", "trained"]
    assert c.training == [batch[1]]
    c.trained({"num_env_steps": 8.0})
    assert c.ledger.balance() == {"produced": 16, "trained": 8, "dropped": {"over_lag": 8}, "in_flight": 0}
    assert (c.version, c.env_steps) == (1, 8)


def test_of_a_rollout_whose_environments_acted_on_their_own_each_ones_share_is_kept():
    c = coordinator_of(plan_of(groups=2, batch=2, lag=2))
    c.place([0])
    leases = c.next_leases()[:2]
    c.version = 5
    for lease in leases:
        finish(c, lease)
        held = c.ring.slots[lease.slot]
        held.envelope["paced"] = True
        held.arrays["policy_version"][0, 1] = 2  # environment 1 began its first step long ago
    c.next_batch()
    c.consumed({leases[1].identity: Fate.OVER_LAG})
    c.trained({"num_env_steps": 7.0})
    groups = c.ledger.by_group()
    assert groups[0]["by_environment"] == {"trained": [4, 3], "late": [0, 1]}
    assert groups[1]["by_environment"] == {"trained": [0, 0], "late": [4, 4]}
    assert c.env_steps == c.ledger.balance()["trained"] == 7
    c.ledger.check()


def test_a_crash_while_actions_are_chosen_is_seen_as_one_of_a_group_whose_environments_act_meanwhile():
    c = coordinator_of(plan_of(groups=1))
    c.place([0])
    lease = c.next_leases()[0]
    write_rollout(c.ring.slots[lease.slot], lease.identity, num_rows=2, version=0)
    assert [c.is_paced(g) for g in (0, -1, 1)] == [False] * 3
    c.ring.slots[lease.slot].envelope["paced"] = True
    assert c.is_paced(0)
    c.ring.slots[lease.slot].envelope["attempt"] += 1  # another's
    assert not c.is_paced(0)


def test_an_update_of_which_nothing_is_left_makes_no_version():
    c = coordinator_of(plan_of(groups=1, batch=1))
    c.place([0])
    lease = c.next_leases()[0]
    finish(c, lease)
    train(c, {lease.identity: Fate.OVER_LAG})
    assert (c.version, c.env_steps) == (0, 0)
    c.ledger.check()


def test_the_log_still_names_what_an_update_dropped_when_nothing_was_left_of_it():
    """Replay must step through it: the group went on from its end."""
    c = coordinator_of(plan_of(groups=1, batch=1))
    c.place([0])
    first, second = c.next_leases()
    finish(c, first)
    train(c, {first.identity: Fate.OVER_LAG})
    arrays, facts = c.get_state()
    resumed = coordinator_of(c.plan)
    resumed.set_state(arrays, json.loads(json.dumps(facts)))
    resumed.place([0])
    finish(c, second)
    finish(resumed, resumed.next_leases()[0])
    for one in (c, resumed):
        one.next_batch()
        assert [(entry["id"][:2], entry["fate"]) for entry in one.consumption] == [([0, 0], "over_lag"), ([0, 1], "trained")]
        one.consumed({})
        one.trained({"num_env_steps": 8.0})
        assert one.consumption == []


# ---- the log ---------------------------------------------------------------------------------------------------------
def test_the_log_holds_what_replay_needs():
    c = coordinator_of(plan_of(groups=2, batch=2))
    c.place([0])
    leases = c.next_leases()
    write_rollout(c.ring.slots[leases[0].slot], leases[0].identity, num_rows=3, versions=[4, 4, 6])
    write_rollout(c.ring.slots[leases[1].slot], leases[1].identity, versions=[5, 6, 5, 5])
    for lease in leases[:2]:
        c.filled(lease.slot, lease.identity)
    c.next_batch()
    assert [{k: v for k, v in e.items() if k != "give_up"} for e in c.consumption] == [
        {"id": [0, 0, 0], "steps": 3 * B, "versions": [[4, 2], [6, 1]], "fate": "trained"},
        {"id": [1, 0, 0], "steps": 4 * B, "versions": [[5, 1], [6, 1], [5, 2]], "fate": "trained"},
    ]


def test_the_log_says_where_an_episode_was_given_up():
    c = coordinator_of(plan_of("sync", 1))
    c.place([0])
    for _ in range(2):
        (lease,) = c.next_leases()
        assert lease.give_up == ()
        assert c.faulted(lease.identity, 2, 1) == [lease.identity]
    (lease,) = c.next_leases()
    assert lease.give_up == ((2, 1),)
    finish(c, lease)
    c.next_batch()
    assert [list(place) for place in c.consumption[0]["give_up"]] == [[2, 1]]
    assert json.loads(json.dumps(c.consumption))


# ---- deaths, faults, strangers ---------------------------------------------------------------------------------------
def test_what_a_dead_actor_was_making_is_counted_and_made_again():
    c = coordinator_of(plan_of(groups=2, batch=2))
    c.place([0, 1])
    leases = c.next_leases()
    mine = [le for le in leases if le.actor == 0]
    slot = write_rollout(c.ring.slots[mine[0].slot], mine[0].identity)
    slot.envelope["num_rows"] = 3
    assert c.lost(0) == [le.identity for le in mine]
    assert c.ledger.balance() == {"produced": 6, "trained": 0, "dropped": {"actor_died": 6}, "in_flight": 0}
    assert c.ledger.balance_rollouts()["dropped"] == {"actor_died": 2}
    again = c.next_leases()
    assert [le.identity for le in again] == [Identity(0, 0, 1), Identity(0, 1, 1)]
    assert again[0].restore is not None
    assert again[1].restore is None
    for stale in mine:
        assert not c.filled(stale.slot, stale.identity)
    assert c.ready == []
    assert c.lost(7) == []
    c.ledger.check()


def test_rows_of_another_attempt_in_the_slot_do_not_count():
    c = coordinator_of(plan_of("sync", 1))
    c.place([0])
    (lease,) = c.next_leases()
    write_rollout(c.ring.slots[lease.slot], Identity(0, 0, 77))
    c.lost(0)
    assert c.ledger.balance()["produced"] == 0


def test_invalid_rows_of_the_unfinished_do_not_count():
    c = coordinator_of(plan_of("sync", 1))
    c.place([0])
    (lease,) = c.next_leases()
    slot = write_rollout(c.ring.slots[lease.slot], lease.identity)
    slot.arrays["valid"][0, 1] = False
    slot.envelope["num_rows"] = 99  # a torn header
    c.lost(0)
    assert c.ledger.balance()["dropped"] == {"actor_died": T * B - 1}


def test_the_word_of_an_old_attempt_is_refused():
    c = coordinator_of(plan_of("sync", 2))
    c.place([0])
    first, other = c.next_leases()
    assert not c.filled(first.slot, Identity(0, 0, 5))
    assert not c.filled(other.slot, first.identity)
    c.faulted(first.identity, 0, 0)
    (again,) = c.next_leases()
    assert c.faulted(first.identity, 0, 0) == []  # what was made in its place is left alone
    assert finish(c, again)
    c.ledger.check()


def test_an_episode_is_given_up_where_its_fault_came_twice_and_only_there():
    c = coordinator_of(plan_of("sync", 1))
    c.place([0])
    for row, env in ((1, 0), (2, 1), (2, 1), (1, 0)):
        (lease,) = c.next_leases()
        c.faulted(lease.identity, row, env)
    (lease,) = c.next_leases()
    assert sorted(lease.give_up) == [(1, 0), (2, 1)]
    assert lease.identity == Identity(0, 0, 4)
    assert c.ledger.balance_rollouts()["dropped"] == {"environment_fault": 4}
    finish(c, lease)
    train(c)
    (lease,) = c.next_leases()
    assert lease.give_up == ()


def test_a_crash_that_comes_again_is_looked_at_closely_then_gone_around():
    """A segmentation fault names no environment: the second attempt is careful there, the third goes around it."""
    c = coordinator_of(plan_of("sync", 2))
    c.place([0, 1])
    leases = c.next_leases()
    assert c.suspect(0, 0, 2, -1)
    assert not c.suspect(1, 0, 2, -1)  # that actor hosts another group
    assert not c.suspect(0, 9, 2, -1)
    assert c.lost(0, 0) == [leases[0].identity]
    (again,) = c.next_leases({0})
    assert (again.careful, again.give_up) == ((2,), ())
    assert c.suspect(0, 0, 2, 1)
    c.lost(0, 0)
    (third,) = c.next_leases({0})
    assert (third.careful, third.give_up) == ((2,), ((2, 1),))
    assert c.ledger.balance_rollouts()["dropped"] == {"environment_fault": 2}
    for lease in (third, leases[1]):
        finish(c, lease)
    train(c)
    assert all((le.careful, le.give_up) == ((), ()) for le in c.next_leases())
    c.lost(0)
    assert not c.suspect(0, 0, 1, 1)  # it was making nothing any more
    assert c.ledger.balance_rollouts()["dropped"] == {"environment_fault": 2, "actor_died": 1}
    c.ledger.check()


def test_a_fault_while_a_group_is_put_back_is_no_fault_of_its_first_row():
    c = coordinator_of(plan_of("sync", 1))
    c.place([0])
    for _ in range(5):
        (lease,) = c.next_leases()
        assert (lease.careful, lease.give_up) == ((), ())
        c.faulted(lease.identity, WHILE_RESTORED, 0)


def test_a_group_is_put_back_while_its_next_rollout_may_not_begin():
    c = coordinator_of(plan_of("sync", groups=2))
    c.place([0, 1])
    first = c.next_restores({0, 1})
    assert [(r.actor, r.identity) for r in first] == [(0, Identity(0, 0, 0)), (1, Identity(1, 0, 0))]
    assert c.next_restores({0, 1}) == []
    leases = c.next_leases({0, 1})
    assert [lease.restore for lease in leases] == [None, None]
    for lease in leases:
        finish(c, lease)
    assert c.next_batch() is not None  # the learner is at work
    c.lost(1)
    c.place([0, 1])
    assert c.next_leases({0, 1}) == []
    assert c.next_restores({0}) == []
    (restore,) = c.next_restores({0, 1})
    assert (restore.actor, restore.identity) == (1, Identity(1, 1, 0))
    assert c.faulted(restore.identity, WHILE_RESTORED, 0) == []  # it broke there: it is made anew
    assert len(c.next_restores({0, 1})) == 1
    c.consumed({})
    c.trained({"num_env_steps": 16.0})
    assert [lease.restore for lease in c.next_leases({0, 1})] == [None, None]


def test_groups_move_when_actors_come_and_go_once_their_leases_are_done():
    c = coordinator_of(plan_of("sync", 3))
    c.place([0, 1, 2])
    leases = c.next_leases()
    c.place([0])
    assert c.take_released() == []  # all are being stepped
    assert [c.hosts(a) for a in (0, 1, 2, 3)] == [True, True, True, False]
    for lease in leases:
        finish(c, lease)
    train(c)
    moved = c.next_leases()
    assert sorted(c.take_released()) == [(1, 1), (2, 2)]
    assert c.take_released() == []
    assert [(le.actor, le.restore is not None) for le in moved] == [(0, False), (0, True), (0, True)]
    assert [c.hosts(a) for a in (0, 1, 2)] == [True, False, False]
    c.place([])
    for lease in moved:
        finish(c, lease)
    train(c)
    assert c.next_leases() == []


# ---- episodes and the end --------------------------------------------------------------------------------------------
def one_episode(c: Coordinator, lease, **facts) -> None:
    add_episode(write_rollout(c.ring.slots[lease.slot], lease.identity), 1, 0, **facts)
    c.filled(lease.slot, lease.identity)


def test_episodes_count_once_they_are_trained_and_the_given_up_never():
    c = coordinator_of(plan_of("sync", 2))
    c.place([0])
    first, second = c.next_leases()
    one_episode(c, first, num_steps=7, episode_return=2.5, seed=99, truncated=True)
    one_episode(c, second, invalid=True, num_steps=50, episode_return=50.0)
    assert np.isnan(c.mean_return)
    _, episodes = train(c)
    assert [vars(e) for e in episodes] == [{"group": 0, "env": 0, "episode_return": 2.5, "num_steps": 7, "seed": 99, "truncated": True}]
    assert (list(c.returns), list(c.lengths), c.num_episodes, c.mean_return) == ([2.5], [7], 1, 2.5)


def test_the_return_counts_once_a_hundred_episodes_are_there():
    c = coordinator_of(plan_of("sync", 1), StopConfig(**{"return": 10.0}))
    c.returns.extend([10.0] * 99)
    assert c.stop_reason(0.0) is None
    c.returns.append(9.0)
    assert c.stop_reason(0.0) is None
    c.returns.append(11.0)
    assert c.mean_return == pytest.approx(10.0)
    assert c.stop_reason(0.0) == "return"
    assert len(c.returns) == 100


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        ({"env_steps": 100}, "env_steps"),
        ({"updates": 7}, "updates"),
        ({"seconds": 3.0}, "seconds"),
        ({"env_steps": 101, "updates": 8, "seconds": 3.1}, None),
        ({"env_steps": 100, "updates": 7, "seconds": 1.0}, "env_steps"),
        ({}, None),
    ],
)
def test_a_stop_condition_is_met_when_it_is_reached(stop, reason):
    c = coordinator_of(plan_of("sync", 1), StopConfig(**stop))
    c.env_steps, c.version = 100, 7
    assert c.stop_reason(3.0) == reason


def test_at_the_end_everything_in_flight_is_accounted_for():
    c = coordinator_of(plan_of(groups=2, batch=2))
    c.place([0])
    leases = c.next_leases()
    finish(c, leases[0])
    slot = write_rollout(c.ring.slots[leases[1].slot], leases[1].identity)
    slot.envelope["num_rows"] = 1
    c.shut_down()
    assert c.ledger.balance() == {"produced": 10, "trained": 0, "dropped": {"shutdown": 10}, "in_flight": 0}
    assert c.ledger.balance_rollouts()["dropped"] == {"shutdown": 4}
    assert not c.filled(leases[1].slot, leases[1].identity)
    c.ledger.check()


# ---- the whole, under every accident ---------------------------------------------------------------------------------
@dataclass
class FakeActor:
    """An actor: its queue of leases, the groups that it hosts with the sequence at which each stands, and what it is just making."""

    incarnation: int = 0
    up: bool = True
    gone: bool = False
    queue: list = field(default_factory=list)
    stands: dict[int, int] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)  # the versions of the rows of the lease being made


@dataclass
class Checkpoint:
    arrays: dict
    facts: str
    trained: list[tuple[Identity, int]]


class Fleet(RuleBasedStateMachine):
    NUM_ACTORS = 3

    @initialize(
        mode=st.sampled_from(["sync", "async"]),
        groups=st.integers(1, 4),
        batch=st.integers(1, 6),
        lag=st.integers(1, 4),
        prompt=st.booleans(),
    )
    def start(self, mode, groups, batch, lag, prompt):
        self.plan = plan_of(mode, groups, batch, lag)
        self.prompt = prompt  # actors close early as they are asked to, and no row takes longer than an update
        self.c = coordinator_of(self.plan)
        self.actors = [FakeActor() for _ in range(self.NUM_ACTORS)]
        self.c.place(range(self.NUM_ACTORS))
        self.attempts: set[Identity] = set()
        self.history: list[tuple[Identity, int]] = []  # trained and not undone: identity, update
        self.dropped_over_lag = 0
        self.put_back: dict[int, Identity] = {}  # before their time, with the identity that was named
        self.with_learner: list[tuple[int, Identity]] | None = None
        self.taken = False  # the learner copied its batch
        self.saved: Checkpoint | None = None
        self.save()

    # What the engine does after everything that happens.
    def dispatch(self, early=True):
        for actor, group in self.c.take_released():
            if self.actors[actor].up:
                self.actors[actor].stands.pop(group, None)
        available = {i for i, a in enumerate(self.actors) if a.up}
        for lease in self.c.next_leases(available):
            actor = self.actors[lease.actor]
            assert actor.up
            assert lease.identity not in self.attempts, "an attempt is ordered once"
            self.attempts.add(lease.identity)
            group, sequence, _ = lease.identity
            if lease.restore is None:
                assert actor.stands[group] == sequence, "a hosted group goes on where it stands"
            else:
                assert lease.restore.cursor["episode"].tolist() == [sequence] * B, "restored to the start of this sequence"
            actor.stands[group] = sequence + 1
            actor.queue.append(lease)
        if early:
            for restore in self.c.next_restores(available):
                group, sequence, _ = restore.identity
                assert self.actors[restore.actor].up
                assert group not in self.actors[restore.actor].stands
                assert restore.state.cursor["episode"].tolist() == [sequence] * B, "put back to where its next rollout begins"
                self.actors[restore.actor].stands[group] = sequence
                self.put_back[group] = restore.identity

    def order_training(self):
        if self.with_learner is None and (batch := self.c.next_batch()) is not None:
            self.with_learner, self.taken = batch, False

    @precondition(lambda self: any(a.up and a.queue for a in self.actors))
    @rule(data=st.data(), rows=st.integers(1, T))
    def step(self, data, rows):
        """An actor makes some rows of its first lease."""
        index = data.draw(st.sampled_from([i for i, a in enumerate(self.actors) if a.up and a.queue]))
        self.make_rows(self.actors[index], rows)
        self.dispatch()
        self.order_training()

    def make_rows(self, actor: FakeActor, num_rows: int) -> None:
        lease = actor.queue[0]
        slot = self.c.ring.slots[lease.slot]
        for _ in range(num_rows):
            late = self.prompt and actor.rows and self.c.version - actor.rows[0] >= self.plan.close_after_lag
            if late:
                break
            actor.rows.append(self.c.version)
            write_rollout(slot, lease.identity, num_rows=len(actor.rows), versions=actor.rows)
            if len(actor.rows) == T:
                break
        if len(actor.rows) == T or (actor.rows and self.prompt and self.c.version - actor.rows[0] >= self.plan.close_after_lag):
            actor.rows = []
            actor.queue.pop(0)
            assert self.c.filled(lease.slot, lease.identity)

    @precondition(lambda self: self.plan.mode == "async" and any(a.up and a.rows for a in self.actors))
    @rule(data=st.data())
    def close_early(self, data):
        actor = data.draw(st.sampled_from([a for a in self.actors if a.up and a.rows]))
        lease = actor.queue.pop(0)
        actor.rows = []
        assert self.c.filled(lease.slot, lease.identity)
        self.dispatch()
        self.order_training()

    @precondition(lambda self: self.with_learner is not None)
    @rule()
    def learn(self):
        """The learner takes its batch; and with the next call it is done with it."""
        if not self.taken:
            self.dropped = {}
            for slot, identity in self.with_learner:
                assert self.c.ring.slots[slot].identity == identity, "nobody wrote into a slot that the learner reads"
                if self.c.version - int(self.c.ring.slots[slot].envelope["version_min"]) > self.plan.max_policy_lag:
                    self.dropped[identity] = Fate.OVER_LAG
            self.steps = sum(int(self.c.ring.slots[s].envelope["num_env_steps"]) for s, i in self.with_learner if i not in self.dropped)
            self.c.consumed(self.dropped)
            self.taken = True
        else:
            self.finish_learning()
        self.dispatch()
        self.order_training()

    def finish_learning(self):
        kept = [i for _, i in self.with_learner if i not in self.dropped]
        version = self.c.version
        self.history += [(i, version + 1 if i in kept else -1) for _, i in self.with_learner]
        self.dropped_over_lag += len(self.dropped)
        self.c.trained({"num_env_steps": float(self.steps)} if kept else {})
        assert self.c.version == version + bool(kept)
        self.with_learner = None

    @rule(data=st.data())
    def kill_an_actor(self, data):
        index = data.draw(st.integers(0, self.NUM_ACTORS - 1))
        if self.actors[index].up:
            self.kill(index)
            self.actors[index].up = True  # started again
            self.dispatch()
            self.order_training()

    def kill(self, index):
        actor = self.actors[index]
        expected = [lease.identity for lease in actor.queue]
        assert sorted(self.c.lost(index)) == sorted(expected)
        self.actors[index] = FakeActor(actor.incarnation + 1, up=False, gone=actor.gone)

    @precondition(lambda self: sum(not a.gone for a in self.actors) > 1)
    @rule(data=st.data())
    def an_actor_is_gone_for_good(self, data):
        index = data.draw(st.sampled_from([i for i, a in enumerate(self.actors) if not a.gone]))
        self.actors[index].gone = True
        self.kill(index)
        self.c.place([i for i, a in enumerate(self.actors) if not a.gone])
        self.dispatch()
        self.order_training()

    @precondition(lambda self: any(a.gone for a in self.actors))
    @rule(data=st.data())
    def an_actor_comes_back(self, data):
        index = data.draw(st.sampled_from([i for i, a in enumerate(self.actors) if a.gone]))
        self.actors[index] = FakeActor(self.actors[index].incarnation + 1)
        self.c.place([i for i, a in enumerate(self.actors) if not a.gone])
        self.dispatch()

    @precondition(lambda self: any(a.up and a.rows for a in self.actors))
    @rule(data=st.data(), env=st.integers(0, B - 1))
    def an_environment_breaks(self, data, env):
        actor = data.draw(st.sampled_from([a for a in self.actors if a.up and a.rows]))
        identity, row = actor.queue[0].identity, len(actor.rows)
        expected = [le.identity for le in actor.queue if le.identity.group == identity.group]
        assert self.c.faulted(identity, row, env) == expected
        actor.queue = [le for le in actor.queue if le.identity.group != identity.group]
        actor.rows = []
        actor.stands.pop(identity.group)
        assert self.c.faulted(identity, row, env) == []
        self.dispatch()
        self.order_training()

    @precondition(lambda self: self.put_back)
    @rule(data=st.data())
    def an_environment_breaks_while_it_is_put_back(self, data):
        group = data.draw(st.sampled_from(sorted(self.put_back)))
        identity, host = self.put_back.pop(group), self.actors[self.c.groups[group].actor]
        if host.stands.get(group) == identity.sequence and identity not in [lease.identity for lease in host.queue]:
            assert self.c.faulted(identity, WHILE_RESTORED, 0) == []
            host.stands.pop(group, None)
        self.dispatch(early=data.draw(st.booleans()))
        self.order_training()

    @rule(data=st.data())
    def an_old_word_arrives(self, data):
        busy = {lease.identity for a in self.actors for lease in a.queue}
        old = sorted(self.attempts - busy)
        if old:
            identity = data.draw(st.sampled_from(old))
            slot = data.draw(st.integers(0, self.plan.num_slots - 1))
            before = self.c.ledger.balance()
            assert not self.c.filled(slot, identity)
            assert self.c.ledger.balance() == before

    @precondition(lambda self: self.with_learner is None)
    @rule()
    def save(self):
        arrays, facts = self.c.get_state()
        self.saved = Checkpoint({n: a.copy() for n, a in arrays.items()}, json.dumps(facts), list(self.history))

    @rule()
    def the_learner_dies(self):
        """All roles are ended, and the run goes back to its checkpoint in place."""
        for index, actor in enumerate(self.actors):
            self.actors[index] = FakeActor(actor.incarnation + 1, up=not actor.gone, gone=actor.gone)
        self.c.set_state(self.saved.arrays, json.loads(self.saved.facts), live=True)
        self.back_at_checkpoint()

    @rule()
    def the_whole_run_dies_and_is_resumed(self):
        self.c = coordinator_of(self.plan)
        self.attempts.clear()  # their memory is gone, and the ledger knows nothing of them
        self.actors = [FakeActor() for _ in self.actors]
        self.c.set_state(self.saved.arrays, json.loads(self.saved.facts))
        self.c.place(range(self.NUM_ACTORS))
        self.back_at_checkpoint()

    def back_at_checkpoint(self):
        self.with_learner = None
        self.history = list(self.saved.trained)
        facts = json.loads(self.saved.facts)
        assert (self.c.version, self.c.env_steps) == (facts["version"], facts["env_steps"])
        self.dispatch()

    @rule()
    def nothing_is_stuck(self):
        """From here, without further accidents, ten more updates are made."""
        goal = self.c.version + 10
        for _ in range(400):
            if self.c.version >= goal:
                break
            self.dispatch()
            self.order_training()
            for actor in self.actors:
                if actor.up and actor.queue:
                    self.make_rows(actor, T)
            self.dispatch()
            self.order_training()
            while self.with_learner is not None:
                self.learn_quietly()
        assert self.c.version >= goal, "the run is stuck"

    def learn_quietly(self):
        batch = self.with_learner
        self.learn()
        if self.with_learner is not None and self.taken and self.with_learner is batch:
            self.learn()

    # ---- what always holds
    @invariant()
    def the_ledger_balances(self):
        if hasattr(self, "c"):
            c = self.c
            c.ledger.check()
            waiting = [i for g in c.groups for i in g.leased.values()] + [i for _, i in c.ready + c.training]
            assert sorted(c.ledger.in_flight) == sorted(waiting), "in flight is what lies somewhere"
            assert len(set(waiting)) == len(waiting)
            assert c.ledger.balance()["trained"] == c.env_steps

    @invariant()
    def every_slot_has_one_owner(self):
        if hasattr(self, "c"):
            owned = [s for g in self.c.groups for s in (*g.free, *g.leased)] + [s for s, _ in self.c.ready]
            if not (self.with_learner and self.taken):
                owned += [s for s, _ in self.c.training]
            assert sorted(owned) == list(range(self.plan.num_slots))
            for index, group in enumerate(self.c.groups):
                per = self.plan.slots_per_group
                assert {*group.free, *group.leased} <= set(range(index * per, (index + 1) * per))

    @invariant()
    def sequences_are_consumed_in_order_without_gap_or_duplicate(self):
        if hasattr(self, "c"):
            for group in range(self.plan.num_groups):
                mine = [i.sequence for i, _ in self.history if i.group == group]
                assert mine == list(range(len(mine)))
            updates = [u for _, u in self.history if u >= 0]
            assert all(a <= b <= a + 1 for a, b in pairwise(updates))

    @invariant()
    def orders_follow_the_mode(self):
        if hasattr(self, "c"):
            if self.plan.mode == "sync":
                for group in self.c.groups:
                    assert group.next_sequence in (self.c.version, self.c.version + 1)
            ahead = len(self.c.ready) + sum(len(g.leased) for g in self.c.groups)
            limit = self.plan.batch_rollouts * (1 if self.plan.mode == "sync" else min(2, self.plan.max_policy_lag))
            assert ahead <= limit

    @invariant()
    def prompt_actors_never_lose_a_rollout_to_lag(self):
        """What waits in the queue alone never passes the bound: only an environment that is slow within one row can."""
        if hasattr(self, "c") and self.prompt and self.plan.max_policy_lag > 2:
            assert self.dropped_over_lag == 0


Fleet.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
TestUnderEveryAccident = Fleet.TestCase
