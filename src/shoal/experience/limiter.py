"""The rate limiter of a replay: how much is sampled for what was inserted (Cassirer et al. 2021, Reverb, arXiv:2102.04736, section 3.3).

Counts only, no clock: whoever decides asks it how many optimizer steps are due once rollouts are in, and how many may be made ahead of the rollouts
that are to come. Samples are counted in transitions, so what a division leaves is carried on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rate:
    """Attributes:
    samples_per_insert: transitions sampled for each env step that is inserted after the first `learning_starts`.
    batch_size: transitions of one optimizer step.
    tolerance_samples: transitions by which sampling may run ahead.
    """

    samples_per_insert: float
    batch_size: int
    learning_starts: int
    tolerance_samples: float = 0.0


class RateLimiter:
    """Attributes:
    inserted: env steps so far; sampled: transitions.
    """

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.inserted = self.sampled = 0

    @property
    def surplus(self) -> float:
        """Transitions sampled beyond what the inserted env steps allow; negative: so many are owed."""
        return self.sampled - self.rate.samples_per_insert * max(0, self.inserted - self.rate.learning_starts)

    @property
    def learns(self) -> bool:
        """Whether anything may be sampled yet."""
        return self.inserted > 0 and self.inserted >= self.rate.learning_starts

    def insert(self, num_env_steps: int) -> int:
        """So many env steps go in. Returns the optimizer steps that are due with them, which count as made."""
        self.inserted += num_env_steps
        return self._take(-self.surplus)

    def ahead(self, most: int) -> int:
        """Optimizer steps, at most `most`, that may be made before anything more is inserted; they count as made. 0: the learner waits."""
        return self._take(min(self.rate.tolerance_samples - self.surplus, float(most * self.rate.batch_size)))

    def _take(self, samples: float) -> int:
        if not self.learns:
            return 0
        steps = max(0, math.floor(samples / self.rate.batch_size + 1e-9))
        self.sampled += steps * self.rate.batch_size
        return steps

    def begin_again(self) -> None:
        """The replay is empty: learning starts once it is filled as at the beginning."""
        self.inserted = self.sampled = 0

    def get_state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"inserted": self.inserted, "sampled": self.sampled}

    def set_state(self, state: dict[str, Any]) -> None:
        self.inserted, self.sampled = int(state["inserted"]), int(state["sampled"])
