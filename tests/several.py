"""Several learners in threads of this process, which add up as the processes of a run do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from shoal.learners.distributed import TorchRanks, meet, memory_store

T = TypeVar("T")
TIMEOUT_SECONDS = 300.0


def several(size: int, work: Callable[[TorchRanks], T]) -> list[T]:
    """What `work` gives each of them, by rank."""
    store = memory_store()

    def one(rank: int) -> T:
        return work(meet(store, rank, size, timeout_seconds=TIMEOUT_SECONDS))

    with ThreadPoolExecutor(size) as pool:
        return [future.result(TIMEOUT_SECONDS * 2) for future in [pool.submit(one, rank) for rank in range(size)]]
