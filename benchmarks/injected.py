"""What the rows of soak_faults.py share: runs of the command line in processes of their own, and what was found."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "src")]

from faults.living import Living  # noqa: E402
from shoal.errors import ShoalError  # noqa: E402
from shoal.monitoring.store import RunReader  # noqa: E402

ENDLESS = ["--stop.updates", "10000000", "--checkpoint.every-updates", "50"]
CAP_SECONDS = 110.0  # of one command, after which it is a hang of ours


@dataclass
class Found:
    """What a row came to. `seconds`: one figure of each time. `wrong`: whatever was not as wanted, in words."""

    times: int = 0
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    figure: str = ""

    def expect(self, held: bool, otherwise: str) -> None:
        if not held:
            self.wrong.append(" ".join(otherwise.split())[:300])


@dataclass(frozen=True)
class Row:
    """`within`: what the figures (seconds) may not pass: the median, and the 99th percentile."""

    fault: str
    wanted: str
    work: Callable[[Found, Path], None]
    within: tuple[float, float] | None = None


def kwargs(**given: Any) -> list[str]:
    return [word for name, value in given.items() if value is not None for word in (f"--env.kwargs.{name}", str(value))]


def answer(run: Living) -> tuple[int, dict[str, Any], float]:
    """Exit code, JSON, and when it ended. Nothing of it may be left two seconds later."""
    out, _ = run.process.communicate(timeout=CAP_SECONDS)
    ended = time.time()
    run.gone(2.0)
    try:
        return run.process.returncode, json.loads(out), ended
    except ValueError:
        return run.process.returncode, {}, ended


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    with suppress(ShoalError), RunReader(directory / "run.db") as reader:
        return reader.events(kind)
    return []
