"""Learners that add up by torch.distributed: gloo on processors, NCCL where each of them has a GPU of its own.

    waits for   all others, in each `sum`: as long as they take, at most `timeout_seconds`
    unblocked   by their part; by the end of one, whose connection closes (gloo)
    on failure  LostRank. Whatever was under way is lost with it, and all learners are to be made anew

Gloo's ring adds each piece up in one order, one learner after the other, and hands the result round: so all get the same bits, every time.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from shoal.algorithms.ranks import LostRank
from shoal.types import Activity, ActivityRecorder, NullRecorder

LOOPBACK = "127.0.0.1"
_c10d: Any = torch.distributed  # whose stores and groups have no types of their own


class TorchRanks:
    """One learner of a group; `meet` makes it.

    Attributes:
      recorder: is told of each exchange, in which this learner may wait for the others.
    """

    def __init__(self, group: Any, rank: int, size: int, device: torch.device) -> None:
        """device: where the group adds up; tensors elsewhere are copied there and back."""
        self.rank, self.size = rank, size
        self.recorder: ActivityRecorder = NullRecorder()
        self._group, self._device = group, device

    def sum(self, tensor: Tensor) -> None:
        self.recorder.enter(Activity.SHARING)
        there = tensor.to(self._device)
        try:
            self._group.allreduce([there]).wait()
        except RuntimeError as error:
            raise LostRank(f"learner-{self.rank} lost the others: {error}") from error
        if there is not tensor:
            tensor.copy_(there)
        self.recorder.enter(Activity.LEARNING)

    def leave(self) -> None:
        self._group = None  # its connections close with it


def meet(
    store: Any,
    rank: int,
    size: int,
    *,
    timeout_seconds: float,
    device: torch.device | None = None,
    address: str = LOOPBACK,
) -> TorchRanks:
    """Find the other learners through a store that all of them have; returns once all are there.

    Args:
      store: of torch.distributed, used by nobody else. timeout_seconds: for this, and for each sum.
      device: where this learner computes. A GPU that no other learner has adds up by NCCL; without one, and by default, gloo does.
      address: of this machine, where the others reach it.
    Raises:
      RuntimeError: they did not come in time.
    """
    timeout = timedelta(seconds=timeout_seconds)
    store.set_timeout(timeout)
    if device is not None and device.type == "cuda" and torch.distributed.is_nccl_available():
        options = _c10d.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return TorchRanks(_c10d.ProcessGroupNCCL(store, rank, size, options), rank, size, device)
    options = _c10d.ProcessGroupGloo._Options()
    options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    group = _c10d.ProcessGroupGloo(store, rank, size, options)
    return TorchRanks(group, rank, size, torch.device("cpu"))


def file_store(fd: int, size: int) -> Any:
    """A store in an anonymous file that all learners of a machine have open (Linux); `fd` stays open while it is used."""
    return _c10d.FileStore(f"/proc/self/fd/{fd}", size)


def network_store(address: str, port: int, size: int, timeout_seconds: float, listening_fd: int | None = None) -> Any:
    """A store for learners on several machines. listening_fd: of a socket that is bound to that address and port, in the process that serves it; this
    process owns it from then on. It neither encrypts nor asks who is there. Raises RuntimeError where it cannot be reached in time."""
    return _c10d.TCPStore(
        address,
        port,
        size,
        is_master=listening_fd is not None,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=listening_fd,
    )


def memory_store() -> Any:
    """A store for learners that are threads of one process."""
    return _c10d.HashStore()
