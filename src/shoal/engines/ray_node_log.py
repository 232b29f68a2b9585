"""The log of a process on a node: a file without a name, so that nothing of it is left whatever ends the node, and of a bounded size."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

READ_BYTES = 1 << 16  # at once
KEPT_BYTES = 1 << 24  # of a log whose process writes more than is read


class NodeLog:
    """Appended to by the process, through `path`; read here as it grows."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - until `close`
        self._at = 0

    @property
    def path(self) -> Path:
        """By which another process opens it."""
        return Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")

    def read(self) -> bytes:
        """What was written since, READ_BYTES at most. Of a log that has grown to more than KEPT_BYTES nothing is kept; what was not read of it is said."""
        fd = self._file.fileno()
        written = os.pread(fd, READ_BYTES, self._at)
        self._at += len(written)
        if (size := os.fstat(fd).st_size) > KEPT_BYTES:
            os.ftruncate(fd, 0)
            if unread := size - self._at:
                written += f"\n[shoal: {unread:,} bytes were left out here: more was written than is read]\n".encode()
            self._at = 0
        return written

    def close(self) -> None:
        self._file.close()
