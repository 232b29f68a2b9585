"""Reading runs in a store: into a directory that ends with this process, so that nobody else's files are touched. Living runs are read as they were copied last."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from shoal.errors import NoRunError, StorageError
from shoal.files import CheckpointDirectory, without_replay
from shoal.storage.checkpoints import ROOT, fetch_newest, newest_whole
from shoal.storage.lock import Driver, living_driver
from shoal.storage.mirror import CHECKPOINTS, CONFIG, FACTS, RESULT
from shoal.storage.objects import Store, retried
from shoal.storage.opening import fetch_database, fetch_papers


def fetched_run(url: str) -> tuple[Path, list[str]]:
    """A run's directory with everything but its replay, logs and TensorBoard files, and warnings. It is removed when this process ends.

    Raises:
      NoRunError, StorageError, CheckpointError: there is no run, the store cannot be read, none of its checkpoints is whole.
    """
    store = Store(url)
    directory = Path(tempfile.mkdtemp(prefix="shoal-run-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    _fetch_papers(store, directory)
    said = fetch_database(store, directory)
    said += fetch_newest(store, CheckpointDirectory(directory / CHECKPOINTS), without_replay)[1]
    return directory, said


@contextlib.contextmanager
def papers(store: Store, *, database: bool = True) -> Iterator[tuple[Path, Driver | None, list[str]]]:
    """What a run says of itself, in a directory that ends with the context; who drives it now; and warnings. run.db is left out where it is not wanted and the run
    has a result. Raises NoRunError, StorageError."""
    with tempfile.TemporaryDirectory(prefix="shoal-run-") as name:
        directory = Path(name)
        _fetch_papers(store, directory)
        driver = living_driver(store)
        said = fetch_database(store, directory) if database or driver or not (directory / RESULT).exists() else []
        yield directory, driver, said


def _fetch_papers(store: Store, directory: Path) -> None:
    fetch_papers(store, directory, (CONFIG, FACTS, RESULT))
    if not (directory / CONFIG).exists():
        raise NoRunError(f"{store.url} is no run: it has no {CONFIG}; `shoal runs URL` lists the runs below one")


def stored_checkpoint(store: Store) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint as `shoal show` says it, by the sizes of its files alone, and warnings."""
    stored, torn = newest_whole(store)
    said = [f"{what}; taking the one before it" if stored else what for what in torn]
    if stored is None:
        return None, said
    sizes = {name: size for name, (size, _) in stored.files.items()}
    return {"update": stored.update, "path": f"{store.url}/{ROOT}/{stored.name}", "bytes": sum(sizes.values()), "files": sizes}, said


def runs_below(url: str) -> list[str]:
    """URLs of the runs right below one. Raises NoRunError where nothing is there, StorageError."""
    store = Store(url)
    names = retried(store.directories)
    if not names:
        raise NoRunError(f"there is nothing below {store.url}")
    found = []
    for name in names:
        with contextlib.suppress(StorageError):
            if retried(partial(store.size, f"{name}/{CONFIG}")) is not None:
                found.append(f"{store.url}/{name}")
    return found
