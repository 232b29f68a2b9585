"""Beginning a run in a store, and going on with one: the lock, the working copy on this disk, and the mirror between the two.

The working copy is a run's directory as any other (`urls.local_directory`), and everything is written there. It counts where this machine made it and no other driver has gone on
since, which the same token in both files `run.json` says; else the store's run takes its place.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from shoal.errors import CheckpointError, ConfigError, NoRunError, RunError, StorageError
from shoal.files import CheckpointDirectory
from shoal.locks import LOCK, lock_run
from shoal.monitoring.store import check_database
from shoal.storage.checkpoints import committed, fetch_newest
from shoal.storage.lock import StoreLock, driver_of
from shoal.storage.mirror import CHECKPOINTS, CONFIG, DATABASE, FACTS, RESULT, Mirror
from shoal.storage.objects import MissingError, Store, retried
from shoal.urls import local_directory


@contextlib.contextmanager
def begin_run(url: str) -> Iterator[Mirror]:
    """For a new run; what an earlier one left in the working copy is removed.

    Raises:
      ConfigError: there is a run already. StorageError: another driver is at it, or the store cannot be reached.
    """
    with _locked(url) as (store, mirror, directory):
        if retried(partial(store.size, CONFIG)) is not None:
            raise ConfigError(
                f"run_dir: {store.url} is a run already; go on with it (shoal resume {store.url}), or choose another --run-dir"
            )
        if directory.is_dir():
            with lock_run(directory):
                _empty(directory)
        yield mirror


@contextlib.contextmanager
def continue_run(
    url: str, *, take_over: bool = False, replay: Callable[[Path], bool] = lambda directory: True
) -> Iterator[tuple[Path, Mirror]]:
    """For a run that is there: its working copy, brought to where the run stands.

    Args:
      replay: whether what the run learns from has to be whole, once its config.yaml is in the working copy.
    Raises:
      NoRunError: there is no run. CheckpointError: it has checkpoints, and none is whole. StorageError: as `begin_run`.
    """
    with _locked(url, take_over) as (store, mirror, directory):
        if retried(partial(store.size, CONFIG)) is None:
            raise NoRunError(f"{store.url} is no run: it has no {CONFIG}; `shoal runs URL` lists the runs below one")
        directory.mkdir(parents=True, exist_ok=True)
        with lock_run(directory):
            for warning in _bring(store, directory, replay):
                mirror.say("warning", message=warning)
        yield directory, mirror


@contextlib.contextmanager
def _locked(url: str, take_over: bool = False) -> Iterator[tuple[Store, Mirror, Path]]:
    said: list[str] = []
    with StoreLock(url, take_over=take_over, told=said.append) as lock:
        store, directory = Store(url), local_directory(url)
        with contextlib.closing(Mirror(store, directory, lock)) as mirror:
            for message in said:
                mirror.say("warning", message=message)
            yield store, mirror, directory


def _bring(store: Store, directory: Path, replay: Callable[[Path], bool]) -> list[str]:
    """The working copy stands where the store's run stands, or further where this machine made it. Returns warnings."""
    ours = _is_ours(store, directory)
    if not ours:
        _empty(directory)
        fetch_papers(store, directory, (CONFIG, RESULT))
    (directory / "logs").mkdir(exist_ok=True)
    warnings = [] if (directory / DATABASE).exists() else fetch_database(store, directory)
    into = CheckpointDirectory(directory / CHECKPOINTS)
    here = _newest_update(into)
    if here < max(retried(partial(committed, store)), default=(-1, 0))[0]:
        warnings += fetch_newest(store, into, replay=replay(directory))[1]
    if not ours:
        fetch_papers(store, directory, (FACTS,))  # last: from now on this copy counts
    return warnings


def _is_ours(store: Store, directory: Path) -> bool:
    """Whether this machine drove the run last."""
    here = driver_of((directory / FACTS).read_bytes() if (directory / FACTS).is_file() else None)
    return here is not None and (directory / CONFIG).is_file() and here == driver_of(retried(partial(store.read, FACTS)))


def _newest_update(checkpoints: CheckpointDirectory) -> int:
    """-1 where none is whole."""
    try:
        return checkpoints.newest().update
    except CheckpointError:
        return -1


def _empty(directory: Path) -> None:
    """Remove what is in it, but for the lock, which the caller holds. Raises RunError."""
    try:
        for path in directory.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise RunError(f"the working copy {directory} cannot be made anew: {error.strerror or error}") from error


def fetch_papers(store: Store, directory: Path, names: tuple[str, ...]) -> None:
    """Small files of a run, as far as they are there."""
    for name in names:
        content = retried(partial(store.read, name))
        if content is not None:
            _written(directory / name, content)


def _written(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def fetch_database(store: Store, directory: Path) -> list[str]:
    """run.db, where there is one. Returns a warning where it is damaged: a run goes on without its numbers."""
    aside = directory / f".{DATABASE}.fetched"
    try:
        retried(partial(store.get, DATABASE, aside))
        check_database(aside)
        for name in (f"{DATABASE}-wal", f"{DATABASE}-shm"):
            (directory / name).unlink(missing_ok=True)
        aside.replace(directory / DATABASE)
    except MissingError:
        return []
    except StorageError:
        raise
    except RunError as error:
        return [
            f"{store.url}/{DATABASE} cannot be used ({error}): metrics and events of before are lost, training goes on from its checkpoint"
        ]
    finally:
        aside.unlink(missing_ok=True)
    return []
