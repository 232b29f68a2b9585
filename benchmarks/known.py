"""An algorithm that learns nothing and takes a known time: for the rows `known/*` of planning.py.

shoal train benchmarks/waiting.py:fixed --env.form python --algorithm benchmarks/known.py:Known --mode async
"""

from __future__ import annotations

import time

from shoal.algorithms.base import Algorithm, UpdateContext
from shoal.config import OnPolicyConfig
from shoal.experience.batch import Batch


class KnownConfig(OnPolicyConfig):
    step_seconds: float = 0.001


class Known(Algorithm[KnownConfig]):
    """Sleeps for `step_seconds` for each env step of the batch."""

    Config = KnownConfig
    modes = ("async", "sync")

    def update(self, batch: Batch, context: UpdateContext) -> dict[str, float]:
        time.sleep(self.config.step_seconds * batch.num_env_steps)
        return {}
