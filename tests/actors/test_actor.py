"""Actor.fill on a scripted group and a scripted behaviour: every number of a rollout is computed again, slowly, and compared.

Legend: T rows, B environments.
"""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from rollout_fakes import (
    RUN_ID,
    Drift,
    ScriptedBehaviour,
    ScriptedGroup,
    SnapshotDrift,
    action_of,
    crc_of,
    fresh_state,
    length_of,
    log_prob_of,
    mask_of,
    observation_of,
    poisoned_ring,
    policy_fields,
    reward_of,
    same_rollout,
    scripted_schema,
    seed_of,
    truncates,
)
from shoal.actors.actor import Actor
from shoal.config import EnvConfig
from shoal.environments import make_group
from shoal.errors import EnvironmentFault
from shoal.experience.envelope import Fate, Identity, Source
from shoal.experience.group_state import GroupHistory
from shoal.experience.schema import rollout_schema
from shoal.types import Activity

T, B, G = 6, 3, 2


class Place:
    """Where one environment stands, followed row by row in plain Python."""

    def __init__(self, b: int) -> None:
        self.b, self.episode, self.steps, self.total = b, 0, 0, 0.0
        self.rewards: list[float] = []
        self.resetting = False

    @property
    def seed(self) -> int:
        return seed_of(G, self.b, self.episode)

    def begin_next(self) -> None:
        self.episode, self.steps, self.total, self.rewards = self.episode + 1, 0, 0.0, []


class Oracle:
    """What a rollout must hold, from the definition of the scripted world."""

    def __init__(self, next_step: bool = False) -> None:
        self.places = [Place(b) for b in range(B)]
        self.next_step = next_step

    def rollout(self, sequence: int, num_rows: int, give_up: tuple[tuple[int, int], ...] = ()) -> dict[str, Any]:
        out: dict[str, Any] = {"cursor/start": self.cursors(), "rows": [], "ends": []}
        for t in range(num_rows):
            row = []
            for p in self.places:
                before = (p.seed, p.steps)
                action = action_of(G, sequence, t, p.b)
                if p.resetting:
                    p.begin_next()
                    p.resetting = False
                    row.append((before, action, 0.0, False, False, False))
                    continue
                if (t, p.b) in give_up:
                    out["ends"].append((t, p, p.seed, p.steps, p.total, False, True, True, (p.seed, p.steps)))
                    p.begin_next()
                    row.append((before, action, 0.0, False, True, False))
                    continue
                p.steps += 1
                reward = reward_of(p.seed, p.steps, action)
                p.total += reward
                p.rewards.append(reward)
                over = p.steps == length_of(p.seed)
                row.append((before, action, reward, over and not truncates(p.seed), over and truncates(p.seed), True))
                if over:
                    final = None if self.next_step else (p.seed, p.steps)
                    out["ends"].append((t, p, p.seed, p.steps, p.total, not truncates(p.seed), truncates(p.seed), False, final))
                    if self.next_step:
                        p.resetting = True
                    else:
                        p.begin_next()
            out["rows"].append(row)
        out["last"] = [(p.seed, p.steps) for p in self.places]
        out["cursor/end"] = self.cursors()
        return out

    def cursors(self) -> list[tuple[Any, ...]]:
        return [
            (p.episode + 1, seed_of(G, p.b, p.episode + 1), 0, 0.0, None, None)
            if p.resetting
            else (p.episode, p.seed, p.steps, p.total, crc_of(p.seed, p.steps), zlib.crc32(np.array(p.rewards, np.float64).tobytes()))
            for p in self.places
        ]


def host(num_slots: int = 3, *, behaviour: ScriptedBehaviour | None = None, schema: dict[str, Any] | None = None, **group: Any):
    ring = poisoned_ring(scripted_schema(T, B, **(schema or {})), num_slots)
    made: list[ScriptedGroup] = []

    def make(index: int) -> ScriptedGroup:
        made.append(ScriptedGroup(index, B, mask="action_mask" in ring.slots[0].arrays, **group))
        return made[-1]

    chosen = behaviour or ScriptedBehaviour()
    actor = Actor(ring, chosen, make, run_id=RUN_ID, actor=4, incarnation=9, epoch=11)
    assert actor.restore(G, fresh_state(B)) == list(group.get("lost", ()))
    return actor, ring, made, chosen


