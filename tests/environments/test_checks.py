"""`shoal check` names each fault before training, and says nothing bad of a sound environment."""

from __future__ import annotations

import json
import struct
import time
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from environment_fakes import Forgetful, Nested, OneBuffer, SnapshotWalk, Walk
from gymnasium import spaces

from shoal.config import EnvConfig
from shoal.environments import CheckReport, check_environment
from shoal.environments.probe import slow_shares
from shoal.errors import ConfigError


def check(factory, **env):
    return check_environment(EnvConfig(id="fake", **env), factory, num_steps=300, seconds=60.0)


def names(report, severity):
    return [finding.name for finding in report.findings if finding.severity == severity]


class Scaled(Walk):
    """A Walk without the seed in its observation, so that it stays small."""

    def observe(self):
        return np.array([0.0, self.count / 10, np.tanh(self.position)])


@pytest.mark.parametrize("factory", [Scaled, Nested])
def test_a_sound_environment_has_no_errors_and_no_warnings(factory):
    report = check(factory)
    assert report.ok
    assert names(report, "error") + names(report, "warning") == []
    assert report.measurements["episodes_ended"] > 3
    assert report.measurements["step_mean_us"] > 0
    assert json.loads(json.dumps(report.to_json()))["ok"]


def with_step(change):
    class Changed(Scaled):
        def step(self, action):
            return change(self, *super().step(action))

    return Changed


class OldReset(Scaled):
    def reset(self, **given: Any):
        return super().reset(**given)[0]


class ListFromReset(Scaled):
    def reset(self, **given: Any):
        return super().reset(**given)[0], []


class NoSpaces(gymnasium.Env):
    pass


class TextSpace(Scaled):
    observation_space = spaces.Text(5)


class Refuses(Scaled):
    def step(self, action):
        assert action == 0, "I take only 0"
        return super().step(action)


class Shared(Scaled):
    buffer: ClassVar[Any] = np.zeros(3)

    def observe(self):
        Shared.buffer[:] = super().observe()
        return Shared.buffer


class BadSnapshot(SnapshotWalk):
    """Its snapshot leaves the position out."""

    def restore_snapshot(self, data: bytes) -> Any:
        self.seed, self.count, _, self.length, self.lifetime = struct.unpack("<dqdqq", data)
        self.position = 0.0
        return self.observe(), {}


class NoSnapshot(SnapshotWalk):
    def snapshot(self) -> bytes:
        raise OSError("the emulator refuses")


class LongSnapshot(SnapshotWalk):
    snapshot_bytes = 39


class NotAnEnvironment:
    pass


def fails():
    raise RuntimeError("no display")


class SharedGenerator(Scaled):
    """Its numbers come from a space of the class, which every instance seeds and draws from."""

    drawn: ClassVar[spaces.Box] = spaces.Box(-1.0, 1.0, (), np.float64)

    def reset(self, *, seed=None, options=None):
        self.drawn.seed(seed)
        return super().reset(seed=seed, options=options)

    def step(self, action):
        o, _, x, t, i = super().step(action)
        return o, float(self.drawn.sample()), x, t, i


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (fails, "construction"),
        (NoSpaces, "spaces"),
        (TextSpace, "spaces"),
        (OldReset, "interface"),
        (with_step(lambda self, o, r, x, t, i: (o, r, x, i)), "interface"),
        (with_step(lambda self, o, r, x, t, i: (o, r, x, t, [])), "interface"),
        (with_step(lambda self, o, r, x, t, i: (o[:2], r, x, t, i)), "observation_shape"),
        (with_step(lambda self, o, r, x, t, i: (o.astype(np.float32), r, x, t, i)), "observation_dtype"),
        (with_step(lambda self, o, r, x, t, i: ({"o": o}, r, x, t, i)), "observation_structure"),
        (with_step(lambda self, o, r, x, t, i: (o * np.nan, r, x, t, i)), "observation_not_finite"),
        (with_step(lambda self, o, r, x, t, i: (o, np.inf, x, t, i)), "reward"),
        (with_step(lambda self, o, r, x, t, i: (o, [1.0], x, t, i)), "reward"),
        (with_step(lambda self, o, r, x, t, i: (o, r, "no", t, i)), "flags"),
        (Refuses, "raised"),
        (Forgetful, "same_seed_differs"),
        (Shared, "shared_buffer"),
        (SharedGenerator, "instances_share_state"),
        (BadSnapshot, "snapshot"),
        (NoSnapshot, "snapshot"),
        (LongSnapshot, "snapshot"),
        (NotAnEnvironment, "interface"),
        (with_step(lambda self, o, r, x, t, i: (o, 10**400, x, t, i)), "reward"),
        (with_step(lambda self, o, r, x, t, i: (o, 1e39, x, t, i)), "reward"),
        (with_step(lambda self, o, r, x, t, i: (o + 1e300, r, x, t, i)), "observation_not_finite"),
    ],
)
def test_each_fault_is_an_error_with_its_name(factory, name):
    report = check(factory)
    assert not report.ok
    assert name in names(report, "error")
    assert next(f for f in report.findings if f.name == name).hint


