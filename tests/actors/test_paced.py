"""Rollouts of groups whose environments act each as soon as it is ready.

Legend: T rows, B environments.
"""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from rollout_fakes import (
    RUN_ID,
    Drift,
    ScriptedBehaviour,
    action_of,
    fresh_state,
    log_prob_of,
    observation_of,
    poisoned_ring,
    policy_fields,
    reward_of,
    same_rollout,
    scripted_schema,
    scripted_spec,
)
from shoal.actors.actor import Actor
from shoal.actors.paced import Paced
from shoal.config import EnvConfig
from shoal.environments import make_group
from shoal.environments.threads import PacedStep
from shoal.errors import EnvironmentFault
from shoal.experience.envelope import Identity
from shoal.experience.schema import rollout_schema
from shoal.types import CURSOR, Acted

T, B, G = 6, 3, 2


class Behaviour(ScriptedBehaviour):
    """As ScriptedBehaviour, also where each environment is at a row of its own. Its state: the rows so far, and the version that saw the last."""

    def act(self, observation, state, row):
        rows = np.broadcast_to(row, len(next(iter(observation.values()))))
        group, sequence = self.begun[-1]
        action = np.array([action_of(group, sequence, int(t), b) for b, t in enumerate(rows)])
        log_prob = np.array([log_prob_of(int(a), int(t)) for a, t in zip(action, rows, strict=True)], np.float32)
        after = {name: np.stack([value[:, 0] + 1, np.full(len(value), self.version, np.float32)], 1) for name, value in state.items()}
        return Acted(action, {"log_prob": log_prob}, after, self.version)


class Metronome:
    """Environment b is ready every `periods[b]`-th time that somebody asks; its episodes never end."""

    def __init__(self, periods, behaviour=None, publish_every: int = 0) -> None:
        self.spec, self.num_envs, self._periods = scripted_spec(False), len(periods), periods
        self._behaviour, self._publish_every = behaviour, publish_every
        self.count = [0] * len(periods)
        self.left: dict[int, int] = {}
        self.actions: dict[int, int] = {}
        self.asked = 0

    def restore(self, state):
        return []

    def observe(self, out):
        for b, count in enumerate(self.count):
            for name, value in observation_of(b, count).items():
                out[name][b] = value

    def cursor(self):
        cursor = np.zeros(self.num_envs, CURSOR)
        cursor["num_steps"] = self.count
        return cursor

    def give_up(self, b):
        raise AssertionError("nobody asked for this")

    def send(self, envs, action_N):
        for b, action in zip(envs, action_N, strict=True):
            assert b not in self.left
            self.left[b], self.actions[b] = self._periods[b], int(action)

    def call_began(self, b):
        return 0.0

    def ready(self, timeout_seconds):
        self.asked += 1
        if self._publish_every and self.asked % self._publish_every == 0:
            self._behaviour.version += 1
        self.left = {b: left - 1 for b, left in self.left.items()}
        return [b for b, left in self.left.items() if left <= 0]

    def take(self, envs):
        for b in envs:
            del self.left[b]
            self.count[b] += 1
        return [PacedStep(reward_of(b, self.count[b], self.actions[b]), False, False, True, None) for b in envs]

    def observed(self, envs):
        each = [observation_of(b, self.count[b]) for b in envs]
        return {name: np.stack([one[name] for one in each]) for name in each[0]}

    def snapshots(self):
        return [None] * self.num_envs

    def close(self):
        pass


def metronomes(periods, *, whole=False, publish_every=0, **more):
    ring = poisoned_ring(scripted_schema(T, len(periods), mask=False), 3)
    behaviour = Behaviour()
    group = Metronome(periods, behaviour, publish_every)
    assert isinstance(group, Paced)
    actor = Actor(ring, behaviour, lambda index: group, run_id=RUN_ID, whole=whole, **more)
    actor.restore(G, fresh_state(len(periods)))
    return actor, behaviour, group


def closing_after(behaviour, updates):
    return lambda first: behaviour.version - first >= updates


# ---- whole (sync) ----------------------------------------------------------------------------------------------------
class Dawdling(Drift):
    def step(self, action):
        time.sleep(random.random() * 0.002)
        return super().step(action)


def test_a_whole_rollout_is_what_stepping_row_by_row_gives_bit_for_bit():
    schema = rollout_schema(make_group(EnvConfig(id="drift"), G, B, 3, Drift).spec, policy_fields(), T, B)
    ring = poisoned_ring(schema, 4)
    plain, paced = (
        Actor(
            ring,
            Behaviour(),
            lambda g, form=form: make_group(EnvConfig(id="drift", form=form), g, B, 3, Dawdling),
            run_id=RUN_ID,
            whole=True,
        )
        for form in ("python", "threads")
    )
    for actor in (plain, paced):
        actor.restore(G, fresh_state(B))
    for sequence in range(5):
        one, other = (actor.fill(k, Identity(G, sequence, 0)) for k, actor in enumerate((plain, paced)))
        same_rollout(one, other)
        other.check(RUN_ID, Identity(G, sequence, 0))
    paced.close()


