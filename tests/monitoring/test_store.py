"""The run's database: what is written is read back, by others too, and after a kill."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import RunError
from shoal.monitoring.store import EpisodeRow, MetricPoint, RunReader, RunStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


def test_everything_that_was_written_is_read_back(path: Path) -> None:
    row = EpisodeRow(1, 64, 0, 3, 12345, 20, 20.0, "terminated")
    with RunStore(path) as store:
        store.set_meta("spec", {"name": "CartPole-v1", "size": np.int64(4)})
        store.metrics(1, 64, 0.5, {"rollout/ep_rew_mean": 20.0, "time/total_timesteps": 64.0})
        store.metrics(2, 128, 1.0, {"rollout/ep_rew_mean": math.nan, "time/total_timesteps": 128.0})
        store.event("restart", 2, actor=1, cause="SIGKILL")
        store.episodes([row])
        store.consumed(2, [[0, 1, 0], [3, 1, 0]])
        store.dropped(0, 7, 0, "over_lag", 2, 64)
    with RunReader(path) as reader:
        assert reader.meta()["spec"] == {"name": "CartPole-v1", "size": 4}
        assert reader.latest() == {"time/total_timesteps": 128.0, "rollout/ep_rew_mean": None} or reader.latest() == {
            "time/total_timesteps": 128.0
        }
        assert reader.series("rollout/ep_rew_mean") == [MetricPoint(1, 64, 0.5, 20.0)]
        assert reader.progress() == MetricPoint(2, 128, 1.0, 20.0)
        (event,) = reader.events("restart")
        assert (event["actor"], event["cause"], event["update"]) == (1, "SIGKILL", 2)
        assert reader.events("checkpoint") == []
        assert reader.episodes() == [row]
        assert list(reader.consumed()) == [(2, [[0, 1, 0], [3, 1, 0]])]
        assert reader.dropped() == {"over_lag": 1}


def test_numbers_wait_for_a_commit_and_events_do_not(path: Path) -> None:
    store = RunStore(path, commit_seconds=3600)
    store.flush()
    store.metrics(1, 1, 1.0, {"a": 1.0})
    with RunReader(path) as reader:
        assert reader.series("a") == []
        store.event("fault")
        assert len(reader.series("a")) == 1
    store.close()


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(path: Path) -> None:
    with RunStore(path) as store:
        for update in range(1, 6):
            store.metrics(update, update, 1.0, {"a": float(update)})
            store.consumed(update, [{"id": [0, update - 1, 0], "steps": 8}, {"id": [1, update - 1, 0], "steps": 7}])
        store.dropped(0, 2, 0, "over_lag", 2, 8)  # before the checkpoint
        store.dropped(1, 4, 0, "over_lag", 4, 7)
        store.dropped(1, 4, 1, "actor_died", 4, 5)
        store.event("restart", 5)
        assert store.rewind(3, {0: 4, 1: 3}) == 2  # of group 0, the checkpoint holds sequence 3 already
        assert store.rewind(3, {0: 4, 1: 3}) == 0
        undone = {(0, "rolled_back"): (1, 8), (1, "rolled_back"): (2, 14)}
        assert store.lost() == {(0, "over_lag"): (1, 8), (1, "actor_died"): (1, 5), **undone}
        store.metrics(4, 4, 1.0, {"a": 40.0})
    with RunReader(path) as reader:
        assert [point.value for point in reader.series("a")] == [1.0, 2.0, 3.0, 40.0]
        assert [update for update, _ in reader.consumed()] == [1, 2, 3]
        assert len(reader.events()) == 1


def test_an_opened_again_store_goes_on(path: Path) -> None:
    for update in (1, 2):
        with RunStore(path) as store:
            store.metrics(update, 0, 0.0, {"a": 1.0})
    with RunReader(path) as reader:
        assert len(reader.series("a")) == 2


def test_episodes_are_sampled_where_they_come_too_fast(path: Path) -> None:
    with RunStore(path, commit_seconds=3600, episodes_per_commit=3) as store:
        for seed in range(10):
            store.episodes([EpisodeRow(1, 1, 0, 0, seed, 1, 1.0, "truncated")])
    with RunReader(path) as reader:
        assert [row.seed for row in reader.episodes()] == [0, 1, 2]


def test_what_was_flushed_outlives_a_kill_and_can_be_read_by_others(path: Path) -> None:
    script = (
        "import sys,time; from pathlib import Path; from shoal.monitoring.store import RunStore\n"
        f"store = RunStore(Path({str(path)!r}), commit_seconds=3600)\n"
        "store.metrics(1, 1, 1.0, {'a': 1.0}); store.flush(); store.metrics(2, 2, 2.0, {'a': 2.0}); print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        os.kill(writer.pid, signal.SIGKILL)
    with RunReader(path) as reader:
        assert [point.update for point in reader.series("a")] == [1]
    with RunStore(path) as store:
        store.metrics(2, 2, 2.0, {"a": 3.0})
    with RunReader(path) as reader:
        assert [point.value for point in reader.series("a")] == [1.0, 3.0]


def test_a_reader_refuses_what_is_no_run(path: Path) -> None:
    with pytest.raises(RunError, match="there is no"):
        RunReader(path)
    path.write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(RunError, match="cannot read"):
        RunReader(path)
    with pytest.raises(RunError, match=r"cannot open .*run\.db.*Move it away.*training goes on"):
        RunStore(path)


def test_a_reader_refuses_another_format(path: Path) -> None:
    with RunStore(path) as store:
        store.set_meta("format", 99)
    with pytest.raises(RunError, match="format 99"):
        RunReader(path)


def test_a_store_that_cannot_write_says_so_and_keeps_its_rows(path: Path) -> None:
    store = RunStore(path, commit_seconds=3600)
    store.flush()
    store.metrics(1, 1, 1.0, {"a": 1.0})
    store._connection.execute("PRAGMA busy_timeout = 0")
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match=r"cannot write .*run\.db"):
            store.flush()
        other.execute("ROLLBACK")
    store.close()
    with RunReader(path) as reader:
        assert len(reader.series("a")) == 1


def test_a_commit_comes_by_itself_once_it_is_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    store = RunStore(path, commit_seconds=1.0)
    store.flush()
    with RunReader(path) as reader:
        store.metrics(1, 1, 1.0, {"a": 1.0})
        assert reader.series("a") == []
        now[0] += 1.5
        store.tick()
        assert len(reader.series("a")) == 1
    store.close()


def test_a_disk_that_stays_full_costs_the_oldest_rows_and_not_the_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.monitoring.store.ROWS_KEPT", 50)
    monkeypatch.setattr("shoal.monitoring.store.LOCKED_SECONDS", 0.0)
    other = sqlite3.connect(path, isolation_level=None)
    with RunStore(path) as store:
        store.set_meta("ledger", 0)
        store.flush()
        other.execute("BEGIN EXCLUSIVE")
        for update in range(200):
            store.consumed(update, [])
            store.set_meta("ledger", update)
            with pytest.raises(RunError, match=r"cannot write .*run\.db"):
                store.flush()
        assert (store.failing, store.rows_lost) == (True, 150)
        other.execute("ROLLBACK")
        store.flush()
        assert not store.failing
    other.close()
    with RunReader(path) as reader:
        assert [update for update, _ in reader.consumed()] == list(range(150, 200))
        assert reader.meta()["ledger"] == 199


def test_a_database_is_readable_from_the_moment_it_has_tables(path: Path) -> None:
    with RunStore(path, commit_seconds=3600), RunReader(path) as reader:
        assert reader.meta() == {"format": 1}
        assert reader.progress() is None


def test_a_database_without_tables_is_told_as_one_that_is_about_to_be_filled(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    with pytest.raises(RunError, match=r"run\.db holds nothing yet: the run is about to begin"):
        RunReader(path)


def test_the_database_of_another_format_is_refused_in_one_line_and_left_alone(path: Path) -> None:
    RunStore(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value = '0' WHERE key = 'format'")
    before = path.read_bytes()
    for opened in (RunStore, RunReader):
        with pytest.raises(RunError, match=r"^[^\n]*run\.db has format 0[^\n]*$"):
            opened(path)
    assert path.read_bytes() == before
