"""The actor: fills rollouts.

A lease names a slot and a rollout (group, sequence, attempt). `Actor.fill` steps that group with the behaviour's actions, writes
every row straight into the slot, and finishes the envelope.

    consumes    leases and new weights (between two steps, where the caller lets it)
    waits for   nothing but the environments themselves
    on failure  raises EnvironmentFault; the slot is left unfinished, and its lease is given up by whoever supervises

Legend: T rows, B environments of the group.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.errors import EnvironmentFault
from shoal.experience.envelope import Fate, Identity, Source
from shoal.experience.ring import Ring, Slot
from shoal.types import Activity, ActivityRecorder, Array, Arrays, Behaviour, EnvironmentGroup, GroupState, NullRecorder


@dataclass
class _Hosted:
    """A group that lives here: its environments, where it stands, and the recurrent state it goes on with."""

    group: EnvironmentGroup
    cursor: Array  # CURSOR [B] with checksums, at the start of the next rollout
    state: Arrays


class Actor:
    """Hosts groups. `between_rows(first_version) -> bool` is asked before every row but the first: True closes the rollout early."""

    def __init__(
        self,
        ring: Ring,
        behaviour: Behaviour,
        make_group: Callable[[int], EnvironmentGroup],
        *,
        run_id: bytes,
        actor: int = 0,
        incarnation: int = 0,
        epoch: int = 0,
        recorder: ActivityRecorder | None = None,
    ) -> None:
        self._recorder = recorder or NullRecorder()
        self._ring = ring
        self._behaviour = behaviour
        self._make_group = make_group
        self._run_id = run_id
        self._who = (actor, incarnation)
        self._epoch = epoch
        self._hosted: dict[int, _Hosted] = {}

    def restore(self, group: int, state: GroupState) -> list[int]:
        """Host `group`, standing at `state`. Returns the environments that could not be rebuilt and began a new episode."""
        self._recorder.enter(Activity.RESTORING, group)
        self.release(group)
        environments = self._make_group(group)
        lost = environments.restore(state)
        cursor = environments.cursor()
        for field in ("observation_crc", "reward_crc"):
            cursor[field] = state.cursor[field]
        fresh = (cursor["num_steps"] == 0) | np.isin(np.arange(len(cursor)), lost)
        self._hosted[group] = _Hosted(environments, cursor, state.policy_state)
        if fresh.any():
            first = _first_observation(environments, self._ring.slots[0])
            for b in np.flatnonzero(fresh):
                cursor["observation_crc"][b] = _crc_rows(first, int(b), slice(None), 0, batched=False)
                cursor["reward_crc"][b] = 0
        return lost

    def release(self, group: int) -> None:
        """Stop hosting `group`: it lives elsewhere from now on."""
        if group in self._hosted:
            self._hosted.pop(group).group.close()

    def close(self) -> None:
        for group in list(self._hosted):
            self.release(group)

    def fill(
        self,
        slot_index: int,
        identity: Identity,
        between_rows: Callable[[int], bool] | None = None,
        give_up: Sequence[tuple[int, int]] = (),
    ) -> Slot:
        """Make one rollout into a slot and return it, finished.

        Args:
          give_up: (row, env) at which an episode is ended as invalid instead of stepped, because its fault came twice.
        """
        slot, hosted = self._ring.slots[slot_index], self._hosted[identity.group]
        _open_envelope(slot, identity, self._run_id, self._who, self._epoch)
        slot.arrays["cursor/start"][:] = hosted.cursor
        for name, value in hosted.state.items():
            slot.arrays[name][:] = value
        self._behaviour.begin(identity.group, identity.sequence)
        try:
            self._step_rows(slot, hosted, between_rows, give_up)
        except EnvironmentFault as fault:
            fault.report.setdefault("group", identity.group)
            fault.report.setdefault("sequence", identity.sequence)
            fault.report.setdefault("row", int(slot.envelope["num_rows"]))
            raise
        self._finish(slot, hosted)
        return slot

    def _step_rows(
        self, slot: Slot, hosted: _Hosted, between_rows: Callable[[int], bool] | None, give_up: Sequence[tuple[int, int]]
    ) -> None:
        a, rows, group, behaviour = slot.arrays, slot.rows, hosted.group, self._behaviour
        action, reward, terminated, truncated = a["action"], a["reward"], a["terminated"], a["truncated"]
        valid, version, envelope, state = a["valid"], a["policy_version"], slot.envelope, hosted.state
        enter, index = self._recorder.enter, int(envelope["group"])
        group.observe(rows[0])
        num_finals = num_episodes = 0
        cursor = group.cursor()
        for t in range(slot.schema.num_rows):
            if t and between_rows is not None and between_rows(int(version[0, 0])):
                break
            enter(Activity.INFERRING, index, -1, t)
            acted = behaviour.act(rows[t], state, t)
            action[t] = acted.action_B
            state = acted.state
            for name, value in acted.outputs.items():
                a[name][t] = value
            enter(Activity.STEPPING, index, -1, t)
            for _, b in filter(lambda place: place[0] == t, give_up):
                group.give_up(b)
            step = group.step(action[t], rows[t + 1])
            reward[t], terminated[t], truncated[t] = step.reward_B, step.terminated_B, step.truncated_B
            valid[t], version[t] = step.valid_B, acted.version
            for b, final in step.ended:
                _record_episode(slot, num_episodes, t, b, cursor, step)
                num_episodes += 1
                if final is not None:
                    a["final/row"][num_finals], a["final/env"][num_finals] = t, b
                    for name, value in final.items():
                        a[f"final/{name}"][num_finals] = value
                    num_finals += 1
            if step.ended:
                cursor = group.cursor()
            envelope["num_rows"] = t + 1
        envelope["num_finals"], envelope["num_episodes"] = num_finals, num_episodes
        hosted.state = state

    def _finish(self, slot: Slot, hosted: _Hosted) -> None:
        a, envelope = slot.arrays, slot.envelope
        num_rows = int(envelope["num_rows"])
        cursor = hosted.group.cursor()
        _chain_checksums(slot, num_rows, hosted.cursor, cursor)
        _complete_episodes(slot, hosted.cursor)
        a["cursor/end"][:] = cursor
        hosted.cursor = cursor
        for name, value in hosted.state.items():
            a[f"{name}/end"][:] = value
        if "snapshot" in a:
            for b, snapshot in enumerate(hosted.group.snapshots()):
                a["snapshot/size"][b] = -1 if snapshot is None else len(snapshot)
                if snapshot is not None:
                    a["snapshot"][b, : len(snapshot)] = np.frombuffer(snapshot, np.uint8)
        versions = a["policy_version"][:num_rows]
        a["valid"][num_rows:] = False
        envelope["num_env_steps"] = int(a["valid"][:num_rows].sum())
        envelope["version_min"], envelope["version_max"] = versions.min(), versions.max()
        envelope["checksum"] = slot.checksum()
        envelope["finished_ns"] = time.monotonic_ns()


def _open_envelope(slot: Slot, identity: Identity, run_id: bytes, who: tuple[int, int], epoch: int) -> None:
    e: Any = slot.envelope
    e["num_rows"] = 0
    e["schema_hash"], e["run_id"] = np.void(slot.schema.hash), np.void(run_id)
    e["group"], e["sequence"], e["attempt"] = identity
    e["actor"], e["incarnation"] = who
    e["source"], e["fate"], e["policy_id"] = Source.STEPPED, Fate.IN_FLIGHT, 0
    e["num_env_steps"] = e["num_episodes"] = e["num_finals"] = 0
    e["stream_epoch"], e["num_agents"] = epoch, 1
    e["member"] = e["behaviour_id"] = 0
    e["received_ns"] = e["consumed_ns"] = e["finished_ns"] = 0
    e["begun_ns"] = time.monotonic_ns()


def _record_episode(slot: Slot, index: int, t: int, b: int, cursor: Array, step: Any) -> None:
    row: Any = slot.arrays["episode"][index]
    row["row"], row["env"], row["seed"] = t, b, cursor["seed"][b]
    row["terminated"], row["truncated"], row["invalid"] = step.terminated_B[b], step.truncated_B[b], False


def _complete_episodes(slot: Slot, start: Array) -> None:
    """Return and length of the episodes that ended, from the rewards in the slot and what the episode had before it."""
    reward, valid = slot.arrays["reward"], slot.arrays["valid"]
    begun = {b: (0, float(start["episode_return"][b]), int(start["num_steps"][b])) for b in range(len(start))}
    for row in slot.arrays["episode"][: int(slot.envelope["num_episodes"])]:
        t, b = int(row["row"]), int(row["env"])
        first, before_return, before_steps = begun[b]
        row["episode_return"] = before_return + float(np.cumsum(reward[first : t + 1, b])[-1])
        row["num_steps"] = before_steps + int(valid[first : t + 1, b].sum())
        begun[b] = (t + 1, 0.0, 0)


def _chain_checksums(slot: Slot, num_rows: int, start: Array, end: Array) -> None:
    """Continue each running episode's checksums over the new rows, or begin them anew after its last end.

    The chain goes over the reset observation and each one after it; a rollout adds its rows 1 to T, since row 0 was added before.
    """
    rewards = slot.arrays["reward"]
    last = np.full(len(start), -1)
    for row in slot.arrays["episode"][: int(slot.envelope["num_episodes"])]:
        last[row["env"]] = row["row"]
    skip = _reset_rows(slot, last)
    observations = {n: slot.arrays[n] for n in slot.observation_names if n != "action_mask"}
    for b in range(len(start)):
        fresh = last[b] >= 0
        crc = 0 if fresh else int(start["observation_crc"][b])
        first = last[b] + 1 + skip[b]
        rows = slice(first if fresh else 1, num_rows + 1)
        end["observation_crc"][b] = _crc_rows(observations, b, rows, crc)
        reward_crc = 0 if fresh else int(start["reward_crc"][b])
        end["reward_crc"][b] = zlib.crc32(np.ascontiguousarray(rewards[first:num_rows, b]).data, reward_crc)


def _reset_rows(slot: Slot, last: Array) -> Array:
    """1 for environments whose row after the last end is the invalid reset row of a NEXT_STEP autoreset, else 0."""
    skip = np.zeros(len(last), np.int64)
    num_rows = int(slot.envelope["num_rows"])
    for b in np.flatnonzero(last >= 0):
        t = last[b] + 1
        skip[b] = int(t < num_rows and not slot.arrays["valid"][t, b])
    return skip


def _crc_rows(arrays: Arrays, b: int, rows: slice, crc: int, *, batched: bool = True) -> int:
    """crc32 of one environment's observations, row by row, each row's fields in schema order."""
    columns = [np.ascontiguousarray(array[rows, b] if batched else array[b][None]) for array in arrays.values()]
    if len(columns) == 1:
        return zlib.crc32(columns[0].data, crc)
    for t in range(len(columns[0])):
        for column in columns:
            crc = zlib.crc32(column[t : t + 1].data, crc)
    return crc


def _first_observation(group: EnvironmentGroup, slot: Slot) -> Arrays:
    """The group's current observation, [B, ...] by field name, without the mask."""
    out = {n: np.zeros_like(slot.arrays[n][0]) for n in slot.observation_names}
    group.observe(out)
    out.pop("action_mask", None)
    return out
