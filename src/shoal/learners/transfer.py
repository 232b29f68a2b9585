"""The way of a batch to the learner's device, and of the weights back from it.

On a processor a batch is put together in memory of its own, and there is no way. With a GPU it is put together in page-locked memory, of
which there is one set for all batches; each field's copy begins as soon as the field is whole, on a stream beside the one that computes, while the
next is put together. Images stay uint8 until they are there, and minibatches are gathered there. Slots are free once a batch is put
together, since by then their bytes lie here; this memory is written again only when its bytes lie on the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.experience.batch import Batch
from shoal.types import Array


class Staging(Protocol):
    """Where the fields of one batch at a time are put together."""

    def array(self, name: str, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Memory for a field, to be written whole. Waits until what lay there before has left it."""

    def begin(self, array: Array) -> Tensor:
        """A field is written: its way to the device may begin. Returns it as a tensor on the host, which is not to be changed."""

    def finish(self, batch: Batch) -> Batch:
        """The batch on the device; what was made or replaced since it was put together is copied now."""


class HostStaging:
    """The learner computes on the processor."""

    def array(self, name: str, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        return np.empty(shape, dtype)

    def begin(self, array: Array) -> Tensor:
        return torch.from_numpy(array)

    def finish(self, batch: Batch) -> Batch:
        return batch


class Lane(Protocol):
    """Copies that are made beside the computation, in order."""

    def send(self, tensor: Tensor) -> Tensor:
        """Begin a copy to the device; the copy is not to be used before `join`."""

    def fetch(self, tensor: Tensor, into: Tensor) -> None:
        """Begin a copy from the device, of what is computed by then; `into` is not to be read before `wait`."""

    def join(self, copies: Sequence[Tensor]) -> None:
        """Let what is computed from now on come after the copies that were begun."""

    def wait(self) -> None:
        """Wait until every copy that was begun is made."""


class CudaLane:
    """A CUDA stream. Copies run beside the computation where the host's memory is page-locked."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, tensor: Tensor) -> Tensor:
        with torch.cuda.stream(self._stream):
            return tensor.to(self._device, non_blocking=True)

    def fetch(self, tensor: Tensor, into: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            into.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)

    def join(self, copies: Sequence[Tensor]) -> None:
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(computing)

    def wait(self) -> None:
        self._stream.synchronize()


class DeviceStaging:
    """The learner computes elsewhere than on the processor.

    consumes    fields, one batch after the other
    waits for   the copies of the batch before, before its memory is written again
    """

    def __init__(self, lane: Lane, *, pinned: bool) -> None:
        self._lane, self._pinned = lane, pinned
        self._buffers: dict[str, Tensor] = {}
        self._begun: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the tensor on the host: it, and its copy
        self._busy = False

    def array(self, name: str, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        if self._busy:
            self._lane.wait()
            self._busy = False
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._buffers or self._buffers[name].numel() < num_bytes:
            self._buffers[name] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        return self._buffers[name].numpy()[:num_bytes].view(dtype).reshape(shape)

    def begin(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array)
        self._begun[id(tensor)] = (tensor, self._lane.send(tensor))
        return tensor

    def finish(self, batch: Batch) -> Batch:
        copies: list[Tensor] = []

        def moved(tensor: Tensor) -> Tensor:
            begun = self._begun.get(id(tensor))
            copies.append(self._lane.send(tensor) if begun is None else begun[1])
            return copies[-1]

        there = batch.mapped(moved)
        self._lane.join(copies)
        self._begun.clear()
        self._busy = True
        return there


class WeightFetch:
    """All tensors of a policy on a device as one copy to the host, float32 [size]."""

    def __init__(self, lane: Lane, size: int, *, pinned: bool) -> None:
        self._lane = lane
        self._host = torch.empty(size, dtype=torch.float32, pin_memory=pinned)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Array:
        """The tensors side by side, in order; valid until the next call."""
        with torch.no_grad():
            self._lane.fetch(torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()]), self._host)
        self._lane.wait()
        return self._host.numpy()


def ways(device: torch.device, num_weights: int) -> tuple[Staging, WeightFetch | None]:
    """Batches to `device`, and weights back from it; None where they are on the host."""
    if device.type == "cpu":
        return HostStaging(), None
    lane = CudaLane(device)
    return DeviceStaging(lane, pinned=True), WeightFetch(lane, num_weights, pinned=True)
