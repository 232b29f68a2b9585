"""Group states on their way: where each environment group stands at the start of a rollout, kept, packed and unpacked.

`GroupHistory` follows one group through its rollouts. From every finished slot it keeps what is needed to put the group back to
the start of any rollout that is not yet consumed: cursors, and either the environments' snapshots or the actions of the running
episodes. numpy and safetensors only; nothing is pickled.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shoal.errors import SchemaError
from shoal.experience.ring import Slot
from shoal.types import CURSOR, Array, Arrays, GroupState


@dataclass
class _Finished:
    """What one finished rollout adds to its group's history."""

    sequence: int
    actions: Array | None  # [num_rows, B, ...]
    rows_used: Array  # [B]
    fresh: Array  # [B], an episode began at its first row: what was kept of the one before is void (it could not be rebuilt)
    last_end: Array  # [B], row of the last episode end, -1 where none
    cursor: Array
    snapshots: list[bytes | None]
    policy_state: Arrays


class GroupHistory:
    """The states of one group at the starts of its unconsumed rollouts. `sequence` is the first of them."""

    def __init__(self, num_envs: int, action_shape: tuple[int, ...], action_dtype: str, policy_state: Arrays) -> None:
        self.num_envs = num_envs
        self._empty = np.zeros((0, *action_shape), action_dtype)
        self.sequence = 0
        self._cursor = np.zeros(num_envs, CURSOR)
        self._chunks: list[list[Array]] = [[] for _ in range(num_envs)]
        self._snapshots: list[bytes | None] = [None] * num_envs
        self._policy_state = policy_state
        self._finished: deque[_Finished] = deque()

    def append(self, slot: Slot, keep_actions: bool) -> None:
        """Remember a finished rollout, which must be the next of its group."""
        envelope, a = slot.envelope, slot.arrays
        num_rows, sequence = int(envelope["num_rows"]), int(envelope["sequence"])
        expected = self.sequence + len(self._finished)
        if sequence != expected:
            raise ValueError(f"group {int(envelope['group'])}: rollout {sequence} came, {expected} was next")
        last = np.full(self.num_envs, -1)
        for row in a["episode"][: int(envelope["num_episodes"])]:
            last[row["env"]] = row["row"]
        snapshots: list[bytes | None] = [None] * self.num_envs
        if "snapshot" in a:
            sizes = a["snapshot/size"]
            snapshots = [a["snapshot"][b, : sizes[b]].tobytes() if sizes[b] >= 0 else None for b in range(self.num_envs)]
        states = {n: a[f"{n}/end"].copy() for n in self._policy_state}
        actions = a["action"][:num_rows].copy() if keep_actions else None
        self._finished.append(
            _Finished(
                sequence, actions, slot.rows_used(), a["cursor/start"]["num_steps"] == 0, last, a["cursor/end"].copy(), snapshots, states
            )
        )

    def forget_before(self, sequence: int) -> None:
        """Rollouts before `sequence` are consumed: no one will ask for their starts again."""
        while self.sequence < sequence:
            done = self._finished.popleft()
            self._chunks = self._extended(self._chunks, done)
            self._cursor, self._snapshots, self._policy_state = done.cursor, done.snapshots, done.policy_state
            self.sequence += 1

    @staticmethod
    def _extended(chunks: list[list[Array]], done: _Finished) -> list[list[Array]]:
        if done.actions is None:
            return chunks
        out = []
        for b, before in enumerate(chunks):
            end = int(done.last_end[b])
            rows = done.actions[end + 1 : done.rows_used[b], b]
            out.append([rows] if end >= 0 or done.fresh[b] else [*before, rows])
        return out

    def state_at(self, sequence: int) -> GroupState:
        """The group's state at the start of rollout `sequence`, one of the unconsumed or the next to be made."""
        chunks, cursor, snapshots, states = self._chunks, self._cursor, self._snapshots, self._policy_state
        for done in self._finished:
            if done.sequence >= sequence:
                break
            chunks = self._extended(chunks, done)
            cursor, snapshots, states = done.cursor, done.snapshots, done.policy_state
        actions = [np.concatenate([self._empty, *parts]) for parts in chunks]
        return GroupState(cursor.copy(), actions, list(snapshots), dict(states))

    def reset_to(self, sequence: int, state: GroupState) -> None:
        """Stand at the start of `sequence`, and know nothing of what came after."""
        self.sequence = sequence
        self._cursor = state.cursor
        self._chunks = [[actions] for actions in state.actions]
        self._snapshots, self._policy_state = state.snapshots, state.policy_state
        self._finished.clear()


def pack(state: GroupState) -> Arrays:
    """A group state as named arrays, for a checkpoint or a message."""
    out: Arrays = {"cursor": state.cursor.view(np.uint8).reshape(len(state.cursor), CURSOR.itemsize)}
    for b, actions in enumerate(state.actions):
        out[f"actions/{b}"] = np.ascontiguousarray(actions)
    for b, snapshot in enumerate(state.snapshots):
        if snapshot is not None:
            out[f"snapshot/{b}"] = np.frombuffer(snapshot, np.uint8)
    for name, value in state.policy_state.items():
        out[f"state/{name}"] = value
    return out


def unpack(arrays: Arrays) -> GroupState:
    """The inverse of `pack`."""
    cursor = np.ascontiguousarray(arrays["cursor"]).view(CURSOR)[:, 0]
    envs = range(len(cursor))
    snapshots = [arrays[f"snapshot/{b}"].tobytes() if f"snapshot/{b}" in arrays else None for b in envs]
    states = {n.removeprefix("state/"): v for n, v in arrays.items() if n.startswith("state/")}
    return GroupState(cursor.copy(), [arrays[f"actions/{b}"] for b in envs], snapshots, states)


def to_bytes(state: GroupState) -> bytes:
    return bytes(save(pack(state)))


def from_bytes(data: bytes) -> GroupState:
    """The inverse of `to_bytes`. Raises SchemaError for bytes that are no group's state."""
    try:
        arrays: dict[str, Any] = load(data)
        return unpack(arrays)
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise SchemaError(f"not the state of a group: {error}") from error
