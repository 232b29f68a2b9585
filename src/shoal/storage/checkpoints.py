"""Checkpoints in a store: files first, the manifest last, which commits. What has none is nobody's, and is swept.

A checkpoint there holds the same files under the same manifest as on the driver's disk. Its revision tells drivers apart: each part of a run numbers from
`REVISIONS` times its own number, so that one that was given up, and is still writing, writes into no other's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shoal.errors import CheckpointError, StorageError
from shoal.files import (
    FACTS,
    MANIFEST,
    REPLAY,
    CheckpointDirectory,
    ForeignError,
    Staging,
    TornError,
    checkpoint_name,
    checkpoint_place,
    everything,
    parse_manifest,
    passed_over,
    run_named,
    verify_file,
    way_out,
    without_replay,
)
from shoal.storage.objects import MissingError, Store, retried

ROOT = "checkpoints"
REVISIONS = 1000  # of an update, that one part of a run may number

Files = Mapping[str, tuple[int, str]]  # size and SHA-256 by name


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is whole in the store, or was when it was looked at."""

    name: str
    update: int
    files: Files
    run: str | None  # the id of the run that made it, where its manifest says so


def committed(store: Store) -> list[tuple[int, int]]:
    """(update, revision) of every checkpoint that has a manifest, oldest first."""
    return sorted(place for name, files in _directories(store).items() if MANIFEST in files and (place := checkpoint_place(name)))


def _directories(store: Store) -> dict[str, dict[str, int]]:
    """Sizes of the files below ROOT, by directory and name."""
    found: dict[str, dict[str, int]] = {}
    for name, size in store.files(ROOT).items():
        directory, _, file = name.removeprefix(f"{ROOT}/").partition("/")
        found.setdefault(directory, {})[file] = size
    return found


def upload(
    store: Store,
    path: Path,
    part: int,
    *,
    before: Stored | None = None,
    guard: Callable[[], None] = lambda: None,
    moved: Callable[[], None] = lambda: None,
) -> Stored:
    """Copy a committed checkpoint of this disk.

    Args:
      part: of the run, which names the revision.
      before: one that is whole in the store already: a file of it that is the same is copied within the store, where that can copy.
      guard: called before the manifest is written; raises where the run is not this driver's any more.
      moved: called after each file, and now and then while bytes move; may raise too.
    Raises:
      StorageError: the store refuses, or holds another size than was sent. TornError, OSError: the files here are not what the manifest says.
    """
    content = (path / MANIFEST).read_bytes()
    update, files, run = parse_manifest(content, path)
    name = _free_name(store, update, part)
    for file, (size_bytes, sha256) in files.items():
        target = f"{ROOT}/{name}/{file}"
        same = before is not None and before.files.get(file) == (size_bytes, sha256)
        if before is None or not same or not store.copy(f"{ROOT}/{before.name}/{file}", target):
            verify_file(path, file, size_bytes, sha256)
            store.put(target, path / file, moved)
        moved()
        if (there := store.size(target)) != size_bytes:
            raise StorageError(f"{store.url}/{target} has {there} bytes after {size_bytes} were written")
    guard()
    store.write(f"{ROOT}/{name}/{MANIFEST}", content)
    return Stored(name, update, files, run)


def _free_name(store: Store, update: int, part: int) -> str:
    """The first revision of this part that is not committed."""
    taken = {revision for saved, revision in committed(store) if saved == update}
    return checkpoint_name(update, next(number for number in range(part * REVISIONS, (part + 1) * REVISIONS) if number not in taken))


def sweep(store: Store, newest: int, keep: int) -> None:
    """Remove all but the newest `keep` updates, superseded revisions, whatever is of later updates (a roll-back undid them) or never had its manifest.

    Args:
      newest: update of the one that was uploaded last.
    """
    found = _directories(store)
    places = {place: name for name, files in found.items() if MANIFEST in files and (place := checkpoint_place(name))}
    by_update = {update: places[update, revision] for update, revision in sorted(places) if update <= newest}
    kept = {by_update[update] for update in sorted(by_update)[-keep:]}
    for name, files in found.items():
        if name in kept or checkpoint_place(name) is None:
            continue
        if MANIFEST in files:  # first: what is removed in part is not committed any more
            store.remove(f"{ROOT}/{name}/{MANIFEST}")
        store.remove_all(f"{ROOT}/{name}")


