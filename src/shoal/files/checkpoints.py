"""The checkpoints of a run: which there are, which is the newest that is whole, and what is in it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.errors import CheckpointError
from shoal.files.arrays import arrays_from_bytes
from shoal.files.manifest import ForeignError, TornError, passed_over, read_manifest, verify_file, way_out
from shoal.files.names import committed, everything, without_replay
from shoal.files.owner import run_beside
from shoal.files.staging import Staging
from shoal.locks import is_other_living_process
from shoal.types import Arrays

_STAGING = re.compile(r"\.staging-\d+-(\d+)")
_TRASH = ".trash-"


@dataclass(frozen=True)
class Loaded:
    """A whole checkpoint.

    Attributes:
      files: those that were verified, and no other can be read.
      warnings: one line for each newer one that was passed over.
      replay_damage: why the files of its replay are left out; "" where they are whole, or were not wanted.
    """

    path: Path
    update: int
    files: Mapping[str, tuple[int, str]]
    warnings: tuple[str, ...] = ()
    replay_damage: str = ""

    def arrays(self, name: str) -> Arrays:
        """What `write_arrays(name, ...)` wrote. Raises CheckpointError where it is not in the checkpoint or was changed since."""
        return arrays_from_bytes(self.read(f"{name}.safetensors"))

    def json(self, name: str) -> Any:
        """What `write_json(name, ...)` wrote. Raises CheckpointError as `arrays` does."""
        try:
            return json.loads(self.read(f"{name}.json"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}/{name}.json is no JSON: {error}") from error

    def read(self, file: str) -> bytes:
        """The bytes of one file, hashed again so that what is used is what was checked."""
        if file not in self.files:
            raise CheckpointError(f"{self.path} holds no {file}; it holds {', '.join(sorted(self.files)) or 'nothing'}")
        try:
            content = (self.path / file).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.path / file} cannot be read: {os.strerror(error.errno or errno.EIO)}") from error
        if (len(content), hashlib.sha256(content).hexdigest()) != self.files[file]:
            raise CheckpointError(f"{self.path / file} was changed after it was checked")
        return content


class CheckpointDirectory:
    """The checkpoints of a run. One process saves (the holder of `locks.lock_run`); any may read. Those of another run, as far as they say whose they are,
    are neither taken nor removed."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._active: set[Path] = set()

    @property
    def run(self) -> str | None:
        """The id of the run, where `run.json` beside the directory has one."""
        return run_beside(self.root)

    def begin(self, update: int, run: str | None = None) -> Staging:
        """Begin a checkpoint of the state after `update` updates. run: the id of whose it is, where no `run.json` says so."""
        return Staging(self.root, update, self._active, self.run or run)

    def paths(self) -> list[Path]:
        """Committed checkpoints, unverified, oldest first."""
        return [path for _, _, path in committed(self.root)]

    def named_run(self) -> str | None:
        """The id of the run that made the newest checkpoint whose manifest can be read."""
        for path in reversed(self.paths()):
            with contextlib.suppress(CheckpointError, OSError):
                return read_manifest(path).run
        return None

    def newest(self, wanted: Callable[[str], bool] = everything) -> Loaded:
        """The newest checkpoint whose wanted files are whole, their hashes verified; a torn one, or one of another run, is passed over with a warning.

        Raises CheckpointError when none is whole, or when the newest was written by another version of the format.
        """
        passed: list[str] = []
        run = self.run
        for path in reversed(self.paths()):
            try:
                loaded = load_checkpoint(path, run, wanted)
            except (TornError, ForeignError) as error:
                passed.append(passed_over(path.name, error))
                continue
            return replace(loaded, warnings=tuple(f"{what}; taking the one before it" for what in passed))
        if not passed:
            raise CheckpointError(f"no checkpoint in {self.root}")
        raise CheckpointError(
            f"no whole checkpoint of this run in {self.root}: {'; '.join(passed)}. Put a copy back; or "
            f"{way_out(self.root.parent, replay_alone=wanted is everything and self._is_whole_without_replay())}"
        )

    def _is_whole_without_replay(self) -> bool:
        try:
            self.newest(without_replay)
        except CheckpointError:
            return False
        return True

    def newest_to_go_on(self, *, replay: bool) -> Loaded:
        """What a run goes on from: `newest`. replay false: of which the replay may be damaged, and is left out then."""
        if replay:
            return self.newest()
        loaded = self.newest(without_replay)
        try:
            return replace(load_checkpoint(loaded.path), warnings=loaded.warnings)
        except TornError as error:
            return replace(loaded, replay_damage=str(error))

    def sweep(self, keep: int, spared: Collection[Path] = ()) -> None:
        """Remove all but the newest `keep` updates, superseded revisions, and what dead processes left half made. Those spared stay in any case.

        A disk that refuses is left as it is: the next sweep tries again.
        """
        if self.root.is_dir():
            with contextlib.suppress(OSError):
                self._sweep(keep, spared)

    def _sweep(self, keep: int, spared: Collection[Path]) -> None:
        mine = [(update, path) for update, _, path in committed(self.root) if not _is_foreign(path, self.run)]
        newest = dict(mine)
        kept = {newest[update] for update in sorted(newest)[-keep:]}
        for _, path in mine:
            if path not in kept and path not in spared:
                trash = path.with_name(f"{_TRASH}{path.name}-{os.getpid()}")
                path.rename(trash)  # removal takes many steps; a kill between them must not leave a torn checkpoint
                shutil.rmtree(trash, ignore_errors=True)
        for path in self.root.iterdir():
            staging = _STAGING.fullmatch(path.name)
            dead = staging and path not in self._active and not is_other_living_process(int(staging[1]))
            if dead or path.name.startswith(_TRASH):
                shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(path: str | os.PathLike[str], run: str | None = None, wanted: Callable[[str], bool] = everything) -> Loaded:
    """One committed checkpoint, the hashes of all wanted files verified.

    Raises:
      TornError: one of them is not whole. ForeignError: it is of another run than `run`. CheckpointError: it is of another format.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
        manifest.check_run(run)
        files = {name: manifest.files[name] for name in manifest.files if wanted(name)}
        for name, (size_bytes, sha256) in files.items():
            verify_file(path, name, size_bytes, sha256)
        return Loaded(path, manifest.update, files)
    except OSError as error:
        raise TornError(f"{error.filename}: {os.strerror(error.errno or errno.EIO)}") from error


def _is_foreign(path: Path, run: str | None) -> bool:
    try:
        read_manifest(path).check_run(run)
    except ForeignError:
        return True
    except (CheckpointError, OSError):
        pass
    return False


@contextlib.contextmanager
def whole_state(path: Path) -> Iterator[None]:
    """Around whoever takes a state out of a checkpoint: one without a part, or of another shape, is a CheckpointError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold the state that this run needs ({type(error).__name__}: {error}); was it written by another version, or its run's configuration changed?"
        ) from error
