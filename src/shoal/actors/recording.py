"""How a rollout is written down: its envelope, the episodes that ended inside, and the checksums of the running ones.

Legend: T rows, B environments of a group.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from shoal.experience.envelope import Fate, Identity, Source
from shoal.experience.ring import Slot
from shoal.types import Array, Arrays, Ended, EnvironmentGroup, GroupStep


def open_envelope(slot: Slot, identity: Identity, run_id: bytes, who: tuple[int, int], epoch: int) -> None:
    e: Any = slot.envelope
    e["num_rows"] = 0
    e["schema_hash"], e["run_id"] = np.void(slot.schema.hash), np.void(run_id)
    e["group"], e["sequence"], e["attempt"] = identity
    e["actor"], e["incarnation"] = who
    e["source"], e["fate"], e["policy_id"] = Source.STEPPED, Fate.IN_FLIGHT, 0
    e["paced"] = False
    e["num_env_steps"] = e["num_episodes"] = e["num_finals"] = 0
    e["stream_epoch"], e["num_agents"] = epoch, 1
    e["member"] = e["behaviour_id"] = 0
    e["received_ns"] = e["consumed_ns"] = e["finished_ns"] = 0
    e["begun_ns"] = time.monotonic_ns()


def record_ends(slot: Slot, ends: Sequence[tuple[int, Ended]]) -> None:
    """Write down the episodes that ended inside, as (row, what it came to) in the order of their rows."""
    a, envelope = slot.arrays, slot.envelope
    kept = [(t, ended.env, ended.final) for t, ended in ends if ended.final is not None]
    envelope["num_episodes"], envelope["num_finals"] = len(ends), len(kept)
    if ends:
        rows = a["episode"][: len(ends)]
        t, b = [t for t, _ in ends], [ended.env for _, ended in ends]
        rows["row"], rows["env"] = t, b
        rows["seed"], rows["num_steps"] = [ended.seed for _, ended in ends], [ended.num_steps for _, ended in ends]
        rows["episode_return"] = [ended.episode_return for _, ended in ends]
        rows["terminated"], rows["truncated"], rows["invalid"] = a["terminated"][t, b], a["truncated"][t, b], ~a["valid"][t, b]
    if kept:
        a["final/row"][: len(kept)], a["final/env"][: len(kept)] = [t for t, _, _ in kept], [b for _, b, _ in kept]
        for name in kept[0][2]:
            into = a[f"final/{name}"]
            for place, (_, _, final) in enumerate(kept):
                into[place] = final[name]


def next_state(state: Arrays, step: GroupStep) -> Arrays:
    """The recurrent state before the next row, for the one after this row: zeros where that row begins an episode, as Slot.resets has it."""
    begins_B = ~step.valid_B
    begins_B[[ended.env for ended in step.ended if ended.final is not None]] = True
    return {name: np.where(begins_B.reshape(-1, *(1,) * (value.ndim - 1)), value.dtype.type(0), value) for name, value in state.items()}


def chain_checksums(slot: Slot, start: Array, end: Array) -> None:
    """Continue each running episode's checksums over the new rows, or begin them anew after its last end.

    The chain goes over the reset observation and each one after it; a rollout adds its rows 1 to T, since row 0 was added before.
    """
    rewards, used = slot.arrays["reward"], slot.rows_used()
    last = np.full(len(start), -1)
    for row in slot.arrays["episode"][: int(slot.envelope["num_episodes"])]:
        last[row["env"]] = row["row"]
    skip = _reset_rows(slot, last)
    observations = {n: slot.arrays[n] for n in slot.observation_names if n != "action_mask"}
    for b in range(len(start)):
        fresh = last[b] >= 0
        crc = 0 if fresh else int(start["observation_crc"][b])
        first = last[b] + 1 + skip[b]
        rows = slice(first if fresh else 1, used[b] + 1)
        end["observation_crc"][b] = crc_rows(observations, b, rows, crc)
        reward_crc = 0 if fresh else int(start["reward_crc"][b])
        end["reward_crc"][b] = zlib.crc32(np.ascontiguousarray(rewards[first : used[b], b]).data, reward_crc)


def _reset_rows(slot: Slot, last: Array) -> Array:
    """1 for environments whose row after the last end is the invalid reset row of a NEXT_STEP autoreset, else 0."""
    skip = np.zeros(len(last), np.int64)
    if slot.envelope["paced"]:
        return skip
    num_rows = int(slot.envelope["num_rows"])
    for b in np.flatnonzero(last >= 0):
        t = last[b] + 1
        skip[b] = int(t < num_rows and not slot.arrays["valid"][t, b])
    return skip


def crc_rows(arrays: Arrays, b: int, rows: slice, crc: int, *, batched: bool = True) -> int:
    """crc32 of one environment's observations, row by row, each row's fields in schema order."""
    columns = [np.ascontiguousarray(array[rows, b] if batched else array[b][None]) for array in arrays.values()]
    if len(columns) == 1:
        return zlib.crc32(columns[0].data, crc)
    for t in range(len(columns[0])):
        for column in columns:
            crc = zlib.crc32(column[t : t + 1].data, crc)
    return crc


def first_observation(group: EnvironmentGroup, slot: Slot) -> Arrays:
    """The group's current observation, [B, ...] by field name, without the mask."""
    out = {n: np.zeros_like(slot.arrays[n][0]) for n in slot.observation_names}
    group.observe(out)
    out.pop("action_mask", None)
    return out
