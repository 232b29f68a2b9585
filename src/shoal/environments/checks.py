"""`shoal check`: what is wrong with an environment, or will be slow with it, found before training and with a hint for the mend."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shoal.config import EnvConfig
from shoal.environments.faults import RAISED
from shoal.environments.instance import Instance
from shoal.environments.make import Factory, close_quietly, describe_instance, open_environment
from shoal.environments.probe import measure
from shoal.environments.spaces import MASK, allocate, extend_crc, random_action, to_environment_action
from shoal.errors import ConfigError, EnvironmentFault
from shoal.types import CURSOR, Array, Arrays, EnvironmentSpec

Severity = Literal["error", "warning", "note"]
_UNSCALED = 100.0  # a float observation beyond this makes a network's first layer saturate
_UNEQUAL = 20.0  # p99 of a step's time over its mean
_EXTRA_INSTANCES = 4  # made to see what one costs in memory


@dataclass(frozen=True)
class Finding:
    """One thing found. An error makes `shoal check` end with code 3; a warning costs exactness or speed; a note informs."""

    severity: Severity
    name: str
    message: str
    hint: str = ""


@dataclass
class CheckReport:
    """Findings in the order of the checks, and what was measured (microseconds, bytes, steps)."""

    environment: str
    findings: list[Finding] = field(default_factory=list)
    measurements: dict[str, float] = field(default_factory=dict)
    spec: EnvironmentSpec | None = None

    @property
    def ok(self) -> bool:
        return all(finding.severity != "error" for finding in self.findings)

    def add(self, severity: Severity, name: str, message: str, hint: str = "") -> None:
        self.findings.append(Finding(severity, name, message, hint))

    def to_json(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
            "measurements": self.measurements,
            "spec": self.spec.to_json() if self.spec else None,
        }


def check_environment(env: EnvConfig, factory: Factory | None = None, *, num_steps: int = 2000, seconds: float = 5.0) -> CheckReport:
    """Play an environment with random actions and say what is wrong with it.

    Args:
      num_steps, seconds: each of the checks that step the environment ends at whichever comes first.
    Raises:
      ConfigError: the environment cannot be found, or an extra is not installed.
    """
    report = CheckReport(env.id)

    def create() -> Any:
        return open_environment(env, factory, training=False)

    spec = report.spec = _describe(report, create)
    if spec is None:
        return report
    try:
        _check_play(report, create, spec, num_steps, seconds)
        _check_same_seed(report, create, spec, num_steps, seconds)
        _check_buffers(report, create, spec)
        _check_cost(report, create, spec, num_steps, seconds)
    except EnvironmentFault as fault:
        _add_fault(report, fault, "step")
    return report


def _describe(report: CheckReport, create: Callable[[], Any]) -> EnvironmentSpec | None:
    """The spec, or None with the reason among the findings."""
    where, made = "construction", None
    try:
        made = create()
        where = "reset"
        return describe_instance(report.environment, made)
    except EnvironmentFault as fault:
        _add_fault(report, fault, where)
    except (ConfigError, AttributeError) as error:
        if made is None:
            raise
        report.add("error", "spaces", str(error), "set observation_space and action_space in __init__")
    finally:
        if made is not None:
            close_quietly(made)
    return None


_NAMES = {
    "raised": "raised", "api": "interface", "reward": "reward", "flag": "flags", "structure": "observation_structure", "shape": "observation_shape",
    "dtype": "observation_dtype", "range": "observation_range", "mask": "action_mask", "not_finite": "observation_not_finite",
}  # fmt: skip


def _add_fault(report: CheckReport, fault: EnvironmentFault, where: str) -> None:
    kind = str(fault.report.get("kind", ""))
    name = where if kind == "raised" and where != "step" else _NAMES.get(kind, where)
    report.add("error", name, str(fault), str(fault.report.get("hint", "")))


class _Player:
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
        return self.instance.advance(to_environment_action(self.spec.action, stored[None])[0])

    def trace(self, episode: int, num_steps: int, seconds: float) -> list[tuple[int, float, bool]]:
        """(checksum of the observation, reward, ended) of each step of one episode, the reset first."""
        self.begin(episode)
        rng, end = np.random.default_rng(episode), time.perf_counter() + seconds
        trace = [(extend_crc(0, self.spec, self.current, 0), 0.0, False)]
        while len(trace) <= num_steps and not trace[-1][2] and time.perf_counter() < end:
            ended = self.act(rng)
            last = self.instance.ended
            crc = _crc(last.final or {}) if ended and last else extend_crc(0, self.spec, self.current, 0)
            trace.append((crc, self.instance.reward, ended))
        return trace


def _crc(arrays: Arrays) -> int:
    crc = 0
    for array in arrays.values():
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc


def _check_play(report: CheckReport, create: Callable[[], Any], spec: EnvironmentSpec, num_steps: int, seconds: float) -> None:
    """Interface, spaces, finite numbers (raised by the instance), ranges, scales, and how episodes end."""
    player, rng, end = _Player(create, spec), np.random.default_rng(0), time.perf_counter() + seconds
    extremes = _Extremes(spec)
    lengths: list[tuple[int, bool, bool]] = []
    steps = 0
    try:
        player.begin(0)
        while steps < num_steps and time.perf_counter() < end:
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
    if len(ends) < 3:
        return
    lengths = {length for length, _, _ in ends}
    if all(terminated and not truncated for _, terminated, truncated in ends) and len(lengths) == 1 and lengths != {1}:
        report.add(
            "warning", "terminated_by_time", f"every episode terminated after exactly {ends[0][0]} steps, as a time limit would",
            "a time limit must return truncated=True, so that values are bootstrapped beyond it",
        )  # fmt: skip
    if all(truncated and not terminated for _, terminated, truncated in ends) and len(lengths) > 1:
        report.add(
            "warning", "truncated_without_time_limit", f"every episode was truncated, after {min(lengths)} to {max(lengths)} steps",
            "terminated and truncated may be swapped: terminated says that the task ended, and the future is worth nothing",
        )  # fmt: skip


def _check_same_seed(report: CheckReport, create: Callable[[], Any], spec: EnvironmentSpec, num_steps: int, seconds: float) -> None:
    """The same seed and actions in a new instance, and in one that was used."""
    first, second = _Player(create, spec), _Player(create, spec)
    try:
        traces = {episode: first.trace(episode, num_steps // 4, seconds / 8) for episode in (0, 1, 2)}
        fresh = _difference(traces[0], second.trace(0, num_steps // 4, seconds))
        used = [_difference(traces[episode], first.trace(episode, num_steps // 4, seconds)) for episode in (0, 1, 2)]
    finally:
        first.instance.close()
        second.instance.close()
    promise = "without this, a run cannot be resumed or moved exactly"
    if fresh is not None:
        hint = f"call super().reset(seed=seed), and draw only from self.np_random; {promise}"
        report.add("error", "same_seed_differs", f"the same seed and actions gave another {fresh} in a second instance", hint)
    elif any(one is not None for one in used):
        found = next(one for one in used if one is not None)
        hint = f"reset() must set everything that an episode depends on; {promise}"
        report.add(
            "warning", "used_instance_differs", f"the same seed and actions gave another {found} in an instance that was used before", hint
        )


def _difference(one: list[tuple[int, float, bool]], other: list[tuple[int, float, bool]]) -> str | None:
    for step, (left, right) in enumerate(zip(one, other, strict=False)):
        for what, a, b in zip(("observation", "reward", "end of the episode"), left, right, strict=True):
            if a != b:
                return f"{what} at step {step}" if step else "observation at reset"
    return None


def _check_buffers(report: CheckReport, create: Callable[[], Any], spec: EnvironmentSpec) -> None:
    """Whether an observation that was returned changes with the next step, or with another instance's."""
    one, other = create(), create()
    try:
        kept = _arrays(one.reset(seed=1)[0])
        before = [array.copy() for array in kept]
        foreign = _arrays(other.reset(seed=2)[0])
        if any(np.shares_memory(a, b) for a in kept for b in foreign):
            report.add(
                "error",
                "shared_buffer",
                "two instances return the same observation buffer",
                "make the buffer in __init__, not in the class",
            )
        rng = np.random.default_rng(0)
        now = allocate(spec, 1).get(MASK)
        action = to_environment_action(spec.action, random_action(spec.action, rng, None if now is None else now[0])[None])[0]
        after = _arrays(one.step(action)[0])
        changed = any(not np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(before, kept, strict=True))
        if changed or any(np.shares_memory(a, b) for a in kept for b in after):
            report.add(
                "warning", "reused_buffer", "the observation of one step is overwritten by the next; shoal copies it, other code may not",
                "return self._observation.copy()",
            )  # fmt: skip
    except RAISED:
        pass  # an action that this step's mask forbids; the checks before have played by the mask
    finally:
        close_quietly(one)
        close_quietly(other)