def compare(slot, expected: dict[str, Any], sequence: int, *, chains: bool = True) -> None:
    a, num_rows = slot.arrays, len(expected["rows"])
    assert int(slot.envelope["num_rows"]) == num_rows
    standing = [[seen for seen, *_ in row] for row in expected["rows"]] + [expected["last"]]
    for t, row in enumerate(standing):
        for b, (seed, steps) in enumerate(row):
            for name, value in observation_of(seed, steps).items():
                np.testing.assert_array_equal(a[name][t, b], value)
            np.testing.assert_array_equal(a["action_mask"][t, b], mask_of(seed, steps))
    for t, row in enumerate(expected["rows"]):
        for b, (_, action, reward, terminated, truncated, valid) in enumerate(row):
            assert (a["action"][t, b], a["log_prob"][t, b]) == (action, np.float32(log_prob_of(action, t)))
            assert (a["reward"][t, b], a["valid"][t, b]) == (reward, valid)
            assert (a["terminated"][t, b], a["truncated"][t, b]) == (terminated, truncated)
    e = slot.envelope
    assert int(e["num_episodes"]) == len(expected["ends"])
    finals = []
    for row, (t, p, seed, steps, total, terminated, truncated, invalid, final) in zip(a["episode"], expected["ends"], strict=False):
        assert (row["row"], row["env"], row["num_steps"], row["seed"]) == (t, p.b, steps, seed)
        assert row["episode_return"] == pytest.approx(total, rel=1e-14)
        assert (row["terminated"], row["truncated"], row["invalid"]) == (terminated, truncated, invalid)
        if final is not None:
            finals.append((t, p.b, final))
    assert int(e["num_finals"]) == len(finals)
    for i, (t, b, (seed, steps)) in enumerate(finals):
        assert (a["final/row"][i], a["final/env"][i]) == (t, b)
        for name, value in observation_of(seed, steps).items():
            np.testing.assert_array_equal(a[f"final/{name}"][i], value)
    assert int(e["num_env_steps"]) == sum(valid for row in expected["rows"] for *_, valid in row)
    for name in ("cursor/start", "cursor/end"):
        for found, wanted in zip(a[name], expected[name], strict=True):
            assert tuple(found)[:4] == pytest.approx(wanted[:4], rel=1e-14)
            if chains:
                assert tuple(found)[4:] == wanted[4:]
    slot.check(RUN_ID, slot.identity)
    assert slot.identity.sequence == sequence


# ---- rows, episodes, checksums ---------------------------------------------------------------------------------------
def test_every_row_end_and_checksum_of_successive_rollouts():
    actor, ring, _, _ = host()
    oracle = Oracle()
    for sequence in range(5):
        ring.poison(sequence % 3)
        slot = actor.fill(sequence % 3, Identity(G, sequence, 0))
        assert slot is ring.slots[sequence % 3]
        expected = oracle.rollout(sequence, T)
        compare(slot, expected, sequence)
    ends = [row for row in expected["ends"] if row[6]]
    assert ends, "truncated episodes are among them"


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_checksums_hold_wherever_rollouts_are_cut(rows):
    actor, ring, _, _ = host()
    oracle = Oracle()
    for sequence in range(12):
        ring.poison(0)
        compare(actor.fill(0, Identity(G, sequence, 0), closing_after(rows)), oracle.rollout(sequence, rows), sequence)


def test_the_behaviour_is_shown_each_row_before_it_is_stepped():
    actor, ring, _, behaviour = host()
    for sequence in range(2):
        slot = actor.fill(sequence, Identity(G, sequence, 0))
        for t in range(T):
            shown = behaviour.seen[sequence * T + t]
            assert set(shown) == {"observation/camera", "observation/position", "action_mask"}
            for name, value in shown.items():
                np.testing.assert_array_equal(value, slot.arrays[name][t])
    assert behaviour.begun == [(G, 0), (G, 1)]
    assert len(behaviour.seen) == 2 * T
    assert ring.slots[2].arrays["policy_version"].max() == -1  # poison: nobody wrote there


