"""How many actors a run is to have, from who waits for whom. Pure: told what was measured and when, it says what is wanted and why.

    the learner waits for data           actors are added, up to twice as many at a time
    data waits for the learner           actors are removed, down to half of them at a time, as long as neither learner nor actors will then be short

Between the two lies a band in which nothing is done: what is removed leaves the learner waiting for half at most of what would add actors again. A decision
takes two windows one after the other that ask for the same, each of whole updates, in which nobody came or went: updates scatter, and one window alone would
see what is not there. And it takes a cool-down after the decision before. One that turns back doubles the cool-down; nothing asked for once it is over
forgets that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.types import Activity, ActivityRecord

GROW = 0.3  # share of its time that the learner waits for data, from which actors are added
SETTLED = 0.15  # the same, as it is expected to be once actors are removed, at most
BUSY = 0.85  # share of their time that actors are expected to work once some are removed, at most; and work before some are added (async), at least
WINDOW_SECONDS = 5.0  # of a window, at least
WINDOW_UPDATES = 3  # the same, in updates
NUM_ENDS = 3  # of two windows
COOL_DOWN_SECONDS = 10.0
LONGEST_SECONDS = 640.0  # of a cool-down that was doubled again and again


@dataclass(frozen=True)
class Load:
    """What was measured over `seconds`: the share of its time that the learner waited for rollouts, and that the actors, on average, waited for orders."""

    seconds: float
    learner_waits: float
    actors_wait: float


@dataclass(frozen=True)
class Decision:
    """Go on with so many actors, since `reason`. load: what was measured; None where the bounds alone decide."""

    actors: int
    reason: str
    load: Load | None = None


def sensible(least: int, most: int, groups: int, *, in_turn: bool) -> list[int]:
    """Numbers of actors from which one is chosen, ascending: all from `least` to `most`; and in sync mode, where an update waits for all groups
    (`in_turn`), only those with which no actor has fewer groups than another for nothing: of four groups three actors step two in turn, as two do."""
    most = min(most, groups)
    counts = range(min(least, most), most + 1)
    if not in_turn:
        return list(counts)
    return sorted({max(counts[0], -(-groups // -(-groups // count))) for count in counts})


def decide(load: Load, actors: int, counts: Sequence[int], *, in_turn: bool) -> Decision | None:
    """What the load asks for; None: to stay at `actors`.

    Args:
      counts: what is allowed, ascending (see `sensible`).
      in_turn: actors and learner take turns, so both wait (sync mode). Else more actors are no help where those that there are have nothing to do.
    """
    if not counts[0] <= actors <= counts[-1]:
        return Decision(min(max(actors, counts[0]), counts[-1]), f"the bounds, and what there is room for, are {counts[0]} to {counts[-1]}")
    learner_waits, actors_wait = f"{load.learner_waits:.0%}", f"{load.actors_wait:.0%}"
    if load.learner_waits >= GROW and (in_turn or 1.0 - load.actors_wait >= BUSY):
        enough = min(2 * actors, math.ceil(actors / max(1e-9, 1.0 - load.learner_waits)))
        wanted = next((count for count in counts if count >= enough), counts[-1])
        return Decision(wanted, f"the learner waited for data {learner_waits} of {load.seconds:.0f} s", load) if wanted > actors else None
    fewer = (count for count in counts if actors / 2 <= count < actors)
    if (wanted := next((count for count in fewer if _suffices(load, actors / count)), actors)) == actors:
        return None
    said = f"data waited for the learner: actors were idle {actors_wait} of {load.seconds:.0f} s, the learner {learner_waits}"
    return Decision(wanted, said, load)


def _suffices(load: Load, ratio: float) -> bool:
    """Whether actors that each do `ratio` times as much keep up with the learner, with something to spare."""
    waiting = load.learner_waits * ratio
    return (1.0 - load.actors_wait) * ratio <= BUSY and waiting <= SETTLED * (waiting + 1.0 - load.learner_waits)


@dataclass(frozen=True)
class Sample:
    """What all had spent at a moment, in seconds: `waited` of what was spent in all (starting left out), of the learner and of all actors together."""

    at: float
    update: int
    learner_waited: float
    learner_spent: float
    actors_waited: float
    actors_spent: float

    @classmethod
    def of(cls, at: float, update: int, learner: ActivityRecord, actors: Sequence[ActivityRecord]) -> Sample:
        waited = sum(record.seconds[Activity.WAITING_FOR_LEASE] for record in actors)
        return cls(at, update, learner.seconds[Activity.WAITING_FOR_BATCH], _spent(learner), waited, sum(map(_spent, actors)))


def _spent(record: ActivityRecord) -> float:
    return sum(record.seconds.values()) - record.seconds[Activity.STARTING]


def load_between(first: Sample, last: Sample) -> Load:
    """What was measured from one sample to another."""
    learner, actors = last.learner_spent - first.learner_spent, last.actors_spent - first.actors_spent
    return Load(
        last.at - first.at,
        _share(last.learner_waited - first.learner_waited, learner),
        _share(last.actors_waited - first.actors_waited, actors),
    )


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0


@dataclass
class Autoscaler:
    """Follows the load of one run between two bounds; `look` is called a few times a second."""

    least: int
    most: int
    groups: int
    in_turn: bool  # an update waits for every group (sync mode)
    cool_down_seconds: float = field(default_factory=lambda: COOL_DOWN_SECONDS)
    _ends: deque[Sample] = field(default_factory=deque)  # of windows
    _last_update: int = -1
    _decided_at: float | None = None
    _direction: int = 0  # of the decision before: 1 more, -1 fewer, 0 none that counts

    def disturbed(self) -> None:
        """Somebody comes, goes, or is told to wait: what was measured so far says nothing of what will be."""
        self._ends.clear()
        self._last_update = -1

    def look(self, sample: Sample, actors: int, room: int) -> Decision | None:
        """What is to be done now, once that is known and its time has come.

        Args:
          actors: that work now. room: actors that there is room for.
        """
        now = sample.at
        if self._decided_at is None:
            self._decided_at = now
        if not self._window_ends(sample):
            return None
        asked = self._asked(actors, sensible(self.least, min(self.most, max(room, 1)), self.groups, in_turn=self.in_turn))
        self._ends.popleft()
        if now - self._decided_at < self.cool_down_seconds:
            return None
        if not any(asked):
            self._direction, self.cool_down_seconds = 0, COOL_DOWN_SECONDS
        directions = {_direction(decision, actors) for decision in asked}
        direction = directions.pop()
        if directions or not direction:
            return None
        if direction == -self._direction:
            self.cool_down_seconds = min(2 * self.cool_down_seconds, LONGEST_SECONDS)
        self._direction, self._decided_at = direction, now
        self.disturbed()
        return asked[-1]

    def _asked(self, actors: int, counts: Sequence[int]) -> list[Decision | None]:
        """What the first window asks for, the second, and the two together."""
        first, middle, last = self._ends
        return [
            decide(load_between(a, b), actors, counts, in_turn=self.in_turn) for a, b in ((first, middle), (middle, last), (first, last))
        ]

    def _window_ends(self, sample: Sample) -> bool:
        """Whether two windows are full, the second of which ends here; each ends with an update."""
        if sample.update == self._last_update:
            return False
        self._last_update = sample.update
        since = self._ends[-1] if self._ends else None
        if since is None or (sample.at - since.at >= WINDOW_SECONDS and sample.update - since.update >= WINDOW_UPDATES):
            self._ends.append(sample)
        return len(self._ends) == NUM_ENDS


def _direction(decision: Decision | None, actors: int) -> int:
    return 0 if decision is None else 1 if decision.actors > actors else -1
