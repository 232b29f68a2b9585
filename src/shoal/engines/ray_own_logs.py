"""The logs of the driver's own processes, in a run on a cluster: they write into pipes, and what comes out goes into the files without secrets.

No secret is on the disk at any moment, whatever ends this process; then what is in the pipes is lost, a moment's worth.

consumes    what the processes of the driver's fleet write on standard output and error
waits for   any of it, or `close`; a process waits for this thread only where it has written 64 KiB that were not taken yet
unblocked   by that
on failure  what a disk does not take is lost; no process fails of it
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from shoal.engines.ray_saying import LogText

READ_BYTES = 1 << 20  # more than a pipe holds
GATHER_SECONDS = 0.01  # lines that come one after the other are taken together


@dataclass
class _Log:
    path: Path
    pipe_fd: int  # both of its ends
    text: LogText = field(default_factory=LogText)

    def take_in(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._keep(self.text.take(os.read(self.pipe_fd, READ_BYTES)))

    def end(self) -> None:
        self.take_in()
        self._keep(self.text.rest())

    def _keep(self, said: bytes) -> None:
        if said:
            with contextlib.suppress(OSError), self.path.open("ab") as file:
                file.write(said)


class OwnLogs:
    """See `Logs` of supervision/zygote.py. `open`, `ended` and `close` are called from one thread; another one, which begins with the first log, writes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logs: dict[Path, _Log] = {}
        self._thread: threading.Thread | None = None
        self._closing = False

    def open(self, path: Path) -> Path:
        """A pipe, the same for all that write into this log, one after the other. The null device where there are no descriptors for it."""
        with self._lock, contextlib.suppress(OSError):
            if self._thread is None:
                self._begin()
            if path not in self._logs:
                self._logs[path] = _Log(path, _pipe())
                self._poll.register(self._logs[path].pipe_fd, select.EPOLLIN)
                path.touch()
        log = self._logs.get(path)
        return Path(os.devnull) if log is None else Path(f"/proc/{os.getpid()}/fd/{log.pipe_fd}")

    def ended(self, path: Path) -> None:
        """Nothing more comes of who wrote there: what was held back of it may be kept."""
        with self._lock:
            if path in self._logs:
                self._logs[path].end()

    def close(self) -> None:
        """All that wrote are dead. May be called twice."""
        if self._thread is None:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._thread = None
        for log in self._logs.values():
            log.end()
            os.close(log.pipe_fd)
        self._logs.clear()
        self._poll.close()
        os.close(self._wake)

    def _begin(self) -> None:
        self._poll, self._wake, self._closing = select.epoll(), os.eventfd(0, os.EFD_CLOEXEC), False
        self._poll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._serve, name="logs", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closing:
            self._poll.poll()
            time.sleep(GATHER_SECONDS)
            with self._lock:
                for log in self._logs.values():
                    log.take_in()


def _pipe() -> int:
    """One descriptor of both ends, which does not wait: there is always somebody to read, and never an end."""
    reading, writing = os.pipe()
    try:
        return os.open(f"/proc/self/fd/{reading}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(reading)
        os.close(writing)
