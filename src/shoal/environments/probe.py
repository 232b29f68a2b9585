"""A short look at an environment before training: its spec, and what a step and a reset cost."""

from __future__ import annotations

import resource
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import gymnasium
import numpy as np

from shoal.config import EnvConfig
from shoal.environments.instance import Instance
from shoal.environments.make import Factory, close_quietly, describe_instance, open_environment
from shoal.environments.native import native_spec
from shoal.environments.spaces import MASK, allocate, random_action, to_environment_action
from shoal.types import CURSOR, EnvironmentSpec

_WAITING_SHARE = 0.5  # below this share of CPU time in wall time, an environment is said to wait


@dataclass(frozen=True)
class Probe:
    """What was found. Times are microseconds per call; `cpu` counts the calling thread.

    waits: steps spend their time waiting (a socket, a sleep), so that threads can step them concurrently.
    """

    spec: EnvironmentSpec
    num_steps: int
    step_wall_us: float
    step_p99_us: float
    step_cpu_us: float
    reset_wall_us: float
    reset_cpu_us: float
    waits: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Clock:
    """Wall and CPU time of the calling thread, and how often it gave up the processor of its own accord."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.waits = self.calls = 0
        self.seconds: list[float] = []

    def __enter__(self) -> None:
        self._switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def __exit__(self, *exception: object) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.thread_time() - self._cpu
        waits = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - self._switches
        self.wall, self.cpu, self.waits, self.calls = self.wall + wall, self.cpu + cpu, self.waits + waits, self.calls + 1
        self.seconds.append(wall if waits else cpu)  # being pushed aside by other work is not the environment's doing

    def per_call(self, seconds: float) -> float:
        return 1e6 * seconds / max(self.calls, 1)


class _Clocks(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose steps and resets are timed."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.steps, self.resets = _Clock(), _Clock()

    def step(self, action: Any) -> Any:
        with self.steps:
            return self.env.step(action)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        with self.resets:
            return self.env.reset(seed=seed)


def probe(env: EnvConfig, factory: Factory | None = None, *, num_steps: int = 200, seconds: float = 0.5) -> Probe:
    """Make one environment, step it with random actions up to `num_steps` or `seconds`, and close it.

    Being measured beside other work makes wall time longer, but not voluntary waits: an environment waits only if it gives up
    the processor by itself in at least every second step, too.

    Raises:
      ConfigError: as `environment_factory`; spaces that shoal does not take.
      EnvironmentFault: it raised, or returned something else than its spaces promise.
    """
    if env.form == "native":
        return Probe(native_spec(env, factory), 0, 0.0, 0.0, 0.0, 0.0, 0.0, False)
    made = open_environment(env, factory)
    try:
        spec = describe_instance(env.id, made)
        return measure(made, spec, num_steps, seconds)
    finally:
        close_quietly(made)


def measure(made: Any, spec: EnvironmentSpec, num_steps: int, seconds: float) -> Probe:
    """Time the steps and resets of an environment under random actions; raises EnvironmentFault as a group would."""
    clocks = _Clocks(made)
    current = allocate(spec, 1)
    instance = Instance(lambda: clocks, spec, current, 0, 0, lambda episode: episode + 1)
    instance.restore(np.zeros((), CURSOR), [], None)
    rng, mask = np.random.default_rng(0), current.get(MASK)
    end = time.perf_counter() + seconds
    while clocks.steps.calls < num_steps and time.perf_counter() < end:
        action = random_action(spec.action, rng, None if mask is None else mask[0])
        instance.advance(to_environment_action(spec.action, action[None])[0])
    steps, resets = clocks.steps, clocks.resets
    waits = steps.cpu < _WAITING_SHARE * steps.wall and steps.waits * 2 >= steps.calls
    return Probe(
        spec, steps.calls, steps.per_call(steps.wall), 1e6 * float(np.quantile(steps.seconds or [0.0], 0.99)), steps.per_call(steps.cpu),
        resets.per_call(resets.wall), resets.per_call(resets.cpu), waits,
    )  # fmt: skip


def choose_form(env: EnvConfig, found: Probe) -> Literal["python", "native", "threads"]:
    """What `auto` stands for. Threads give the same bits as the python form, so measuring cannot change a run's numbers;
    a native form would, so it is taken only where it is asked for."""
    if env.form != "auto":
        return env.form
    return "threads" if found.waits else "python"
