"""B environments that step at once, each in a thread of its own: for environments that wait (a simulator behind a socket, a sleep).

An environment is made, stepped and closed in the same thread, which some simulators demand. Since environments share nothing, the
results are those of PythonGroup, bit for bit.

    consumes    actions [B] as stored (step); those of some environments (send)
    waits for   all environments of the group (step, restore); any of them (ready)
    on failure  waits for the others, then raises the first environment's EnvironmentFault; `restore` must follow
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from shoal.environments.faults import environment_fault
from shoal.environments.group import NOBODY, PythonGroup
from shoal.environments.instance import Instance
from shoal.environments.spaces import all_fit
from shoal.types import CURSOR, Array, Arrays, Ended, EnvironmentSpec, GroupState, GroupStep

LOOK_SECONDS = 0.05  # between two looks at calls that are under way
_Task = Callable[[], Any]
_Stands = tuple[int, int, int, float]  # the first fields of CURSOR


class _Done(NamedTuple):
    env: int
    result: Any
    error: BaseException | None


class _Worker:
    """One thread that runs what is put into its queue, in order, and reports each end to `done`.

    consumes: tasks; None ends it. waits for: its queue, without limit, unblocked by `submit` and `stop`. on failure: reports the
    exception as the task's result and goes on. It is a daemon, so that a hanging environment cannot keep its process alive.
    """

    def __init__(self, env: int, done: SimpleQueue[_Done]) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._env, self._done = env, done
        self._thread = threading.Thread(target=self._run, name=f"environment-{env}", daemon=True)
        self._thread.start()

    def submit(self, task: _Task) -> None:
        self._tasks.put(task)

    def stack(self) -> str:
        """Where it stands now."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "" if frame is None else "".join(traceback.format_stack(frame))

    def stop(self, timeout_seconds: float) -> None:
        self._tasks.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        _let_others_finish()
        while (task := self._tasks.get()) is not None:
            try:
                self._done.put(_Done(self._env, task(), None))
            except BaseException as error:
                self._done.put(_Done(self._env, None, error))


class PacedStep(NamedTuple):
    """What one environment's step gave; see GroupStep."""

    reward: float
    terminated: bool
    truncated: bool
    valid: bool
    ended: Ended | None  # what the episode came to, where it ended


