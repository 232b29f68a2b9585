"""Where a group stood at the start of any rollout that is not consumed: against simulating the group again from the beginning."""

from __future__ import annotations

import numpy as np
import pytest

from rollout_fakes import (
    Drift,
    ScriptedBehaviour,
    SnapshotDrift,
    action_of,
    add_episode,
    fresh_state,
    poisoned_ring,
    policy_fields,
    same_rollout,
    scripted_schema,
    write_rollout,
)
from shoal.actors.actor import Actor
from shoal.config import EnvConfig
from shoal.environments import make_group
from shoal.experience.envelope import Identity
from shoal.experience.group_state import GroupHistory, from_bytes, pack, to_bytes, unpack
from shoal.experience.schema import rollout_schema
from shoal.types import CURSOR, GroupState

GROUP, B, T = 3, 3, 4
STATE = {"policy_state/h": np.zeros((B, 2), np.float32)}


def same_state(one: GroupState, other: GroupState) -> None:
    np.testing.assert_array_equal(one.cursor, other.cursor)
    assert one.cursor.dtype == other.cursor.dtype == CURSOR
    assert len(one.actions) == len(other.actions)
    for a, b in zip(one.actions, other.actions, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert one.snapshots == other.snapshots
    assert one.policy_state.keys() == other.policy_state.keys()
    for name in one.policy_state:
        np.testing.assert_array_equal(one.policy_state[name], other.policy_state[name])


def real_group(factory, num_rollouts: int, rows: list[int]):
    """Rollouts of a real environment, `rows[i % len]` rows each: (ring, make_actor). One slot per rollout and one to play in."""

    def make(group: int):
        return make_group(EnvConfig(id="drift"), group, B, 7, factory)

    spec = make(GROUP).spec
    ring = poisoned_ring(rollout_schema(spec, policy_fields(), T, B), num_rollouts + 1)

    def actor() -> Actor:
        return Actor(ring, ScriptedBehaviour(), make, run_id=bytes(16))

    first = actor()
    first.restore(GROUP, fresh_state(B))
    for k in range(num_rollouts):
        first.fill(k, Identity(GROUP, k, 0), closing_after(rows[k % len(rows)]))
    return ring, actor


def closing_after(rows: int):
    calls = iter([False] * (rows - 1) + [True] * T)
    return lambda version: next(calls)


@pytest.mark.parametrize("factory", [Drift, SnapshotDrift])
def test_every_unconsumed_start_is_rebuilt_bit_for_bit(factory):
    """From each start that the history still holds, another actor makes the following rollout with the same bits."""
    num, rows = 7, [4, 1, 3]
    ring, actor = real_group(factory, num, rows)
    spare = ring.slots[num]
    history = GroupHistory(B, (), "int64", STATE)
    for appended in range(num):
        history.append(ring.slots[appended], keep_actions=factory is Drift)
        consumed = max(0, appended - 2)
        history.forget_before(consumed)
        assert history.sequence == consumed
        for start in range(consumed, appended + 1):
            state = history.state_at(start)
            if factory is SnapshotDrift and start:
                assert all(snapshot is not None for snapshot in state.snapshots)
                assert all(len(a) == 0 for a in state.actions)
            elsewhere = actor()
            assert elsewhere.restore(GROUP, from_bytes(to_bytes(state))) == []
            ring.poison(num)
            elsewhere.fill(num, Identity(GROUP, start, 9), closing_after(rows[start % len(rows)]))
            same_rollout(spare, ring.slots[start])
            elsewhere.close()


def scripted_slots(num: int, **schema):
    """Rollouts of a group whose episodes go on from one to the next."""
    ring = poisoned_ring(scripted_schema(T, B, **schema), num)
    slots = [write_rollout(slot, Identity(GROUP, k, 0), num_rows=[4, 2, 3, 1][k % 4], tag=k) for k, slot in enumerate(ring.slots)]
    for k, slot in enumerate(slots):
        slot.arrays["cursor/start"]["num_steps"] = 10 * k
    return slots


def test_what_an_environment_that_could_not_be_put_back_did_before_is_forgotten():
    slots = scripted_slots(2)
    slots[1].arrays["cursor/start"]["num_steps"][1] = 0  # it was to go on with its episode, and began another
    history = GroupHistory(B, (), "int64", STATE)
    for slot in slots:
        history.append(slot, keep_actions=True)
    lengths = [len(actions) for actions in history.state_at(2).actions]
    assert lengths == [4 + 2, 2, 4 + 2]


def test_the_actions_of_running_episodes_are_kept_from_their_beginning():
    slots = scripted_slots(4)
    add_episode(slots[0], 1, 0)
    add_episode(slots[0], 2, 0)  # twice: the last one counts
    add_episode(slots[2], 2, 1)  # at the last row: the next episode has no action yet
    add_episode(slots[3], 0, 2)
    history = GroupHistory(B, (), "int64", STATE)
    per_env: list[list[int]] = [[], [], []]
    expected = [[list(a) for a in per_env]]
    for k, slot in enumerate(slots):
        ends = {(1, 0), (2, 0)} if k == 0 else {2: {(2, 1)}, 3: {(0, 2)}}.get(k, set())
        for t in range(int(slot.envelope["num_rows"])):
            for b in range(B):
                per_env[b].append((t * 10 + b + 100 * k) % 5)
                if (t, b) in ends:
                    per_env[b].clear()
        expected.append([list(a) for a in per_env])
        history.append(slot, keep_actions=True)
    for start in range(5):
        state = history.state_at(start)
        assert [a.tolist() for a in state.actions] == expected[start]
        assert all(a.dtype == np.int64 for a in state.actions)
        assert state.cursor["episode"].tolist() == [start] * B
        assert state.snapshots == [None] * B
        h = np.zeros((B, 2)) if start == 0 else slots[start - 1].arrays["policy_state/h/end"]
        np.testing.assert_array_equal(state.policy_state["policy_state/h"], h)
    history.forget_before(3)
    for start in (3, 4):
        assert [a.tolist() for a in history.state_at(start).actions] == expected[start]
        assert history.state_at(start).cursor["episode"].tolist() == [start] * B
    np.testing.assert_array_equal(history.state_at(3).policy_state["policy_state/h"], slots[2].arrays["policy_state/h/end"])


def test_of_a_paced_rollout_only_the_rows_that_an_environment_made_are_its_actions():
    slots = scripted_slots(2)
    slots[0].envelope["paced"] = True
    slots[0].arrays["valid"][:] = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    add_episode(slots[0], 1, 0)
    history = GroupHistory(B, (), "int64", STATE)
    for slot in slots:
        history.append(slot, keep_actions=True)
    assert [a.tolist() for a in history.state_at(1).actions] == [[20 % 5], [1, 11 % 5], [2]]
    after = [[(100 + 10 * t + b) % 5 for t in range(2)] for b in range(B)]
    assert [a.tolist() for a in history.state_at(2).actions] == [[20 % 5, *after[0]], [1, 11 % 5, *after[1]], [2, *after[2]]]


def test_without_actions_none_are_kept():
    history = GroupHistory(B, (2,), "float32", {})
    slots = scripted_slots(2)
    for slot in slots:
        history.append(slot, keep_actions=False)
    history.forget_before(1)
    for start in (1, 2):
        assert [a.shape for a in history.state_at(start).actions] == [(0, 2)] * B
        assert all(a.dtype == np.float32 for a in history.state_at(start).actions)
        assert history.state_at(start).policy_state == {}


def test_snapshots_are_taken_at_their_own_length_and_none_where_there_is_none():
    slots = scripted_slots(2, snapshot_bytes=5)
    for k, slot in enumerate(slots):
        slot.arrays["snapshot"][0, :3] = [k, 8, 9]
        slot.arrays["snapshot/size"][:] = [3, -1, 0]
    history = GroupHistory(B, (), "int64", STATE)
    for slot in slots:
        history.append(slot, keep_actions=True)
    assert history.state_at(0).snapshots == [None] * B
    assert history.state_at(1).snapshots == [bytes([0, 8, 9]), None, b""]
    assert history.state_at(2).snapshots == [bytes([1, 8, 9]), None, b""]
    history.forget_before(2)
    assert history.state_at(2).snapshots == [bytes([1, 8, 9]), None, b""]


def test_what_is_remembered_is_no_view_of_the_slot():
    (slot,) = scripted_slots(1, snapshot_bytes=5)
    slot.arrays["snapshot/size"][:] = 2
    history = GroupHistory(B, (), "int64", STATE)
    history.append(slot, keep_actions=True)
    before = to_bytes(history.state_at(1))
    for array in slot.arrays.values():
        array.reshape(-1).view(np.uint8)[:] = 0xFF
    assert to_bytes(history.state_at(1)) == before
    state = history.state_at(1)
    state.cursor["episode"] = 99
    state.snapshots[0] = b"x"
    assert to_bytes(history.state_at(1)) == before


def test_only_the_next_rollout_is_taken():
    slots = scripted_slots(4)
    history = GroupHistory(B, (), "int64", STATE)
    with pytest.raises(ValueError, match=r"^group 3: rollout 1 came, 0 was next$"):
        history.append(slots[1], keep_actions=True)
    history.append(slots[0], keep_actions=True)
    history.append(slots[1], keep_actions=True)
    history.forget_before(1)
    with pytest.raises(ValueError, match=r"^group 3: rollout 3 came, 2 was next$"):
        history.append(slots[3], keep_actions=True)
    with pytest.raises(ValueError, match="rollout 1 came, 2 was next"):
        history.append(slots[1], keep_actions=True)
    history.append(slots[2], keep_actions=True)
    history.forget_before(0)
    assert history.sequence == 1


def test_a_history_that_was_reset_goes_on_from_there():
    slots = scripted_slots(4)
    history = GroupHistory(B, (), "int64", STATE)
    for slot in slots[:3]:
        history.append(slot, keep_actions=True)
    at_two, at_three = history.state_at(2), history.state_at(3)
    history.append(slots[3], keep_actions=True)
    history.reset_to(2, at_two)
    assert history.sequence == 2
    same_state(history.state_at(2), at_two)
    history.append(slots[2], keep_actions=True)
    same_state(history.state_at(3), at_three)
    history.forget_before(3)
    same_state(history.state_at(3), at_three)


def whole_state() -> GroupState:
    cursor = np.zeros(B, CURSOR)
    for i, name in enumerate(CURSOR.names or ()):
        cursor[name] = np.arange(B) + 10 * i + 1
    actions = [np.arange(b * 2, dtype=np.float32).reshape(b, 2) for b in range(B)]
    return GroupState(cursor, actions, [b"\x01\x00", None, b""], {"policy_state/h": np.arange(6, dtype=np.float32).reshape(B, 2)})


def test_a_packed_state_has_these_arrays():
    packed = pack(whole_state())
    assert {n: (a.dtype.name, a.shape) for n, a in packed.items()} == {
        "cursor": ("uint8", (B, CURSOR.itemsize)),
        "actions/0": ("float32", (0, 2)),
        "actions/1": ("float32", (1, 2)),
        "actions/2": ("float32", (2, 2)),
        "snapshot/0": ("uint8", (2,)),
        "snapshot/2": ("uint8", (0,)),
        "state/policy_state/h": ("float32", (B, 2)),
    }


def test_packing_and_bytes_lose_nothing():
    state = whole_state()
    same_state(unpack(pack(state)), state)
    same_state(from_bytes(to_bytes(state)), state)
    assert isinstance(to_bytes(state), bytes)


def test_an_unpacked_cursor_is_a_copy():
    state = whole_state()
    unpack(pack(state)).cursor["episode"] = 99
    assert state.cursor["episode"].tolist() == [1, 2, 3]


def test_actions_that_are_not_contiguous_are_packed_in_their_order():
    state = whole_state()
    state.actions[2] = np.arange(8, dtype=np.int64).reshape(4, 2)[:, 1]
    assert from_bytes(to_bytes(state)).actions[2].tolist() == [1, 3, 5, 7]
    assert action_of(0, 0, 0, 0) == 0
