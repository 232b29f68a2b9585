"""`run.db`: what happened in a run, in SQLite (WAL), written by one process and readable by any other, also after a crash.

Writes are buffered and committed together, at most `commit_seconds` apart, on the caller's thread: a commit under
`synchronous = NORMAL` waits for no disk. A killed writer loses at most what it had not committed; `flush` before a checkpoint's manifest
therefore keeps the log at least as new as the checkpoint, and `rewind` cuts off what lies beyond it when a run is resumed.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from shoal.errors import RunError

FORMAT = 1
ROWS_KEPT = 10_000
LOCKED_SECONDS = 2.0  # another program holds the database: the rows wait for the next commit, the supervisor does not
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS metrics (
  name TEXT NOT NULL, "update" INTEGER NOT NULL, env_steps INTEGER NOT NULL, seconds REAL NOT NULL, value REAL,
  PRIMARY KEY (name, "update")) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, time REAL NOT NULL, "update" INTEGER NOT NULL, kind TEXT NOT NULL, json TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS episodes (
  id INTEGER PRIMARY KEY, "update" INTEGER NOT NULL, env_steps INTEGER NOT NULL, "group" INTEGER NOT NULL, env INTEGER NOT NULL,
  seed INTEGER NOT NULL, num_steps INTEGER NOT NULL, episode_return REAL, ended TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS updates ("update" INTEGER PRIMARY KEY, consumed TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS dropped (
  "group" INTEGER NOT NULL, sequence INTEGER NOT NULL, attempt INTEGER NOT NULL, reason TEXT NOT NULL,
  "update" INTEGER NOT NULL, env_steps INTEGER NOT NULL, PRIMARY KEY ("group", sequence, attempt)) WITHOUT ROWID;
"""
_ADVICE = "Move it away (with run.db-wal and run.db-shm): the run's metrics and log are lost, training goes on from its checkpoint"
_FINAL = "('over_lag', 'invalid')"  # reasons after which a sequence is not made again
_INSERT = {
    "metrics": "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?)",
    "events": 'INSERT INTO events (time, "update", kind, json) VALUES (?, ?, ?, ?)',
    "episodes": 'INSERT INTO episodes ("update", env_steps, "group", env, seed, num_steps, episode_return, ended) VALUES (?, ?, ?, ?, ?, ?, ?, ?)',
    "updates": "INSERT OR REPLACE INTO updates VALUES (?, ?)",
    "dropped": "INSERT OR REPLACE INTO dropped VALUES (?, ?, ?, ?, ?, ?)",
    "meta": "INSERT OR REPLACE INTO meta VALUES (?, ?)",
}


class EpisodeRow(NamedTuple):
    """One finished episode; `ended` is `terminated`, `truncated` or `invalid`."""

    update: int
    env_steps: int
    group: int
    env: int
    seed: int
    num_steps: int
    episode_return: float
    ended: str


class MetricPoint(NamedTuple):
    """One value of one metric."""

    update: int
    env_steps: int
    seconds: float
    value: float