def test_the_message_of_a_fault_says_what_to_do():
    (finding,) = check(with_step(lambda self, o, r, x, t, i: (o.astype(np.float32), r, x, t, i))).findings
    assert "float64 [3]" in finding.message
    assert "float32 [3]" in finding.message
    assert "astype" in finding.hint


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("I have no words")


class RaisesUnspeakable(Scaled):
    def step(self, action):
        raise Unspeakable


def test_an_error_that_cannot_say_itself_is_named_all_the_same():
    finding = next(one for one in check(RaisesUnspeakable).findings if one.name == "raised")
    assert "step() raised Unspeakable (whose __str__ raises RuntimeError)" in finding.message


def test_an_info_that_is_no_dict_is_told_as_what_it_is():
    for call, factory in (
        ("step()", with_step(lambda self, o, r, x, t, i: (o, r, x, t, []))),
        ("reset()", ListFromReset),
    ):
        finding = next(one for one in check(factory).findings if one.name == "interface")
        assert f"{call} returned something else than" in finding.message
        assert "whose info is list" in finding.message
        assert finding.hint.startswith("info is a dict")


def test_numbers_that_only_float64_holds_are_named():
    for change in (lambda self, o, r, x, t, i: (o, 1e39, x, t, i), lambda self, o, r, x, t, i: (o - 1e300, r, x, t, i)):
        (finding,) = check(with_step(change)).findings
        assert "does not fit into float32" in finding.message
        assert "at most 3.4e+38 in size" in finding.message


class Narrow(Scaled):
    observation_space = spaces.Box(-0.1, 0.1, (3,), np.float64)


class Endless(Scaled):
    def __init__(self):
        super().__init__(length=10**9)

    def observe(self):
        return np.zeros(3)


class Swapped(Scaled):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, truncated, terminated, info


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (Narrow, "observation_range"),
        (Walk, "unscaled_observation"),
        (Endless, "episode_never_ends"),
        (Swapped, "truncated_without_time_limit"),
        (lambda: Scaled(length=6), "terminated_by_time"),
        (OneBuffer, "reused_buffer"),
        (SnapshotWalk, "used_instance_differs"),
    ],
)
def test_each_weakness_is_a_warning_with_its_name(factory, name):
    report = check(factory)
    assert report.ok
    assert name in names(report, "warning")
    assert next(f for f in report.findings if f.name == name).hint


class Uneven(Scaled):
    """One step in `every` takes 10 ms."""

    def __init__(self, every):
        super().__init__()
        self.every, self.steps = every, 0

    def step(self, action):
        self.steps += 1
        if self.steps % self.every == 0:
            time.sleep(0.01)
        return super().step(action)


@pytest.mark.parametrize("every", [10, 100])
def test_rare_steps_that_take_most_of_the_time_are_a_note(every):
    report = check_environment(EnvConfig(id="fake"), lambda: Uneven(every), num_steps=300, seconds=60.0)
    assert names(report, "note") == ["unequal_step_times"]


def test_slow_steps_are_those_beyond_ten_times_the_median():
    assert slow_shares([]) == slow_shares([1.0, 9.0, 1.0]) == (0.0, 0.0)
    assert slow_shares([1.0] * 90 + [11.0] * 10) == pytest.approx((0.1, 110 / 200))


def test_what_cannot_be_found_is_a_configuration_error():
    with pytest.raises(ConfigError):
        check_environment(EnvConfig(id="CartPol-v1"))


def test_environments_that_do_not_fit_into_memory_are_a_warning():
    class Heavy(Scaled):
        def __init__(self):
            super().__init__()
            self.ballast = np.ones(5_000_000)  # 40 MB: more than malloc may keep when it is freed, and hand out again

    report = check_environment(EnvConfig(id="fake"), Heavy, num_steps=20, seconds=60.0, num_envs=10**6)
    assert "memory" in names(report, "warning")
    assert report.measurements["memory_bytes"] > 20_000_000


def test_a_report_survives_the_way_between_processes():
    report = check(SnapshotWalk)
    assert CheckReport.from_json(json.loads(json.dumps(report.to_json()))) == report