def newest_whole(store: Store) -> tuple[Stored | None, list[str]]:
    """The newest checkpoint whose files all have the sizes of its manifest (their hashes are not read), and a line for each that was passed over."""
    found, run, passed = _directories(store), _run_of(store), list[str]()
    for update, revision in reversed(committed(store)):
        name = checkpoint_name(update, revision)
        try:
            stored = _stored(store, name, run)
            for file, (size_bytes, _) in stored.files.items():
                if (there := found.get(name, {}).get(file)) != size_bytes:
                    raise TornError(f"{file} is missing" if there is None else f"{file} has {there} bytes instead of {size_bytes}")
        except (TornError, ForeignError) as error:
            passed.append(passed_over(f"{name} in {store.url}", error))
            continue
        return stored, passed
    return None, passed


def _run_of(store: Store) -> str | None:
    """The id of the run in the store; None where nothing says it."""
    return run_named(retried(partial(store.read, FACTS)))


def _stored(store: Store, name: str, run: str | None) -> Stored:
    """Raises ForeignError where it is of another run than this, TornError, CheckpointError."""
    content = retried(partial(store.read, f"{ROOT}/{name}/{MANIFEST}"))
    if content is None:
        raise TornError(f"{MANIFEST} is missing")
    manifest = parse_manifest(content, Path(name))
    manifest.check_run(run)
    return Stored(name, *manifest)


class _ReplayTornError(TornError):
    """All of a checkpoint is whole but its replay."""


def fetch_newest(
    store: Store, into: CheckpointDirectory, wanted: Callable[[str], bool] = everything, *, replay: bool = True
) -> tuple[int | None, list[str]]:
    """Bring the newest whole checkpoint to this disk, every hash verified, and commit it there with those of its files that are wanted.

    Args:
      replay: whether its replay has to be whole. One that is damaged and has not is left out; the manifest here lists it still, as that of the store.
    Returns:
      its update (None where the store has none), and a line for each newer one that was passed over, and for a replay that was left out.
    Raises:
      CheckpointError: there are some and none is whole, the newest is of another format, or this disk refuses. StorageError: the store cannot be read.
    """
    passed: list[str] = []
    replay_alone = False
    places, run = retried(partial(committed, store)), _run_of(store)
    for update, revision in reversed(places):
        name = checkpoint_name(update, revision)
        try:
            damage = _fetch(store, _stored(store, name, run), into, wanted, replay)
        except (TornError, ForeignError) as error:
            passed.append(passed_over(f"{name} in {store.url}", error))
            replay_alone |= isinstance(error, _ReplayTornError)
        else:
            left_out = [f"checkpoint {name} in {store.url} is taken without its replay ({damage})"] if damage else []
            return update, [*(f"{what}; taking the one before it" for what in passed), *left_out]
    if passed:
        raise CheckpointError(
            f"no whole checkpoint of this run in {store.url}: {'; '.join(passed)}. Put a copy back; or {way_out(store.url, replay_alone=replay_alone)}"
        )
    return None, []


def _fetch(store: Store, stored: Stored, into: CheckpointDirectory, wanted: Callable[[str], bool], replay: bool) -> str:
    """Returns why its replay was left out, "" where it was not. Raises TornError."""
    files = [file for file in stored.files if wanted(file)]
    rows = [file for file in files if not without_replay(file)]
    with into.begin(stored.update, stored.run) as staging:
        for file in filter(without_replay, files):
            _fetch_file(store, stored, file, staging)
        try:
            for file in rows:
                _fetch_file(store, stored, file, staging)
        except TornError as error:
            if replay:
                raise _ReplayTornError(str(error)) from error
            shutil.rmtree(staging.path / REPLAY, ignore_errors=True)
            staging.commit({file: stored.files[file] for file in rows})
            return str(error)
        staging.commit()
    return ""


def _fetch_file(store: Store, stored: Stored, file: str, staging: Staging) -> None:
    """Raises TornError where it is missing, or another than the manifest says."""
    size_bytes, sha256 = stored.files[file]
    object_name = f"{ROOT}/{stored.name}/{file}"
    there = retried(partial(store.size, object_name))
    if there != size_bytes:  # before it is brought here, whatever its length
        raise TornError(f"{file} is missing" if there is None else f"{file} has {there} bytes instead of {size_bytes}")
    with staging.disk_errors():
        (staging.path / file).parent.mkdir(parents=True, exist_ok=True)
    try:
        retried(partial(store.get, object_name, staging.path / file))
    except MissingError as error:
        raise TornError(str(error)) from None
    with staging.disk_errors():
        verify_file(staging.path, file, size_bytes, sha256)
