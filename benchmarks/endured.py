"""What the sections of soak_files.py share: rows of its table, and what a machine does not allow."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "src")]

from faults.living import TINY  # noqa: E402

ENDLESS = [*TINY, "--stop.updates", "1000000", "--checkpoint.every-updates", "2"]


@dataclass
class Row:
    fault: str
    times: int
    outcome: str
    figure: str
    held: bool = True
    seconds: list[float] = field(default_factory=list)  # of each time, where `--add` may add to them


class Skipped(Exception):
    """This machine does not allow what a section needs."""
