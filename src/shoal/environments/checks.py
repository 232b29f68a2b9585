"""`shoal check`: what is wrong with an environment, or will be slow with it, found before training and with a hint for the mend."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from shoal.config import EnvConfig
from shoal.environments.faults import cut, environment_errors, plain, words_of
from shoal.environments.findings import CheckReport, Finding
from shoal.environments.instance import unwrap
from shoal.environments.make import Factory, close_quietly, describe_instance, open_environment
from shoal.environments.playing import Player, check_play
from shoal.environments.probe import MAKING, Tell, Told, limited, measure, quiet
from shoal.environments.spaces import MASK, allocate, random_action, to_environment_action
from shoal.errors import ConfigError, EnvironmentFault
from shoal.machine import available_bytes
from shoal.types import CURSOR, Array, EnvironmentSpec

__all__ = ["CheckReport", "Finding", "check_environment"]

_UNEQUAL = 0.5  # share of the time that slow steps take
_EXTRA_INSTANCES = 4  # made to see what one costs in memory
_ACTIONS_TRIED = 16  # to see whether a step that raised does so for some actions only
_MEMORY_SHARE = 0.8  # of the memory that is free, which environments may take without a warning


def check_environment(
    env: EnvConfig,
    factory: Factory | None = None,
    *,
    num_steps: int = 2000,
    seconds: float = 5.0,
    num_envs: int = 1,
    tell: Tell = quiet,
    found: Callable[[CheckReport], None] = lambda report: None,
) -> CheckReport:
    """Play an environment with random actions and say what is wrong with it. In this process: one that hangs or crashes takes it along
    (`shoal.check` and `shoal check` do this in a process of its own, engines/checking.py).

    Args:
      num_steps, seconds: each of the checks that step the environment ends at whichever comes first.
      num_envs: how many environments a run would have, for their memory.
      tell: is told what the environment is asked for, before it is.
      found: is given the report after each check.
    Raises:
      ConfigError: the environment cannot be found, or an extra is not installed.
    """
    report = CheckReport(env.id)

    def create() -> Any:
        tell(MAKING)
        bare, limit = unwrap(open_environment(env, factory, training=False))
        return limited(Told(bare, tell), limit)

    def open_plain() -> Any:
        tell(MAKING)
        return open_environment(env, factory, training=False)

    spec = report.spec = _describe(report, open_plain, tell)
    found(report)
    if spec is None:
        return report
    try:
        check_play(report, create, spec, num_steps, seconds)
        for check in (_check_same_seed, _check_snapshots, _check_buffers, _check_cost):
            found(report)
            check(report, create, spec, num_steps, seconds)
        _check_memory(report, num_envs)
    except EnvironmentFault as fault:
        add_fault(report, fault, "step")
        if fault.report.get("kind") == "raised" and str(fault.report.get("what", "")).startswith("step()"):
            found(report)
            _check_actions(report, create, spec)
    return report


def _describe(report: CheckReport, create: Callable[[], Any], tell: Tell) -> EnvironmentSpec | None:
    """The spec, or None with the reason among the findings."""
    where, made = "construction", None
    try:
        made = create()
        where = "reset"
        tell("reset()", seed=0)
        return describe_instance(report.environment, made)
    except EnvironmentFault as fault:
        add_fault(report, fault, where)
    except (ConfigError, AttributeError) as error:
        if made is None:
            raise
        if isinstance(made, gymnasium.Env):
            report.add("error", "spaces", str(error), "set observation_space and action_space in __init__, to spaces that shoal takes")
        else:
            report.add("error", "interface", str(error), "let the factory return a gymnasium.Env (old Gym environments: see shimmy)")
    finally:
        if made is not None:
            tell("close()")
            close_quietly(made)
    return None


_NAMES = {
    "raised": "raised", "api": "interface", "reward": "reward", "flag": "flags", "structure": "observation_structure", "shape": "observation_shape",
    "dtype": "observation_dtype", "range": "observation_range", "mask": "action_mask", "not_finite": "observation_not_finite",
    "snapshot": "snapshot", "hang": "hangs", "died": "process_died",
}  # fmt: skip


def add_fault(report: CheckReport, fault: EnvironmentFault, where: str) -> None:
    """A fault as a finding; `where` it came, for one that has no name of its own."""
    kind = str(fault.report.get("kind", ""))
    name = where if kind == "raised" and where != "step" else _NAMES.get(kind, where)
    report.add("error", name, str(fault), str(fault.report.get("hint", "")))


def _check_same_seed(report: CheckReport, create: Callable[[], Any], spec: EnvironmentSpec, num_steps: int, seconds: float) -> None:
    """The same seed and actions in a new instance, and in one that was used."""
    first, second = Player(create, spec), Player(create, spec)
    try:
        traces = {episode: first.trace(episode, num_steps // 4, seconds / 8) for episode in (0, 1, 2)}
        fresh = _difference(traces[0], second.trace(0, num_steps // 4, seconds))
        used = [_difference(traces[episode], first.trace(episode, num_steps // 4, seconds)) for episode in (0, 1, 2)]
        # Side by side, as environments of a group are stepped: another one's resets and steps between its own.
        beside = zip(first.steps(0, num_steps // 4, seconds), second.steps(1, num_steps // 4, seconds), strict=False)
        shared = _difference(traces[0], [one for one, _ in beside])
    finally:
        first.instance.close()
        second.instance.close()
    promise = "without this, a run cannot be resumed or moved exactly"
    if fresh is not None:
        hint = f"call super().reset(seed=seed), and draw only from self.np_random; {promise}"
        report.add("error", "same_seed_differs", f"the same seed and actions gave another {fresh} in a second instance", hint)
    elif shared is not None and all(one is None for one in used):
        hint = f"let each instance have its own state, spaces and generators, none of them in the class or the module; {promise}"
        report.add("error", "instances_share_state", f"stepped beside another instance, it gave another {shared}", hint)
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


def _check_actions(report: CheckReport, create: Callable[[], Any], spec: EnvironmentSpec) -> None:
    """After a step that raised: whether it does for some actions of the action space only, each tried as the first of an episode."""
    rng = np.random.default_rng(0)
    refused, taken = [], []
    for _ in range(_ACTIONS_TRIED):
        made = create()
        try:
            made.reset(seed=1)
            action = to_environment_action(spec.action, random_action(spec.action, rng)[None])[0]
            made.step(action)
            taken.append(plain(action))
        except environment_errors() as error:
            refused.append((plain(action), words_of(error)))
        finally:
            close_quietly(made)
    if refused and taken and spec.action_mask == "none":
        action, raised = refused[0]
        report.add(
            "error", "action_refused",
            cut(f"step() raised {raised} for the action {action}, and took {taken[0]}; both are of its action space", 1_000),
            "action_space must hold only what step() takes; give an action_mask where that changes from step to step",
        )  # fmt: skip


def _check_snapshots(report: CheckReport, create: Callable[[], Any], spec: EnvironmentSpec, num_steps: int, seconds: float) -> None:
    """Whether what follows a snapshot is the same in another instance that was restored from it."""
    if not spec.snapshot_bytes:
        return
    one, other = Player(create, spec), Player(create, spec)
    try:
        one.begin(0)
        rng, end = np.random.default_rng(0), time.perf_counter() + seconds / 4
        for _ in range(min(10, num_steps)):
            one.act(rng)
        taken, cursor = one.instance.snapshot(), np.zeros((), CURSOR)
        for name in ("episode", "seed", "num_steps", "episode_return"):
            cursor[name] = getattr(one.instance, name)
        same = other.instance.restore(cursor, [], taken)
        mine, its = np.random.default_rng(1), np.random.default_rng(1)
        for _ in range(num_steps // 4):
            same = same and one.act(mine) == other.act(its) and one.instance.reward == other.instance.reward
            same = same and all(np.array_equal(one.current[name], other.current[name]) for name in one.current)
            if not same or time.perf_counter() > end:
                break
    finally:
        one.instance.close()
        other.instance.close()
    if not same:
        report.add(
            "error", "snapshot", "another instance that was restored from a snapshot went on differently",
            "snapshot() must hold everything that the future depends on, random state included",
        )  # fmt: skip


def _check_buffers(report: CheckReport, create: Callable[[], Any], spec: EnvironmentSpec, num_steps: int, seconds: float) -> None:
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
    except environment_errors():
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
            with suppress(*environment_errors()):  # what fails here has been reported already
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
    if found.slow_time > _UNEQUAL:
        message = f"{found.slow_steps:.2%} of the steps take more than ten times as long as most, {found.slow_time:.0%} of the time in all"
        report.add("note", "unequal_step_times", message, "a group waits for its slowest; mode async lets groups go on alone")


def _check_memory(report: CheckReport, num_envs: int) -> None:
    """Whether the environments of a run fit into the memory that is free now."""
    needed, free = report.measurements.get("memory_bytes", 0.0) * num_envs, available_bytes()
    if free and needed > _MEMORY_SHARE * free:
        report.add(
            "warning", "memory", f"{num_envs} environments take about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            "lower sampling.groups or sampling.group_size",
        )  # fmt: skip


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0