def test_a_whole_rollout_ends_when_the_slowest_has_filled_its_rows():
    actor, _, group = metronomes([1, 2, 7], whole=True)
    slot = actor.fill(0, Identity(G, 0, 0))
    assert slot.arrays["valid"].all()
    assert (group.count, group.left, bool(slot.envelope["paced"])) == ([T] * 3, {}, False)


def test_a_whole_rollout_that_the_caller_closes_is_not_whole():
    actor, _, _ = metronomes([1, 2], whole=True)
    slot = actor.fill(0, Identity(G, 0, 0), lambda first: True)
    assert slot.envelope["paced"]
    assert slot.rows_used().tolist() == [1, 1]


# ---- as soon as they are ready (async) -------------------------------------------------------------------------------
def test_the_first_that_filled_its_rows_closes_the_rollout_and_steps_under_way_go_on_in_the_next():
    actor, behaviour, group = metronomes([1, 2, 100])
    first = actor.fill(0, Identity(G, 0, 0))
    assert first.envelope["paced"]
    assert first.rows_used().tolist() == [6, 3, 0]
    assert int(first.envelope["num_env_steps"]) == 9
    sent = group.actions[2]
    behaviour.version = 5
    group.left[2] = 1  # it comes back now
    second = actor.fill(1, Identity(G, 1, 0))
    a = second.arrays
    assert (a["action"][0, 2], a["policy_version"][0, 2], a["valid"][0, 2]) == (sent, 0, True)
    assert a["log_prob"][0, 2] == np.float32(log_prob_of(sent, 0))
    assert a["reward"][0, 2] == reward_of(2, 1, sent)
    np.testing.assert_array_equal(a["observation/position"][0, 2], observation_of(2, 0)["observation/position"])
    np.testing.assert_array_equal(a["observation/position"][1, 2], observation_of(2, 1)["observation/position"])
    assert (a["policy_version"][0, :2] == 5).all()
    assert (int(second.envelope["version_min"]), int(second.envelope["version_max"])) == (0, 5)


def test_the_recurrent_state_of_each_environment_goes_on_with_its_own_rows():
    """The behaviour's counts the rows of an environment, as its observation does; it answers for all whenever one is ready, but only that one is told."""
    actor, behaviour, _ = metronomes([1, 2, 17], publish_every=3)
    for sequence in range(8):
        slot = actor.fill(sequence % 3, Identity(G, sequence, 0), closing_after(behaviour, 2) if sequence % 3 == 1 else None)
        used = slot.rows_used()
        np.testing.assert_array_equal(slot.arrays["policy_state/h"][:, 0], slot.arrays["observation/position"][0, :, 1])
        end = slot.arrays["policy_state/h/end"]
        np.testing.assert_array_equal(end[:, 0], slot.arrays["policy_state/h"][:, 0] + used)
        for b in np.flatnonzero(used):
            assert end[b, 1] == slot.arrays["policy_version"][used[b] - 1, b]
    assert slot.arrays["policy_state/h"][2, 0] == 2  # the slow one's steps began in one rollout and ended in another


def test_the_row_after_an_environments_last_one_bootstraps_it():
    actor, _, _ = metronomes([1, 2])
    slot = actor.fill(0, Identity(G, 0, 0))
    for b, used in enumerate(slot.rows_used()):
        np.testing.assert_array_equal(slot.arrays["observation/position"][used, b], observation_of(b, int(used))["observation/position"])
        assert not slot.arrays["observation/position"][used + 1 : T + 1, b].any()


def test_a_rollout_closes_when_what_it_began_grows_old():
    actor, behaviour, _ = metronomes([1, 1], publish_every=2)
    slot = actor.fill(0, Identity(G, 0, 0), closing_after(behaviour, 2))
    assert slot.rows_used().tolist() == [4, 4]


def test_a_straggler_that_was_sent_long_ago_does_not_close_the_rollouts_of_the_others():
    actor, behaviour, group = metronomes([1, 1, 10_000], publish_every=4)
    for sequence in range(6):
        slot = actor.fill(sequence % 3, Identity(G, sequence, 0), closing_after(behaviour, 2))
        assert slot.rows_used().tolist() == [T, T, 0]
    group.left[2] = 1
    slot = actor.fill(0, Identity(G, 6, 0), closing_after(behaviour, 2))
    assert slot.rows_used().tolist() == [T, T, 1]
    assert slot.arrays["policy_version"][0, 2] == 0
    assert behaviour.version > 6


def test_a_step_that_takes_too_long_is_a_fault_with_a_name():
    actor, _, group = metronomes([1, 10_000], step_timeout_seconds=0.0)
    with pytest.raises(EnvironmentFault) as caught:
        actor.fill(0, Identity(G, 0, 0))
    report = caught.value.report
    assert {name: report[name] for name in ("kind", "group", "env", "paced")} == {"kind": "hang", "group": G, "env": 1, "paced": [0, 0]}
    assert group.count[0] > 0
