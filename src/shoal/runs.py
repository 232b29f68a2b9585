"""Run directories: their names, what each holds, and what can be said about a run from its files alone.

    config.yaml    complete and resolved; what makes a directory a run
    run.db         metrics, events, ledger (monitoring.store)
    result.json    what `shoal train --json` prints, once the run ended
    checkpoints/   logs/   videos/   TensorBoard files

A run whose directory is a URL has all of it in a working copy on the driver's disk, and the rest of the world reads what the store has (storage/).
Everything here reads; it works on living, finished, crashed and half-written runs. No torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
import warnings as python_warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shoal.config import RunConfig
from shoal.engines.elsewhere import Elsewhere
from shoal.errors import ConfigError, NoRunError, ShoalError
from shoal.files import CheckpointDirectory, write_text_atomically
from shoal.locks import run_holder
from shoal.monitoring.store import RunReader
from shoal.settings import dump_config, read_yaml
from shoal.storage.objects import Store
from shoal.storage.opening import begin_run, continue_run
from shoal.storage.reading import fetched_run, papers, runs_below, stored_checkpoint
from shoal.urls import is_url, local_directory

CONFIG, DATABASE, RESULT, CHECKPOINTS, LOGS, VIDEOS = "config.yaml", "run.db", "result.json", "checkpoints", "logs", "videos"
_HARMLESS = frozenset({"checkpoint", "recovered", "uploaded"})  # events that are no faults
_EVENTS_SHOWN = 20
_APART = ("ledger", "lag", "replay", "network")  # of a result: said beside it, as of a run that has none yet


def run_name(config: RunConfig, when: time.struct_time | None = None) -> str:
    """`{env}__{algorithm}__{seed}__{time}`, fit for a directory's name."""
    parts = [_word(config.env.id), _word(config.algorithm.name), str(config.seed), time.strftime("%Y%m%d-%H%M%S", when or time.localtime())]
    return "__".join(parts)


def _word(name: str) -> str:
    location, colon, last = name.rpartition(":")
    short = f"{Path(location).name.removesuffix('.py')}-{last}" if colon else name
    return re.sub(r"[^A-Za-z0-9.]+", "-", short).strip("-.")[:80] or "run"


class NewRun:
    """A run that is being started."""

    def __init__(self, directory: Path, elsewhere: Elsewhere) -> None:
        self.directory, self.elsewhere = directory, elsewhere
        self.unwanted = False

    def discard(self) -> None:
        """It never began: its directory is to go."""
        self.unwanted = True


@contextlib.contextmanager
def new_run(config: RunConfig, runs: str | Path = "runs") -> Iterator[NewRun]:
    """`create_run`; at the end, all that was made is removed where the run was discarded."""
    chosen = _chosen(config)
    place: contextlib.AbstractContextManager[Elsewhere] = contextlib.nullcontext(Elsewhere())
    if is_url(config.run_dir):
        place = begin_run(config.run_dir)
    with place as elsewhere:
        before = set() if chosen is None else _inside(chosen.resolve())
        there = Path(runs) if chosen is None else chosen
        missing = [path for path in (there, *there.absolute().parents) if not path.exists()]
        run = NewRun(create_run(config, runs), elsewhere)
        try:
            yield run
        finally:
            if run.unwanted:
                elsewhere.discard()
                for path in _inside(run.directory) - before:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # others may have made something there meanwhile
                    for path in [run.directory, *missing] if chosen is None else missing:
                        path.rmdir()


def _chosen(config: RunConfig) -> Path | None:
    """Where the run is to lie on this disk; None where it is named after what it trains."""
    if is_url(config.run_dir):
        return local_directory(config.run_dir)
    return Path(config.run_dir).expanduser() if config.run_dir else None


@contextlib.contextmanager
def old_run(
    path: str | os.PathLike[str], *, take_over: bool = False, replay: Callable[[Path], bool] = lambda directory: True
) -> Iterator[tuple[Path, Elsewhere]]:
    """The directory of a run that is to be gone on with, and where else it is kept. The working copy of a run in a store stands for the URL.

    Raises:
      NoRunError: there is none. Else as `storage.opening.continue_run`.
    """
    directory = None if is_url(path) else find_run(path)
    url = path if is_url(path) else None if directory is None else _url_of(directory)
    if url is not None:
        with continue_run(url, take_over=take_over, replay=replay) as found:
            yield found
        return
    if take_over:
        raise ConfigError(f"take_over: {path} is no URL; the kernel lets go of a run on this disk when its process ends")
    assert directory is not None
    yield directory, Elsewhere()


def _url_of(directory: Path) -> str | None:
    with contextlib.suppress(ConfigError):  # a damaged one is told by whoever needs it
        url = read_yaml(directory / CONFIG).get("run_dir")
        if is_url(url) and local_directory(url) == directory:
            return url
    return None


