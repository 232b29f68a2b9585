"""The conservation law: produced = trained + dropped (by reason) + in flight, per group and in total, whatever happens."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from shoal.errors import LedgerError
from shoal.experience.envelope import REMADE, Fate, Identity
from shoal.experience.ledger import Ledger, Shares

A0, A1 = Identity(0, 0, 0), Identity(0, 1, 0)
SETTLING = [fate for fate in Fate if fate is not Fate.IN_FLIGHT]


def ledger_with(*settled: tuple[Identity, int, Fate]) -> Ledger:
    ledger = Ledger()
    for identity, steps, fate in settled:
        ledger.begin(identity)
        ledger.finish(identity, steps)
        ledger.settle(identity, fate)
    return ledger


def test_a_rollouts_way_shows_in_the_balance():
    ledger = Ledger()
    assert ledger.balance() == {"produced": 0, "trained": 0, "dropped": {}, "in_flight": 0}
    ledger.begin(A0)
    ledger.begin(A1)
    assert ledger.in_flight == [A0, A1]
    assert ledger.balance() == {"produced": 0, "trained": 0, "dropped": {}, "in_flight": 0}
    assert ledger.balance_rollouts() == {"produced": 2, "trained": 0, "dropped": {}, "in_flight": 2}
    ledger.finish(A0, 12)
    assert ledger.balance() == {"produced": 12, "trained": 0, "dropped": {}, "in_flight": 12}
    ledger.settle(A0, Fate.TRAINED)
    assert ledger.in_flight == [A1]
    assert ledger.balance() == {"produced": 12, "trained": 12, "dropped": {}, "in_flight": 0}
    ledger.finish(A1, 5)
    ledger.settle(A1, Fate.OVER_LAG)
    assert ledger.balance() == {"produced": 17, "trained": 12, "dropped": {"over_lag": 5}, "in_flight": 0}
    assert ledger.balance_rollouts() == {"produced": 2, "trained": 1, "dropped": {"over_lag": 1}, "in_flight": 0}
    ledger.check()


def test_the_listener_is_told_of_every_end_with_its_steps():
    heard = []
    ledger = Ledger()
    ledger.listener = lambda *told: heard.append(told)
    ledger.begin(A0)
    ledger.begin(A1)
    ledger.finish(A0, 12)
    ledger.settle(A0, Fate.TRAINED)
    ledger.settle(A1, Fate.ACTOR_DIED)
    assert heard == [(A0, Fate.TRAINED, 12), (A1, Fate.ACTOR_DIED, 0)]


def test_finishing_again_corrects_the_steps():
    ledger = Ledger()
    ledger.begin(A0)
    ledger.finish(A0, 3)
    ledger.finish(A0, 8)
    assert ledger.balance() == {"produced": 8, "trained": 0, "dropped": {}, "in_flight": 8}
    ledger.check()


def test_reasons_come_in_the_order_of_the_closed_list_and_none_with_zero():
    ledger = ledger_with(
        (Identity(0, 0, 0), 1, Fate.SHUTDOWN),
        (Identity(0, 0, 1), 0, Fate.SUPERSEDED),
        (Identity(0, 0, 2), 2, Fate.ACTOR_DIED),
        (Identity(0, 0, 3), 3, Fate.INVALID),
    )
    assert list(ledger.balance()["dropped"].items()) == [("actor_died", 2), ("invalid", 3), ("shutdown", 1)]
    assert list(ledger.balance_rollouts()["dropped"]) == ["actor_died", "invalid", "superseded", "shutdown"]


def test_groups_have_accounts_of_their_own():
    ledger = ledger_with((Identity(1, 0, 0), 4, Fate.TRAINED), (A0, 6, Fate.TRAINED), (A1, 2, Fate.INVALID))
    ledger.begin(Identity(2, 0, 0))
    ledger.begin(Identity(0, 2, 0))
    ledger.finish(Identity(0, 2, 0), 4)
    rows = ledger.by_group()
    assert list(rows) == [0, 1, 2]
    assert rows[0] == {"produced": 12, "trained": 6, "dropped": {"invalid": 2}, "in_flight": 4, "trained_share": 0.5}
    assert rows[1] == {"produced": 4, "trained": 4, "dropped": {}, "in_flight": 0, "trained_share": 1.0}
    assert rows[2] == {"produced": 0, "trained": 0, "dropped": {}, "in_flight": 0, "trained_share": 0.0}


def test_what_was_replayed_of_a_group_is_a_share_of_its_own_beside_none_that_was_trained():
    row = ledger_with((A0, 6, Fate.REPLAYED), (A1, 2, Fate.INVALID)).by_group()[0]
    assert (row["trained"], row["trained_share"]) == (0, 0.0)
    assert (row["replayed"], row["replayed_share"]) == (6, 0.75)


def test_a_gap_is_refused():
    ledger = Ledger()
    ledger.begin(A0)
    with pytest.raises(LedgerError, match=r"^group 0: sequence 2 begun before 1$"):
        ledger.begin(Identity(0, 2, 0))
    with pytest.raises(LedgerError, match=r"^group 1: sequence 1 begun before 0$"):
        ledger.begin(Identity(1, 1, 0))


def test_two_attempts_at_once_are_refused():
    ledger = Ledger()
    ledger.begin(A0)
    with pytest.raises(LedgerError, match=r"^group 0: two attempts of sequence 0 in flight$"):
        ledger.begin(Identity(0, 0, 1))
    ledger.begin(Identity(1, 0, 0))


@pytest.mark.parametrize("fate", SETTLING)
def test_a_sequence_may_come_again_exactly_after_the_fates_that_leave_it_open(fate):
    ledger = ledger_with((A0, 1, fate))
    if fate in REMADE:
        ledger.begin(Identity(0, 0, 1))
    else:
        with pytest.raises(LedgerError, match=r"^group 0: sequence 0 begun again after a final attempt$"):
            ledger.begin(Identity(0, 0, 1))


def test_a_sequence_that_became_final_before_an_earlier_one_is_final_too():
    ledger = Ledger()
    ledger.begin(A0)
    ledger.begin(A1)
    ledger.settle(A1, Fate.TRAINED)
    with pytest.raises(LedgerError, match=r"^group 0: sequence 1 begun again after a final attempt$"):
        ledger.begin(Identity(0, 1, 1))
    ledger.settle(A0, Fate.TRAINED)
    assert ledger.get_state()["0"]["final"] == 2
    assert not ledger._accounts[0].final_ahead  # a run of months keeps nothing of what lies below the mark


def test_a_duplicate_is_refused_by_name():
    ledger = ledger_with((A0, 1, Fate.TRAINED))
    with pytest.raises(LedgerError, match=r"^group 0: Identity\(.*\) is to be trained, but is not in flight: a duplicate$"):
        ledger.settle(A0, Fate.TRAINED)
    with pytest.raises(LedgerError, match=r"^group 0: Identity\(.*\) finished, but is not in flight$"):
        ledger.finish(A0, 1)


def test_check_names_the_group_whose_account_does_not_balance():
    ledger = ledger_with((A0, 3, Fate.TRAINED), (Identity(1, 0, 0), 3, Fate.TRAINED))
    ledger._accounts[1].produced_rollouts += 1
    with pytest.raises(LedgerError, match=r"^group 1: 2 rollouts produced, 1 accounted for$"):
        ledger.check()
    ledger._accounts[1].produced_rollouts -= 1
    ledger._accounts[0].steps[Fate.TRAINED] -= 1
    with pytest.raises(LedgerError, match=r"^group 0: 3 steps produced, 2 accounted for$"):
        ledger.check()
    ledger._accounts[0].steps[Fate.TRAINED] += 1
    ledger.begin(A1)
    ledger.check()
    del ledger._in_flight[A1]
    with pytest.raises(LedgerError, match=r"^group 0: 2 rollouts produced, 1 accounted for$"):
        ledger.check()


def test_a_state_leaves_out_what_is_in_flight():
    ledger = ledger_with((A0, 3, Fate.TRAINED), (A1, 2, Fate.ACTOR_DIED))
    ledger.begin(Identity(0, 1, 1))
    ledger.finish(Identity(0, 1, 1), 9)
    ledger.begin(Identity(0, 2, 0))
    state = ledger.get_state()
    assert state == {
        "0": {
            "produced_rollouts": 2,
            "produced_steps": 5,
            "rollouts": {"trained": 1, "actor_died": 1},
            "steps": {"trained": 3, "actor_died": 2},
            "final": 1,
        }
    }
    other = ledger_with((Identity(7, 0, 0), 1, Fate.TRAINED))
    other.begin(Identity(7, 1, 0))
    other.set_state(json.loads(json.dumps(state)))
    assert other.in_flight == []
    assert other.by_group().keys() == {0}
    assert other.balance() == {"produced": 5, "trained": 3, "dropped": {"actor_died": 2}, "in_flight": 0}
    assert other.balance_rollouts() == {"produced": 2, "trained": 1, "dropped": {"actor_died": 1}, "in_flight": 0}
    with pytest.raises(LedgerError, match="begun before 1"):
        other.begin(Identity(0, 2, 2))
    with pytest.raises(LedgerError, match="final attempt"):
        other.begin(Identity(0, 0, 2))
    other.begin(Identity(0, 1, 2))
    other.check()


def test_what_a_killed_part_lost_is_booked_once_and_balances():
    ledger = ledger_with((A0, 3, Fate.TRAINED), (Identity(0, 1, 0), 4, Fate.ACTOR_DIED))
    lost = {(0, Fate.ACTOR_DIED): (2, 6), (0, Fate.ROLLED_BACK): (3, 30), (1, Fate.ROLLED_BACK): (1, 9), (0, Fate.OVER_LAG): (0, 0)}
    for _ in range(2):
        ledger.take_over(lost)
        ledger.check()
        assert ledger.balance() == {"produced": 48, "trained": 3, "dropped": {"actor_died": 6, "rolled_back": 39}, "in_flight": 0}
        assert ledger.balance_rollouts() == {"produced": 7, "trained": 1, "dropped": {"actor_died": 2, "rolled_back": 4}, "in_flight": 0}
    ledger.begin(Identity(0, 1, 9))
    assert ledger.final == {0: 1, 1: 0}


def test_a_roll_back_undoes_what_was_trained_since_and_keeps_what_was_lost():
    ledger = ledger_with((A0, 3, Fate.TRAINED))
    mark = ledger.get_state()
    for identity, steps, fate in (
        (A1, 2, Fate.ACTOR_DIED),
        (Identity(0, 1, 1), 4, Fate.TRAINED),
        (Identity(0, 2, 1), 5, Fate.OVER_LAG),
        (Identity(0, 3, 1), 6, Fate.INVALID),
        (Identity(1, 0, 0), 7, Fate.TRAINED),
    ):
        ledger.begin(identity)
        ledger.finish(identity, steps)
        ledger.settle(identity, fate)
    ledger.begin(Identity(0, 4, 1))
    ledger.finish(Identity(0, 4, 1), 8)
    ledger.roll_back(mark)
    ledger.check()
    assert ledger.in_flight == []
    assert ledger.balance() == {"produced": 35, "trained": 3, "dropped": {"actor_died": 2, "rolled_back": 30}, "in_flight": 0}
    assert ledger.balance_rollouts() == {"produced": 7, "trained": 1, "dropped": {"actor_died": 1, "rolled_back": 5}, "in_flight": 0}
    assert ledger.get_state()["0"]["final"] == 1
    with pytest.raises(LedgerError, match="begun before 1"):
        ledger.begin(Identity(0, 2, 2))
    ledger.begin(Identity(0, 1, 2))
    ledger.begin(Identity(1, 0, 1))


def test_what_went_into_the_replay_is_replayed_and_what_left_it_a_part_of_that():
    ledger = Ledger()
    for sequence in range(2):
        ledger.begin(Identity(0, sequence, 0))
        ledger.finish(Identity(0, sequence, 0), 6)
        ledger.settle(Identity(0, sequence, 0), Fate.REPLAYED)
    ledger.evict(0, 5)
    ledger.check()
    assert ledger.balance() == {"produced": 12, "trained": 0, "dropped": {}, "in_flight": 0, "replayed": 12, "evicted": 5}
    mark = json.loads(json.dumps(ledger.get_state()))
    with pytest.raises(LedgerError, match="group 0: 13 steps evicted from the replay, 12 went into it"):
        ledger.evict(0, 8)
    ledger.roll_back(mark)
    assert ledger.balance()["evicted"] == 5
    ledger.evict_all()
    assert ledger.balance()["evicted"] == 12


# ---- against a list of every rollout ---------------------------------------------------------------------------------
@dataclass
class Record:
    identity: Identity
    steps: int = 0
    fate: Fate = Fate.IN_FLIGHT
    evicted: int = 0  # steps


FINAL = (Fate.TRAINED, Fate.REPLAYED, Fate.OVER_LAG, Fate.INVALID)


class Oracle:
    """Every rollout that ever was, one after the other. Slow and plain."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def of(self, group: int) -> list[Record]:
        return [r for r in self.records if r.identity.group == group]

    def is_final(self, group: int, sequence: int) -> bool:
        return any(r.fate in FINAL and r.identity.sequence == sequence for r in self.of(group))

    def first_open(self, group: int) -> int:
        sequence = 0
        while self.is_final(group, sequence):
            sequence += 1
        return sequence

    def in_flight(self) -> list[Identity]:
        return [r.identity for r in self.records if r.fate is Fate.IN_FLIGHT]

    def count(self, records: list[Record], of: str) -> dict[str, object]:
        def total(*fates: Fate) -> int:
            return sum(r.steps if of == "steps" else 1 for r in records if r.fate in fates)

        dropped = {f.label: total(f) for f in Fate if f not in (Fate.TRAINED, Fate.REPLAYED, Fate.IN_FLIGHT) and total(f)}
        counts: dict[str, object] = {
            "produced": total(*Fate), "trained": total(Fate.TRAINED), "dropped": dropped, "in_flight": total(Fate.IN_FLIGHT)
        }  # fmt: skip
        if total(Fate.REPLAYED):
            counts["replayed"] = total(Fate.REPLAYED)
            if of == "steps":
                counts["evicted"] = sum(r.evicted for r in records if r.fate is Fate.REPLAYED)
        return counts


