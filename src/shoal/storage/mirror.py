"""A run's copy in a store, made by a thread of the driver while the run goes on.

consumes    checkpoints that are whole on this disk (`saved`); of those that wait the newest wins, since the store may be slower than the run
waits for   the store, in its own thread; the driver waits in `begin`, for a few small objects, and in `finish` and `failed`
unblocked   by the store, or STALL_SECONDS after the last byte moved
on failure  tried ATTEMPTS times, a little later each time, and each time with what is the newest then; then said (`upload_failed`), and the next one is tried. The last one's
            failure is the run's (`finish`). What was committed in the store before stays whole
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.engines.elsewhere import Elsewhere, Event
from shoal.errors import RunError, ShoalError, StorageError
from shoal.files import CheckpointDirectory, checkpoint_place, write_text_atomically
from shoal.monitoring.store import copy_database
from shoal.storage import checkpoints
from shoal.storage.lock import LostError, StoreLock, driver_of
from shoal.storage.objects import Store, retried

CONFIG, FACTS, DATABASE, RESULT, CHECKPOINTS = "config.yaml", "run.json", "run.db", "result.json", "checkpoints"
ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0
STALL_SECONDS = 900.0  # without a byte that moved
FAILED_SECONDS = 30.0  # for the last checkpoint of a run that an error ended
_COPY = ".run.db.copy"


class Mirror(Elsewhere):
    """See the module. `close` ends its thread, at the next byte that moves; what it had not committed is nobody's."""

    def __init__(self, store: Store, directory: Path, lock: StoreLock) -> None:
        self.url = store.url
        self._store, self._directory, self._lock = store, directory, lock
        self._part = self._keep = 0
        self._said: deque[tuple[str, dict[str, Any]]] = deque()
        self._changed = threading.Condition()
        self._waiting: Path | None = None  # the newest that is to be copied
        self._current: Path | None = None  # that is being copied
        self._skipped = 0  # that waited, and were not copied
        self._last_words = False  # result and numbers are to be copied once nothing else is to be
        self._closed = False
        self._failure = ""  # why the newest that was tried is not there
        self._moved_at = time.monotonic()
        self._newest: checkpoints.Stored | None = None
        self._there = -1  # update of the newest that is whole in the store
        self._thread = threading.Thread(target=self._work, name="shoal-mirror", daemon=True)

    def say(self, kind: str, **facts: Any) -> None:
        self._said.append((kind, facts))

    # ---- what the driver calls -----------------------------------------------------------------------------------
    def begin(self, part: int, keep: int) -> None:
        """run.json names the driver, here and there; config.yaml is written last, since it makes a directory a run."""
        self._part, self._keep = part, keep
        self._lock.check(self._store)
        facts = {**json.loads((self._directory / FACTS).read_text(encoding="utf-8")), "driver": self._lock.token}
        write_text_atomically(self._directory / FACTS, json.dumps(facts, indent=1))
        retried(lambda: self._store.write(FACTS, (self._directory / FACTS).read_bytes()))
        retried(lambda: self._store.remove(RESULT))  # of an earlier part
        retried(lambda: self._store.write(CONFIG, (self._directory / CONFIG).read_bytes()))
        self._there = max(retried(lambda: checkpoints.committed(self._store)), default=(-1, 0))[0]
        self._offer_what_is_missing()  # an earlier part ended before it was copied
        self._thread.start()

    def _offer_what_is_missing(self) -> None:
        here = CheckpointDirectory(self._directory / CHECKPOINTS).paths()
        if here and _update_of(here[-1]) > self._there and not self.held():
            self.saved(here[-1])

    def saved(self, path: Path) -> None:
        with self._changed:
            self._skipped += self._waiting is not None
            self._waiting = path
            self._changed.notify_all()

    def held(self) -> tuple[Path, ...]:
        with self._changed:
            return tuple(path for path in (self._waiting, self._current) if path is not None)

    def tell(self, event: Event) -> None:
        while self._said:
            kind, facts = self._said.popleft()
            event(kind, **facts)
        if self._lock.lost:
            self._lock.check(self._store)

    def finish(self, event: Event) -> None:
        self._offer_what_is_missing()  # the last attempt failed, and none was made since
        self._wait(STALL_SECONDS, lambda: self._moved_at)
        self.tell(event)
        if not self._failure:
            self._leave(STALL_SECONDS, lambda: self._moved_at)
            self.tell(event)
        if self._failure:
            raise StorageError(
                f"the run ended well, and is whole in {self._directory}, but not in {self.url}: {self._failure}. `shoal resume {self.url}` on this machine copies it"
            )

    def failed(self, event: Event) -> None:
        begun = time.monotonic()
        with contextlib.suppress(StorageError):
            self._wait(FAILED_SECONDS, lambda: begun)
            self._leave(FAILED_SECONDS, lambda: begun)
        with contextlib.suppress(StorageError):
            self.tell(event)

    def discard(self) -> None:
        """Only what a run puts there is removed: the place may hold other things."""
        self.close()
        with contextlib.suppress(StorageError):
            for name in (CONFIG, FACTS, DATABASE, RESULT):
                self._store.remove(name)
            self._store.remove_all(CHECKPOINTS)

    def settle(self, part: int, keep: int) -> None:
        self.begin(part, keep)
        self.finish(lambda *_, **__: None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _leave(self, seconds: float, since: Callable[[], float]) -> None:
        with self._changed:
            self._last_words, self._moved_at = True, time.monotonic()
            self._changed.notify_all()
        self._wait(seconds, since)

    def _wait(self, seconds: float, since: Callable[[], float]) -> None:
        """Until the thread has nothing to do. Raises StorageError, so many seconds after `since`."""
        with self._changed:
            while self._thread.is_alive() and (self._waiting or self._current or self._last_words):
                if time.monotonic() - since() > seconds:
                    self._failure = f"nothing has moved for {seconds:g} s"
                    raise StorageError(f"{self.url} does not take what is written: {self._failure}")
                self._changed.wait(0.1)
            if (self._waiting or self._last_words) and not self._lock.lost:
                self._failure = self._failure or "the thread that copies has ended"

    # ---- the thread ----------------------------------------------------------------------------------------------
    def _work(self) -> None:
        with self._changed:
            while not self._closed and not self._lock.lost:
                if self._waiting is not None:
                    self._current, self._waiting = self._waiting, None
                elif not self._last_words:
                    self._changed.wait()
                    continue
                self._changed.release()
                try:
                    self._copy_current() if self._current is not None else self._tried(self._copy_result)
                finally:
                    self._changed.acquire()
                    if self._current is None:
                        self._last_words = False
                    self._current = None
                    self._changed.notify_all()

    def _copy_current(self) -> None:
        begun, done = time.monotonic(), self._tried(self._copy)
        with self._changed:
            assert self._current is not None
            update = _update_of(self._current)
        if self._failure:
            self.say("upload_failed", update=update, message=self._failure)
        if not done or self._newest is None:
            return
        self._there = update
        size_bytes = sum(size for size, _ in self._newest.files.values())
        self.say("uploaded", update=update, bytes=size_bytes, seconds=time.monotonic() - begun)
        with contextlib.suppress(StorageError):  # the next one sweeps again
            checkpoints.sweep(self._store, update, self._keep)

    def _copy(self) -> None:
        """The newest that there is now. The log of consumption is never behind a checkpoint, in the store as on this disk."""
        with self._changed:
            if self._waiting is not None:  # it came while the one before it was tried
                self._current, self._waiting = self._waiting, None
                self._skipped += 1
            path, skipped, self._skipped = self._current, self._skipped, 0
        assert path is not None
        if skipped:
            self.say("upload_skipped", update=_update_of(path), skipped=skipped)
        self._copy_database()
        self._newest = checkpoints.upload(self._store, path, self._part, before=self._newest, guard=self._guard, moved=self._moved)

    def _copy_result(self) -> None:
        self._copy_database()
        self._guard()
        if (self._directory / RESULT).is_file():
            self._store.write(RESULT, (self._directory / RESULT).read_bytes())

    def _copy_database(self) -> None:
        copy = self._directory / _COPY
        try:
            copy_database(self._directory / DATABASE, copy)
            self._guard()
            self._store.replace(DATABASE, copy, self._moved)
        finally:
            copy.unlink(missing_ok=True)

    def _tried(self, act: Callable[[], None]) -> bool:
        """Whether it was done in the end."""
        self._failure = ""
        for attempt in range(ATTEMPTS):
            self._moved_at = time.monotonic()
            try:
                act()
            except LostError:
                return False
            except (RunError, OSError) as error:
                self._failure = _one_line(error)
            except Exception as error:  # a bug must not look like a copy
                self._failure = f"{type(error).__name__}: {error}"
                return False
            else:
                self._failure = ""
                return True
            if attempt < ATTEMPTS - 1:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, FIRST_WAIT_SECONDS * 2**attempt)
            if self._closed:
                return False
        return False

    def _guard(self) -> None:
        """Raise LostError where another driver has the run, or had it and has ended since: run.json there names who drove last."""
        self._lock.check(self._store)
        if driver_of(self._store.read(FACTS)) != self._lock.token:
            self._lock.lost = "another driver, which has ended since"
            self._lock.check(self._store)

    def _moved(self) -> None:
        """Something moved. Raises where nothing is to be written any more."""
        self._moved_at = time.monotonic()
        if self._closed or self._lock.lost:
            raise LostError("the run was closed")


def _update_of(path: Path) -> int:
    place = checkpoint_place(path.name)
    return -1 if place is None else place[0]


def _one_line(error: Exception) -> str:
    known = isinstance(error, ShoalError)
    return " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())
