"""The lock of a run in a store: one driver at a time, as far as one object can tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from shaky_store import rule

from shoal.errors import StorageError
from shoal.storage import lock
from shoal.storage.lock import NAME, Driver, LostError, StoreLock, living_driver, parse_lock, this_place
from shoal.storage.objects import Store

URL = "shaky://bucket/run"


@pytest.fixture(autouse=True)
def store(shaky: Path) -> Store:
    return Store(URL)


def elsewhere() -> Driver:
    """A driver of another machine, that renewed its lease just now."""
    return Driver("theirs", "otherhost", 17, "another boot", time.time(), time.time())


def left_by(store: Store, driver: Driver) -> None:
    store.write(NAME, json.dumps(asdict(driver)).encode())


def test_one_driver_has_the_run_and_leaves_nothing(store: Store) -> None:
    with StoreLock(URL) as held:
        driver = living_driver(store)
        assert driver is not None
        assert (driver.pid, driver.token) == (os.getpid(), held.token)
        with pytest.raises(StorageError, match=rf"is in use by process {os.getpid()} on .*--take-over"):
            StoreLock(URL)
        held.check(store)
    assert living_driver(store) is None
    assert store.files("") == {}


def test_a_driver_elsewhere_has_it_until_its_lease_is_over(store: Store) -> None:
    left_by(store, elsewhere())
    with pytest.raises(StorageError, match="in use by process 17 on otherhost"):
        StoreLock(URL)
    left_by(store, replace(elsewhere(), renewed=time.time() - lock.LEASE_SECONDS - 1))
    assert living_driver(store) is None
    told: list[str] = []
    with StoreLock(URL, told=told.append):
        pass
    assert "taken over from process 17 on otherhost" in told[0]


def test_a_driver_of_this_machine_that_is_dead_has_it_no_more(store: Store) -> None:
    if not this_place():
        pytest.skip("processes cannot be told apart here")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    mine = replace(elsewhere(), place=this_place(), pid=dead.pid, renewed=time.time())
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    left_by(store, mine)
    assert living_driver(store) is None  # a zombie
    dead.wait()
    with StoreLock(URL):
        pass
    left_by(store, replace(mine, pid=os.getppid()))
    assert living_driver(store) is not None
    left_by(store, replace(mine, pid=os.getpid()))  # of a lock of this process that could not be removed
    assert living_driver(store) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"token": 1}', b'{"token":"","host":"","pid":"x","place":"","since":0,"renewed":0}']
)
def test_a_damaged_lock_is_nobodys_and_is_not_taken_without_a_word(content: bytes, store: Store) -> None:
    assert parse_lock(content) is None
    store.write(NAME, content)
    with pytest.raises(StorageError, match="does not name"):
        StoreLock(URL)
    with StoreLock(URL, take_over=True):
        assert living_driver(store) is not None


def test_who_loses_the_run_sees_it_and_leaves_the_others_lock(store: Store) -> None:
    with StoreLock(URL) as first:
        with StoreLock(URL, take_over=True) as second:
            with pytest.raises(LostError, match=rf"taken over by process {os.getpid()}"):
                first.check(store)
            second.check(store)
            first.release()
            driver = living_driver(store)
            assert driver is not None
            assert driver.token == second.token
        assert store.read(NAME) is None


def test_it_is_renewed_and_written_again_where_somebody_removed_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)

    def until(what: Any) -> None:
        deadline = time.monotonic() + 300
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def there() -> Driver:
        """A look may fall into the moment of a renewal."""
        found: list[Driver | None] = []
        until(lambda: found.append(living_driver(store)) or found[-1] is not None)
        assert found[-1] is not None
        return found[-1]

    with StoreLock(URL) as held:
        first = there()
        until(lambda: (driver := living_driver(store)) is not None and driver.renewed > first.renewed)
        store.remove(NAME)
        until(lambda: living_driver(store) is not None)
        rule(away=True)
        time.sleep(0.2)  # rounds that fail
        rule()
        last = there()
        until(lambda: (driver := living_driver(store)) is not None and driver.renewed > last.renewed)
        held.check(store)
    assert store.read(NAME) is None


def test_a_store_that_replaces_by_steps_costs_nobody_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.01)
    write, torn = Store.write, []

    def by_steps(self: Store, name: str, content: bytes) -> None:
        write(self, name, b"")
        torn.append(name)
        time.sleep(0.05)
        write(self, name, content)

    with StoreLock(URL) as held:
        monkeypatch.setattr(Store, "write", by_steps)
        while len(torn) < 10:
            held.check(store)
        monkeypatch.setattr(Store, "write", write)
