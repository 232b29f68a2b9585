"""A short look at an environment before training: its spec, and what a step and a reset cost."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import gymnasium
import numpy as np
from gymnasium.wrappers import TimeLimit

from shoal.config import EnvConfig
from shoal.environments.faults import TookTooLong, environment_errors, environment_fault, raised_in
from shoal.environments.instance import Instance, unwrap
from shoal.environments.make import Factory, describe_instance, open_environment
from shoal.environments.native import native_spec
from shoal.environments.spaces import MASK, allocate, random_action, to_environment_action
from shoal.types import CURSOR, EnvironmentSpec

MAKING = "making the environment"
FIRST_SEED = 1  # of the first episode that is measured
_SLOW = 10.0  # times the median: steps that take more are slow ones
_WAITING_SHARE = 0.5  # below this share of CPU time in wall time, an environment is said to wait


class Tell(Protocol):
    """Is told what an environment is asked for, before it is: `step()` with its action, `reset()` with its seed, MAKING, `close()`."""

    def __call__(self, call: str, /, **facts: Any) -> None: ...


def quiet(call: str, /, **facts: Any) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Probe:
    """What was found. Times are microseconds per call; `cpu` counts the calling thread.

    slow_steps, slow_time: share of the steps that take more than _SLOW times the median, and of the time that they take.
    waits: steps spend their time waiting (a socket, a sleep), so that threads can step them concurrently.
    repeats: the same seed gave the same first observation again.
    """

    spec: EnvironmentSpec
    num_steps: int
    step_wall_us: float
    step_p99_us: float
    slow_steps: float
    slow_time: float
    step_cpu_us: float
    reset_wall_us: float
    reset_cpu_us: float
    waits: bool
    repeats: bool

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


class Told(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose steps and resets are timed, and told before they begin: whoever watches then knows what hangs or died."""

    def __init__(self, env: Any, tell: Tell = quiet) -> None:
        super().__init__(env)
        self.steps, self.resets = _Clock(), _Clock()
        self._tell = tell

    def step(self, action: Any) -> Any:
        self._tell("step()", action=np.asarray(action).tolist())
        with self._last(), self.steps:
            return self.env.step(action)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self._tell("reset()", seed=seed)
        with self._last(), self.resets:
            return self.env.reset(seed=seed)

    @contextmanager
    def _last(self) -> Iterator[None]:
        """What no one takes for the environment's error (the user's Ctrl-C) ends the process, and nothing is told after it."""
        try:
            yield
        except environment_errors():
            raise
        except BaseException:
            self._tell = quiet
            raise

    def close(self) -> None:
        self._tell("close()")
        self.env.close()

    def __getattr__(self, name: str) -> Any:  # snapshots, which gymnasium's wrappers do not pass on
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.env, name)


def limited(told: Told, limit: int | None) -> Any:
    """With the time limit that was taken off `told`'s environment, as a group wants it."""
    return told if limit is None else TimeLimit(told, limit)


def probe(env: EnvConfig, factory: Factory | None = None, *, num_steps: int = 200, seconds: float = 0.5, tell: Tell = quiet) -> Probe:
    """Make one environment, step it with random actions up to `num_steps` or `seconds`, and close it.

    Being measured beside other work makes wall time longer, but not voluntary waits: an environment waits only if it gives up
    the processor by itself in at least every second step, too.

    Args:
      tell: is told what the environment is asked for, before it is.
    Raises:
      ConfigError: as `environment_factory`; spaces that shoal does not take.
      EnvironmentFault: it raised, or returned something else than its spaces promise.
    """
    tell(MAKING)
    if env.form == "native":
        return Probe(native_spec(env, factory), 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, False, True)
    made = open_environment(env, factory)
    tell("reset()", seed=0)
    spec = describe_instance(env.id, made)
    found = measure(made, spec, num_steps, seconds, tell)
    tell("close()")
    try:
        made.close()  # one with a fault is left as it is: closing it may hang, and what is wrong would not be said
    except TookTooLong as error:
        raise environment_fault(**raised_in("close()", error), environment=env.id, group=0, env=0, step=0, seed=0) from error
    except environment_errors():
        pass  # it is no longer wanted
    return found


def measure(made: Any, spec: EnvironmentSpec, num_steps: int, seconds: float, tell: Tell = quiet) -> Probe:
    """Time the steps and resets of an environment under random actions; raises EnvironmentFault as a group would."""
    bare, limit = unwrap(made)
    clocks = Told(bare, tell)
    current = allocate(spec, 1)
    instance = Instance(lambda: limited(clocks, limit), spec, current, 0, 0, lambda episode: FIRST_SEED + episode)
    instance.restore(np.zeros((), CURSOR), [], None)
    instance.check_finite()
    first = {name: array.copy() for name, array in current.items()}
    rng, mask = np.random.default_rng(0), current.get(MASK)
    end = time.perf_counter() + seconds
    while clocks.steps.calls < num_steps and time.perf_counter() < end:
        action = random_action(spec.action, rng, None if mask is None else mask[0])
        instance.advance(to_environment_action(spec.action, action[None])[0])
        instance.check_finite()
    steps, resets = clocks.steps, clocks.resets
    waits = steps.cpu < _WAITING_SHARE * steps.wall and steps.waits * 2 >= steps.calls
    instance.restore(np.zeros((), CURSOR), [], None)
    repeats = all(np.array_equal(array, current[name]) for name, array in first.items())
    return Probe(
        spec, steps.calls, steps.per_call(steps.wall), 1e6 * float(np.quantile(steps.seconds or [0.0], 0.99)),
        *slow_shares(steps.seconds), steps.per_call(steps.cpu),
        resets.per_call(resets.wall), resets.per_call(resets.cpu), waits, repeats,
    )  # fmt: skip


def slow_shares(seconds: Sequence[float]) -> tuple[float, float]:
    """Share of the calls that take more than _SLOW times the median, and of the time that they take."""
    taken = np.array(seconds)
    slow = taken > _SLOW * np.median(taken) if len(taken) else taken > 0
    return (float(slow.mean()), float(taken[slow].sum() / taken.sum())) if slow.any() else (0.0, 0.0)


def choose_form(env: EnvConfig, found: Probe) -> Literal["python", "native", "threads"]:
    """What `auto` stands for. Threads give the same bits as the python form, so measuring cannot change a run's numbers;
    a native form would, so it is taken only where it is asked for."""
    if env.form != "auto":
        return env.form
    return "threads" if found.waits else "python"
