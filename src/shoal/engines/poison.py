"""Steps that break their environment each time they come: what broke where, so that the third attempt goes around it.

A place is (row of the rollout, environment of the group). After a re-making the same actions lead to the same place, so a fault that comes
twice there is no accident, and its episode is given up as invalid. A fault that names no environment (a hang, a crash: all that is known is
the row) makes the next attempt a careful one, in which each environment is named before it is stepped.

In a paced group one environment may hang through many rollouts, while the others go on. Its place is the step of its episode.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

WHILE_RESTORED = -1  # in place of a row: it broke before the first one
ANY_ROW = -2  # in place of a row: the environments of a paced group are each at another
UNNAMED = -1  # in place of an environment
CERTAIN, DOUBTFUL = 2, 1  # points: the environment's own doing; a SIGKILL or SIGSTOP, which mostly come from elsewhere
POISONED = 4  # points at which a place is gone around


@dataclass
class Suspects:
    """What broke in one group. Places while it was restored are counted for nobody: there is nothing to give up."""

    _points: Counter[tuple[int, int, int]] = field(default_factory=Counter)  # (sequence, row, env)
    _steps: Counter[tuple[int, int, int]] = field(default_factory=Counter)  # (env, episode, step)

    def add(self, sequence: int, row: int, env: int, points: int = CERTAIN) -> None:
        if row != WHILE_RESTORED:
            self._points[sequence, row, env] += points

    def add_step(self, env: int, episode: int, step: int) -> None:
        """An environment of a paced group hung in this step of its episode."""
        self._steps[env, episode, step] += CERTAIN

    def given_up_steps(self) -> tuple[tuple[int, int, int], ...]:
        """(env, episode, step) at which a paced group ends an episode instead of stepping it."""
        return tuple(place for place, points in self._steps.items() if points >= POISONED)

    def given_up(self, sequence: int) -> tuple[tuple[int, int], ...]:
        """(row, env) at which episodes of this rollout are ended instead of stepped. One that broke again even so (the reset of the episode
        after it) is named once more for each time: as many episodes are passed over."""
        found: list[tuple[int, int]] = []
        for (where, row, env), points in sorted(self._points.items()):
            if where == sequence and env != UNNAMED:
                total = points + sum(self._points.get((where, near, UNNAMED), 0) for near in (row, ANY_ROW))
                found += [(row, env)] * ((total - POISONED) // CERTAIN + 1 if total >= POISONED else 0)
        return tuple(found)

    def careful(self, sequence: int) -> tuple[int, ...]:
        """Rows of this rollout at which an environment broke that nobody could name."""
        return tuple(sorted(row for where, row, env in self._points if where == sequence and env == UNNAMED))

    def forget_before(self, sequence: int) -> None:
        for place in [place for place in self._points if place[0] < sequence]:
            del self._points[place]
