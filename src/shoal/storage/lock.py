"""The lock of a run in a store: an object that names the driver, and that the driver renews for as long as it lives.

    {"token": ..., "host": ..., "pid": ..., "place": ..., "since": ..., "renewed": ...}    times are seconds since the epoch

A store has no locks, so this is the best that can be done with one object. Another driver takes the run where the one before is known to be dead (it was a process of this
machine, and is gone), where it has not renewed for LEASE_SECONDS (as the two clocks have it), or where its user says so. Whoever lost the run sees it before it commits a checkpoint, and
ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shoal.errors import StorageError
from shoal.storage.objects import Store, retried
from shoal.supervision.processes import process_state

NAME = "run.lock"
RENEW_SECONDS = 30.0
LEASE_SECONDS = 150.0
SETTLE_SECONDS = 0.2
_held: set[str] = set()  # tokens of this process


class LostError(StorageError):
    """Another driver has the run."""


@dataclass(frozen=True)
class Driver:
    """Who has a run. `place` is one machine between two of its starts, and one namespace of processes in it; "" where that is not known."""

    token: str
    host: str
    pid: int
    place: str
    since: float
    renewed: float

    @property
    def lives(self) -> bool:
        """Whether it is to be taken for alive."""
        if self.place and self.place == this_place():
            return self.token in _held if self.pid == os.getpid() else process_state(self.pid) not in (None, "Z", "X")
        return time.time() - self.renewed < LEASE_SECONDS

    def __str__(self) -> str:
        since, age = datetime.fromtimestamp(self.since, UTC), max(0.0, time.time() - self.renewed)
        return f"process {self.pid} on {self.host}, since {since:%Y-%m-%d %H:%M:%S} UTC, last heard of {age:.0f} s ago"


def parse_lock(content: bytes) -> Driver | None:
    """The driver that a lock names; None where it names none."""
    try:
        facts: Any = json.loads(content)
        times = float(facts["since"]), float(facts["renewed"])
        driver = Driver(str(facts["token"]), str(facts["host"])[:200], int(facts["pid"]), str(facts["place"]), *times)
        str(driver)  # its times can be said
    except (ValueError, TypeError, KeyError, OverflowError, OSError, RecursionError):
        return None
    return driver


def driver_of(facts: bytes | None) -> Any:
    """The token of who drove a run last, which its run.json names; None where it names nobody."""
    try:
        return None if facts is None else json.loads(facts).get("driver")
    except (ValueError, AttributeError, RecursionError):
        return None


def living_driver(store: Store) -> Driver | None:
    """Who has the run at this moment."""
    content = retried(lambda: store.read(NAME))
    driver = None if content is None else parse_lock(content)
    return driver if driver is not None and driver.lives else None


def this_place() -> str:
    """This start of this machine and this namespace of processes, within which a process number names one process."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class StoreLock:
    """Held, and renewed by a thread of its own, from the beginning to `release`.

    Attributes:
      token: names this driver.
      lost: who took the run, in words, once somebody did; else "".
    Raises:
      StorageError: another driver that is to be taken for alive has the run; names it, and says what to do.
    """

    def __init__(self, url: str, *, take_over: bool = False, told: Callable[[str], None] = lambda message: None) -> None:
        self._store, self.token, self.lost = Store(url), secrets.token_hex(16), ""
        self._since = time.time()
        self._ended = threading.Event()
        self._own = threading.Lock()  # held while this driver writes: some stores replace by steps, between which the lock names nobody
        self._take(take_over, told)
        _held.add(self.token)
        self._thread = threading.Thread(target=self._renew, name="shoal-store-lock", daemon=True)
        self._thread.start()

    def _take(self, take_over: bool, told: Callable[[str], None]) -> None:
        if not retried(lambda: self._store.create(NAME, self._content())):
            self._replace(take_over, told)
        time.sleep(SETTLE_SECONDS)  # where a store cannot tell who came first, who wrote last has it
        self._look()
        if self.lost:
            raise StorageError(f"{self._store.url} was taken at the same moment by {self.lost}; try again once it has ended")

    def _replace(self, take_over: bool, told: Callable[[str], None]) -> None:
        content = self._store.read(NAME)
        driver = None if content is None else parse_lock(content)
        if content is not None and (driver is None or driver.lives) and not take_over:
            who = str(driver) if driver is not None else f"a driver that {NAME} there does not name"
            raise StorageError(
                f"{self._store.url} is in use by {who}; stop it, or wait {LEASE_SECONDS:g} s after its end, or give `shoal resume` --take-over where you know that it is dead"
            )
        if content is not None:
            told(f"the lock of {self._store.url} is taken over from {driver or 'a driver without a name'}")
        retried(lambda: self._store.write(NAME, self._content()))

    def check(self, store: Store) -> None:
        """Raise LostError where another driver has the run. `store` is the caller's own."""
        if not self.lost:
            self._look(store)
        if self.lost:
            raise LostError(
                f"{store.url} was taken over by {self.lost}: this driver ends, and what it made since its last checkpoint there is made again by the other"
            )

    def _look(self, store: Store | None = None) -> None:
        with self._own:
            self._see(store or self._store)

    def _see(self, store: Store) -> None:
        content = store.read(NAME)
        if content is None:  # somebody removed it
            store.write(NAME, self._content())
            return
        driver = parse_lock(content)
        if driver is None or driver.token != self.token:
            self.lost = str(driver) if driver is not None else "somebody without a name"

    def _renew(self) -> None:
        """Where the store cannot be reached, it is tried again: the lease is longer than several rounds."""
        while not self._ended.wait(RENEW_SECONDS) and not self.lost:
            try:
                self._look()
                if not self.lost:
                    with self._own:
                        self._store.write(NAME, self._content())
            except StorageError:
                continue

    def _content(self) -> bytes:
        me = Driver(self.token, socket.gethostname(), os.getpid(), this_place(), self._since, time.time())
        return json.dumps(asdict(me)).encode()

    def release(self) -> None:
        """Leave the run to others. A store that does not answer keeps the lock until its time is over."""
        self._ended.set()
        self._thread.join(1.0)
        _held.discard(self.token)
        if self.lost or self._thread.is_alive():  # which waits for the store, as this would
            return
        with contextlib.suppress(StorageError):
            content = self._store.read(NAME)
            driver = None if content is None else parse_lock(content)
            if driver is not None and driver.token == self.token:
                self._store.remove(NAME)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
