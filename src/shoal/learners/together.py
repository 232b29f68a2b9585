"""All learners of a run in one process: where all roles are in it, and where a run is executed again.

Each but the first has a thread of its own, and does there what it would do in a process, so the bits are those of as many processes.

    consumes    orders, as one learner
    waits for   the other learners, at the end of each update
    unblocked   by them; they make the same steps
    on failure  what any of them raised; then all are to be made anew
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch

from shoal.algorithms.ranks import LostRank
from shoal.experience.envelope import Identity
from shoal.learners.distributed import meet, memory_store
from shoal.learners.learner import Consumed, Learner

Orders = Sequence[tuple[int, Identity]]


class _Companion:
    """Does what it is given in its own thread, until something is raised there."""

    def __init__(self, threads: int) -> None:
        self._given: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(threads,), name="shoal learner", daemon=True).start()

    def begin(self, work: Callable[[], None]) -> None:
        self._given.put(work)

    def finish(self) -> BaseException | None:
        """Wait for what was begun. Returns what it raised."""
        return self._done.get()

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # a thread has a number of its own
        while True:
            try:
                self._given.get()()
            except BaseException as error:
                self._done.put(error)
                return
            self._done.put(None)


class Together:
    """Attributes:
    all: the learners. first: the one that publishes, and whose state is that of all.
    """

    def __init__(self, learners: Sequence[Learner], *, threads: int, timeout_seconds: float) -> None:
        """threads: torch's, of each. timeout_seconds: of one wait for each other."""
        self.all = list(learners)
        self.first = learners[0]
        self._orders: Orders = ()
        self._companions = [_Companion(threads) for _ in learners[1:]]
        if not self._companions:
            return
        store = memory_store()

        def join(rank: int) -> None:
            learners[rank].join(meet(store, rank, len(learners), timeout_seconds=timeout_seconds))

        for rank, companion in enumerate(self._companions, 1):
            companion.begin(partial(join, rank))
        join(0)
        self._finish()

    def _finish(self) -> None:
        """Wait for all; raises what one of them did, rather than what came of that for the others."""
        errors = [error for companion in self._companions if (error := companion.finish()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, LostRank)):
            raise error

    def consume(self, orders: Orders) -> Consumed:
        """As the first learner does; the slots are free once `update` returns, where there is one."""
        self._orders = orders
        return self.first.consume(orders)

    def update(self, consumed: Consumed, optimizer_steps: int = 0) -> dict[str, float]:
        for companion, learner in zip(self._companions, self.all[1:], strict=True):
            companion.begin(partial(_follow, learner, self._orders, optimizer_steps))
        try:
            metrics = self.first.update(consumed, optimizer_steps)
            self.first.agree()
        except BaseException as error:
            self.first.leave()  # else the others would wait for it
            if isinstance(error, LostRank):
                self._finish()  # which raises why
            raise
        self._finish()
        return metrics


def _follow(learner: Learner, orders: Orders, optimizer_steps: int) -> None:
    try:
        learner.update(learner.consume(orders), optimizer_steps)
        learner.agree()
    except BaseException:
        learner.leave()  # else the others would wait for it
        raise
