"""A local run under way, as the parts of its engine share it. Nothing is decided here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from shoal.engines.environment_faults import EnvironmentFaults
from shoal.engines.fleet import Fleet
from shoal.engines.process import Process
from shoal.engines.recovery import Recoveries
from shoal.engines.session import Session
from shoal.errors import DivergedError


@dataclass
class Running:
    """Where a run stands, besides what its session and its coordinator know.

    Attributes:
      reason: why it is to end; no more once the learner was lost, and the run went back to its last checkpoint.
      at_checkpoint: where it may be to end already.
      divergence: that is to be mended.
      under_way: the last order to train.
      furthest: newest version that this process saw made. kept: newest that several learners keep in memory (engines/keeping.py).
      zygote_deaths: since an update was made.
    """

    session: Session
    fleet: Fleet
    reason: str | None = None
    at_checkpoint: bool = True
    divergence: DivergedError | None = None
    under_way: dict[str, Any] = field(default_factory=dict)
    furthest: int = 0
    kept: int | None = None
    zygote_deaths: int = 0

    def __post_init__(self) -> None:
        self.coordinator = self.session.coordinator
        self.faults = EnvironmentFaults(self.session)
        self.recoveries = Recoveries()

    def kill(self, process: Process, why: str) -> None:
        if process.up and not process.doomed:
            self.session.observer.event("killed", role=process.name, index=process.index, reason=why)
        self.fleet.kill(process, why)

    def back(self, role: str, index: int) -> None:
        """It has done what shows that it is there again."""
        if facts := self.recoveries.back(role, index, time.monotonic()):
            self.session.observer.event("recovered", **facts)
