"""Groups: their own resets, true last observations, restoring, faults."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from environment_fakes import Forgetful, Nested, OneBuffer, Recorder, SnapshotWalk, Walk, fresh_state, same_rows
from gymnasium import spaces
from gymnasium.wrappers import Autoreset, FlattenObservation, TimeLimit

from shoal import streams
from shoal.config import EnvConfig
from shoal.environments import make_group
from shoal.environments.spaces import allocate
from shoal.errors import ConfigError, EnvironmentFault


def group_of(factory, num_envs=3, group=5, run_seed=7, **env):
    return make_group(EnvConfig(id="fake", **env), group, num_envs, run_seed, factory)


def played(group, num_steps, state=None, actions=None):
    recorder = Recorder(group)
    recorder.begin(state)
    rng = np.random.default_rng(0)
    every = actions if actions is not None else rng.integers(0, 3, (num_steps, group.num_envs))
    for action_B in every[:num_steps]:
        recorder.step(action_B)
    return recorder


def steps(recorder, num_steps, action_B):
    for _ in range(num_steps):
        recorder.step(np.array(action_B))


def test_every_episode_is_reset_with_the_seed_of_its_own_stream():
    recorder = played(group_of(Walk), 40)
    for b in range(3):
        seeds = [recorder.rows[0]["observation"][b, 0]] + [
            recorder.rows[t + 1]["observation"][b, 0] for t, s in enumerate(recorder.steps) if any(x.env == b for x in s.ended)
        ]
        assert len(seeds) > 3
        assert seeds == [streams.episode_seed(7, 5, b, episode) for episode in range(len(seeds))]
    assert recorder.group.cursor()["episode"].min() > 2


def test_the_action_reaches_the_environment_with_its_start():
    seen = []

    class Noting(Walk):
        def step(self, action):
            seen.append(action)
            return super().step(action)

    played(group_of(Noting), 1, actions=np.array([[0, 1, 2]]))
    assert seen == [-1, 0, 1]
    assert all(isinstance(action, np.int64) for action in seen)


@pytest.mark.parametrize("truncate", [False, True])
def test_an_ended_episode_shows_its_true_last_observation_and_then_the_reset(truncate):
    recorder = played(group_of(lambda: Walk(truncate=truncate, length=4)), 4)
    last = recorder.steps[-1]
    assert [e.env for e in last.ended] == [0, 1, 2]
    assert last.truncated_B.all() == truncate
    assert last.terminated_B.all() != truncate
    for b, final, *_ in last.ended:
        seed, steps, position = final["observation"]
        assert (seed, steps) == (streams.episode_seed(7, 5, b, 0), 4)
        assert position == last.reward_B[b]  # Walk's reward is where it stands
        assert recorder.rows[-1]["observation"][b, 1] == 0
        assert recorder.rows[-1]["observation"][b, 0] == streams.episode_seed(7, 5, b, 1)
    assert all(not step.ended and not step.terminated_B.any() for step in recorder.steps[:-1])


def test_a_flag_is_down_again_at_the_step_after_an_end():
    recorder = played(group_of(lambda: Walk(length=4)), 5)
    assert recorder.steps[3].terminated_B.all()
    assert not recorder.steps[4].terminated_B.any()


def test_max_episode_steps_truncates_and_also_where_the_episode_terminates_there():
    recorder = played(group_of(lambda: Walk(length=50), max_episode_steps=6), 6)
    assert recorder.steps[5].truncated_B.all()
    assert not recorder.steps[5].terminated_B.any()
    assert recorder.steps[5].ended[0].final["observation"][1] == 6
    recorder = played(group_of(lambda: TimeLimit(Walk(length=6), 6)), 6)
    assert recorder.steps[5].truncated_B.all()
    assert recorder.steps[5].terminated_B.all()


def test_a_reused_observation_buffer_changes_nothing():
    same_rows(played(group_of(Walk), 30), played(group_of(OneBuffer), 30))


def test_what_a_group_gives_depends_on_group_and_seed_and_not_on_its_size():
    wide, narrow = played(group_of(Walk, num_envs=3), 1), played(group_of(Walk, num_envs=2), 1, actions=np.array([[0, 0]]))
    np.testing.assert_array_equal(wide.rows[0]["observation"][:2], narrow.rows[0]["observation"])
    assert (played(group_of(Walk, group=6), 0).rows[0]["observation"][:, 0] != wide.rows[0]["observation"][:, 0]).all()
    assert (played(group_of(Walk, run_seed=8), 0).rows[0]["observation"][:, 0] != wide.rows[0]["observation"][:, 0]).all()


@pytest.mark.parametrize("cut", [0, 1, 5, 17, 33])
@pytest.mark.parametrize("factory", [Walk, Nested])
def test_restore_by_restepping_goes_on_bit_for_bit(factory, cut):
    high = 3 if factory is Walk else 2
    shape = (50, 3) if factory is Walk else (50, 3, 2)
    actions = np.random.default_rng(1).integers(0, high, shape)
    if factory is Nested:
        actions[..., 0] = 0
    whole = played(group_of(factory), 50, actions=actions)
    first = played(group_of(factory), cut, actions=actions)
    second = Recorder(group_of(factory))
    assert second.begin(first.state(snapshots=False)) == []
    for action_B in actions[cut:]:
        second.step(action_B)
    same_rows(whole, second, from_row=cut)


def test_restore_also_works_in_a_used_group():
    recorder = played(group_of(Walk), 20)
    state = recorder.state()
    for action_B in np.zeros((13, 3), np.int64):
        recorder.step(action_B)
    before = len(recorder.rows)
    assert recorder.begin(state) == []
    np.testing.assert_array_equal(recorder.rows[20]["observation"], recorder.rows[before]["observation"])


@pytest.mark.parametrize("cut", [0, 2, 11, 30])
def test_restore_by_snapshot_rebuilds_what_restepping_could_not(cut):
    actions = np.random.default_rng(2).integers(0, 3, (40, 3))
    whole = played(group_of(SnapshotWalk), 40, actions=actions)
    first = played(group_of(SnapshotWalk), cut, actions=actions)
    state = first.state()
    assert all(len(one) <= first.spec.snapshot_bytes for one in state.snapshots)
    second = Recorder(group_of(SnapshotWalk))
    assert second.begin(state) == []
    np.testing.assert_array_equal(second.group.cursor()["episode_return"], first.group.cursor()["episode_return"])
    for action_B in actions[cut:]:
        second.step(action_B)
    same_rows(whole, second, from_row=cut)


def test_a_snapshot_that_does_not_give_the_same_observation_is_told():
    first = played(group_of(SnapshotWalk), 2)
    state = first.state()
    state.snapshots[1] = state.snapshots[1][:4] + SnapshotWalk.snapshot(_moved(SnapshotWalk()))
    second = Recorder(group_of(SnapshotWalk))
    assert second.begin(state) == [1]
    assert second.group.cursor()["num_steps"].tolist() == [2, 0, 2]
    assert second.group.cursor()["episode"].tolist() == [0, 1, 0]


def _moved(env):
    env.reset(seed=99)
    return env


def test_environments_that_do_not_repeat_are_named_and_begin_the_next_episode():
    state = played(group_of(Forgetful), 2).state()
    second = Recorder(group_of(Forgetful))
    assert second.begin(state) == [0, 1, 2]
    cursor = second.group.cursor()
    assert cursor["episode"].tolist() == [1, 1, 1]
    assert cursor["seed"].tolist() == [streams.episode_seed(7, 5, b, 1) for b in range(3)]
    assert cursor["num_steps"].tolist() == [0, 0, 0]


def test_an_episode_that_ends_while_it_is_restepped_is_lost_even_without_checksums():
    state = played(group_of(lambda: Walk(length=9)), 5).state()
    state.cursor["observation_crc"] = state.cursor["reward_crc"] = 0
    assert Recorder(group_of(lambda: Walk(length=9))).begin(state) == []
    assert Recorder(group_of(lambda: Walk(length=4))).begin(state) == [0, 1, 2]


@pytest.mark.parametrize("field", ["observation_crc", "reward_crc"])
def test_one_wrong_checksum_is_noticed(field):
    state = played(group_of(Walk), 2).state()
    state.cursor[field][2] += 1
    assert Recorder(group_of(Walk)).begin(state) == [2]


def test_the_cursor_counts_episodes_steps_and_returns():
    recorder = played(group_of(lambda: Walk(length=4)), 6)
    cursor = recorder.group.cursor()
    assert cursor["episode"].tolist() == [1, 1, 1]
    assert cursor["num_steps"].tolist() == [2, 2, 2]
    np.testing.assert_array_equal(cursor["episode_return"], recorder.steps[4].reward_B + recorder.steps[5].reward_B)


def test_an_epoch_changes_new_episodes_but_not_the_running_one():
    state = played(group_of(Walk), 2).state()
    later = make_group(EnvConfig(id="fake"), 5, 3, 7, Walk, epoch=1)
    recorder = Recorder(later)
    assert recorder.begin(state) == []
    for _ in range(10):
        recorder.step(np.zeros(3, np.int64))
    assert later.cursor()["seed"][0] == streams.episode_seed(7, 5, 0, int(later.cursor()["episode"][0]), 1)


def test_an_episode_that_is_given_up_ends_as_an_invalid_row_without_a_step():
    recorder = played(group_of(lambda: Walk(length=9)), 3)
    recorder.group.give_up(1)
    step = recorder.step(np.zeros(3, np.int64))
    assert step.valid_B.tolist() == [True, False, True]
    assert step.truncated_B.tolist() == [False, True, False]
    assert step.reward_B[1] == 0
    ((b, final, *_),) = step.ended
    assert b == 1
    np.testing.assert_array_equal(final["observation"], recorder.rows[-2]["observation"][1])
    assert recorder.rows[-1]["observation"][1, 0] == streams.episode_seed(7, 5, 1, 1)
    later = [recorder.step(np.zeros(3, np.int64)) for _ in range(10)]
    assert any(e.env == 1 for step in later for e in step.ended)
    assert all(step.valid_B.all() for step in later)


def test_masks_in_the_observation_and_in_info():
    recorder = played(group_of(Nested), 1, actions=np.zeros((1, 3, 2), np.int64))
    np.testing.assert_array_equal(recorder.rows[1]["action_mask"][0], [True, True, False, True, True])

    class Info(Walk):
        def reset(self, **given):
            return super().reset(**given)[0], {"action_mask": np.array([1, 1, 0], np.int8)}

        def step(self, action):
            return (*super().step(action)[:4], {"action_mask": np.array([0, 1, 0], np.int8)})

    recorder = played(group_of(Info), 1)
    assert recorder.spec.action_mask == "info"
    np.testing.assert_array_equal(recorder.rows[0]["action_mask"][2], [True, True, False])
    np.testing.assert_array_equal(recorder.rows[1]["action_mask"][2], [False, True, False])


def broken(**changes):
    """A Walk that returns something else at its third step: changes by place in the result."""

    class Broken(Walk):
        def step(self, action):
            result = list(super().step(action))
            if self.count == 3:
                for place, value in changes.items():
                    if isinstance(value, BaseException):
                        raise value
                    result[int(place[1:])] = value
            return tuple(result)

    return lambda: Broken(length=9)


@pytest.mark.parametrize(
    ("factory", "kind", "field", "actual"),
    [
        (broken(_0=np.zeros(4)), "shape", "observation", "[4]"),
        (broken(_0=np.zeros(3, np.float32)), "dtype", "observation", "float32"),
        (broken(_0={"a": 1}), "structure", "observation", "a dict"),
        (broken(_0=np.array([0.0, np.nan, 0.0])), "not_finite", "observation", "nan at flat index 1"),
        (broken(_0=np.array([0.0, np.inf, 0.0])), "not_finite", "observation", "inf at flat index 1"),
        (broken(_1=np.nan), "reward", "reward", "nan"),
        (broken(_1=np.float64("inf")), "reward", "reward", "inf"),
        (broken(_1=np.zeros(1)), "reward", "reward", "ndarray"),
        (broken(_1=None), "reward", "reward", "None"),
        (broken(_2=1), "flag", "terminated", "int 1"),
        (broken(_3=None), "flag", "truncated", "None"),
        (broken(_4=[]), "api", "step()", "a tuple of 5 whose info is list"),
        (broken(_0=ValueError("the arm broke")), "raised", "", ""),
        (broken(_0=SystemExit(3)), "raised", "", ""),
    ],
)
def test_a_fault_names_environment_group_step_field_seed_action_and_what_came(factory, kind, field, actual):
    recorder = Recorder(group_of(factory))
    recorder.begin()
    with pytest.raises(EnvironmentFault) as caught:
        steps(recorder, 5, [0, 1, 2])
    report = caught.value.report
    assert report["kind"] == kind
    assert report["field"] == field
    assert actual in report["actual"]
    assert (report["environment"], report["group"], report["env"]) == ("fake", 5, 0)
    assert report["seed"] == streams.episode_seed(7, 5, 0, 0)
    assert report["last_action"] == -1
    assert report["step"] == 3
    if kind == "raised":
        assert "in step" in report["traceback"]
        assert "traceback" in str(caught.value)
    assert "group 5, environment 0" in str(caught.value)


def test_a_keyboard_interrupt_is_the_environments_own_only_where_no_ctrl_c_comes():
    def play():
        recorder = Recorder(group_of(broken(_0=KeyboardInterrupt())))
        recorder.begin()
        steps(recorder, 5, [0, 1, 2])

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal; whoever started the tests may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            play()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in every role
        with pytest.raises((EnvironmentFault, KeyboardInterrupt)) as caught:  # uncaught, it would end all tests
            play()
    finally:
        signal.signal(signal.SIGINT, before)
    assert str(caught.value).startswith("fake: step() raised KeyboardInterrupt")
    assert (caught.value.report["kind"], caught.value.report["step"]) == ("raised", 3)


def test_a_nan_in_the_last_observation_of_an_episode_is_a_fault():
    class LastIsNan(Walk):
        def step(self, action):
            result = super().step(action)
            return (result[0] * (np.nan if result[2] else 1), *result[1:])

    recorder = Recorder(group_of(LastIsNan))
    recorder.begin()
    with pytest.raises(EnvironmentFault, match="not finite"):
        steps(recorder, 9, [0, 0, 0])


def test_great_numbers_that_float32_holds_are_no_fault():
    class Great(Walk):
        def observe(self):
            return np.array([3e38, self.count, -3e38])

    assert len(played(group_of(Great), 3).steps) == 3


def test_the_old_gym_interface_is_recognised():
    class Old(Walk):
        def step(self, action):
            observation, reward, terminated, _, info = super().step(action)
            return observation, reward, terminated, info

    recorder = Recorder(group_of(Old))
    recorder.begin()
    with pytest.raises(EnvironmentFault, match="old Gym interface"):
        recorder.step(np.zeros(3, np.int64))

    class OldReset(Walk):
        def reset(self, **given):
            return super().reset(**given)[0]

    with pytest.raises(EnvironmentFault, match=r"reset\(\) returned"):
        Recorder(group_of(OldReset)).begin()


def test_after_a_fault_restore_makes_a_new_instance_and_goes_on():
    made = []

    class Once(Walk):
        def __init__(self):
            super().__init__(length=9)
            made.append(self)

        def step(self, action):
            if len(made) == 4 and self.count == 2 and made.index(self) == 2:
                raise RuntimeError("only the first time")
            return super().step(action)

    recorder = Recorder(group_of(Once, num_envs=3))
    made.clear()
    recorder.begin()
    made.append(None)
    recorder.step(np.zeros(3, np.int64))
    recorder.step(np.zeros(3, np.int64))
    state = recorder.state()
    with pytest.raises(EnvironmentFault, match="only the first time"):
        recorder.step(np.zeros(3, np.int64))
    assert recorder.group.restore(state) == []
    assert recorder.step(np.zeros(3, np.int64)).valid_B.all()


def test_an_environment_that_resets_itself_is_unwrapped_or_refused():
    same_rows(played(group_of(lambda: Autoreset(Walk())), 20), played(group_of(Walk), 20))
    with pytest.raises(ConfigError, match="Autoreset"):
        group_of(lambda: FlattenObservation(Autoreset(Walk())))
    with pytest.raises(ConfigError, match=r"gymnasium\.Env"):
        group_of(lambda: 3)


def test_observe_writes_what_step_wrote_last():
    recorder = played(group_of(Walk), 7)
    out = allocate(recorder.spec, 3)
    recorder.group.observe(out)
    np.testing.assert_array_equal(out["observation"], recorder.rows[-1]["observation"])


def test_a_step_before_restore_is_refused():
    group = group_of(Walk)
    with pytest.raises(EnvironmentFault, match="restore"):
        group.step(np.zeros(3, np.int64), allocate(group.spec, 3))


def test_box_actions_are_scaled_into_the_space():
    seen = []

    class Continuous(Walk):
        action_space = spaces.Box(-2, 4, (2,), np.float32)

        def step(self, action):
            seen.append(action)
            return super().step(0)

    group = group_of(Continuous, num_envs=1)
    group.restore(fresh_state(group.spec, 1))
    group.step(np.array([[-1.0, 0.5]], np.float32), allocate(group.spec, 1))
    np.testing.assert_allclose(seen[0], [-2, 2.5])
    assert seen[0].dtype == np.float32