class LedgerMachine(RuleBasedStateMachine):
    marks = Bundle("marks")

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.oracle = Ledger(), Oracle()
        self.next = dict.fromkeys(range(3), 0)  # first sequence that may be begun, were there no gaps
        self.attempts = 0

    def record(self, data, *, what: str) -> Record:
        return data.draw(st.sampled_from([r for r in self.oracle.records if r.fate is Fate.IN_FLIGHT]), what)

    @rule(group=st.integers(0, 2), back=st.integers(-1, 3))
    def begin(self, group, back):
        """The next sequence, one of the last, or one too far."""
        self.attempts += 1
        identity = Identity(group, max(0, self.next[group] - back), self.attempts)
        busy = any(i[:2] == identity[:2] for i in self.oracle.in_flight())
        if identity.sequence > self.next[group] or busy or self.oracle.is_final(group, identity.sequence):
            with pytest.raises(LedgerError, match=f"^group {group}: "):
                self.ledger.begin(identity)
        else:
            self.ledger.begin(identity)
            self.oracle.records.append(Record(identity))
            self.next[group] = max(self.next[group], identity.sequence + 1)

    @precondition(lambda self: self.oracle.in_flight())
    @rule(data=st.data(), steps=st.integers(0, 50))
    def finish(self, data, steps):
        record = self.record(data, what="finished")
        self.ledger.finish(record.identity, steps)
        record.steps = steps

    @precondition(lambda self: self.oracle.in_flight())
    @rule(data=st.data(), fate=st.sampled_from(SETTLING))
    def settle(self, data, fate):
        record = self.record(data, what="settled")
        self.ledger.settle(record.identity, fate)
        record.fate = fate

    @precondition(lambda self: any(r.fate is Fate.REPLAYED for r in self.oracle.records))
    @rule(data=st.data(), steps=st.integers(0, 60))
    def evict(self, data, steps):
        """Whole rollouts or parts of them leave the replay; never more than went in."""
        record = data.draw(st.sampled_from([r for r in self.oracle.records if r.fate is Fate.REPLAYED]))
        steps = min(steps, record.steps - record.evicted)
        self.ledger.evict(record.identity.group, steps)
        record.evicted += steps

    @rule(group=st.integers(0, 3), sequence=st.integers(0, 4), attempt=st.integers(0, 40), fate=st.sampled_from(SETTLING))
    def refuse_strangers(self, group, sequence, attempt, fate):
        identity = Identity(group, sequence, attempt)
        if identity not in self.oracle.in_flight():
            with pytest.raises(LedgerError, match=f"^group {group}: "):
                self.ledger.settle(identity, fate)
            with pytest.raises(LedgerError, match=f"^group {group}: "):
                self.ledger.finish(identity, 1)

    def nothing_is_final_ahead(self) -> bool:
        """Checkpoints are made where every group was consumed in order."""
        return all(
            not self.oracle.is_final(g, s) for g in self.next for s in range(self.oracle.first_open(g), self.next[g])
        )  # fmt: skip

    @precondition(lambda self: self.nothing_is_final_ahead())
    @rule(target=marks)
    def mark(self):
        return json.dumps(self.ledger.get_state()), copy.deepcopy(self.oracle.records)

    @rule(mark=marks)
    def roll_back(self, mark):
        """Only to a mark of this history: one that a resume or a roll-back has not cut off."""
        state, then = mark
        now = self.oracle.records[: len(then)]
        if [r.identity for r in then] != [r.identity for r in now]:
            return
        if any(old.fate in FINAL and (new.fate is not old.fate or new.evicted < old.evicted) for old, new in zip(then, now, strict=True)):
            return
        self.ledger.roll_back(json.loads(state))
        before = {r.identity: r.fate for r in then}
        evicted = {r.identity: r.evicted for r in then}
        for record in self.oracle.records:
            undone = record.fate in FINAL and before.get(record.identity) not in FINAL
            if record.fate is Fate.IN_FLIGHT or undone:
                record.fate = Fate.ROLLED_BACK
            record.evicted = evicted.get(record.identity, 0)
        self.next = {g: self.oracle.first_open(g) for g in self.next}

    @rule(mark=consumes(marks))
    def resume(self, mark):
        state, then = mark
        self.ledger = Ledger()
        self.ledger.set_state(json.loads(state))
        self.oracle.records = [copy.deepcopy(r) for r in then if r.fate is not Fate.IN_FLIGHT]
        self.next = {g: self.oracle.first_open(g) for g in self.next}

    @invariant()
    def the_books_agree(self):
        ledger, oracle = self.ledger, self.oracle
        ledger.check()
        assert sorted(ledger.in_flight) == sorted(oracle.in_flight())
        assert ledger.balance() == oracle.count(oracle.records, "steps")
        assert ledger.balance_rollouts() == oracle.count(oracle.records, "rollouts")
        for group, row in ledger.by_group().items():
            expected = oracle.count(oracle.of(group), "steps")
            shares = {
                f"{fate}_share": expected[fate] / max(1, expected["produced"]) for fate in ("trained", "replayed") if fate in expected
            }
            assert row == {**expected, **shares}
            assert ledger.get_state()[str(group)]["final"] == oracle.first_open(group)


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestLedgerAgainstAListOfEveryRollout = LedgerMachine.TestCase


