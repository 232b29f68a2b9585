"""What `shoal bench replay` measures: replays that are full, and stacks that are stored as such. No speed is asserted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal.benching import replays
from shoal.benching.replays import BATCH, CASES, GROUP_SIZE, GROUPS, N_STEP, bench_replay
from shoal.config import ReplayConfig
from shoal.experience.replay import Replay
from shoal.experience.replay_layout import Layout

SMALL = tuple(replace(case, capacity_steps=GROUPS * GROUP_SIZE * 130) for case in CASES)


class Kept(Replay):
    """Remembers all that were made."""

    made: list[Kept]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        Kept.made.append(self)


def test_every_case_is_filled_and_both_ways_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    Kept.made = []
    monkeypatch.setattr(replays, "CASES", SMALL)
    monkeypatch.setattr(replays, "Replay", Kept)
    told: list[str] = []
    found = bench_replay(seconds=0.0, told=told.append)
    assert told == [f"replay: {case.name}" for case in CASES]
    assert found["settings"] == {"groups": GROUPS, "group_size": GROUP_SIZE, "batch": BATCH, "n_step": N_STEP, "prioritised": True}
    assert list(found["cases"]) == [case.name for case in CASES]
    for case, replay, figures in zip(SMALL, Kept.made, found["cases"].values(), strict=True):
        replay.check_valid()
        assert replay.num_steps <= case.capacity_steps < replay.inserted_steps
        assert (figures["capacity_steps"], figures["rollout_length"]) == (case.capacity_steps, case.rollout_length)
        assert min(figures["insert_per_second"], figures["sample_per_second"], figures["size_bytes"]) > 0
        leaves = replay._priorities.tree.leaves
        assert len(np.unique(leaves[leaves > 0])) > 1  # priorities were updated


def test_the_rollouts_of_each_case_are_whole_and_stacks_are_found_to_be_some() -> None:
    for case in SMALL:
        slots = replays._rollouts(case)
        assert {int(slot.envelope["num_env_steps"]) for slot in slots} == {case.rollout_length * GROUP_SIZE}
        layout = Layout.of(slots[0], GROUPS, ReplayConfig(capacity_steps=case.capacity_steps))
        assert list(layout.stacks) == (["observation"] if case.dtype == "uint8" else [])


def test_stacks_are_stored_once_for_each_frame() -> None:
    stacks = next(case for case in CASES if case.name == "stacks")
    (slot, *_), config = replays._rollouts(stacks), ReplayConfig(capacity_steps=stacks.capacity_steps, prioritised=True, n_step=N_STEP)
    assert 84 * 84 < Replay.size_bytes(slot.schema, GROUPS, config) / stacks.capacity_steps < 1.1 * 84 * 84