@pytest.mark.parametrize("next_step", [False, True])
@pytest.mark.parametrize("rows", [1, 2, T])
def test_the_recurrent_state_is_that_of_the_running_episode_wherever_rollouts_are_cut(rows, next_step):
    """The behaviour's counts rows, and so does the observation; a last observation that has a row of its own is seen in its episode's state."""
    actor, ring, _, behaviour = host(next_step=next_step)
    for sequence in range(8):
        ring.poison(0)
        slot = actor.fill(0, Identity(G, sequence, 0), closing_after(rows) if rows < T else None, ((0, 2),) if sequence == 3 else ())
        num_rows, stands = int(slot.envelope["num_rows"]), slot.arrays["observation/position"][..., 1]
        shown = np.stack([state["policy_state/h"][:, 0] for state in behaviour.states])
        np.testing.assert_array_equal(shown, stands[:num_rows])
        np.testing.assert_array_equal(slot.arrays["policy_state/h"][:, 0], stands[0])
        np.testing.assert_array_equal(slot.arrays["policy_state/h/end"][:, 0], stands[num_rows])
        state = slot.arrays["policy_state/h"][:, 0]
        for t, resets in enumerate(slot.resets()):  # a learner comes to the same states
            state = np.where(resets, 0, state)
            np.testing.assert_array_equal(state, stands[t])
            state = state + 1
        behaviour.states.clear()


def test_the_state_that_a_behaviour_keeps_for_its_next_answer_is_not_the_groups():
    class Forgetful(ScriptedBehaviour):
        kept = np.zeros((B, 2), np.float32)

        def act(self, observation, state, row):
            self.kept[:] = state["policy_state/h"] + 1
            return super().act(observation, state, row)._replace(state={"policy_state/h": self.kept})

    actor, _, _, behaviour = host(behaviour=Forgetful())
    end = actor.fill(0, Identity(G, 0, 0)).arrays["policy_state/h/end"].copy()
    behaviour.kept[:] = 77  # it answered for another group
    np.testing.assert_array_equal(actor.fill(1, Identity(G, 1, 0)).arrays["policy_state/h"], end)


def test_the_next_rollout_begins_where_the_last_one_ended():
    actor, ring, _, _ = host()
    slots = [actor.fill(i, Identity(G, i, 0), closing_after(rows)) for i, rows in enumerate((6, 1, 4))]
    for before, after in pairwise(slots):
        end = int(before.envelope["num_rows"])
        for name in before.observation_names:
            np.testing.assert_array_equal(before.arrays[name][end], after.arrays[name][0])
        np.testing.assert_array_equal(before.arrays["cursor/end"], after.arrays["cursor/start"])
        np.testing.assert_array_equal(before.arrays["policy_state/h/end"], after.arrays["policy_state/h"])
    assert ring.slots[1].envelope["num_rows"] == 1


def test_reset_rows_of_a_next_step_autoreset_are_not_valid_and_count_nowhere():
    actor, _, _, _ = host(next_step=True)
    oracle = Oracle(next_step=True)
    unknown: set[int] = set()  # those whose reset fell between two rollouts: their checksums cannot be continued, nor are they asked for
    compared = 0
    for sequence in range(6):
        slot = actor.fill(0, Identity(G, sequence, 0))
        expected = oracle.rollout(sequence, T)
        compare(slot, expected, sequence, chains=False)
        unknown -= {p.b for _, p, *_ in expected["ends"]}
        unknown |= {p.b for p in oracle.places if p.resetting}
        for b in set(range(B)) - unknown:
            assert tuple(slot.arrays["cursor/end"][b])[4:] == expected["cursor/end"][b][4:]
            compared += 1
        assert int(slot.envelope["num_finals"]) == 0
        assert int(slot.envelope["num_env_steps"]) < T * B
    assert compared > 6


def closing_after(rows: int):
    calls = iter([False] * (rows - 1) + [True] * T)
    return lambda version: next(calls)


@pytest.mark.parametrize("rows", [1, 3, T])
def test_a_rollout_that_is_closed_early_holds_only_its_rows(rows):
    actor, ring, _, _ = host()
    oracle = Oracle()
    asked: list[int] = []

    def between_rows(first_version: int) -> bool:
        asked.append(first_version)
        return len(asked) == rows

    slot = actor.fill(0, Identity(G, 0, 0), between_rows)
    compare(slot, oracle.rollout(0, rows), 0)
    assert len(asked) == min(rows, T - 1)  # before every row but the first
    assert not slot.arrays["valid"][rows:].any()
    assert np.isnan(slot.arrays["reward"][rows:]).all()  # nothing else was touched
    assert (slot.arrays["observation/camera"][rows + 1 :] == 255).all()
    compare(actor.fill(1, Identity(G, 1, 0)), oracle.rollout(1, T), 1)
    assert ring.slots[1].envelope["num_rows"] == T