# ---- what each environment contributed -------------------------------------------------------------------------------
def shares(trained: list[int], late: list[int]) -> Shares:
    return Shares(np.array(trained), np.array(late))


def test_late_steps_of_a_rollout_that_was_trained_count_as_dropped():
    ledger = Ledger()
    for identity, fate, share in (
        (A0, Fate.TRAINED, shares([6, 1], [0, 2])),
        (A1, Fate.OVER_LAG, shares([0, 0], [0, 1])),
    ):
        ledger.begin(identity)
        ledger.finish(identity, int(sum(share.trained_B) + sum(share.late_B)))
        ledger.settle(identity, fate, share)
        ledger.check()
    assert ledger.balance() == {"produced": 10, "trained": 7, "dropped": {"over_lag": 3}, "in_flight": 0}
    assert ledger.balance_rollouts() == {"produced": 2, "trained": 1, "dropped": {"over_lag": 1}, "in_flight": 0}
    assert ledger.by_group()[0]["by_environment"] == {"trained": [6, 1], "late": [0, 3]}


def test_shares_that_are_not_all_of_a_rollout_are_an_error():
    ledger = Ledger()
    ledger.begin(A0)
    ledger.finish(A0, 9)
    with pytest.raises(LedgerError, match="has 9 steps, 7 trained and 1 late"):
        ledger.settle(A0, Fate.TRAINED, shares([7], [1]))


def test_shares_go_through_a_checkpoint_and_back():
    ledger = Ledger()
    ledger.begin(A0)
    ledger.finish(A0, 4)
    ledger.settle(A0, Fate.TRAINED, shares([2, 1], [0, 1]))
    mark = json.loads(json.dumps(ledger.get_state()))
    ledger.begin(A1)
    ledger.finish(A1, 5)
    ledger.settle(A1, Fate.TRAINED, shares([2, 0], [0, 3]))
    ledger.roll_back(mark)
    ledger.check()
    assert ledger.balance() == {"produced": 9, "trained": 3, "dropped": {"over_lag": 1, "rolled_back": 5}, "in_flight": 0}
    again = Ledger()
    again.set_state(mark)
    again.check()
    for one in (ledger, again):
        assert one.by_group()[0]["by_environment"] == {"trained": [2, 1], "late": [0, 1]}