def _inside(directory: Path) -> set[Path]:
    return {path for part in (directory / LOGS, directory) if part.is_dir() for path in part.iterdir()}


def create_run(config: RunConfig, runs: str | Path = "runs") -> Path:
    """Make the directory of a new run and write its config.yaml: `config.run_dir`, or one named after it under `runs`.

    Raises:
      ConfigError: the directory is a run already, or cannot be made.
    """
    chosen = _chosen(config)
    name = run_name(config)
    try:
        for attempt in range(1, 1000):  # runs may begin in the same second
            path = chosen or Path(runs) / (name if attempt == 1 else f"{name}-{attempt}")
            try:
                path.mkdir(parents=True, exist_ok=chosen is not None)
            except FileExistsError:
                if chosen is not None:
                    raise
                continue
            break
        if (path / CONFIG).exists():
            raise ConfigError(f"run_dir: {path} is a run already; go on with it (shoal resume {path}), or choose another --run-dir")
        (path / LOGS).mkdir(exist_ok=True)
        write_text_atomically(path / CONFIG, dump_config(config))
    except OSError as error:
        raise ConfigError(f"run_dir: the run's directory cannot be made: {error}; choose one with --run-dir") from error
    return path.resolve()


def find_run(path: str | os.PathLike[str]) -> Path:
    """The directory of the run that `path` is, or lies in (its config.yaml, one of its checkpoints); of a URL, what could be fetched, until this process ends.
    Raises NoRunError where there is none, StorageError."""
    if is_url(path):
        directory, said = fetched_run(path)
        for warning in said:
            python_warnings.warn(warning, RuntimeWarning, stacklevel=3)
        return directory
    given = Path(path).expanduser()
    for candidate in (given, *given.absolute().parents[:2]) if given.exists() else ():
        if (candidate / CONFIG).is_file():
            return candidate.resolve()
    raise NoRunError(
        f"{path} {'is no run: it has no ' + CONFIG if given.exists() else 'does not exist'}; `shoal runs` lists the runs of a directory"
    )


def list_runs(directory: str | Path = "runs") -> list[dict[str, Any]]:
    """One row per run in `directory`, oldest first (below a URL: by name): run, env, algorithm, seed, status, env_steps, updates, seconds, mean_return.

    status: running, why it ended (return, env_steps ...), failed (an error ended it), stopped (it died; resume goes on), or damaged.
    Raises NoRunError where `directory` does not exist.
    """
    if is_url(directory):
        return [_row_elsewhere(url) for url in runs_below(directory)]
    root = Path(directory)
    if not root.is_dir():
        raise NoRunError(f"there is no directory {root}; runs are made under runs/ where shoal was started, or where --run-dir says")
    found = sorted(root.glob(f"*/{CONFIG}"), key=lambda file: file.stat().st_mtime)
    return [_row(file.parent, file.parent.name, partial(run_holder, file.parent)) for file in found]


def _row_elsewhere(url: str) -> dict[str, Any]:
    try:
        with papers(Store(url), database=False) as (directory, driver, _):
            return _row(directory, url, lambda: None if driver is None else driver.pid)
    except ShoalError:
        return _row(Path(os.devnull), url, lambda: None)


def _row(path: Path, name: str, held: Callable[[], int | None]) -> dict[str, Any]:
    row: dict[str, Any] = {"run": name, "env": None, "algorithm": None, "seed": None, "status": "damaged"}
    row |= dict.fromkeys(("env_steps", "updates", "seconds", "mean_return"))
    try:
        config = read_yaml(path / CONFIG)
        row |= {"env": config["env"]["id"], "algorithm": config["algorithm"]["name"], "seed": config["seed"]}
        holder = held()
        row["status"] = _status(path, holder)
        row |= _progress(path, holder)
    except (ShoalError, OSError, KeyError, TypeError):
        pass  # a row says what can be said
    return row


def _status(path: Path, holder: int | None) -> str:
    if holder is not None:
        return "running"
    result = read_result(path)
    if result:
        return str(result["reason"])
    with contextlib.suppress(ShoalError), RunReader(path / DATABASE) as reader:
        last = next(reversed(reader.events()), None)
        if last is not None and last["kind"] == "failed":
            return "failed"
    return "stopped"


def read_result(path: Path, warnings: list[str] | None = None) -> dict[str, Any]:
    """How the run's last part ended; empty where it never ended by itself, or the file is damaged, which is added to `warnings`."""
    file = path / RESULT
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        result = str(error)
    if isinstance(result, dict) and "reason" in result:
        return result
    if warnings is not None:
        warnings.append(
            f"{file} is damaged ({result if isinstance(result, str) else 'it names no reason'}): the run stands where its newest checkpoint says"
        )
    return {}


