"""Threads give the same bits as stepping one by one, and each environment keeps to its thread."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from environment_fakes import Recorder, SnapshotWalk, Threads, Walk, fresh_state, same_rows

from shoal.config import EnvConfig
from shoal.environments import make_group
from shoal.environments.spaces import allocate
from shoal.errors import EnvironmentFault


def group_of(factory, form="threads", num_envs=4):
    return make_group(EnvConfig(id="fake", form=form), 5, num_envs, 7, factory)


def played(group, actions, state=None):
    recorder = Recorder(group)
    recorder.begin(state)
    for action_B in actions:
        recorder.step(action_B)
    return recorder


ACTIONS = np.random.default_rng(0).integers(0, 3, (40, 4))


@pytest.mark.parametrize("factory", [Walk, Threads, SnapshotWalk])
def test_threads_give_the_same_bits_as_stepping_one_by_one(factory):
    threads, python = group_of(factory), group_of(factory, "python")
    same_rows(played(threads, ACTIONS), played(python, ACTIONS))
    np.testing.assert_array_equal(threads.cursor(), python.cursor())
    threads.close()


def test_restore_crosses_from_threads_to_python():
    threads = group_of(Walk)
    first = played(threads, ACTIONS[:17])
    second = played(group_of(Walk, "python"), ACTIONS[17:], first.state())
    same_rows(played(group_of(Walk, "python"), ACTIONS), second, from_row=17)
    threads.close()


def test_an_environment_lives_in_one_thread_from_making_to_closing():
    made = []

    class Noting(Threads):
        def __init__(self):
            super().__init__()
            made.append(self)

        def close(self):
            self.threads.add(threading.get_ident())

    group = group_of(Noting)
    played(group, ACTIONS[:5])
    group.close()
    own = [env.threads for env in made[1:]]  # the first was made here, for its spec
    assert all(len(threads) == 1 for threads in own)
    assert len(set.union(*own)) == 4
    assert threading.get_ident() not in set.union(*own)


def test_environments_wait_at_the_same_time():
    meeting = threading.Barrier(4, timeout=300)

    class Meets(Walk):
        def step(self, action):
            meeting.wait()  # nobody passes before all four are here
            return super().step(action)

    group = group_of(Meets)
    assert len(played(group, ACTIONS[:3]).steps) == 3
    group.close()


def test_a_fault_in_a_thread_is_raised_for_the_right_environment_and_the_group_can_be_restored():
    class Fails(Walk):
        def step(self, action):
            if self.count == 1 and action == 1:
                raise ValueError("no")
            return super().step(action)

    group = group_of(Fails)
    recorder = played(group, [np.zeros(4, np.int64)])
    state = recorder.state()
    with pytest.raises(EnvironmentFault) as caught:
        recorder.step(np.array([0, 0, 2, 0]))
    assert caught.value.report["env"] == 2
    assert group.restore(state) == []
    recorder.step(np.zeros(4, np.int64))
    group.close()


def test_a_hanging_environment_does_not_keep_close_waiting():
    held = threading.Event()

    class Hangs(Walk):
        def close(self):
            if threading.current_thread() is not threading.main_thread():  # the one that was made for its spec
                held.wait(600)

    group = group_of(Hangs)
    group.restore(fresh_state(group.spec, 4))
    group.close()
    held.set()


def test_paced_environments_act_on_their_own_and_give_the_same_episodes():
    gate = threading.Event()

    class Slow(Walk):
        def step(self, action):
            if self.slow:
                gate.wait(600)
            return super().step(action)

    made = []

    def factory():
        made.append(Slow())
        made[-1].slow = False
        return made[-1]

    group = group_of(factory, num_envs=2)
    group.restore(fresh_state(group.spec, 2))
    python = played(group_of(Walk, "python", num_envs=2), np.ones((6, 2), np.int64))
    slow = next(env for env in made if getattr(env, "seed", None) == python.rows[0]["observation"][0, 0])
    slow.slow = True
    group.send([0], np.ones(1, np.int64))
    for t in range(6):  # environment 1 makes six steps while environment 0 is still in its first
        group.send([1], np.ones(1, np.int64))
        assert group.ready(300) == [1]
        (step,) = group.take([1])
        np.testing.assert_array_equal(group.observed([1])["observation"][0], python.rows[t + 1]["observation"][1])
        assert step.reward == python.steps[t].reward_B[1]
        assert (step.terminated, step.valid) == (python.steps[t].terminated_B[1], True)
        final = {e.env: e.final for e in python.steps[t].ended}.get(1)
        assert (step.ended is None) == (final is None)
        if final is not None:
            np.testing.assert_array_equal(step.ended.final["observation"], final["observation"])
    assert group.ready(0.01) == []
    with pytest.raises(RuntimeError, match="take"):
        group.send([0], np.ones(1, np.int64))
    gate.set()
    while group.ready(300) != [0]:
        time.sleep(0.001)
    assert group.take([0])[0].reward == python.steps[0].reward_B[0]
    group.close()


def test_of_those_that_are_taken_together_the_one_that_is_not_finite_is_named():
    class Infinite(Walk):
        def step(self, action):
            observation, *rest = super().step(action)
            return (observation * np.inf if action == 1 else observation, *rest)

    group = group_of(Infinite, num_envs=4)
    group.restore(fresh_state(group.spec, 4))
    group.send(range(4), np.array([0, 0, 2, 2]))
    while len(envs := group.ready(300)) < 4:
        time.sleep(0.001)
    with pytest.raises(EnvironmentFault) as caught:
        group.take(envs)
    assert caught.value.report["env"] == 2
    group.close()


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="the system has no such threads")
def test_threads_of_environments_do_not_interrupt_who_wakes_them():
    policies = []

    class Asks(Walk):
        def step(self, action):
            policies.append(os.sched_getscheduler(threading.get_native_id()))
            return super().step(action)

    group = group_of(Asks, num_envs=3)
    group.restore(fresh_state(group.spec, 3))
    group.step(np.ones(3, np.int64), allocate(group.spec, 3))
    assert policies == [os.SCHED_BATCH] * 3
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    group.close()


def test_a_call_that_hangs_while_the_group_is_put_back_is_named_after_its_limit():
    held = threading.Event()

    class Hangs(Walk):
        def reset(self, *, seed=None, options=None):
            if threading.current_thread().name == "environment-2":
                held.wait(600)
            return super().reset(seed=seed, options=options)

    told = []
    env = EnvConfig(id="fake", form="threads", step_timeout_seconds=4.0)  # the machine may stand still for a moment
    group = make_group(env, 5, 4, 7, Hangs, progress=told.append)
    begun = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"reset\(\).* has not returned for \d+\.\d s") as caught:
        group.restore(fresh_state(group.spec, 4))
    assert 4.0 <= time.monotonic() - begun < 300  # half of what it hangs for
    assert (caught.value.report["kind"], caught.value.report["env"]) == ("hang", 2)
    assert "held.wait(600)" in caught.value.report["traceback"]
    assert set(told) == {-1}
    held.set()
    group.close()


def test_a_reset_has_its_limit_to_itself_and_so_has_each_call_while_the_group_is_put_back():
    class Lingers(Walk):
        def reset(self, *, seed=None, options=None):
            time.sleep(2.5)
            return super().reset(seed=seed, options=options)

        def step(self, action):
            time.sleep(2.5)
            observation, reward, _, _, info = super().step(action)
            return observation, reward, False, True, info

    group = make_group(EnvConfig(id="fake", form="threads", step_timeout_seconds=4.9), 5, 2, 7, Lingers)  # less than two calls take
    group.restore(fresh_state(group.spec, 2))
    begun = time.monotonic()
    group.send([0], np.zeros(1, np.int64))
    while not group.ready(0.05):
        pass
    assert group.call_began(0) - begun > 2.49
    group.close()
