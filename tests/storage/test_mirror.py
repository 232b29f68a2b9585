"""The mirror of a run in a store: the newest checkpoint wins, nothing waits for it, what fails is tried again and then told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shaky_store import SECRET, rule, waiting

from shoal.errors import StorageError
from shoal.files import CheckpointDirectory
from shoal.monitoring.store import RunReader, RunStore, check_database, copy_database
from shoal.storage import mirror as module
from shoal.storage.checkpoints import committed
from shoal.storage.lock import NAME, LostError, StoreLock
from shoal.storage.mirror import Mirror
from shoal.storage.objects import Store

URL = "shaky://bucket/run"


class Run:
    """A driver's directory, and its mirror."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        (directory / "config.yaml").write_text("env: {id: CartPole-v1}\n")
        (directory / "run.json").write_text(json.dumps({"parts": 1}))
        self.database = RunStore(directory / "run.db")
        self.lock = StoreLock(URL)
        self.mirror = Mirror(Store(URL), directory, self.lock)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.checkpoints = CheckpointDirectory(directory / "checkpoints")

    def save(self, update: int) -> Path:
        self.database.event("checkpoint", update)
        with self.checkpoints.begin(update) as staging:
            staging.write_arrays("learner", {"w": np.full(3, update)})
            path = staging.commit()
        self.mirror.saved(path)
        self.checkpoints.sweep(2, self.mirror.held())
        return path

    def event(self, kind: str, **facts: Any) -> None:
        self.events.append((kind, facts))

    def told(self, kind: str) -> list[dict[str, Any]]:
        self.mirror.tell(self.event)
        return [facts for told, facts in self.events if told == kind]

    def close(self) -> None:
        self.mirror.close()
        self.lock.release()
        self.database.close()


@pytest.fixture
def run(shaky: Path, tmp_path: Path) -> Iterator[Run]:
    with closing(Run(tmp_path / "run")) as made:
        yield made


@pytest.fixture
def there(shaky: Path) -> Path:
    return shaky / "bucket" / "run"


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def updates() -> list[int]:
    return [update for update, _ in committed(Store(URL))]


def test_every_checkpoint_goes_there_as_far_as_the_newest_are_kept_and_at_the_end_result_and_numbers(run: Run, there: Path) -> None:
    run.mirror.begin(0, 2)
    for update in range(1, 5):
        run.save(update)
        until(lambda update=update: update in updates())
    until(lambda: updates() == [3, 4])
    (run.directory / "result.json").write_text('{"reason": "updates"}')
    run.database.event("last")
    run.mirror.finish(run.event)
    assert [facts["update"] for facts in run.told("uploaded")] == [1, 2, 3, 4]
    assert json.loads((there / "result.json").read_text()) == {"reason": "updates"}
    assert (there / "config.yaml").read_bytes() == (run.directory / "config.yaml").read_bytes()
    assert (there / "run.json").exists()
    assert {path.name for path in there.iterdir()} == {"config.yaml", "run.json", "run.db", "result.json", "checkpoints", NAME}
    check_database(there / "run.db")
    with RunReader(there / "run.db") as reader:
        assert [event["kind"] for event in reader.events()] == ["checkpoint"] * 4 + ["last"]
    assert not (run.directory / ".run.db.copy").exists()


def test_while_the_store_waits_nothing_else_does_and_then_the_newest_goes(run: Run) -> None:
    run.mirror.begin(0, 2)
    rule(wait="learner")
    first = run.save(1)
    until(waiting().exists)  # it is being copied
    assert run.mirror.held() == (first,)
    for update in range(2, 8):
        newest = run.save(update)  # returns at once
    assert set(run.mirror.held()) == {first, newest}
    assert {path.name for path in run.checkpoints.paths()} == {"update-000000001", "update-000000006", "update-000000007"}
    assert updates() == []
    rule()
    run.mirror.finish(run.event)
    assert updates() == [1, 7]
    assert run.told("upload_skipped") == [{"update": 7, "skipped": 5}]
    assert run.mirror.held() == ()


def test_what_fails_is_tried_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.01)
    run.mirror.begin(0, 2)
    rule(fail=[3, "update-000000001"])
    run.save(1)
    until(lambda: updates() == [1])
    assert run.told("upload_failed") == []


def test_a_checkpoint_that_cannot_be_copied_is_told_and_the_next_one_is_tried(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.01)
    run.mirror.begin(0, 2)
    rule(away=True)
    run.save(1)
    until(lambda: run.told("upload_failed"))
    (failed,) = run.told("upload_failed")
    assert failed["update"] == 1
    assert "cannot" in failed["message"]
    assert SECRET not in json.dumps(run.events)
    rule()
    run.save(2)
    until(lambda: updates() == [2])
    run.mirror.finish(run.event)


