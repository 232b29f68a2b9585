"""Crowding: how many times as much processor time the same work takes while the other cores do it too.

Cores share a clock, caches and memory, and two that a virtual machine shows may be threads of one. So the parts of a training, which are measured alone on one
core, cost more in a run that keeps all cores busy. Updates are made in turn with the neighbours at rest and at work, so that whatever else makes a machine fast
or slow is on both sides.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from shoal.benching.measuring import median, spend
from shoal.engines.roles import Blueprint
from shoal.errors import ProcessError

if TYPE_CHECKING:
    from shoal.benching.parts import Cycle

MOST = 15  # neighbours; each holds an interpreter with torch
_READY = "ready"
_START_SECONDS = 120.0
_SETTLE_SECONDS = 0.005
_MIN_PAIRS, _MOST_PAIRS = 3, 1000


class Neighbours:
    """Processes that make the updates of the same training, one core each, while they are told to. A context manager; they end with it."""

    def __init__(self, blueprint: Blueprint, number: int) -> None:
        order = json.dumps(
            {"config": blueprint.config.model_dump(mode="json", by_alias=True), "spec": blueprint.spec.to_json(), "parent": os.getpid()}
        )
        command = [sys.executable, "-m", "shoal.benching.neighbours"]
        self._processes: list[subprocess.Popen[str]] = []
        try:
            for _ in range(number):
                pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
                process = subprocess.Popen(command, text=True, **pipes)
                self._processes.append(process)
                assert process.stdin is not None
                process.stdin.write(order + "\n")
                process.stdin.flush()
            for process in self._processes:
                assert process.stdout is not None
                told = select.select([process.stdout], [], [], _START_SECONDS)[0]
                if not told or process.stdout.readline().strip() != _READY:
                    raise ProcessError(
                        "a second process with the same environment, which was to keep another core busy, has ended or hangs"
                    )
            self.rest()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Neighbours:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def work(self) -> None:
        self._signal(signal.SIGCONT)
        time.sleep(_SETTLE_SECONDS)

    def rest(self) -> None:
        self._signal(signal.SIGSTOP)
        for process in self._processes:
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)


def crowding(cycle: Cycle, blueprint: Blueprint, cores: int, seconds: float) -> float:
    """Median ratio of an update's processor time with `cores` - 1 neighbours (MOST of them) to that without, for about `seconds`."""
    if cores == 1:
        return 1.0
    ratios: list[float] = []
    with Neighbours(blueprint, min(MOST, cores - 1)) as neighbours:
        begun = time.perf_counter()
        for _ in range(_MOST_PAIRS):
            elapsed = time.perf_counter() - begun
            if elapsed >= seconds and ratios and (len(ratios) >= _MIN_PAIRS or elapsed >= 3 * seconds):
                break
            alone = _update_seconds(cycle)
            neighbours.work()
            beside = _update_seconds(cycle)
            neighbours.rest()
            ratios += [beside / alone] if alone and beside else []
    return median(ratios) or 1.0


def _update_seconds(cycle: Cycle) -> float:
    """Processor time of an update for each of its env steps; 0 where all of it was too old."""
    steps = 0

    def once() -> None:
        nonlocal steps
        steps = cycle.run(1)

    spent = spend(once)
    return spent.cpu / steps if steps else 0.0


def main() -> None:
    """A neighbour: reads what it is to do, says that it is ready after a first update, and works until it is killed, by the end of its parent if by nothing else."""
    import torch

    from shoal.benching.parts import Cycle
    from shoal.config import RunConfig
    from shoal.engines.roles import UserObjects
    from shoal.supervision.processes import signal_me_when_parent_dies
    from shoal.types import EnvironmentSpec

    answers = os.dup(1)
    os.dup2(2, 1)  # an environment may print
    order = json.loads(sys.stdin.readline())
    signal_me_when_parent_dies(signal.SIGKILL, order["parent"])
    torch.set_num_threads(1)
    cycle = Cycle(Blueprint(RunConfig.model_validate(order["config"]), EnvironmentSpec.from_json(order["spec"]), UserObjects(), bytes(16)))
    cycle.run(1)
    os.write(answers, f"{_READY}\n".encode())
    while True:
        cycle.run(1)


if __name__ == "__main__":
    main()
