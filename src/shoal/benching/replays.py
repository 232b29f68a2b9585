"""`shoal bench replay`: how fast the experience replay is filled and sampled, alone on one core.

It is filled as the learner fills it, rollout by rollout, until it is full and old steps make room; then batches are drawn and their priorities
updated. Every episode is as long as a rollout, so each row of a batch, the true last observations and the resets are there.

Legend: T rows of a rollout, B environments of a group.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from shoal.benching.measuring import cpu_us, machine, repeat
from shoal.config import ReplayConfig
from shoal.experience.envelope import Identity
from shoal.experience.replay import Replay
from shoal.experience.ring import Slot, allocate
from shoal.experience.schema import rollout_schema
from shoal.types import Array, EnvironmentSpec, FieldSpec, LeafSpec

GROUPS, GROUP_SIZE, ROLLOUT_LENGTH, BATCH, N_STEP = 4, 8, 128, 512, 3  # sampling's defaults; the batch of Horgan et al. 2018
_FRAMES, _SIDE = 4, 84


@dataclass(frozen=True)
class Case:
    """What is stored, and how many steps of it."""

    name: str
    capacity_steps: int
    shape: tuple[int, ...]
    dtype: str
    rollout_length: int = ROLLOUT_LENGTH


CASES = (
    Case("vector", 1_000_000, (4,), "float32"),  # CartPole's
    Case("short rollouts", 1_000_000, (4,), "float32", rollout_length=16),
    Case("stacks", 40_000, (_FRAMES, _SIDE, _SIDE), "uint8"),  # Atari's
)


def bench_replay(*, seconds: float = 10.0, told: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure prioritised insertion and sampling.

    Args:
      seconds: of each figure; filling comes on top.
    Returns:
      settings, date, machine, and `cases`: by name, capacity and size of the replay, and transitions per second of one core's time.
    """
    cases = {}
    for case in CASES:
        told(f"replay: {case.name}")
        cases[case.name] = _measure(case, seconds)
    return {
        "settings": {"groups": GROUPS, "group_size": GROUP_SIZE, "batch": BATCH, "n_step": N_STEP, "prioritised": True},
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {**machine(), "load": round(os.getloadavg()[0], 2)},
        "cases": cases,
    }


def _measure(case: Case, seconds: float) -> dict[str, Any]:
    slots = _rollouts(case)
    config = ReplayConfig(capacity_steps=case.capacity_steps, prioritised=True, n_step=N_STEP)
    replay = Replay(slots[0].schema, GROUPS, config, gamma=0.99)
    inserted = 0

    def insert() -> int:
        nonlocal inserted
        for slot in slots:
            slot.envelope["sequence"] = inserted
            replay.insert(slot, inserted)
        inserted += 1
        return sum(int(slot.envelope["num_env_steps"]) for slot in slots)

    while not replay.evicted_steps:
        insert()
    insertion = repeat(insert, seconds)
    rng = np.random.default_rng(0)
    sample = None

    def draw() -> int:
        nonlocal sample
        sample = replay.sample(BATCH, rng, beta=0.4, reuse=sample)
        replay.update_priorities(sample.index_M, np.abs(sample.return_M) + 0.01)
        return BATCH

    sampling = repeat(draw, seconds)
    return {
        "capacity_steps": case.capacity_steps,
        "size_bytes": Replay.size_bytes(slots[0].schema, GROUPS, config),
        "rollout_length": case.rollout_length,
        "insert_per_second": 1e6 / cpu_us(insertion),
        "sample_per_second": 1e6 / cpu_us(sampling),
    }


def _rollouts(case: Case) -> list[Slot]:
    """One rollout of each group, which can follow itself: an episode begins with its first row and ends with its last."""
    leaf = LeafSpec((), "box", case.dtype, case.shape, low=(0.0,), high=(255.0,))
    action = LeafSpec((), "discrete", "int64", (), nvec=(2,), start=(0,))
    spec = EnvironmentSpec("bench", (leaf,), action)
    schema = rollout_schema(spec, [FieldSpec("action", "int64", (), "T")], case.rollout_length, GROUP_SIZE)
    rng = np.random.default_rng(0)
    ring = allocate(schema, GROUPS)
    for group, slot in enumerate(ring.slots):
        a, e = slot.arrays, slot.envelope
        observation_TB = _episodes(case, rng)
        a["observation"][:-1], a["observation"][-1] = observation_TB[:-1], observation_TB[0]
        a["action"][:] = rng.integers(0, 2, a["action"].shape)
        a["reward"][:], a["valid"][:] = 1.0, True
        a["terminated"][-1, ::2] = a["truncated"][-1, 1::2] = True
        a["final/row"][:GROUP_SIZE], a["final/env"][:GROUP_SIZE] = case.rollout_length - 1, np.arange(GROUP_SIZE)
        a["final/observation"][:GROUP_SIZE] = observation_TB[-1]
        e["group"], e["sequence"], e["attempt"] = Identity(group, 0, 0)
        e["num_rows"], e["num_env_steps"], e["num_finals"] = case.rollout_length, case.rollout_length * GROUP_SIZE, GROUP_SIZE
    return ring.slots


def _episodes(case: Case, rng: np.random.Generator) -> Array:
    """Observations of one episode in each environment, the last included: [T+1, B, ...]."""
    rows = case.rollout_length + 1
    if case.dtype != "uint8":
        return rng.normal(size=(rows, GROUP_SIZE, *case.shape)).astype(case.dtype)
    frames = rng.integers(0, 256, (rows, GROUP_SIZE, *case.shape[1:]), np.uint8)
    shown = np.maximum(0, np.arange(rows)[:, None] + np.arange(1 - _FRAMES, 1))  # the first frame fills its stack
    return np.asarray(frames[shown].swapaxes(1, 2))
