"""Anonymous shared memory: no name anywhere, so that it is gone with the last process that holds it, however that one ends.

(A name in /dev/shm stays behind after a `kill -9` of its owner.) Descriptors travel by fork or by `Channel.send_with_fds`.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import sys
import tempfile

import numpy as np
import numpy.typing as npt

from shoal.errors import ShapeError

POISON = 0xFF  # NaN as float32 and float64, -1 as a signed integer: shows wherever unwritten memory is trained on


def anonymous_file(name: str) -> int:
    """A descriptor (close-on-exec) of an empty file that has no name in any directory; `name` shows in /proc/PID/maps only."""
    if sys.platform == "linux":
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fd, path = tempfile.mkstemp(prefix=name)
    os.unlink(path)
    return fd


class SharedMemory:
    """A fixed number of bytes, zero at first, that several processes map.

    Attributes:
      fd: descriptor to pass to another process, which then calls `attach(fd, size_bytes)`. Owned by this object.
      size_bytes: as asked for.
      buffer: uint8 [size_bytes], writable; views of it stay valid after `close`.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self._map = mmap.mmap(fd, size_bytes)
        self.buffer: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    @classmethod
    def create(cls, size_bytes: int, name: str = "shoal") -> SharedMemory:
        """New memory. It can neither shrink nor grow (a shorter file would kill its readers by SIGBUS).

        Raises:
          ShapeError: if size_bytes is not positive.
        """
        if size_bytes <= 0:
            raise ShapeError(f"shared memory {name!r}: expected a positive size, got {size_bytes} bytes")
        fd = anonymous_file(name)
        try:
            os.ftruncate(fd, size_bytes)
            if sys.platform == "linux":
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, size_bytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, size_bytes: int) -> SharedMemory:
        """Map memory that another process made; takes the descriptor over.

        Raises:
          ShapeError: if the file behind `fd` is shorter than `size_bytes`.
        """
        actual_bytes = os.fstat(fd).st_size
        if not 0 < size_bytes <= actual_bytes:
            raise ShapeError(f"shared memory on descriptor {fd}: expected {size_bytes} bytes, it holds {actual_bytes}")
        return cls(fd, size_bytes)

    def poison(self) -> None:
        """Fill with 0xFF (NaN, -1): for tests, so that memory read before it is written is seen."""
        self.buffer.fill(POISON)

    def close(self) -> None:
        """Close the descriptor, and unmap unless views are alive (the last view unmaps). May be called twice."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        self.buffer = np.zeros(0, np.uint8)
        with contextlib.suppress(BufferError):  # a view is alive: the map goes with it
            self._map.close()
