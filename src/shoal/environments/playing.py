"""Playing one environment with random actions, for `shoal check`: what its numbers are, and how its episodes end."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from shoal.environments.findings import CheckReport
from shoal.environments.instance import Instance
from shoal.environments.spaces import MASK, allocate, extend_crc, random_action, to_environment_action
from shoal.types import CURSOR, Array, Arrays, EnvironmentSpec

_UNSCALED = 100.0  # a float observation beyond this makes a network's first layer saturate
_ENDS = 3  # episodes from which something can be said of how they end


class Player:
    """One environment under random actions that depend on a seed; every observation is a row of `current`."""

    def __init__(self, create: Callable[[], Any], spec: EnvironmentSpec) -> None:
        self.spec, self.current = spec, allocate(spec, 1)
        self.instance = Instance(create, spec, self.current, 0, 0, lambda episode: 1000 + episode)

    def begin(self, episode: int) -> None:
        cursor = np.zeros((), CURSOR)
        cursor["episode"] = episode
        self.instance.restore(cursor, [], None)

    def act(self, rng: np.random.Generator) -> bool:
        mask = self.current.get(MASK)
        stored = random_action(self.spec.action, rng, None if mask is None else mask[0])
        ended = self.instance.advance(to_environment_action(self.spec.action, stored[None])[0])
        self.instance.check_finite()
        return ended

    def trace(self, episode: int, num_steps: int, seconds: float) -> list[tuple[int, float, bool]]:
        """(checksum of the observation, reward, ended) of each step of one episode, the reset first."""
        return list(self.steps(episode, num_steps, seconds))

    def steps(self, episode: int, num_steps: int, seconds: float) -> Iterator[tuple[int, float, bool]]:
        """The same one by one, each made when it is asked for."""
        self.begin(episode)
        rng, end = np.random.default_rng(episode), time.perf_counter() + seconds
        yield extend_crc(0, self.spec, self.current, 0), 0.0, False
        for _ in range(num_steps):
            if time.perf_counter() >= end:
                return
            ended = self.act(rng)
            last = self.instance.ended
            crc = _crc(last.final or {}) if ended and last else extend_crc(0, self.spec, self.current, 0)
            yield crc, self.instance.reward, ended
            if ended:
                return


def _crc(arrays: Arrays) -> int:
    crc = 0
    for array in arrays.values():
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc


def check_play(report: CheckReport, create: Callable[[], Any], spec: EnvironmentSpec, num_steps: int, seconds: float) -> None:
    """Interface, spaces, finite numbers (raised by the instance), ranges, scales, and how episodes end."""
    player, rng, end = Player(create, spec), np.random.default_rng(0), time.perf_counter() + seconds
    extremes = _Extremes(spec)
    lengths: list[tuple[int, bool, bool]] = []
    steps = 0
    try:
        player.begin(0)
        while (steps < num_steps or (len(lengths) < _ENDS and steps < 5 * num_steps)) and time.perf_counter() < end:
            before = player.instance.num_steps
            ended = player.act(rng)
            steps += 1
            extremes.see(player.current)
            if ended:
                lengths.append((before + 1, player.instance.terminated, player.instance.truncated))
    finally:
        player.instance.close()
    report.measurements["steps_played"] = steps
    report.measurements["episodes_ended"] = len(lengths)
    extremes.report(report)
    _check_ends(report, lengths, steps)
    if spec.action.kind == "box" and not spec.action.bounded:
        report.add("note", "action_bounds", "the action space is unbounded; the policy's numbers reach the environment as they are")


class _Extremes:
    """Smallest and greatest value of every box of the observation."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self._leaves = [leaf for leaf in spec.observation if leaf.kind == "box" and leaf.dtype != "bool" and leaf.size]
        self._low: dict[str, Array] = {}
        self._high: dict[str, Array] = {}

    def see(self, current: Arrays) -> None:
        for leaf in self._leaves:
            name, value = leaf.name("observation"), current[leaf.name("observation")][0].astype(np.float64)
            self._low[name] = np.minimum(self._low.get(name, value), value)
            self._high[name] = np.maximum(self._high.get(name, value), value)

    def report(self, report: CheckReport) -> None:
        for leaf in self._leaves:
            name = leaf.name("observation")
            if name not in self._low:
                continue
            low, high = self._low[name].ravel(), self._high[name].ravel()
            out = np.flatnonzero((low < np.array(leaf.low)) | (high > np.array(leaf.high)))
            if len(out):
                i = int(out[0])
                bound = leaf.low[i % len(leaf.low)], leaf.high[i % len(leaf.high)]
                report.add(
                    "warning", "observation_range", f"{name}: values from {low[i]:g} to {high[i]:g} at flat index {i}, outside of {bound}",
                    "widen the bounds of observation_space, or clip",
                )  # fmt: skip
            greatest = float(max(np.abs(low).max(), np.abs(high).max()))
            if leaf.dtype.startswith("float") and greatest > _UNSCALED:
                report.add(
                    "warning",
                    "unscaled_observation",
                    f"{name}: values up to {greatest:g}",
                    "set policy.normalise_observations to true, or scale",
                )


def _check_ends(report: CheckReport, ends: list[tuple[int, bool, bool]], steps: int) -> None:
    if not ends:
        hint = "end it, or set env.max_episode_steps"
        report.add("warning", "episode_never_ends", f"no episode ended within {steps} steps of random actions", hint)
    lengths = {length for length, _, _ in ends}
    longest = [(terminated, truncated) for length, terminated, truncated in ends if length == max(lengths)]
    by_time = len(longest) >= max(_ENDS, len(ends) / 2) and max(lengths) > 1
    if by_time and all(terminated and not truncated for terminated, truncated in longest):
        which = "every episode" if len(lengths) == 1 else f"none of {len(ends)} episodes was longer, and {len(longest)}"
        report.add(
            "warning", "terminated_by_time", f"{which} terminated after exactly {max(lengths)} steps, as a time limit would",
            "a time limit must return truncated=True, so that values are bootstrapped beyond it",
        )  # fmt: skip
    if len(ends) >= _ENDS and all(truncated and not terminated for _, terminated, truncated in ends) and len(lengths) > 1:
        report.add(
            "warning", "truncated_without_time_limit", f"every episode was truncated, after {min(lengths)} to {max(lengths)} steps",
            "terminated and truncated may be swapped: terminated says that the task ended, and the future is worth nothing",
        )  # fmt: skip
