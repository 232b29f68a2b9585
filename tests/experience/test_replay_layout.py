"""How many rows a replay has for what it was given, and what a refusal says that it needs."""

from __future__ import annotations

import re

import pytest

from replay_world import IMAGE, SECOND, VECTOR, Kind, World
from shoal.config import ReplayConfig
from shoal.errors import ConfigError
from shoal.experience.replay import Replay
from shoal.experience.replay_layout import Layout, check_learning_starts

STEPS = ReplayConfig(capacity_steps=60)
SEQUENCES = ReplayConfig(capacity_steps=600, sequence_length=10, burn_in=3)
VECTORS, FRAMES = Kind((VECTOR,)), Kind((IMAGE, VECTOR))


def layout(kind: Kind, config: ReplayConfig) -> Layout:
    return Layout.likely(kind.schema(), kind.groups, config)


@pytest.mark.parametrize(("kind", "older"), [(VECTORS, 0), (FRAMES, 3), (Kind((SECOND, IMAGE)), 3)])
def test_what_was_asked_for_is_within_reach_beside_the_newest_observation_and_the_older_frames_of_a_stack(kind, older):
    found = layout(kind, STEPS)
    assert (found.reach, found.num_rows, found.capacity_steps) == (10, 10 + 1 + older, 60)


def test_only_sequences_have_starts_and_every_rollout_in_the_column_has_one():
    assert layout(VECTORS, STEPS).num_starts == 0
    found = layout(VECTORS, SEQUENCES)
    assert (found.num_starts - 1) * VECTORS.num_rows <= found.num_rows < found.num_starts * VECTORS.num_rows


@pytest.mark.parametrize("kind", [VECTORS, FRAMES], ids=["vectors", "frames"])
@pytest.mark.parametrize("config", [STEPS, SEQUENCES], ids=["steps", "sequences"])
def test_the_bytes_and_steps_that_a_refusal_names_are_just_enough(kind, config):
    with pytest.raises(ConfigError) as caught:
        layout(kind, config.model_copy(update={"capacity_bytes": 100}))
    found = re.search(r"([\d,]+) steps in ([\d,]+) bytes at least", str(caught.value))
    steps, least = (int(number.replace(",", "")) for number in found.groups())
    at_least = layout(
        kind, config.model_copy(update={"capacity_bytes": least + kind.groups * kind.num_envs})
    )  # a byte a column: it is rounded
    assert at_least.capacity_steps == steps
    assert at_least.size_bytes <= least + kind.groups * kind.num_envs
    for short in ({"capacity_bytes": least - kind.groups * kind.num_envs}, {"capacity_steps": steps - 1}):
        with pytest.raises(ConfigError, match="too few for"):
            layout(kind, config.model_copy(update=short))


def test_learning_starts_that_whole_rows_hold_just_so_are_enough():
    config = ReplayConfig(capacity_steps=61, capacity_bytes=1_000_000, learning_starts=61)  # ten steps of each of six columns
    check_learning_starts(layout(VECTORS, config), config)
    few = config.model_copy(update={"capacity_bytes": 2_000})
    with pytest.raises(ConfigError, match="would never hold the 61"):
        check_learning_starts(layout(VECTORS, few), few)


def test_learning_starts_are_those_of_all_replays_to_which_groups_are_dealt():
    asked = ReplayConfig(capacity_steps=60, capacity_bytes=2_400)
    holds = layout(VECTORS, asked).capacity_steps
    assert 0 < holds < 60
    config = asked.model_copy(update={"learning_starts": holds + 1})
    world = World(VECTORS)
    slot, _ = world.rollout(0)
    Replay(world.schema, VECTORS.groups, config, gamma=0.9, dealt=2).insert(slot, 0)
    with pytest.raises(ConfigError, match="would never hold"):
        Replay(world.schema, VECTORS.groups, config, gamma=0.9).insert(slot, 0)
    with pytest.raises(ConfigError, match="would never hold"):
        check_learning_starts(layout(VECTORS, config), config)


@pytest.mark.parametrize("name", ["observation/image", "observation/vector"])
def test_a_column_does_not_go_on_where_any_of_its_observations_is_another(name):
    world = World(FRAMES)
    replay = Replay(world.schema, FRAMES.groups, STEPS, gamma=0.9)
    replay.insert(world.rollout(0, end_share=0.0)[0], 0)
    slot, _ = world.rollout(0, end_share=0.0)
    newest_B = replay._newest_C[: FRAMES.num_envs]
    assert replay._store.goes_on(slot, 0, newest_B).tolist() == [True, True]
    slot.arrays[name][0, 1] += 1
    assert replay._store.goes_on(slot, 0, newest_B).tolist() == [True, False]