def _arrays(observation: Any) -> list[Array]:
    if isinstance(observation, dict):
        return [array for part in observation.values() for array in _arrays(part)]
    if isinstance(observation, tuple):
        return [array for part in observation for array in _arrays(part)]
    return [observation] if isinstance(observation, np.ndarray) else []


def _check_cost(report: CheckReport, create: Callable[[], Any], spec: EnvironmentSpec, num_steps: int, seconds: float) -> None:
    """Time of a step, and memory of an instance."""
    before = _resident_bytes()
    extra = [create() for _ in range(_EXTRA_INSTANCES)]
    try:
        for index, made in enumerate(extra):
            with suppress(*RAISED):  # what fails here has been reported already
                made.reset(seed=index)
        report.measurements["memory_bytes"] = max(0, _resident_bytes() - before) / _EXTRA_INSTANCES
        found = measure(extra[0], spec, num_steps, seconds)
    finally:
        for made in extra:
            close_quietly(made)
    report.measurements |= {
        "step_mean_us": found.step_wall_us,
        "step_p99_us": found.step_p99_us,
        "step_cpu_us": found.step_cpu_us,
        "reset_mean_us": found.reset_wall_us,
        "cpu_share": found.step_cpu_us / found.step_wall_us if found.step_wall_us else 1.0,
    }
    if found.waits:
        report.add("note", "waits", "steps wait more than they compute", "env.form auto steps such environments in threads")
    if found.step_wall_us and found.step_p99_us > _UNEQUAL * found.step_wall_us:
        message = f"one step in a hundred takes {found.step_p99_us:.0f} us or more, the mean is {found.step_wall_us:.0f} us"
        report.add("note", "unequal_step_times", message, "a group waits for its slowest; mode async lets groups go on alone")


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0
