"""The lock of a living run: who trains in a directory, and that nobody else does. No torch.

The kernel holds it, on a file in the run's directory, for as long as the process lives, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Self

from shoal.errors import RunError

LOCK = "run.lock"


class RunLock:
    """Held for as long as the run lives; the kernel lets go of it when the process dies. A forked child does not hold it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _locks[descriptor] = os.getpid()

    def release(self) -> None:
        if _locks.pop(self._descriptor, None) == os.getpid():
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


_locks: dict[int, int] = {}  # descriptor -> process that took it


def _forget_locks() -> None:
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_forget_locks)


def lock_run(directory: str | os.PathLike[str], *, wait_seconds: float = 5.0) -> RunLock:
    """Take the run for this process. `wait_seconds` is how long the last children of a killed run may take to die.

    Raises RunError, which names the process, where a living run holds it; or which says why nothing can be written there.
    """
    try:
        descriptor = os.open(Path(directory) / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunError(
            f"cannot write {Path(directory) / LOCK}: {os.strerror(error.errno or errno.EIO)}; a run needs its directory"
        ) from error
    deadline = time.monotonic() + wait_seconds
    try:
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            holder = _holder(descriptor)
            living = holder is not None and (holder == os.getpid() or is_other_living_process(holder))
            if living or time.monotonic() > deadline:
                raise RunError(
                    f"{directory} is in use by process {holder or 'unknown'}; stop it (Ctrl-C or kill -INT) or choose another run directory"
                )
            time.sleep(0.01)
        os.ftruncate(descriptor, 0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the number
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return RunLock(descriptor)


def run_holder(directory: str | os.PathLike[str]) -> int | None:
    """The process that holds the run now, or None."""
    try:
        descriptor = os.open(Path(directory) / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return None if _try_lock(descriptor, fcntl.LOCK_SH) else _holder(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None


def is_other_living_process(pid: int) -> bool:
    """False for this process, and for one that is gone."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