def _progress(path: Path, holder: int | None) -> dict[str, Any]:
    """How far the run came: what the database says while it runs or after a crash, else its result."""
    result = read_result(path)
    if result and holder is None:
        return {name: result.get(name) for name in ("env_steps", "updates", "seconds", "mean_return")}
    with RunReader(path / DATABASE) as reader:
        point = reader.progress()
    if point is None:
        return {}
    return {"env_steps": point.env_steps, "updates": point.update, "seconds": point.seconds, "mean_return": _finite(point.value)}


def _finite(value: float) -> float | None:
    return value if value - value == 0.0 else None


def show(run: str | Path) -> dict[str, Any]:
    """Everything that is known of a run.

    Returns:
      run, status, process (of a living run; and its host, of one in a store), configuration, environment and schema (the fields of a rollout), results,
      ledger, lag, replay (of what learns from one), network (of a cluster), dropped (by reason, from the log), faults {counts by kind, newest}, recovery (by role), checkpoint {update, path, bytes, files}, warnings.
    Raises:
      RunError: `run` is no run.
    """
    if is_url(run):
        return _show_elsewhere(Store(run))
    path = find_run(run)
    shown = _shown(path, run_holder(path))
    shown["checkpoint"] = _checkpoint(path, shown["warnings"])
    return shown


def _show_elsewhere(store: Store) -> dict[str, Any]:
    with papers(store) as (path, driver, said):
        shown = _shown(path, None if driver is None else driver.pid)
    checkpoint, torn = stored_checkpoint(store)
    shown |= {"run": store.url, "checkpoint": checkpoint, "warnings": said + torn + shown["warnings"]}
    return shown if driver is None else shown | {"host": driver.host}


def _shown(path: Path, holder: int | None) -> dict[str, Any]:
    """All but the checkpoint."""
    shown: dict[str, Any] = {
        "run": str(path),
        "status": _status(path, holder),
        "process": holder,
        "configuration": read_yaml(path / CONFIG),
    }
    warnings: list[str] = []
    result = read_result(path, warnings)
    meta: dict[str, Any] = {}
    try:
        with RunReader(path / DATABASE) as reader:
            meta, latest, dropped, events = reader.meta(), reader.latest(), reader.dropped(), reader.events()
            shown |= {"results": _progress(path, holder), "latest_metrics": latest, "dropped": dropped, "faults": _faults(events)}
            shown["recovery"] = recovery(events)
    except ShoalError as error:
        warnings.append(str(error))
    if result and shown["process"] is None:
        shown["results"] = {name: value for name, value in result.items() if name not in _APART}
        meta = {name: result[name] for name in _APART if name in result} | meta
    shown |= {
        "environment": meta.get("spec"),
        **{name: meta.get(name) for name in ("schema", "ledger", "lag")},
        "replay": meta.get("replay") or None,
        "network": meta.get("network") or None,
    }
    return shown | {"checkpoint": None, "warnings": warnings}


def _faults(events: list[dict[str, Any]]) -> dict[str, Any]:
    faults = [event for event in events if event["kind"] not in _HARMLESS]
    return {"counts": dict(Counter(event["kind"] for event in faults)), "newest": faults[-_EVENTS_SHOWN:]}


def recovery(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How long roles were missed, from a fault to the first rollout (of the learner: update) after it, without the time in which
    episodes were stepped again: by role, count and p50, p99 and max of the seconds; and the median of that other time."""
    rows = [event for event in events if event["kind"] == "recovered"]
    found = {}
    for role in sorted({row["role"] for row in rows}):
        mine = [row for row in rows if row["role"] == role]
        seconds = sorted(row["seconds"] - row["restoring_seconds"] for row in mine)
        restoring = sorted(row["restoring_seconds"] for row in mine)
        spread = {name: quantile(seconds, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}
        found[role] = {"count": len(mine), **spread, "restoring_p50": quantile(restoring, 0.5)}
    return found


def quantile(ascending: Sequence[float], share: float) -> float:
    """The smallest of these numbers that at least `share` of them do not pass."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]


def _checkpoint(path: Path, warnings: list[str]) -> dict[str, Any] | None:
    directory = CheckpointDirectory(path / CHECKPOINTS)
    if not directory.paths():
        return None
    try:
        loaded = directory.newest()
    except ShoalError as error:
        warnings.append(str(error))
        return None
    warnings.extend(loaded.warnings)
    num_bytes = sum(size for size, _ in loaded.files.values())
    return {
        "update": loaded.update,
        "path": str(loaded.path),
        "bytes": num_bytes,
        "files": {name: size for name, (size, _) in loaded.files.items()},
    }