def test_the_version_of_each_row_is_that_of_its_action():
    actor, _, _, behaviour = host()
    behaviour.version = 5
    told: list[int] = []

    def between_rows(first_version: int) -> bool:
        told.append(first_version)
        behaviour.version = {2: 6, 4: 8}.get(len(told), behaviour.version)
        return False

    slot = actor.fill(0, Identity(G, 0, 0), between_rows)
    assert slot.arrays["policy_version"].tolist() == [[v] * B for v in (5, 5, 6, 6, 8, 8)]
    assert told == [5] * (T - 1)
    assert (int(slot.envelope["version_min"]), int(slot.envelope["version_max"])) == (5, 8)


def test_versions_of_rows_that_were_not_made_do_not_count():
    actor, ring, _, behaviour = host()
    ring.slots[0].arrays["policy_version"][:] = 99
    behaviour.version = 3
    slot = actor.fill(0, Identity(G, 0, 0), closing_after(2))
    assert (int(slot.envelope["version_min"]), int(slot.envelope["version_max"])) == (3, 3)


def test_the_envelope_says_who_made_what():
    actor, ring, _, _ = host()
    ring.slots[1].envelope["fate"], ring.slots[1].envelope["consumed_ns"] = Fate.TRAINED, 5
    e = actor.fill(1, Identity(G, 7, 3)).envelope
    expected = {
        "policy_id": 0, "group": G, "sequence": 7, "attempt": 3, "actor": 4, "incarnation": 9, "source": Source.STEPPED, "fate": Fate.IN_FLIGHT,
        "num_rows": T, "version_min": 0, "version_max": 0, "stream_epoch": 11, "received_ns": 0, "consumed_ns": 0, "num_agents": 1, "member": 0,
        "behaviour_id": 0,
    }  # fmt: skip
    assert {name: int(e[name]) for name in expected} == expected
    assert (e["schema_hash"].tobytes(), e["run_id"].tobytes()) == (ring.schema.hash, RUN_ID)
    assert 0 < int(e["begun_ns"]) <= int(e["finished_ns"])
    assert int(e["checksum"]) == ring.slots[1].checksum()


def test_a_slot_that_is_being_filled_is_named_and_unfinished():
    """What the supervisor reads when an actor dies in the middle."""
    seen = []

    class Looking(ScriptedBehaviour):
        def act(self, observation, state, row):
            e = ring.slots[0].envelope
            seen.append((ring.slots[0].identity, int(e["num_rows"]), int(e["num_env_steps"]), int(e["finished_ns"])))
            return super().act(observation, state, row)

    actor, ring, _, _ = host(behaviour=Looking())
    actor.fill(0, Identity(G, 0, 2))
    assert seen == [(Identity(G, 0, 2), t, 0, 0) for t in range(T)]


def test_snapshots_of_the_end_are_kept_at_their_length():
    actor, ring, _, _ = host(schema={"snapshot_bytes": 5}, snapshots=True)
    slot = actor.fill(0, Identity(G, 0, 0))
    counts = slot.arrays["cursor/end"]["num_steps"]
    assert slot.arrays["snapshot/size"].tolist() == [2, -1, 2]
    assert slot.arrays["snapshot"][0, :2].tolist() == [0, counts[0]]
    assert slot.arrays["snapshot"][2, :2].tolist() == [2, counts[2]]
    assert (ring.slots[1].arrays["snapshot"] == 255).all()


def test_without_mask_and_without_memory_a_rollout_is_the_same_otherwise():
    actor, _, made, behaviour = host(schema={"mask": False, "state": False})
    actor.restore(G, fresh_state(B, state=False))
    slot = actor.fill(0, Identity(G, 0, 0))
    assert set(behaviour.seen[0]) == {"observation/camera", "observation/position"}
    expected = Oracle().rollout(0, T)
    assert [tuple(c)[4:] for c in slot.arrays["cursor/end"]] == [c[4:] for c in expected["cursor/end"]]
    slot.check(RUN_ID, Identity(G, 0, 0))
    assert len(made) == 2


# ---- giving up and faults --------------------------------------------------------------------------------------------
def test_an_episode_that_is_given_up_ends_there_as_invalid():
    actor, _, made, _ = host()
    oracle = Oracle()
    give_up = ((1, 0), (3, 2))
    slot = actor.fill(0, Identity(G, 0, 0), None, give_up)
    compare(slot, oracle.rollout(0, T, give_up), 0)
    assert made[0].given_up == [(1, 0), (3, 2)]
    compare(actor.fill(1, Identity(G, 1, 0)), oracle.rollout(1, T), 1)


