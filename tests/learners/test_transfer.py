"""The way to a device and back, on a lane whose copies are made late: nothing is overwritten before it has left, nothing is used before it is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_assemble import flat, slots_of
from test_learner import World, config_of

from shoal.learners.assemble import assemble
from shoal.learners.transfer import CudaLane, DeviceStaging, HostStaging, WeightFetch, ways
from shoal.networks.policy import named_tensors


class LateLane:
    """Copies are made when somebody waits, and hold poison until then. `join` only orders, as on a GPU."""

    def __init__(self) -> None:
        self._begun: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.joined: list[int] = []
        self.waits = 0

    def send(self, tensor):
        copy = torch.empty_like(tensor)
        copy.numpy().reshape(-1).view(np.uint8)[:] = 0xFF
        self._begun.append((tensor, copy))
        return copy

    def fetch(self, tensor, into):
        into.fill_(float("nan"))
        self._begun.append((tensor, into))

    def join(self, copies):
        self.joined.append(len(copies))

    def wait(self):
        self.waits += 1
        for source, copy in self._begun:
            copy.copy_(source)
        self._begun.clear()


class ComputingLane(LateLane):
    """The computation comes right after `join`, in a test that has no stream."""

    def join(self, copies):
        super().join(copies)
        LateLane.wait(self)


def assert_equal(found, expected) -> None:
    for name, value in flat(expected).items():
        assert torch.equal(flat(found)[name], value), name
        assert flat(found)[name].dtype is value.dtype


def test_a_batch_arrives_as_it_was_put_together() -> None:
    lane = LateLane()
    staging = DeviceStaging(lane, pinned=False)
    expected = assemble(slots_of([4, 2]), version=9, max_lag=9)
    moved = staging.finish(assemble(slots_of([4, 2]), 9, 9, staging))
    lane.wait()
    assert_equal(moved, expected)
    assert lane.joined == [len(flat(expected))]
    assert moved.observation["observation/camera"].dtype is torch.uint8


def test_memory_is_written_again_only_when_its_bytes_have_left() -> None:
    lane = LateLane()
    staging = DeviceStaging(lane, pinned=False)
    sizes = [[4, 4], [2, 3], [4, 4, 4], [1]]  # the same memory, parts of it, and more than there was
    moved = [staging.finish(assemble(slots_of(rows), 9 + i, 99, staging)) for i, rows in enumerate(sizes)]
    assert lane.waits == len(sizes) - 1  # once a batch
    lane.wait()
    for i, rows in enumerate(sizes):
        assert_equal(moved[i], assemble(slots_of(rows), 9 + i, 99))


def test_memory_is_kept_and_does_not_grow_with_the_batches() -> None:
    staging = DeviceStaging(LateLane(), pinned=False)
    staging.finish(assemble(slots_of([4, 4]), 9, 9, staging))
    place = staging.array("observation/camera", (5, 6, 2, 3), np.uint8).ctypes.data
    assert staging.array("observation/camera", (2, 3, 2, 3), np.uint8).ctypes.data == place
    assert staging.array("observation/camera", (5, 6, 2, 3), np.uint8).ctypes.data == place


def test_what_was_replaced_since_is_what_arrives() -> None:
    """Rewards are normalised between the two."""
    lane = LateLane()
    staging = DeviceStaging(lane, pinned=False)
    batch = assemble(slots_of([4, 4]), 9, 9, staging)
    batch.reward_TN = batch.reward_TN * 0.5 + 1
    moved = staging.finish(batch)
    lane.wait()
    assert torch.equal(moved.reward_TN, batch.reward_TN)
    assert torch.equal(moved.action, batch.action)


def test_slots_are_free_once_a_batch_is_put_together() -> None:
    lane = LateLane()
    staging = DeviceStaging(lane, pinned=False)
    slots = slots_of([4, 2])
    expected = assemble(slots, version=9, max_lag=9)
    batch = assemble(slots, 9, 9, staging)
    for slot in slots:
        for array in slot.arrays.values():
            array.reshape(-1).view(np.uint8)[:] = 0xFF
    moved = staging.finish(batch)
    lane.wait()
    assert_equal(moved, expected)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_learner_that_stages_makes_the_same_versions(normalise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"normalise_observations": normalise, "normalise_rewards": normalise}
    plain = World(config=config_of(**config))
    lane = ComputingLane()
    monkeypatch.setattr(
        "shoal.learners.learner.ways",
        lambda device, size: (DeviceStaging(lane, pinned=False), WeightFetch(lane, size, pinned=False)),
    )
    staged = World(config=config_of(**config))
    for sequence in range(3):
        for world in (plain, staged):
            metrics = world.learner.update(world.learner.consume(world.rollouts(sequence)))
            assert np.isfinite(metrics["loss"])
    assert len(lane.joined) == 3
    assert staged.learner.weights_sha256 == plain.learner.weights_sha256
    (version, ours), (_, theirs) = staged.published(), plain.published()
    assert version == 3
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_on_a_processor_there_is_no_way() -> None:
    staging, fetch = ways(torch.device("cpu"), 10)
    assert isinstance(staging, HostStaging)
    assert fetch is None
    batch = assemble(slots_of([4]), 9, 9, staging)
    assert staging.finish(batch) is batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_batch_goes_to_a_gpu_and_weights_come_back() -> None:
    device = torch.device("cuda")
    lane = CudaLane(device)
    staging = DeviceStaging(lane, pinned=True)
    for i, rows in enumerate([[4, 4], [2, 3], [4, 4, 4]] * 20):
        moved = staging.finish(assemble(slots_of(rows), 9 + i, 99, staging))
        assert moved.action.device.type == "cuda"
        assert_equal(moved.mapped(torch.Tensor.cpu), assemble(slots_of(rows), 9 + i, 99))
    world = World()
    tensors = {name: tensor.to(device) for name, tensor in named_tensors(world.policy).items()}
    found = WeightFetch(lane, world.layout.size, pinned=True)(tensors)
    world.learner.publish()
    assert all(np.array_equal(value, world.published()[1][name]) for name, value in world.layout.views(found).items())
