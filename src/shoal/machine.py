"""What this machine has to give. No torch."""

from __future__ import annotations

import math
from pathlib import Path


def available_bytes() -> int | None:
    """Memory that is free on this machine, and in this container where it has a limit; None where nobody says."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
        found += [int(limit) - int(used)] if limit != "max" else []
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def in_words(num_bytes: float) -> str:
    """`1.5 GiB`."""
    power = min(5, int(math.log(num_bytes, 1024))) if num_bytes >= 1 else 0
    return f"{num_bytes / 1024**power:,.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"
