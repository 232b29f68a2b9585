"""Clocks of the benches: processor time of what is called, medians over repeats, and the machine that they were measured on."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shoal.settings import available_cores

_MIN_REPEATS = 5


@dataclass(frozen=True)
class Spent:
    """Seconds of one measured stretch: the processor time of all threads of this process, and wall time."""

    cpu: float
    wall: float


def spend(work: Callable[[], Any]) -> Spent:
    """Do it once."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.process_time() - cpu, time.perf_counter() - wall)


def repeat(work: Callable[[], int], seconds: float) -> list[tuple[Spent, int]]:
    """`work` (returns how many steps it made) again and again for about `seconds`, and at least five times; the first is a warm-up."""
    work()
    found: list[tuple[Spent, int]] = []
    end = time.perf_counter() + seconds
    steps = 0

    def once() -> None:
        nonlocal steps
        steps = work()

    while time.perf_counter() < end or len(found) < _MIN_REPEATS:
        spent = spend(once)
        found.append((spent, steps))
    return found


def median(values: Sequence[float]) -> float:
    """The median; 0 of nothing."""
    return float(statistics.median(values)) if values else 0.0


def cpu_us(found: Sequence[tuple[Spent, int]]) -> float:
    """Median processor time of a step in microseconds."""
    return 1e6 * median([spent.cpu / steps for spent, steps in found if steps])


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, and the versions that figures depend on."""
    info = Path("/proc/cpuinfo")
    texts = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [text.partition(":")[2].strip() for text in texts if text.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": available_cores(),
        "torch": version("torch"),
        "python": platform.python_version(),
    }
