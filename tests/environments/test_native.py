"""Vector environments in every autoreset mode: true last observations, valid rows, and exact restoring by snapshots."""

from __future__ import annotations

import faulty
import numpy as np
import pytest
from environment_fakes import Recorder, VectorWalk, same_rows
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from shoal.config import EnvConfig
from shoal.environments import make_group, probe
from shoal.errors import ConfigError, EnvironmentFault


def group_of(factory, num_envs=3, run_seed=7, env_id="fake", **kwargs):
    return make_group(EnvConfig(id=env_id, form="native", kwargs=kwargs), 5, num_envs, run_seed, factory)


def played(group, num_steps, state=None, seed=0):
    recorder = Recorder(group)
    recorder.begin(state)
    rng = np.random.default_rng(seed)
    for action_B in rng.integers(0, 2, (num_steps, group.num_envs)):
        recorder.step(action_B)
    return recorder


def transitions(recorder, b):
    """(observation, its true successor, truncated) of each valid row of environment b."""
    out = []
    for t, step in enumerate(recorder.steps):
        if step.valid_B[b]:
            finals = {e.env: e.final for e in step.ended}
            successor = finals[b]["observation"] if finals.get(b) is not None else recorder.rows[t + 1]["observation"][b]
            out.append((recorder.rows[t]["observation"][b].tolist(), successor.tolist(), bool(step.truncated_B[b])))
    return out


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_truncated_episode_shows_its_true_last_observation_in_every_autoreset_mode(mode):
    recorder = played(group_of(lambda num_envs: VectorWalk(num_envs, mode)), 30)
    for b, length in enumerate((3, 4, 5)):
        expected = [([e, n], [e, n + 1], n + 1 == length) for e in range(20) for n in range(length)]
        got = transitions(recorder, b)
        assert got == expected[: len(got)]
        assert len(got) >= 30 - 30 // length


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_only_next_step_has_rows_that_are_no_steps_and_they_count_nothing(mode):
    recorder = played(group_of(lambda num_envs: VectorWalk(num_envs, mode)), 25)
    valid_TB = np.stack([step.valid_B for step in recorder.steps])
    if mode is not AutoresetMode.NEXT_STEP:
        assert valid_TB.all()
    for b, length in enumerate((3, 4, 5)):
        expected = [mode is not AutoresetMode.NEXT_STEP or t % (length + 1) != length for t in range(25)]
        assert valid_TB[:, b].tolist() == expected
        assert all(step.reward_B[b] == (1.0 if step.valid_B[b] else 0.0) for step in recorder.steps)
        invalid = [step for step in recorder.steps if not step.valid_B[b]]
        assert not any(step.truncated_B[b] or step.terminated_B[b] for step in invalid)
    cursor = recorder.group.cursor()
    np.testing.assert_array_equal(cursor["episode_return"], cursor["num_steps"])


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_gymnasiums_own_vector_wrapper_gives_the_same_transitions(mode):
    from environment_fakes import Walk

    def factory(num_envs):
        return SyncVectorEnv([lambda: Walk(truncate=True, length=4) for _ in range(num_envs)], autoreset_mode=mode)

    recorder = played(group_of(factory), 20)
    for b in range(3):
        for before, after, truncated in transitions(recorder, b):
            assert after[1] == before[1] + 1
            assert truncated == (after[1] == 4)


@pytest.mark.parametrize("cut", [0, 3, 40, 97])
def test_cartpoles_vector_form_is_restored_bit_for_bit(cut):
    whole = played(group_of(None, env_id="CartPole-v1"), 120)
    first = played(group_of(None, env_id="CartPole-v1"), cut)
    assert first.spec.exact_restore
    state = first.state()
    assert all(len(one) == first.spec.snapshot_bytes for one in state.snapshots)
    second = Recorder(group_of(None, env_id="CartPole-v1"))
    assert second.begin(state) == []
    for action_B in np.random.default_rng(0).integers(0, 2, (120, 3))[cut:]:
        second.step(action_B)
    same_rows(whole, second, from_row=cut)
    np.testing.assert_array_equal(whole.group.cursor(), second.group.cursor())
    assert not all(step.valid_B.all() for step in whole.steps)


def test_without_snapshots_running_episodes_are_lost_and_said_to_be():
    group = group_of(lambda num_envs: VectorWalk(num_envs, AutoresetMode.SAME_STEP))
    assert not group.spec.exact_restore
    recorder = played(group, 4)
    assert Recorder(group).begin(recorder.state()) == [0, 2]  # environment 1 had just begun an episode


def test_seeds_differ_between_groups_and_repeat():
    one, same, other = (group_of(None, env_id="CartPole-v1", run_seed=s) for s in (7, 7, 8))
    rows = [played(group, 0).rows[0]["observation"] for group in (one, same, other)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])


def test_giving_up_begins_every_environment_anew():
    recorder = played(group_of(lambda num_envs: VectorWalk(num_envs, AutoresetMode.DISABLED)), 2)
    recorder.group.give_up(1)
    step = recorder.step(np.zeros(3, np.int64))
    assert not step.valid_B.any()
    assert [e.env for e in step.ended] == [0, 1, 2]
    assert recorder.step(np.zeros(3, np.int64)).valid_B.all()