def test_a_last_checkpoint_that_cannot_be_copied_is_an_error_and_is_copied_once_the_store_is_there(
    run: Run, there: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.01)
    run.mirror.begin(0, 2)
    rule(away=True)
    run.save(1)
    (run.directory / "result.json").write_text('{"reason": "updates"}')
    with pytest.raises(StorageError, match=r"ended well, and is whole in .*but not in shaky://bucket/run: .*on this machine copies it"):
        run.mirror.finish(run.event)
    rule()
    run.mirror.close()
    run.lock.release()
    with StoreLock(URL) as lock, closing(Mirror(Store(URL), run.directory, lock)) as again:
        again.settle(1, 2)
    assert updates() == [1]
    assert (there / "result.json").exists()


def test_an_upload_that_failed_is_tried_once_more_at_the_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.01)
    run.mirror.begin(0, 2)
    rule(away=True)
    run.save(1)
    until(lambda: run.told("upload_failed"))
    rule()
    run.mirror.finish(run.event)
    assert updates() == [1]


def test_a_store_where_nothing_moves_is_not_waited_for_without_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_SECONDS", 0.3)
    run.mirror.begin(0, 2)
    rule(wait="learner")
    run.save(1)
    with pytest.raises(StorageError, match=r"nothing has moved for 0\.3 s"):
        run.mirror.finish(run.event)
    rule()


def test_a_driver_that_lost_the_run_writes_no_manifest_and_ends(run: Run, there: Path) -> None:
    run.mirror.begin(0, 2)
    rule(wait="learner")
    run.save(1)
    until((there / "run.db").exists)
    with StoreLock(URL, take_over=True) as other:
        rule()
        until(lambda: run.lock.lost)
        with pytest.raises(LostError, match="taken over"):
            run.mirror.tell(run.event)
        with pytest.raises(LostError, match="taken over"):
            run.mirror.finish(run.event)
        run.mirror.failed(run.event)
        assert updates() == []
        other.check(Store(URL))


def test_a_driver_that_slept_while_another_began_and_ended_writes_no_more(run: Run, there: Path) -> None:
    run.mirror.begin(0, 2)
    with StoreLock(URL, take_over=True) as other:
        Store(URL).write("run.json", json.dumps({"parts": 2, "driver": other.token}).encode())
    assert not (there / NAME).exists()
    run.save(1)
    until(lambda: run.lock.lost)
    with pytest.raises(LostError, match="which has ended since"):
        run.mirror.tell(run.event)
    assert updates() == []


def test_a_mirror_that_is_closed_writes_no_more(run: Run) -> None:
    run.mirror.begin(0, 2)
    rule(wait="learner")
    run.save(1)
    until(waiting().exists)
    run.mirror.close()
    rule()
    until(lambda: not run.mirror._thread.is_alive())
    assert updates() == []


def test_a_run_that_an_error_ended_leaves_what_it_had(run: Run, there: Path) -> None:
    run.mirror.begin(0, 2)
    run.save(1)
    run.database.event("failed", 1, error="EnvironmentFault", message="broken")
    run.mirror.failed(run.event)
    assert updates() == [1]
    with RunReader(there / "run.db") as reader:
        assert reader.events("failed")


def test_what_began_and_is_not_wanted_leaves_nothing_but_what_was_there(run: Run, there: Path) -> None:
    Store(URL).write("notes", b"the user's own")
    run.mirror.begin(0, 2)
    run.save(1)
    until(lambda: updates() == [1])
    run.mirror.discard()
    run.lock.release()
    assert {path.name for path in there.rglob("*") if path.is_file()} == {"notes"}


def test_a_copy_of_a_database_that_is_written_is_of_one_moment(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run.db", commit_seconds=0.0) as store:
        for update in range(200):
            store.metrics(update, update, 0.0, {"a": 1.0, "b": 2.0})
            if update % 20 == 0:
                copy_database(tmp_path / "run.db", tmp_path / "copy.db")
                check_database(tmp_path / "copy.db")
                with RunReader(tmp_path / "copy.db") as reader:
                    assert (
                        [point.update for point in reader.series("a")]
                        == list(range(update + 1))
                        == [point.update for point in reader.series("b")]
                    )
                assert {path.name for path in tmp_path.iterdir()} >= {"copy.db"}
                assert not (tmp_path / "copy.db-wal").exists()