def test_a_fault_names_the_group_sequence_and_row_and_leaves_the_slot_unfinished():
    fault = EnvironmentFault("broke", {"env": 1})
    actor, ring, _, _ = host(fault=(T + 2, fault))
    actor.fill(0, Identity(G, 0, 0))
    with pytest.raises(EnvironmentFault) as caught:
        actor.fill(1, Identity(G, 1, 5))
    assert caught.value.report == {"env": 1, "group": G, "sequence": 1, "row": 2}
    assert int(ring.slots[1].envelope["num_rows"]) == 2
    assert int(ring.slots[1].envelope["finished_ns"]) == 0
    assert ring.slots[1].identity == Identity(G, 1, 5)


def test_what_a_fault_says_itself_is_kept():
    actor, _, _, _ = host(fault=(0, EnvironmentFault("broke", {"group": 77, "row": 88})))
    with pytest.raises(EnvironmentFault) as caught:
        actor.fill(0, Identity(G, 0, 0))
    assert caught.value.report == {"group": 77, "row": 88, "sequence": 0}


# ---- hosting ---------------------------------------------------------------------------------------------------------
def test_a_restored_group_replaces_the_one_before_and_released_ones_are_closed():
    actor, _, made, _ = host()
    state = fresh_state(B)
    actor.restore(G, state)
    assert [g.closed for g in made] == [1, 0]
    assert made[1].restored is state
    actor.restore(5, fresh_state(B))
    actor.release(G)
    actor.release(G)
    assert [g.closed for g in made] == [1, 1, 0]
    with pytest.raises(KeyError):
        actor.fill(0, Identity(G, 0, 0))
    actor.close()
    assert [g.closed for g in made] == [1, 1, 1]


def test_environments_that_could_not_be_rebuilt_begin_their_checksums_and_their_recurrent_state_anew():
    state = fresh_state(B)
    state.cursor["num_steps"], state.cursor["episode"] = 1, 4
    state.cursor["observation_crc"], state.cursor["reward_crc"] = [7, 8, 9], [17, 18, 19]
    state.policy_state["policy_state/h"][:] = 5
    actor, _, made, _ = host(lost=(1,))
    assert actor.restore(G, state) == [1]
    slot = actor.fill(0, Identity(G, 0, 0))
    assert slot.arrays["policy_state/h"][:, 0].tolist() == [5, 0, 5]
    start = slot.arrays["cursor/start"]
    assert start["episode"].tolist() == [4, 5, 4]
    assert start["observation_crc"].tolist() == [7, crc_of(seed_of(G, 1, 5), 0), 9]
    assert start["reward_crc"].tolist() == [17, 0, 19]
    assert len(made) == 2


@pytest.mark.parametrize("factory", [Drift, SnapshotDrift])
def test_a_group_that_moves_to_another_actor_goes_on_bit_for_bit(factory):
    def make(group: int):
        return make_group(EnvConfig(id="drift"), group, B, 3, factory)

    schema = rollout_schema(make(0).spec, policy_fields(), T, B)
    ring = poisoned_ring(schema, 6)
    stays, goes = (Actor(ring, ScriptedBehaviour(), make, run_id=RUN_ID) for _ in range(2))
    stays.restore(1, fresh_state(B))
    history = GroupHistory(B, (), "int64", {"policy_state/h": np.zeros((B, 2), np.float32)})
    for k in range(3):
        history.append(stays.fill(k, Identity(1, k, 0)), keep_actions=factory is Drift)
        assert goes.restore(1, history.state_at(k + 1)) == []
        one = stays.fill(4, Identity(1, k + 1, 0))
        other = goes.fill(5, Identity(1, k + 1, 1))
        same_rollout(one, other)
        stays.restore(1, history.state_at(k + 1))


def test_the_recorder_is_told_what_goes_on():
    told: list[tuple[int, int, int, int]] = []

    class Noting:
        def enter(self, activity: int, group: int = -1, env: int = -1, row: int = -1) -> None:
            told.append((activity, group, env, row))

    ring = poisoned_ring(scripted_schema(T, B), 1)
    actor = Actor(ring, ScriptedBehaviour(), lambda g: ScriptedGroup(g, B), run_id=RUN_ID, recorder=Noting())
    actor.restore(G, fresh_state(B))
    actor.fill(0, Identity(G, 0, 0), closing_after(2))
    assert told == [
        (Activity.RESTORING, G, -1, -1),
        (Activity.INFERRING, G, -1, 0),
        (Activity.STEPPING, G, -1, 0),
        (Activity.INFERRING, G, -1, 1),
        (Activity.STEPPING, G, -1, 1),
    ]