def test_faults_of_vector_environments_are_classified():
    class Broken(VectorWalk):
        what = ""

        def step(self, actions):
            observation, reward, terminated, truncated, info = super().step(actions)
            if self.what == "nan":
                observation[1, 0] = np.nan
            if self.what == "dtype":
                observation = observation.astype(np.float64)
            if self.what == "reward":
                reward = reward[:2]
            if self.what == "raise":
                raise ValueError("the simulator is gone")
            return observation, reward, terminated, truncated, info

    for what, kind in (("nan", "not_finite"), ("dtype", "shape"), ("reward", "reward"), ("raise", "raised")):
        group = group_of(lambda num_envs: Broken(num_envs, AutoresetMode.SAME_STEP))
        recorder = played(group, 1)
        Broken.what = what
        with pytest.raises(EnvironmentFault) as caught:
            recorder.step(np.zeros(3, np.int64))
        Broken.what = ""
        assert caught.value.report["kind"] == kind
        assert caught.value.report["env"] == (1 if what == "nan" else 0)
        assert recorder.group.restore(recorder.state()) == [0, 1, 2]


def test_no_vector_form_is_a_configuration_error():
    with pytest.raises(ConfigError, match="no vector form"):
        make_group(EnvConfig(id="Pendulum-v1", form="native"), 0, 2, 0)
    with pytest.raises(ConfigError, match="VectorEnv"):
        group_of(lambda num_envs: object())


def test_a_mask_in_a_batched_dict_observation_is_read():
    class Masked(VectorWalk):
        def __init__(self, num_envs):
            super().__init__(num_envs, AutoresetMode.SAME_STEP)
            self.single_observation_space = spaces.Dict({"x": self.single_observation_space, "action_mask": spaces.MultiBinary(2)})

        def _observe(self):
            return {"x": super()._observe(), "action_mask": np.tile(np.array([[1, 0]], np.int8), (self.num_envs, 1))}

        def step(self, actions):
            self.lengths[:] = 99
            return super().step(actions)

    recorder = played(group_of(Masked), 1)
    assert recorder.rows[1]["action_mask"].tolist() == [[True, False]] * 3


def test_probe_reads_the_spec_of_a_native_form():
    assert probe(EnvConfig(id="CartPole-v1", form="native")).spec.exact_restore


# ---- what a vector form does wrong ------------------------------------------------------------------------------------
def broken(fault, where="step", at=3):
    group = group_of(faulty.vector, num_envs=2, fault=fault, where=where, at=at)
    played(group, 10)
    return group


@pytest.mark.parametrize(
    ("fault", "where", "kind", "says", "env"),
    [
        ("raises", "init", "raised", "making the environment raised ValueError: the arm is stuck", 0),
        ("raises", "reset", "raised", "reset() raised ValueError", 0),
        ("raises", "step", "raised", "step() raised ValueError", 0),
        ("none", "reset", "api", "reset() returned something else than (observation, info)", 0),
        ("info", "reset", "api", "reset() returned something else", 0),
        ("info", "step", "api", "step() returned something else", 0),
        ("nan", "step", "not_finite", "the observation is not finite", 1),
        ("reward_nan", "step", "reward", "the reward is not finite", 1),
        ("structure", "step", "shape", "step() returned an observation that is not in its space", 0),
        ("snapshots_raise", "", "snapshot", "snapshots() raised RuntimeError: the simulators cannot be saved", 0),
        ("snapshots_long", "", "snapshot", "snapshots() broke its promise", 0),
    ],
)
def test_whatever_a_vector_form_does_is_a_fault_with_its_kind(fault, where, kind, says, env):
    with pytest.raises(EnvironmentFault) as caught:
        broken(fault, where).snapshots()
    report = caught.value.report
    assert says in str(caught.value)
    assert (report["kind"], report["env"]) == (kind, env)
    assert "raised" in str(caught.value) or (report["expected"] and report["actual"] and report["field"])


def test_a_vector_form_that_cannot_be_made_is_found_by_the_look_before_training():
    env = EnvConfig(id="fake", form="native", kwargs={"fault": "raises", "where": "init"})
    with pytest.raises(EnvironmentFault, match="making the environment raised ValueError"):
        probe(env, faulty.vector)
    env = EnvConfig(id="fake", form="native", kwargs={"spin": 3})
    with pytest.raises(ConfigError, match=r"env\.kwargs of fake: .*'spin'"):
        probe(env, faulty.vector)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_each_call_that_makes_or_puts_back_a_vector_form_is_told(mode):
    told, resets = [], []
    group = make_group(EnvConfig(id="fake", form="native"), 5, 3, 7, lambda num_envs: VectorWalk(num_envs, mode), progress=told.append)
    assert told == [0, 0]  # made, and reset for its spec
    recorder = Recorder(group)
    recorder.begin(None)
    assert told == [0, 0, 0]
    group.resetting = lambda b, begins: resets.append((b, begins))
    for _ in range(4):
        recorder.step(np.zeros(3, np.int64))
    assert resets == ([(0, True), (0, False)] * 2 if mode is AutoresetMode.DISABLED else [])