class RunStore:
    """The one writer of a `run.db`.

    Consumes: what the coordinator hands over, in memory. Waits for: at most a commit, once in `commit_seconds`.
    On failure: a full or broken disk raises RunError at the next commit, naming the file. The rows wait for the next one, of each table
    at most `ROWS_KEPT`: a disk that stays full for hours costs the oldest rows (`rows_lost` counts them), not the memory.

    Attributes:
      failing: whether the last commit was refused.
      rows_lost: rows that were given up.
    """

    def __init__(self, path: Path, *, commit_seconds: float = 1.0, episodes_per_commit: int = 200) -> None:
        self.path, self._commit_seconds, self._episodes_per_commit = path, commit_seconds, episodes_per_commit
        self._pending: dict[str, list[tuple[Any, ...]]] = {table: [] for table in _INSERT}
        self._meta: dict[str, str] = {}
        self.failing, self.rows_lost = False, 0
        self._committed = time.monotonic()
        self._connection = _connect(path)
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.executescript(f"BEGIN; {_SCHEMA}")  # with the format in one transaction: readers see both or neither
            found = self._connection.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
            if found is None:
                self._connection.execute(_INSERT["meta"], ("format", str(FORMAT)))
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._connection.close()
            advice = "is the disk full?" if isinstance(error, sqlite3.OperationalError) else _ADVICE
            raise RunError(f"cannot open {path}: {error}; {advice}") from error
        if found is not None and found[0] != str(FORMAT):
            self._connection.close()
            raise RunError(f"{path} has format {found[0]}; this version of shoal writes {FORMAT}: go on with the version that wrote it")

    def set_meta(self, key: str, value: Any) -> None:
        """Keep one JSON value under a name: the environment's spec, the schema, the result, the ledger's balance."""
        self._meta[key] = _to_json(value)

    def metrics(self, update: int, env_steps: int, seconds: float, values: Mapping[str, float]) -> None:
        """Keep named numbers of one update; those that are not finite are kept as NULL."""
        rows = ((name, update, env_steps, seconds, value if math.isfinite(value) else None) for name, value in values.items())
        self._pending["metrics"].extend(rows)
        self.tick()

    def event(self, kind: str, update: int = 0, **facts: Any) -> None:
        """Keep something that happened: a restart, a fault, a checkpoint, a roll-back, a warning. Committed at once."""
        self._pending["events"].append((time.time(), update, kind, _to_json(facts)))
        self.flush()

    def episodes(self, rows: Iterable[EpisodeRow]) -> None:
        """Keep finished episodes: a sample, the first `episodes_per_commit` of each commit."""
        room = self._episodes_per_commit - len(self._pending["episodes"])
        self._pending["episodes"].extend(tuple(row) for row in list(rows)[: max(0, room)])

    def consumed(self, update: int, log: Any) -> None:
        """Keep what an update consumed and in which order, as JSON: {id: [group, sequence, attempt], steps} of each rollout, and what
        `shoal replay` needs besides."""
        self._pending["updates"].append((update, _to_json(log)))
        self.tick()

    def dropped(self, group: int, sequence: int, attempt: int, reason: str, update: int, env_steps: int) -> None:
        """Keep the fate of a rollout that was not trained."""
        self._pending["dropped"].append((group, sequence, attempt, reason, update, env_steps))

    def tick(self) -> None:
        """Commit if it is time. Called by every writer of numbers; call it also where nothing may be written for long."""
        if time.monotonic() - self._committed >= self._commit_seconds:
            self.flush()

    def flush(self) -> None:
        """Commit everything now. Raises RunError where the disk refuses."""
        self._committed = time.monotonic()
        self._pending["meta"] = list(self._meta.items())
        if not any(self._pending.values()):
            return
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for table, rows in self._pending.items():
                self._connection.executemany(_INSERT[table], rows)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._refused()
            raise RunError(f"cannot write {self.path}: {error}; is the disk full?") from error
        self.failing = False
        self._meta.clear()
        for rows in self._pending.values():
            rows.clear()

    def rewind(self, update: int, final: Mapping[int, int]) -> int:
        """The run goes on from a checkpoint of this update. Numbers and episodes after it are forgotten; what was consumed after it is
        kept as rolled back, by identity. Events stay.

        Args:
          final: by group, the first sequence that the checkpoint does not hold as final.
        Returns:
          how many updates are undone.
        """
        try:
            return self._rewind(update, final)
        except sqlite3.Error as error:
            self._refused()
            raise RunError(f"cannot write {self.path}: {error}; is the disk full?") from error

    def _rewind(self, update: int, final: Mapping[int, int]) -> int:
        self.flush()
        run = self._connection.execute
        lost = [row for row in run(f"SELECT * FROM dropped WHERE reason IN {_FINAL}").fetchall() if row[1] >= final.get(row[0], 0)]
        undone = run('SELECT "update", consumed FROM updates WHERE "update" > ?', (update,)).fetchall()
        for when, consumed in undone:
            for entry in json.loads(consumed):
                if "id" not in entry:  # optimizer steps of a run that learns from a replay
                    continue
                group, sequence, attempt = entry["id"]
                if sequence >= final.get(group, 0):
                    lost.append((group, sequence, attempt, "", when, entry["steps"]))
        run("BEGIN IMMEDIATE")
        self._connection.executemany(_INSERT["dropped"], [(*row[:3], "rolled_back", *row[4:]) for row in lost])
        for table in ("metrics", "episodes", "updates"):
            run(f'DELETE FROM {table} WHERE "update" > ?', (update,))
        run("COMMIT")
        return len(undone)

    def forget_consumed(self, update: int) -> None:
        """Drop the log of consumption up to this update, where no checkpoint is before it and nothing will be replayed from it."""
        self._connection.execute('DELETE FROM updates WHERE "update" <= ?', (update,))

    def lost(self) -> dict[tuple[int, str], tuple[int, int]]:
        """(rollouts, env steps) that were not trained, by group and reason."""
        self.flush()
        rows = self._connection.execute('SELECT "group", reason, COUNT(*), SUM(env_steps) FROM dropped GROUP BY "group", reason')
        return {(group, reason): (num_rollouts, num_env_steps) for group, reason, num_rollouts, num_env_steps in rows}

    def _refused(self) -> None:
        if self._connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):  # some errors have rolled it back already
                self._connection.execute("ROLLBACK")
        self.failing = True
        for rows in self._pending.values():
            self.rows_lost += max(0, len(rows) - ROWS_KEPT)
            del rows[:-ROWS_KEPT]

    def close(self) -> None:
        """Commit and close. May be called twice. Raises RunError where the disk refuses; it is closed then too."""
        try:
            self.flush()
        finally:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _connect(path: Path) -> sqlite3.Connection:
    try:
        return sqlite3.connect(path, timeout=LOCKED_SECONDS, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise RunError(f"cannot open {path}: {error}; is the disk full, or something else than a file there?") from error


class RunReader:
    """Reads a `run.db`, of a living run too. Raises RunError where there is none, or it is no run's."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise RunError(f"there is no {path}; a run's directory holds config.yaml and run.db")
        self._path = path
        self._connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30.0)
        if not list(self._rows("SELECT name FROM sqlite_master")):
            raise RunError(f"{path} holds nothing yet: the run is about to begin, or ended before it could")
        found = self.meta().get("format")
        if found != FORMAT:
            raise RunError(f"{path} has format {found}; this version of shoal reads {FORMAT}")

    def meta(self) -> dict[str, Any]:
        """Every JSON value by name."""
        return {key: json.loads(value) for key, value in self._rows("SELECT key, value FROM meta")}

    def latest(self) -> dict[str, float]:
        """The newest value of every metric."""
        query = 'SELECT name, value FROM metrics JOIN (SELECT name, MAX("update") AS "update" FROM metrics GROUP BY name) USING (name, "update")'
        return {name: value for name, value in self._rows(query) if value is not None}

    def progress(self) -> MetricPoint | None:
        """How far the run came: update, env steps, seconds, and the mean return (NaN where unknown) as value."""
        newest = (
            'SELECT "update", env_steps, seconds, value FROM metrics WHERE name = ? AND value IS NOT NULL ORDER BY "update" DESC LIMIT 1'
        )
        steps = next(self._rows(newest, "time/total_timesteps"), None)
        mean_return = next(self._rows(newest, "rollout/ep_rew_mean"), (0, 0, 0, math.nan))[3]
        return None if steps is None else MetricPoint(steps[0], steps[1], steps[2], mean_return)

    def series(self, name: str) -> list[MetricPoint]:
        """All values of one metric, oldest first."""
        query = 'SELECT "update", env_steps, seconds, value FROM metrics WHERE name = ? AND value IS NOT NULL ORDER BY "update"'
        return [MetricPoint(*row) for row in self._rows(query, name)]

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Events, oldest first: `time` (since the epoch), `update`, `kind`, and the facts."""
        rows = self._rows('SELECT time, "update", kind, json FROM events WHERE ? IS NULL OR kind = ? ORDER BY id', kind, kind)
        return [{"time": when, "update": update, "kind": name, **json.loads(facts)} for when, update, name, facts in rows]

    def episodes(self) -> list[EpisodeRow]:
        """The sampled episodes, oldest first."""
        query = 'SELECT "update", env_steps, "group", env, seed, num_steps, episode_return, ended FROM episodes ORDER BY id'
        return [EpisodeRow(*row) for row in self._rows(query)]

    def consumed(self) -> Iterator[tuple[int, Any]]:
        """(update, what it consumed), in order."""
        return ((update, json.loads(log)) for update, log in self._rows('SELECT "update", consumed FROM updates ORDER BY "update"'))

    def dropped(self) -> dict[str, int]:
        """Rollouts that were not trained, counted by reason."""
        return dict(self._rows("SELECT reason, COUNT(*) FROM dropped GROUP BY reason ORDER BY reason"))

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _rows(self, query: str, *values: Any) -> Iterator[Any]:
        try:
            yield from self._connection.execute(query, values)
        except sqlite3.Error as error:
            raise RunError(f"cannot read {self._path}: {error}") from error


def _to_json(value: Any) -> str:
    """Compact JSON; numpy numbers and paths become plain, what is not finite becomes text."""
    return json.dumps(value, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    item = getattr(value, "item", None)
    if callable(item):
        return item()
    if isinstance(value, (set, frozenset, tuple)):
        return sorted(value)
    return str(value)


def copy_database(path: Path, to: Path) -> None:
    """A copy of a run.db, which may be written meanwhile, as it was at one moment, in one file. Raises RunError."""
    to.unlink(missing_ok=True)
    try:
        opened = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(opened, uri=True, timeout=30.0)) as source, contextlib.closing(sqlite3.connect(to)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # else a reader would make a second file beside it
    except sqlite3.Error as error:
        raise RunError(f"cannot copy {path}: {error}; is the disk full?") from error


def check_database(path: Path) -> None:
    """Raise RunError where a run.db that came from elsewhere is not whole."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        raise RunError(f"{path} is damaged: {error}") from error
    if found != ("ok",):
        raise RunError(f"{path} is damaged: {found[0] if found else 'it says nothing'}")
