"""Learners of one group that sample from a replay: each has its groups' rollouts, all hold the same weights, and what one knows is told for all.

Legend: T rows of a rollout, B environments of a group.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout_fakes import RUN_ID, poisoned_ring, scripted_spec, write_rollout
from several import several
from shoal.algorithms import load_algorithm
from shoal.algorithms.ranks import Ranks
from shoal.config import ReplayConfig, RunConfig
from shoal.engines.keeping import keep, keep_replay, load_kept, load_kept_replay
from shoal.errors import CheckpointError, LearnersError, SchemaError
from shoal.experience.envelope import Identity
from shoal.experience.replay_memory import KeptMemory, Memory
from shoal.experience.ring import Ring
from shoal.experience.schema import rollout_schema
from shoal.learners.learner import CHECK_EVERY, Unpublished
from shoal.learners.replay_learner import ReplayLearner, part_of
from shoal.learners.together import Together
from shoal.networks.policy import build_acting, named_tensors
from shoal.supervision.memory import anonymous_file
from shoal.weights.board import WeightLayout

T, B, GROUPS = 4, 3, 4
KINDS: dict[str, dict[str, Any]] = {
    "dqn": {"prioritised": True, "n_step": 2},
    "r2d2": {"prioritised": True, "n_step": 2, "sequence_length": 2 * T, "burn_in": 1, "capacity_steps": 240},
    "uniform": {"prioritised": False},
}


class World:
    """Learners over one ring, as threads or processes of a run share it."""

    def __init__(self, name: str, size: int, memories: list[Memory] | None = None) -> None:
        kind: Any = load_algorithm("r2d2" if name == "r2d2" else "dqn")
        algorithm = kind.Config(batch_size=12)
        config = RunConfig(algorithm=algorithm, seed=5, learners=size)
        config.sampling.groups, config.sampling.group_size, config.sampling.rollout_length = GROUPS, B, T
        config.policy.hidden_sizes = [8]
        if kind.remembers:
            config.policy.memory, config.policy.memory_size = "lstm", 2
        self.spec, self._settings = scripted_spec(), ReplayConfig(**{"capacity_steps": 120, "samples_per_insert": 1.0, **KINDS[name]})
        self.ring: Ring | None = None
        self.learners = []
        for rank in range(size):
            policy = build_acting(self.spec, config.policy, seed=1, kind=kind.network(algorithm))
            if self.ring is None:
                self.ring = poisoned_ring(rollout_schema(self.spec, policy.fields(), T, B), GROUPS)
            layout = WeightLayout.of((n, tuple(t.shape)) for n, t in named_tensors(policy).items())
            more: dict[str, Any] = {} if memories is None else {"memory": memories[rank]}
            self.learners.append(
                ReplayLearner(
                    config, self.spec, policy, kind(policy, algorithm), self.ring, Unpublished(layout.size),
                    run_id=RUN_ID, replay=self._settings, **more,
                )
            )  # fmt: skip

    def rollouts(self, sequence: int) -> list[tuple[int, Identity]]:
        orders = []
        assert self.ring is not None
        for group in range(GROUPS):
            identity = Identity(group, sequence, 0)
            slot = write_rollout(self.ring.slots[group], identity, version=sequence, tag=group + 10 * sequence)
            slot.arrays["reward"][:] = np.sin(group + sequence + np.arange(T))[:, None]
            slot.envelope["checksum"] = slot.checksum()
            orders.append((group, identity))
        return orders

    def together(self) -> Together:
        return Together(self.learners, threads=1, timeout_seconds=600.0)


def updated(world: World, together: Together, sequence: int, steps: int = 3) -> dict[str, float]:
    return together.update(together.consume(world.rollouts(sequence)), steps)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_all_hold_the_same_and_each_has_the_rollouts_of_its_groups(name: str, size: int) -> None:
    world = World(name, size)
    together = world.together()
    begun = world.learners[0].held_sha256
    metrics = [updated(world, together, sequence) for sequence in range(5)]
    assert len({learner.held_sha256 for learner in world.learners}) == 1
    assert world.learners[0].held_sha256 != begun
    for rank, learner in enumerate(world.learners):
        learner.replay.check_valid()
        rows = learner.replay._store.rows
        tags = rows.take("observation/position", np.arange(rows.num_groups * B * rows.num_rows))[:, 0] // 100 % 10
        assert rows.num_groups == GROUPS // size
        assert {int(tag) for tag in tags if tag} == {group for group in range(1, GROUPS) if group % size == rank}
        assert (learner.version, learner.env_steps) == (5, 5 * GROUPS * B * T)
    assert all(found["num_env_steps"] == GROUPS * B * T for found in metrics)
    assert metrics[-1]["replay/steps"] == sum(learner.replay.num_steps for learner in world.learners)
    assert metrics[-1]["replay/capacity_steps"] == sum(learner.replay.capacity_steps for learner in world.learners)
    evicted = sum(count for found in metrics for key, count in found.items() if key.startswith("evicted/"))
    assert evicted == sum(learner.replay.evicted_steps for learner in world.learners)
    assert metrics[-1]["optimizer_steps"] == 3.0
    assert 0 <= metrics[-1]["replay/age_updates_mean"] <= metrics[-1]["replay/age_updates_max"] <= 4


def test_the_same_learners_make_the_same_weights_every_time_and_others_make_others() -> None:
    shas = []
    for size in (2, 2, 4):
        world = World("dqn", size)
        together = world.together()
        for sequence in range(4):
            updated(world, together, sequence)
        shas.append(world.learners[0].held_sha256)
    assert shas[0] == shas[1] != shas[2]


def test_importance_weights_are_relative_to_the_largest_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("dqn", 2)
    together = world.together()
    for sequence in range(3):
        updated(world, together, sequence)
    found: dict[int, Any] = {}
    for rank, learner in enumerate(world.learners):
        sample, learn = learner.replay.sample, learner._algorithm.learn

        def sampled(*args: Any, rank: int = rank, sample: Any = sample, replay: Any = learner.replay, **how: Any) -> Any:
            drawn = sample(*args, **how)
            tree = replay._priorities.tree
            found[rank] = (tree.leaves[drawn.index_M % tree.num_leaves] / tree.total, how["beta"])
            return drawn

        def learned(rows: Any, context: Any, rank: int = rank, learn: Any = learn) -> Any:
            found[rank] = (*found[rank], rows.weight_M.clone())
            return learn(rows, context)

        monkeypatch.setattr(learner.replay, "sample", sampled)
        monkeypatch.setattr(learner._algorithm, "learn", learned)
    updated(world, together, 3, steps=1)
    probability = np.concatenate([found[rank][0] for rank in (0, 1)])
    weight = torch.cat([found[rank][2] for rank in (0, 1)]).numpy()
    np.testing.assert_allclose(weight, (probability / probability.min()) ** -found[0][1], rtol=1e-5)
    assert len(weight) == 12
    assert weight.max() == 1.0
    assert min(found[rank][2].max() for rank in (0, 1)) < 1.0  # one has not the largest


def test_no_step_is_made_before_all_can_sample() -> None:
    world = World("dqn", 2)
    together = world.together()
    orders = [order for order in world.rollouts(0) if order[1].group % 2 == 0]
    metrics = together.update(together.consume(orders), 2)
    assert (metrics["optimizer_steps"], metrics["num_env_steps"]) == (0.0, 2 * B * T)
    rest = [order for order in world.rollouts(0) if order[1].group % 2]
    assert together.update(together.consume(rest), 2)["optimizer_steps"] == 2.0


@pytest.mark.parametrize("name", KINDS)
def test_learners_that_were_saved_with_their_replays_go_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    world, other = World(name, 2), World(name, 2)
    first, second = world.together(), other.together()
    for sequence in range(4):
        updated(world, first, sequence)
    arrays, facts = world.learners[0].get_state()
    for rank, (mine, theirs) in enumerate(zip(world.learners, other.learners, strict=True)):
        mine.replay.save(tmp_path / str(rank), None)
        theirs.set_state(arrays, facts)
        theirs.replay.load(tmp_path / str(rank))
    for sequence in range(4, 7):
        assert updated(world, first, sequence) == updated(other, second, sequence)
    assert world.learners[0].held_sha256 == other.learners[1].held_sha256


@pytest.fixture
def files() -> Iterator[list[list[int]]]:
    """Of each of two learners: rows, journal, two states; and two of both."""
    made = [[anonymous_file("kept") for _ in range(4)] for _ in range(2)] + [[anonymous_file("kept") for _ in range(2)]]
    yield made
    for fd in [fd for fds in made for fd in fds]:
        os.close(fd)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("made_by", ["nobody", "the first", "both"])
def test_learners_that_come_after_a_kill_make_the_update_again_with_the_same_bits(name: str, made_by: str, files: list[list[int]]) -> None:
    """In the update that is lost, one learner or both may have come to its end."""
    straight = World(name, 2)
    through = straight.together()
    expected = [updated(straight, through, sequence) for sequence in range(7)]

    memories: list[Memory] = [KeptMemory(fds[0], fds[1]) for fds in files[:2]]
    lost = World(name, 2, memories)
    together = lost.together()
    for sequence in range(5):
        if sequence == 4 and made_by == "nobody":
            lost.learners[1].consume(lost.rollouts(sequence))  # and no more of it
            continue
        updated(lost, together, sequence)
        for rank, learner in enumerate(lost.learners if sequence < 4 or made_by == "both" else lost.learners[:1]):
            keep_replay(learner.replay, (files[rank][2], files[rank][3]), learner.version)
        if sequence < 4:
            keep(lost.learners[0], (files[2][0], files[2][1]))

    again = World(name, 2, [KeptMemory(fds[0], fds[1]) for fds in files[:2]])
    for rank, learner in enumerate(again.learners):
        load_kept(learner, (files[2][0], files[2][1]), 4)
        load_kept_replay(learner.replay, (files[rank][2], files[rank][3]), 4)
        learner.replay.check_valid()
    anew = again.together()
    assert [updated(again, anew, sequence) for sequence in range(4, 7)] == expected[4:]
    assert again.learners[1].held_sha256 == straight.learners[0].held_sha256
    with pytest.raises(CheckpointError):
        load_kept_replay(
            World(name, 2, [KeptMemory(fds[0], fds[1]) for fds in files[:2]]).learners[0].replay, (files[0][2], files[0][3]), 9
        )


def test_a_critic_that_differs_is_found_though_the_policies_are_the_same() -> None:
    world = World("dqn", 2)

    def work(ranks: Ranks) -> None:
        learner = world.learners[ranks.rank]
        learner.join(ranks)
        learner.version = CHECK_EVERY
        learner.agree()
        if ranks.rank == 1:
            learner._algorithm.target.flat[0] += 1.0
        assert world.learners[0].weights_sha256 == world.learners[1].weights_sha256
        with pytest.raises(LearnersError, match="after update 10 the learners do not hold the same weights"):
            learner.agree()

    several(2, work)


@pytest.mark.parametrize("victim", [1, 2, 3])
def test_what_one_of_them_raises_is_raised_at_once(victim: int) -> None:
    world = World("dqn", 4)
    together = world.together()
    orders = world.rollouts(0)
    assert world.ring is not None
    world.ring.slots[victim].envelope["run_id"] = np.void(bytes(16))
    begun = time.monotonic()
    consumed = together.consume(orders)
    with pytest.raises(SchemaError, match=f"slot {victim}: of run"):
        together.update(consumed, 1)
    assert time.monotonic() - begun < 300.0, "the others waited as long as for one that lives"


def test_what_is_to_be_held_is_divided() -> None:
    whole = ReplayConfig(capacity_steps=1000, capacity_bytes=999, shards=3)
    assert part_of(whole, 1) == whole
    part = part_of(whole, 2)
    assert (part.capacity_steps, part.capacity_bytes, part.shards) == (500, 499, 1)
    assert part_of(ReplayConfig(), 2).capacity_bytes is None
