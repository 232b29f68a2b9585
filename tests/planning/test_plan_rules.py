"""The model's rules are the coordinator's: both are told the same and decide the same."""

from __future__ import annotations

from collections import deque

from cluster import plan_of
from hypothesis import given
from hypothesis import strategies as st

from rollout_fakes import poisoned_ring, scripted_schema, scripted_spec, write_rollout
from shoal.config import StopConfig
from shoal.engines.coordinator import Coordinator
from shoal.engines.plan import Lease, Plan
from shoal.planning.rules import Rollout, Rules

T, B = 4, 2


class Both:
    """A coordinator and the rules, step by step beside each other."""

    def __init__(self, plan: Plan, learners: int = 1) -> None:
        """learners: several keep the slots of an update until it is made."""
        self.several = learners > 1
        self.coordinator = Coordinator(plan, scripted_spec(), poisoned_ring(scripted_schema(T, B), plan.num_slots), StopConfig())
        self.coordinator.place([0])
        self.rules = Rules(plan, [1] * plan.num_groups)
        self.leased: list[deque[tuple[Lease, Rollout]]] = [deque() for _ in range(plan.num_groups)]
        self.at_work, self.copied = False, False

    def lease(self) -> None:
        leases, rollouts = self.coordinator.next_leases(), self.rules.leases()
        assert [lease.identity[:2] for lease in leases] == [(r.group, r.sequence) for r in rollouts]
        for lease, rollout in zip(leases, rollouts, strict=True):
            self.leased[rollout.group].append((lease, rollout))

    def fill(self, which: int, age: int) -> None:
        """Finish the oldest lease of a group, with rows that are `age` versions old."""
        making = [group for group in self.leased if group]
        if not making:
            return
        lease, rollout = making[which % len(making)].popleft()
        version = max(0, self.rules.version - age) if self.coordinator.plan.mode == "async" else self.rules.version
        write_rollout(self.coordinator.ring.slots[lease.slot], lease.identity, num_rows=T, version=version)
        assert self.coordinator.filled(lease.slot, lease.identity)
        rollout.pieces = [(version, float(T * B))]
        self.rules.filled(rollout)

    def learn(self) -> None:
        """The learner's next step: its batch, the copy of it, the new version."""
        if not self.at_work:
            batch, taken = self.coordinator.next_batch(), self.rules.next_batch()
            assert (batch is None) == (taken is None)
            if batch is None or taken is None:
                return
            assert [identity[:2] for _, identity in batch] == [(r.group, r.sequence) for r, _ in taken]
            assert {amount for _, amount in taken} == {1}
            self.at_work, self.copied = True, False
        elif not self.copied and not self.several:
            self.coordinator.consumed({})
            self.rules.consumed()
            self.copied = True
        else:
            if self.several:
                self.coordinator.consumed({})
                self.rules.consumed()
            self.coordinator.trained({"num_env_steps": 1.0})
            self.rules.trained()
            self.at_work = False
        assert self.coordinator.version == self.rules.version


@given(
    st.sampled_from(["sync", "async"]), st.integers(1, 4), st.none() | st.integers(1, 9), st.integers(1, 5), st.integers(1, 2),
    st.lists(st.tuples(st.sampled_from(["lease", "fill", "fill", "fill", "learn", "update"]), st.integers(0, 7), st.integers(0, 5)), min_size=60, max_size=150),
)  # fmt: skip
def test_what_is_begun_and_what_is_trained_is_what_the_coordinator_says(mode, groups, batch, lag, learners, told) -> None:
    both = Both(plan_of(mode, groups, B, T, batch, lag, learners), learners)
    for what, which, age in told:
        if what == "lease":
            both.lease()
        elif what == "fill":
            both.fill(which, age)
        else:
            for _ in range(3 if what == "update" else 1):
                both.learn()


def test_a_group_that_stands_for_many_gives_a_batch_a_part_of_what_it_made_and_keeps_its_slot_until_the_rest_is_taken() -> None:
    rules = Rules(plan_of("async", 6, batch=3), [5, 1])
    first = rules.leases()
    assert [(r.group, r.amount) for r in first] == [(0, 5), (1, 1)]  # of 6 that may be in flight
    for rollout in first:
        rollout.pieces = [(0, 8.0)]
        rules.filled(rollout)
    batches = []
    while (batch := rules.next_batch()) is not None:
        batches.append([(r.group, taken) for r, taken in batch])
        rules.consumed()
        rules.trained()
    assert batches == [[(0, 3)], [(0, 2), (1, 1)]]
    assert rules.held == 0
    assert [(r.group, r.sequence) for r in rules.leases()] == [(0, 1), (1, 1)]
