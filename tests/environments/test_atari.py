"""Atari: preprocessing, one seed per episode, exact snapshots."""

from __future__ import annotations

import numpy as np
import pytest
from environment_fakes import Recorder, same_rows

from shoal.config import EnvConfig
from shoal.environments import environment_factory, environment_spec, make_group
from shoal.errors import ConfigError

pytest.importorskip("ale_py")
pytest.importorskip("cv2")


def group_of(game="ALE/Breakout-v5", num_envs=2, **kwargs):
    return make_group(EnvConfig(id=game, kwargs=kwargs), 0, num_envs, 3)


def played(group, actions, state=None):
    recorder = Recorder(group)
    recorder.begin(state)
    for action_B in actions:
        recorder.step(action_B)
    return recorder


def test_what_training_sees():
    spec = environment_spec(EnvConfig(id="ALE/Pong-v5"))
    (leaf,) = spec.observation
    assert (leaf.shape, leaf.dtype, leaf.is_image) == ((4, 84, 84), "uint8", True)
    assert spec.action.nvec == (6,)
    assert 0 < spec.snapshot_bytes < 100_000
    assert spec.exact_restore


def test_frames_are_stacked_with_the_newest_last():
    recorder = played(group_of(), np.full((6, 2), 2))
    before, after = recorder.rows[-2]["observation"], recorder.rows[-1]["observation"]
    np.testing.assert_array_equal(after[:, :3], before[:, 1:])
    assert (after[:, 3] != before[:, 3]).any()
    assert after.max() > 50


@pytest.mark.parametrize("cut", [1, 60, 175])
def test_snapshots_rebuild_a_game_bit_for_bit_across_lives(cut):
    actions = np.random.default_rng(0).integers(0, 4, (220, 2))
    whole = played(group_of(), actions)
    assert sum(len(step.ended) for step in whole.steps) > 2
    state = played(group_of(), actions[:cut]).state()
    second = played(group_of(), actions[cut:], state)
    same_rows(whole, second, from_row=cut)


def test_restore_by_snapshot_loses_nothing():
    actions = np.random.default_rng(1).integers(0, 4, (30, 2))
    first = played(group_of(), actions)
    assert Recorder(group_of()).begin(first.state()) == []


def test_a_seed_repeats_an_episode_also_in_a_used_instance():
    create = environment_factory(EnvConfig(id="ALE/Breakout-v5"), training=False)
    used, fresh = create(), create()
    used.reset(seed=1)
    for _ in range(50):
        used.step(3)
    actions = np.random.default_rng(2).integers(0, 4, 150)

    def episode(env):
        return [env.reset(seed=9)[0], *(env.step(action)[0] for action in actions)]

    np.testing.assert_array_equal(episode(used), episode(fresh))
    assert not np.array_equal(episode(fresh)[-1], [fresh.reset(seed=10)[0], *(fresh.step(a)[0] for a in actions)][-1])


def test_a_lost_life_ends_the_episode_in_training_and_the_same_game_goes_on():
    training = environment_factory(EnvConfig(id="ALE/Breakout-v5"))()
    training.reset(seed=0)
    lives = [training.step(0)[4]["lives"]]
    terminated = False
    while not terminated:
        _, _, terminated, _, info = training.step(1)
        lives.append(info["lives"])
    assert (lives[0], lives[-1]) == (5, 4)
    assert training.reset(seed=1)[1]["lives"] == 4

    whole = environment_factory(EnvConfig(id="ALE/Breakout-v5"), training=False)()
    whole.reset(seed=0)
    terminated = False
    while not terminated:
        _, _, terminated, _, info = whole.step(1)
    assert info["lives"] == 0
    assert whole.reset(seed=1)[1]["lives"] == 5


def test_rewards_are_signs_in_training_and_scores_in_evaluation():
    def rewards(training):
        env = environment_factory(EnvConfig(id="ALE/SpaceInvaders-v5", kwargs={"episodic_life": False}), training=training)()
        env.reset(seed=0)
        return [env.step(1)[1] for _ in range(300)]

    signs, scores = rewards(True), rewards(False)
    assert max(signs) == 1
    assert max(scores) > 1
    np.testing.assert_array_equal(np.sign(scores), signs)


def test_sticky_actions_come_from_the_episodes_seed():
    def last_frames(seed, sticky):
        env = environment_factory(EnvConfig(id="ALE/Breakout-v5", kwargs={"repeat_action_probability": sticky, "noop_max": 0}))()
        env.reset(seed=seed)
        return [env.step(action)[0][-1].sum() for action in (2, 3, 3, 2, 2, 3, 2, 3) * 3]

    assert last_frames(1, 0.25) == last_frames(1, 0.25)
    assert last_frames(1, 0.25) != last_frames(2, 0.25)
    assert last_frames(1, 0.0) == last_frames(2, 0.0)


def test_games_are_truncated_by_frames_and_by_steps():
    env = environment_factory(EnvConfig(id="ALE/Pong-v5", kwargs={"max_num_frames_per_episode": 200}))()
    env.reset(seed=0)
    results = [env.step(0)[2:4] for _ in range(60)]
    assert (False, True) in results
    env = environment_factory(EnvConfig(id="ALE/Pong-v5", max_episode_steps=5))()
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(5)] == [False] * 4 + [True]


def test_preprocessing_can_be_left_out():
    spec = environment_spec(EnvConfig(id="ALE/Pong-v5", atari_preprocessing=False))
    assert spec.observation[0].shape == (210, 160, 3)
    with pytest.raises(ConfigError, match="atari_preprocessing"):
        environment_factory(EnvConfig(id="ALE/Pong-v5", kwargs={"obs_type": "ram"}))


def test_a_snapshot_of_the_wrong_length_is_refused():
    env = environment_factory(EnvConfig(id="ALE/Pong-v5"))()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="bytes was expected"):
        env.restore_snapshot(env.snapshot() + b"x")
