import os

import numpy as np
import pytest

from shoal.errors import ShapeError
from shoal.supervision.memory import SharedMemory


def test_what_one_writes_the_other_reads():
    mine = SharedMemory.create(4096)
    theirs = SharedMemory.attach(os.dup(mine.fd), 4096)
    mine.buffer[100:104] = [1, 2, 3, 4]
    assert theirs.buffer[100:104].tolist() == [1, 2, 3, 4]
    assert theirs.buffer[104:].sum() == 0
    mine.close()
    assert theirs.buffer[101] == 2
    theirs.close()
    theirs.close()


def test_it_has_no_name_in_dev_shm():
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    memory = SharedMemory.create(1 << 20, "shoal-test")
    after = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    assert not {name for name in after - before if "shoal" in name}
    memory.close()


def test_poison_shows_as_nan_and_minus_one():
    memory = SharedMemory.create(64)
    memory.poison()
    assert np.isnan(memory.buffer.view(np.float32)).all()
    assert np.isnan(memory.buffer.view(np.float64)).all()
    assert (memory.buffer.view(np.int64) == -1).all()
    memory.close()


def test_views_outlive_close():
    memory = SharedMemory.create(4096)
    view = memory.buffer[:10]
    memory.close()
    view[:] = 7
    assert view.sum() == 70


def test_close_gives_descriptors_back():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        SharedMemory.create(4096).close()
    assert len(os.listdir("/proc/self/fd")) <= before  # what tests before this one left may go meanwhile


@pytest.mark.parametrize("size_bytes", [0, 8192])
def test_attach_refuses_a_size_that_the_file_does_not_have(size_bytes):
    memory = SharedMemory.create(4096)
    with pytest.raises(ShapeError, match="4096"):
        SharedMemory.attach(memory.fd, size_bytes)
    memory.close()


def test_create_refuses_nothing():
    with pytest.raises(ShapeError, match="positive"):
        SharedMemory.create(0)


def test_nobody_can_shorten_it_under_a_reader():
    memory = SharedMemory.create(8192)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 4096)
    memory.close()