class PacedGroup(PythonGroup):
    """PythonGroup whose environments step, reset and are rebuilt concurrently, and act each as soon as it is ready:

        observe(out); send(range(B), action_B)
        envs = ready(timeout); steps = take(envs); observed(envs); ...; send(envs, action_N)

    Its resets are not told (`resetting`), since they come in threads of their own.

    `step` and `restore` are for while no environment is under way.
    """

    def __init__(
        self,
        create: Callable[[], Any],
        spec: EnvironmentSpec,
        group: int,
        num_envs: int,
        run_seed: int,
        epoch: int = 0,
        limit_seconds: float = float("inf"),
    ) -> None:
        """limit_seconds: of each call while it is put back; one that takes longer is a fault, after which it can only be closed."""
        self._call_began = [0.0] * num_envs  # monotonic clock; each written by its own thread
        self._limit_seconds, self._group = limit_seconds, group
        super().__init__(create, spec, group, num_envs, run_seed, epoch)
        self._done: SimpleQueue[_Done] = SimpleQueue()
        self._workers = [_Worker(b, self._done) for b in range(num_envs)]
        self._under_way: set[int] = set()
        self._finished: dict[int, _Done] = {}
        self._taken = self._stands()

    def restore(self, state: GroupState) -> list[int]:
        lost = super().restore(state)
        self._taken = self._stands()
        return lost

    def step(self, action_B: Array, out: Arrays) -> GroupStep:
        step = super().step(action_B, out)
        self._taken = self._stands()
        return step

    def cursor(self) -> Array:
        """Where each environment stood when its last step was taken; a step under way does not count yet."""
        return np.array([(*stands, 0, 0) for stands in self._taken], CURSOR)

    def snapshots(self) -> list[bytes | None]:
        """As PythonGroup's, but None for an environment whose step is under way: nobody may look into it, and it does not stand at its cursor."""
        if not self.spec.snapshot_bytes:
            return [None] * self.num_envs
        idle = [b for b in range(self.num_envs) if b not in self._under_way and b not in self._finished]
        taken = self._run({b: self._instances[b].snapshot for b in idle})
        return [taken.get(b) for b in range(self.num_envs)]

    def send(self, envs: Sequence[int], action_N: Array) -> None:
        """Begin a step of each of these environments, with its action as stored ([N, *shape])."""
        for b, action in zip(envs, self._to_environment(np.asarray(action_N)), strict=True):
            if b in self._under_way or b in self._finished:
                raise RuntimeError(f"environment {b} has not given its last step yet; take() it first")
            self._under_way.add(b)
            self._begin_call(b)
            self._workers[b].submit(_advancing(self._instances[b], action))

    def ready(self, timeout_seconds: float) -> list[int]:
        """Environments whose step has ended and that were not taken; waits for one at most `timeout_seconds`. [] after that."""
        if self._under_way and not self._finished and timeout_seconds > 0:
            with suppress(Empty):
                self._keep(self._done.get(timeout=timeout_seconds))
        for _ in range(self._done.qsize()):
            self._keep(self._done.get_nowait())
        return sorted(self._finished)

    def call_began(self, b: int) -> float:
        """When the present call of environment b began (monotonic clock): its step, or the reset after it."""
        return self._call_began[b]

    def take(self, envs: Sequence[int]) -> list[PacedStep]:
        """What the steps of these environments gave, but for the observation, see `observed`.

        Raises:
          EnvironmentFault: a step failed; that of the first such environment.
        """
        done = [self._finished.pop(b) for b in envs]
        for one in done:
            if one.error is not None:
                raise one.error
        for name, array in self._floats:
            if not all_fit(array[envs]):
                b = next(b for b in envs if not all_fit(array[b]))
                raise self._instances[b].not_finite(name, array[b])
        return [self._step_of(one.env, bool(one.result)) for one in done]

    def observed(self, envs: Sequence[int]) -> Arrays:
        """The new observations of environments whose step was taken, by name [N, *shape]."""
        return {name: array[envs] for name, array in self._current.items()}

    def close(self) -> None:
        """Close every environment in its own thread; one that hangs is left behind after a second."""
        for worker, instance in zip(self._workers, self._instances, strict=True):
            worker.submit(instance.close)
        end = time.monotonic() + 1.0
        for worker in self._workers:
            worker.stop(max(0.0, end - time.monotonic()))

    def _step_of(self, b: int, ended: bool) -> PacedStep:
        instance = self._instances[b]
        self._taken[b] = _stands_at(instance)
        if not ended:
            return PacedStep(instance.reward, False, False, True, None)
        valid, instance.valid = instance.valid, True
        return PacedStep(instance.reward, instance.terminated, instance.truncated, valid, instance.ended)

    def _stands(self) -> list[_Stands]:
        return [_stands_at(instance) for instance in self._instances]

    def _keep(self, done: _Done) -> None:
        self._under_way.discard(done.env)
        self._finished[done.env] = done

    def _restore_all(self, arguments: list[tuple[Array, list[Any], bytes | None]]) -> list[bool]:
        tasks = {b: _restoring(self._instances[b], given, partial(self._begin_call, b)) for b, given in enumerate(arguments)}
        same = self._run(tasks, self._refuse_hangs)
        return [same[b] for b in range(self.num_envs)]

    def _advance_all(self, actions: list[Any]) -> list[int]:
        ended = self._run({b: _advancing(self._instances[b], action) for b, action in enumerate(actions)})
        return [b for b in range(self.num_envs) if ended[b]]

    def _resets(self, b: int, begins: bool) -> None:
        self._begin_call(b)

    def _begin_call(self, b: int) -> None:
        self._call_began[b] = time.monotonic()

    def _refuse_hangs(self, under_way: Iterable[int]) -> None:
        """While the group is put back: each call by itself has the limit."""
        self.progress(NOBODY)
        now = time.monotonic()
        for b in under_way:
            if (seconds := now - self._call_began[b]) > self._limit_seconds:
                instance, what = self._instances[b], "making it, reset() or a step while it was put back"
                raise environment_fault(
                    "hang", f"{what} has not returned for {seconds:.1f} s", environment=self.spec.name, group=self._group, env=b,
                    step=instance.num_steps, seed=instance.seed, expected=f"at most {self._limit_seconds:g} s", actual=f"{seconds:.1f} s",
                    stack=self._workers[b].stack(),
                )  # fmt: skip

    def _advance(self, b: int, action: Any) -> bool:
        """In its own thread, alone."""
        return bool(self._run({b: _advancing(self._instances[b], action)})[b])

    def _run(self, tasks: dict[int, _Task], look: Callable[[Iterable[int]], None] | None = None) -> dict[int, Any]:
        """Run tasks of environments that are not under way, and wait for all of them; the error of the lowest index is raised.

        look: told a few times a second who is not done; it may raise.
        """
        for b, task in tasks.items():
            self._begin_call(b)
            self._workers[b].submit(task)
        found: dict[int, _Done] = {}
        while len(found) < len(tasks):
            try:
                done = self._done.get(timeout=LOOK_SECONDS if look else None)
            except Empty:
                if look:
                    look(tasks.keys() - found.keys())
                continue
            if done.env in tasks:
                found[done.env] = done
            else:
                self._keep(done)
        for b in sorted(found):
            if (error := found[b].error) is not None:
                raise error
        return {b: done.result for b, done in found.items()}


def _let_others_finish() -> None:
    """The calling thread, woken, waits until whoever computes has done so, as far as the system knows such threads (SCHED_BATCH).

    What an environment's thread needs first is the interpreter's lock, which he has who woke it: two switches of the core for nothing, at each step.
    """
    with suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _stands_at(instance: Instance) -> _Stands:
    return instance.episode, instance.seed, instance.num_steps, instance.episode_return


def _advancing(instance: Instance, action: Any) -> _Task:
    return lambda: instance.advance(action)


def _restoring(instance: Instance, given: tuple[Array, list[Any], bytes | None], progress: Callable[[], None]) -> _Task:
    return lambda: instance.restore(*given, progress)
