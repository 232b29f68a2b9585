"""How a rollout is written down: its envelope, the episodes that ended inside, and the checksums of the running ones.

Legend: T rows, B environments of a group.
"""

from __future__ import annotations

import time
import zlib
from typing import Any

import numpy as np

from shoal.experience.envelope import Fate, Identity, Source
from shoal.experience.ring import Slot
from shoal.types import Array, Arrays, EnvironmentGroup


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


def record_end(slot: Slot, t: int, b: int, seed: int, final: Arrays | None) -> None:
    """An episode ended at row t of environment b. `final`: its true last observation, None where row t + 1 holds it."""
    a, envelope = slot.arrays, slot.envelope
    row: Any = a["episode"][int(envelope["num_episodes"])]
    row["row"], row["env"], row["seed"] = t, b, seed
    row["terminated"], row["truncated"], row["invalid"] = a["terminated"][t, b], a["truncated"][t, b], not a["valid"][t, b]
    envelope["num_episodes"] += 1
    if final is not None:
        place = int(envelope["num_finals"])
        a["final/row"][place], a["final/env"][place] = t, b
        for name, value in final.items():
            a[f"final/{name}"][place] = value
        envelope["num_finals"] += 1


def complete_episodes(slot: Slot, start: Array) -> None:
    """Return and length of the episodes that ended, from the rewards in the slot and what the episode had before it."""
    reward, valid = slot.arrays["reward"], slot.arrays["valid"]
    begun = {b: (0, float(start["episode_return"][b]), int(start["num_steps"][b])) for b in range(len(start))}
    for row in slot.arrays["episode"][: int(slot.envelope["num_episodes"])]:
        t, b = int(row["row"]), int(row["env"])
        first, before_return, before_steps = begun[b]
        row["episode_return"] = before_return + float(np.cumsum(reward[first : t + 1, b])[-1])
        row["num_steps"] = before_steps + int(valid[first : t + 1, b].sum())
        begun[b] = (t + 1, 0.0, 0)


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
