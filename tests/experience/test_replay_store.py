"""The replay's priorities, weights, ages and refusals; how it fills and samples is in tests/contracts/test_replays.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from replay_world import IMAGE, VECTOR, Kind, World
from shoal.config import ReplayConfig
from shoal.errors import ConfigError, SchemaError
from shoal.experience.replay import Replay
from shoal.experience.replay_layout import Layout, check_learning_starts
from shoal.experience.stacks import Stack, is_stacked, likely_stack, possible_stacks
from shoal.types import LeafSpec

PRIORITISED = ReplayConfig(capacity_steps=10_000, prioritised=True, alpha=0.6)


def made(config: ReplayConfig = PRIORITISED, rounds: int = 3, kind: Kind = Kind()) -> tuple[World, Replay]:  # noqa: B008
    world = World(kind)
    replay = Replay(world.schema, kind.groups, config, gamma=0.9)
    fill(world, replay, rounds)
    return world, replay


def fill(world: World, replay: Replay, rounds: int, version: int = 0) -> None:
    for _ in range(rounds):
        for group in range(world.kind.groups):
            replay.insert(world.rollout(group, version=version)[0], version)


def every(replay: Replay) -> np.ndarray:
    """The names of all steps."""
    found = np.unique(replay.sample(20 * replay.num_steps, np.random.default_rng(0), beta=0.0).index_M)
    assert len(found) == replay.num_steps
    return found


def counts(replay: Replay, names: np.ndarray, num: int, draws: int = 40, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return sum(np.bincount(names.searchsorted(replay.sample(num, rng, beta=0.5).index_M), minlength=len(names)) for _ in range(draws))


@pytest.mark.parametrize("num", [1, 7, 512])
def test_a_step_is_drawn_as_often_as_its_priority_to_the_alpha_says(num):
    _, replay = made()
    names = every(replay)
    priority = np.random.default_rng(2).random(len(names)) * 3 + 0.05
    replay.update_priorities(names, priority)
    draws = {1: 8_000, 7: 4_000, 512: 400}[num]
    expected = priority**0.6 / (priority**0.6).sum() * num * draws
    found = counts(replay, names, num, draws)
    # Stratified draws vary less than independent ones, for which this would be chi-square: 99.9 % of it, and a floor for num = 1.
    chi_square = ((found - expected) ** 2 / expected).sum()
    freedom = len(names) - 1
    assert chi_square < freedom + 3.3 * np.sqrt(2 * freedom)
    assert num > 1 or chi_square > freedom - 3.3 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "config", [ReplayConfig(), ReplayConfig(prioritised=False), PRIORITISED.model_copy(update={"alpha": 0.0}), PRIORITISED]
)
def test_without_other_priorities_all_steps_are_drawn_alike_with_weights_of_one(config):
    _, replay = made(config)
    names = every(replay)
    if config.alpha == 0 or not config.prioritised:
        replay.update_priorities(names, np.linspace(0, 5, len(names)))
    found = counts(replay, names, len(names), 10)
    assert ((found >= 8) & (found <= 12)).all()  # one of each stratum: at most one too many at either edge
    assert (replay.sample(50, np.random.default_rng(0), beta=0.7).weight_M == 1.0).all()


def test_weights_make_up_for_how_often_a_step_is_drawn():
    _, replay = made()
    names = every(replay)
    priority = np.linspace(0.1, 4, len(names))
    replay.update_priorities(names, priority)
    sample = replay.sample(300, np.random.default_rng(0), beta=0.7)
    drawn = priority[names.searchsorted(sample.index_M)] ** 0.6
    np.testing.assert_allclose(sample.weight_M, (drawn / drawn.min()) ** -0.7, rtol=1e-6)
    assert (sample.weight_M.dtype, sample.weight_M.max()) == (np.float32, 1.0)


def test_new_steps_enter_at_the_largest_priority_so_far():
    world, replay = made()
    old = every(replay)
    replay.update_priorities(old, np.full(len(old), 0.5))
    replay.update_priorities(old[:1], np.array([9.0]))
    replay.update_priorities(old[:1], np.array([0.5]))
    fill(world, replay, 1)
    names = every(replay)
    found = counts(replay, names, 1000)
    new = ~np.isin(names, old)
    assert 0 < new.sum() < len(names)
    assert found[new].mean() / found[~new].mean() == pytest.approx((9.0 / 0.5) ** 0.6, rel=0.05)


def test_priorities_of_steps_that_were_evicted_meanwhile_are_ignored():
    world, replay = made(PRIORITISED.model_copy(update={"capacity_steps": 60}))
    old = every(replay)
    fill(world, replay, 1)
    gone = np.setdiff1d(old, every(replay))
    assert len(gone) > 0
    fill(world, replay, 4)  # others lie where they lay
    before = replay.sample(200, np.random.default_rng(0), beta=1.0).index_M
    replay.update_priorities(gone, np.full(len(gone), 1e9))
    assert (replay.sample(200, np.random.default_rng(0), beta=1.0).index_M == before).all()
    replay.check_valid()
    fill(world, replay, 1)
    assert replay._priorities.most == 1.0  # nor does what comes next rank with them


def test_steps_that_just_left_and_are_not_written_over_yet_take_no_priority():
    world, replay = made(PRIORITISED.model_copy(update={"capacity_steps": 60}))
    for _ in range(8):
        for group in range(world.kind.groups):
            names = every(replay)
            replay.insert(world.rollout(group, rows=1, end_share=0.0)[0], 0)
            replay.update_priorities(names, np.full(len(names), 0.5))
            replay.check_valid()
            held = np.isin(every(replay), names)
            leaves = replay._priorities.tree.leaves
            assert np.count_nonzero(np.isclose(leaves, 0.5**0.6)) == held.sum() == replay.num_steps - world.kind.num_envs


def test_a_step_of_priority_zero_is_still_there():
    _, replay = made()
    names = every(replay)
    replay.update_priorities(names, np.zeros(len(names)))
    replay.check_valid()
    assert len(every(replay)) == len(names)


def test_the_least_probability_is_that_of_the_step_that_is_drawn_least():
    _, replay = made()
    names = every(replay)
    priority = np.linspace(0.2, 4.0, len(names))
    replay.update_priorities(names, priority)
    some = np.random.default_rng(0).permutation(len(names))[:9]
    expected = (priority[some] ** 0.6).min() / (priority**0.6).sum()
    assert replay.least_probability(names[some]) == pytest.approx(expected)


def test_one_of_several_replays_is_dealt_every_nth_group_and_looks_for_the_memory_of_all(monkeypatch):
    kind = Kind(groups=3)
    whole, dealt = (Replay(kind.schema(), kind.groups, PRIORITISED, gamma=0.9, dealt=n) for n in (1, 2))
    world = World(kind)
    for round_ in range(4):
        for group in range(kind.groups):
            slot, _ = world.rollout(group, version=round_)
            whole.insert(slot, round_)
            slot.envelope["group"] = 2 * group + 1  # that of the second of two
            dealt.insert(slot, round_)
    dealt.check_valid()
    one, other = (replay.sample(100, np.random.default_rng(0), beta=0.5) for replay in (whole, dealt))
    assert (one.index_M == other.index_M).all()
    assert (one.observation["observation/vector"] == other.observation["observation/vector"]).all()
    size = Replay.size_bytes(kind.schema(), kind.groups, PRIORITISED)
    monkeypatch.setattr("shoal.experience.replay.available_bytes", lambda: 2 * size - 1)
    with pytest.raises(ConfigError, match=r"^replay\.capacity_steps 20,000 takes "):
        Replay(kind.schema(), kind.groups, PRIORITISED, gamma=0.9, dealt=2).insert(slot, 0)
    monkeypatch.setattr("shoal.experience.replay.available_bytes", lambda: 2 * size)
    assert Replay(kind.schema(), kind.groups, PRIORITISED, gamma=0.9, dealt=2).insert(slot, 0) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5])
def test_a_priority_that_is_no_number_is_refused_and_changes_nothing(bad):
    _, replay = made()
    names = every(replay)
    before = replay.sample(100, np.random.default_rng(0), beta=1.0).index_M
    with pytest.raises(SchemaError, match="priority 1 of 3 is"):
        replay.update_priorities(names[:3], np.array([1.0, bad, 5.0]))
    assert (replay.sample(100, np.random.default_rng(0), beta=1.0).index_M == before).all()


def test_ages_count_updates_since_the_policy_chose_and_steps_since_the_insertion():
    world, replay = made(rounds=0)
    fill(world, replay, 1, version=3)
    after = replay.inserted_steps
    fill(world, replay, 2, version=7)
    sample = replay.sample(400, np.random.default_rng(0), beta=1.0)
    assert set(sample.age_updates_M) == {0, 4}
    old = sample.age_updates_M == 4
    assert sample.age_steps_M[old].min() == replay.inserted_steps - after
    assert sample.age_steps_M[~old].min() == 0


def test_an_environment_that_looks_as_it_did_before_a_missing_rollout_does_not_go_on_from_there():
    world, replay = made(PRIORITISED.model_copy(update={"n_step": 3}), rounds=0)
    slot, _ = world.rollout(0, end_share=0.0)
    newest_B = slot.arrays["observation/vector"][world.kind.num_rows].copy()
    replay.insert(slot, 0)
    world.rollout(0)  # nobody gets it
    slot, _ = world.rollout(0, end_share=0.0)
    slot.arrays["observation/vector"][0] = newest_B
    replay.insert(slot, 0)
    sample = replay.sample(200, np.random.default_rng(0), beta=0.0)
    number, clock = newest_B[0]
    last = (sample.observation["observation/vector"] == (number, clock - 1)).all(axis=1)
    assert last.any()
    np.testing.assert_allclose(sample.discount_M[last], 0.9, rtol=1e-6)


def break_a_leaf(replay):
    replay._priorities.tree.set(np.flatnonzero(replay._priorities.tree.leaves)[:1], 0.0)


def draw_what_is_no_step(replay):
    replay._priorities.tree.set(np.flatnonzero(replay._priorities.tree.leaves == 0)[:1], 1.0)


def forget_an_eviction(replay):
    replay.evicted_steps -= 1


def evict_more_than_came(replay):
    replay.evicted_steps = replay.inserted_steps + 1


def drop_a_step(replay):
    place = np.flatnonzero(replay._priorities.tree.leaves)[:1]
    replay._store.rows.put(0, "flags", place, 0)


@pytest.mark.parametrize("harm", [break_a_leaf, draw_what_is_no_step, forget_an_eviction, evict_more_than_came, drop_a_step])
def test_a_replay_that_is_none_any_more_is_found(harm):
    _, replay = made(PRIORITISED.model_copy(update={"capacity_steps": 60}), rounds=6)
    replay.check_valid()
    harm(replay)
    with pytest.raises(AssertionError):
        replay.check_valid()


def test_an_empty_replay_that_evicted_is_found():
    _, replay = made(rounds=0)
    replay.check_valid()
    replay.evicted_steps = 1
    with pytest.raises(AssertionError):
        replay.check_valid()


def test_nothing_is_drawn_from_an_empty_replay():
    _, replay = made(rounds=0)
    with pytest.raises(ValueError, match="nothing can be sampled yet: 0 env steps"):
        replay.sample(1, np.random.default_rng(0), beta=1.0)


def test_a_capacity_that_holds_no_step_of_an_environment_is_refused():
    with pytest.raises(ConfigError, match=r"replay\.capacity_steps 5 .* 6 environments \(3 groups of 2\), which need 1 step each"):
        made(PRIORITISED.model_copy(update={"capacity_steps": 5}))
    with pytest.raises(ConfigError, match=r"replay\.capacity_bytes 100 "):
        made(PRIORITISED.model_copy(update={"capacity_bytes": 100}))


# ---- stacks ----------------------------------------------------------------------------------------------------------------
def test_a_stack_of_four_costs_a_frame():
    def size(shape: tuple[int, ...]) -> int:
        leaf = LeafSpec((), "box", "uint8", shape, low=(0.0,), high=(255.0,))
        return Replay.size_bytes(Kind((leaf,)).schema(), 3, PRIORITISED)

    assert size((4, 84, 84)) == size((84, 84, 4)) < 1.01 * size((84, 84)) < 0.26 * size((84, 84, 16)) * 4
    assert size((84, 84, 3)) > 2.9 * size((84, 84))  # colours


def test_planes_that_do_not_follow_each_other_or_never_move_are_no_stack():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (20, 2, 5, 5), np.uint8)
    stacks = frames[np.arange(16)[:, None] + np.arange(4)].swapaxes(1, 2)
    steps = np.ones((15, 2), np.bool_)
    assert is_stacked(stacks, steps, Stack(0, 4))
    assert is_stacked(np.moveaxis(stacks, 2, -1), steps, Stack(-1, 4))
    assert not is_stacked(stacks[:, :, ::-1], steps, Stack(0, 4))
    assert not is_stacked(np.ones_like(stacks), steps, Stack(0, 4))
    resets = rng.integers(0, 256, stacks.shape, np.uint8)
    resets[-2:] = stacks[-2:]
    assert not is_stacked(resets, steps, Stack(0, 4))
    assert is_stacked(resets, steps & (np.arange(15) == 14)[:, None], Stack(0, 4))  # before, every step ended its episode
    still = np.ones((16, 3, 4, 5, 5), np.uint8)
    still[:, 2:] = resets[:, :1]  # one environment of three moves, and its planes follow each other nowhere
    assert not is_stacked(still, np.ones((15, 3), np.bool_), Stack(0, 4))
    once = np.ones((16, 1, 4, 5, 5), np.uint8)
    once[0] = 0  # moves once, to what does not follow, and stays there
    assert not is_stacked(once, np.ones((15, 1), np.bool_), Stack(0, 4))
    assert possible_stacks("uint8", (84, 84)) == possible_stacks("float32", (4, 84, 84)) == possible_stacks("uint8", (40, 30, 20)) == []
    assert likely_stack("uint8", (84, 84, 3)) is None
    assert likely_stack("uint8", (12, 84, 84)) == Stack(0, 12)
    half = np.concatenate([stacks[:8], resets[:8]])
    moved = np.arange(15)[:, None] != 7  # seven of fourteen rows go on from the one before
    assert not is_stacked(half, steps & moved, Stack(0, 4))
    assert is_stacked(half, steps & moved & (np.arange(15) != 14)[:, None], Stack(0, 4))


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((2, 84, 84), [Stack(0, 2)]),
        ((16, 84, 84), [Stack(0, 16)]),
        ((84, 84, 16), [Stack(-1, 16)]),
        ((1, 84, 84), []),
        ((17, 84, 17), []),
        ((12, 84, 4), [Stack(-1, 4), Stack(0, 12)]),
        ((4, 84, 12), [Stack(0, 4), Stack(-1, 12)]),
        ((4, 3, 84, 84), [Stack(0, 4)]),
    ],
)
def test_an_image_may_be_a_stack_along_its_ends_of_2_to_16_frames_the_shorter_first(shape, found):
    assert possible_stacks("uint8", shape) == found
    assert likely_stack("uint8", shape) == (found[0] if found else None)


IMAGES = Kind((IMAGE,), stacked=False)


@pytest.mark.parametrize("sequence_length", [None, 10])
def test_memory_is_looked_at_again_once_images_that_look_like_stacks_are_none(sequence_length, monkeypatch):
    kind = IMAGES if sequence_length is None else replace(IMAGES, memory=True)
    config = ReplayConfig(capacity_steps=60_000, sequence_length=sequence_length)
    world, told = World(kind), Replay.size_bytes(kind.schema(), kind.groups, config)
    slot, _ = world.rollout(0)
    truth = Layout.of(slot, kind.groups, config).size_bytes
    assert truth > 1.2 * told
    for free in (told, truth - 1):
        monkeypatch.setattr("shoal.experience.replay.available_bytes", lambda free=free: free)
        replay = Replay(world.schema, kind.groups, config, gamma=0.9)
        with pytest.raises(
            ConfigError, match=r"^replay\.capacity_steps 60,000 takes .* observation/image to be stacks.*replay\.capacity_bytes$"
        ):
            replay.insert(slot, 0)
        assert replay.num_steps == 0
    capped = Replay(world.schema, kind.groups, config.model_copy(update={"capacity_bytes": truth - 1}), gamma=0.9)
    assert capped.insert(slot, 0) == 0
    for free in (truth, None):
        monkeypatch.setattr("shoal.experience.replay.available_bytes", lambda free=free: free)
        assert Replay(world.schema, kind.groups, config, gamma=0.9).insert(slot, 0) == 0


def test_what_fewer_bytes_hold_is_looked_at_again_once_images_that_look_like_stacks_are_none():
    world = World(IMAGES)
    slot, _ = world.rollout(0)
    config = ReplayConfig(capacity_steps=60_000, capacity_bytes=200_000, learning_starts=0)
    told, truth = (
        layout.capacity_steps for layout in (Layout.likely(world.schema, IMAGES.groups, config), Layout.of(slot, IMAGES.groups, config))
    )
    assert truth < told < 60_000
    check_learning_starts(Layout.likely(world.schema, IMAGES.groups, config), config.model_copy(update={"learning_starts": told}))
    replay = Replay(world.schema, IMAGES.groups, config.model_copy(update={"learning_starts": told}), gamma=0.9)
    assert replay.capacity_steps == told
    with pytest.raises(
        ConfigError, match=rf"^replay\.learning_starts: the replay holds {truth:,} env steps in 200,000 bytes .* never hold the {told:,} "
    ):
        replay.insert(slot, 0)
    replay = Replay(world.schema, IMAGES.groups, config.model_copy(update={"learning_starts": truth}), gamma=0.9)
    assert replay.insert(slot, 0) == 0
    assert replay.capacity_steps == truth


def test_what_several_replays_hold_together_is_what_learning_waits_for():
    world = World(IMAGES)
    layout = Layout.likely(world.schema, IMAGES.groups, ReplayConfig(capacity_bytes=200_000))
    together = ReplayConfig(capacity_bytes=200_000, learning_starts=3 * layout.capacity_steps)
    check_learning_starts(layout, together, 3)
    with pytest.raises(ConfigError, match=r"in 400,000 bytes .*lower it, or raise the other$"):
        check_learning_starts(layout, together, 2)


def test_a_replay_that_does_not_fit_any_more_when_it_is_loaded_is_refused(tmp_path, monkeypatch):
    world, replay = made()
    replay.save(tmp_path, None)
    monkeypatch.setattr("shoal.experience.replay.available_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match=r"^replay\.capacity_steps 10,000 takes .* KiB of memory; 1,000 B are free here"):
        Replay(world.schema, world.kind.groups, PRIORITISED, gamma=0.9).load(tmp_path)


def test_frames_are_stored_once_and_a_reset_costs_the_older_ones():
    kind = Kind((IMAGE, VECTOR), num_rows=16)
    _, replay = made(kind=kind, rounds=4)
    assert replay._store.layout.stacks == {"observation/image": Stack(0, 4)}
    assert replay._store.rows.fields["observation/image"] == ("uint8", (2, 3))
