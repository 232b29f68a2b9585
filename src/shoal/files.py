"""Files of a run: checkpoints that are whole or not there, and text that is replaced in one step.

A checkpoint is a directory `update-000000123` of safetensors and JSON files (`write_arrays`, `write_json`, or written into
`Staging.path` by another process) and a `manifest.json` with the size and SHA-256 of each. It is made aside, every file and
directory is fsynced, it is renamed, and the parent is fsynced: a kill at any instant leaves the old ones as they were.
An update that is saved a second time becomes `update-000000123.1`, so there is no instant without a whole one; the newest
revision counts and `sweep` removes the others.

The manifest is canonical JSON and carries a hash of itself; that rule outlives the format number, so another version's
checkpoint is told from a torn one. Nothing here is ever unpickled. Ground floor: numpy, no torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from shoal.errors import CheckpointError, RunError, SchemaError
from shoal.locks import is_other_living_process
from shoal.types import Array, Arrays

FORMAT = 1
MANIFEST = "manifest.json"
_MANIFEST_BYTES = 2**24  # a manifest is shorter; a longer file is none, and is not read into memory
_COMMITTED = re.compile(r"update-(\d{9,18})(?:\.(\d{1,9}))?")
_STAGING = re.compile(r"\.staging-\d+-(\d+)")
_TRASH = ".trash-"


class Staging:
    """A checkpoint in the making, in a directory of its own: write, then `commit` or `discard`.

    As a context manager it is discarded at the end unless it was committed.
    Raises CheckpointError from each method where the disk refuses, after discarding what was written.
    """

    def __init__(self, root: Path, update: int, active: set[Path]) -> None:
        self.path = root / f".staging-{update}-{os.getpid()}"
        self.update = update
        self._root = root
        self._active = active
        with self.disk_errors():
            shutil.rmtree(self.path, ignore_errors=True)
            root.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
        active.add(self.path)

    @property
    def previous(self) -> Path | None:
        """The newest committed checkpoint. A file of it that did not change may be linked (`os.link`) instead of written: it is the same
        file, made durable and hashed when that one was committed, so `commit` does not read it again. It is hashed whenever one is loaded.
        """
        return max(_committed(self._root), default=(0, 0, None))[2]

    def write_arrays(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Write `{name}.safetensors`; `name` may hold a slash. Structured arrays (CURSOR) keep their dtype.

        Raises SchemaError for a dtype that is neither numbers, booleans nor a record of them.
        """
        with self.disk_errors():
            write_arrays(self._place(name, ".safetensors"), arrays)

    def write_json(self, name: str, value: object) -> None:
        """Write `{name}.json`; floats come back bit for bit, NaN and infinities included."""
        with self.disk_errors():
            self._place(name, ".json").write_text(to_json(value), encoding="utf-8")

    def commit(self) -> Path:
        """Make it durable and visible in one step; returns its final path."""
        with self.disk_errors():
            return self._commit()

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._active.discard(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.path in self._active:
            self.discard()

    def _commit(self) -> Path:
        files: dict[str, dict[str, object]] = {}
        directories = [self.path]
        known: dict[tuple[int, int], tuple[int, str]] | None = None
        for path in sorted(self.path.rglob("*")):
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise CheckpointError(f"{path}: a checkpoint holds plain files only, this is a link or a device")
            if path.is_dir():
                directories.append(path)
            elif path.relative_to(self.path) != Path(MANIFEST):
                status = path.stat()
                if status.st_nlink > 1 and known is None:
                    known = _committed_digests(self._root)
                committed = (known or {}).get((status.st_dev, status.st_ino))
                size_bytes, sha256 = committed or _digest(path, sync=True)
                files[path.relative_to(self.path).as_posix()] = {"bytes": size_bytes, "sha256": sha256}
        manifest = self.path / MANIFEST
        manifest.write_bytes(_manifest_bytes({"format": FORMAT, "update": self.update, "files": files}))
        for path in [manifest, *reversed(directories)]:
            _sync(path)
        final = self._root / checkpoint_name(self.update, self._next_revision())
        self.path.rename(final)
        self._active.discard(self.path)
        _sync(self._root)
        return final

    def _next_revision(self) -> int:
        return max((revision + 1 for update, revision, _ in _committed(self._root) if update == self.update), default=0)

    def _place(self, name: str, suffix: str) -> Path:
        path = self.path / (name + suffix)
        if ".." in path.parts or self.path not in path.parents or path.name == MANIFEST:
            raise ValueError(f"{name!r} is no name for a file of a checkpoint")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextlib.contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Around what writes into `path` itself: an OSError discards the checkpoint and becomes a CheckpointError that says so."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self.discard()
            reason = f"{os.strerror(error.errno)} ({error.filename})" if isinstance(error, OSError) and error.errno else str(error)
            raise CheckpointError(
                f"checkpoint of update {self.update} was not saved: {reason}. Those before it are whole. Free space in, or mend, {self._root}"
            ) from error


@dataclass(frozen=True)
class Loaded:
    """A whole checkpoint. `warnings` has one line for each newer one that was passed over."""

    path: Path
    update: int
    files: Mapping[str, tuple[int, str]]
    warnings: tuple[str, ...] = ()

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
    """The checkpoints of a run. One process saves (the holder of `locks.lock_run`); any may read."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._active: set[Path] = set()

    def begin(self, update: int) -> Staging:
        """Begin a checkpoint of the state after `update` updates."""
        return Staging(self.root, update, self._active)

    def paths(self) -> list[Path]:
        """Committed checkpoints, unverified, oldest first."""
        return [path for _, _, path in _committed(self.root)]

    def newest(self) -> Loaded:
        """The newest whole checkpoint, every hash verified; a torn one is passed over with a warning.

        Raises CheckpointError when none is whole, or when the newest was written by another version of the format.
        """
        torn: list[str] = []
        for path in reversed(self.paths()):
            try:
                loaded = load_checkpoint(path)
            except TornError as error:
                torn.append(f"checkpoint {path.name} is not whole ({error})")
                continue
            return Loaded(loaded.path, loaded.update, loaded.files, tuple(f"{what}; taking the one before it" for what in torn))
        if not torn:
            raise CheckpointError(f"no checkpoint in {self.root}")
        raise CheckpointError(
            f"no whole checkpoint in {self.root}: {'; '.join(torn)}. Put a copy back; or move them away, and `shoal resume` begins again from the start"
        )

    def sweep(self, keep: int, spared: Collection[Path] = ()) -> None:
        """Remove all but the newest `keep` updates, superseded revisions, and what dead processes left half made. Those spared stay in any case.

        A disk that refuses is left as it is: the next sweep tries again.
        """
        if self.root.is_dir():
            with contextlib.suppress(OSError):
                self._sweep(keep, spared)

    def _sweep(self, keep: int, spared: Collection[Path]) -> None:
        newest = {update: path for update, _, path in _committed(self.root)}
        kept = {newest[update] for update in sorted(newest)[-keep:]}
        for path in self.paths():
            if path not in kept and path not in spared:
                trash = path.with_name(f"{_TRASH}{path.name}-{os.getpid()}")
                path.rename(trash)  # removal takes many steps; a kill between them must not leave a torn checkpoint
                shutil.rmtree(trash, ignore_errors=True)
        for path in self.root.iterdir():
            staging = _STAGING.fullmatch(path.name)
            dead = staging and path not in self._active and not is_other_living_process(int(staging[1]))
            if dead or path.name.startswith(_TRASH):
                shutil.rmtree(path, ignore_errors=True)


class TornError(CheckpointError):
    """A checkpoint that is not whole: the caller takes the one before."""


def load_checkpoint(path: str | os.PathLike[str]) -> Loaded:
    """One committed checkpoint, every hash verified. Raises CheckpointError where it is not whole or of another format."""
    path = Path(path)
    try:
        update, files = _read_manifest(path)
        for name, (size_bytes, sha256) in files.items():
            verify_file(path, name, size_bytes, sha256)
        return Loaded(path, update, files)
    except OSError as error:
        raise TornError(f"{error.filename}: {os.strerror(error.errno or errno.EIO)}") from error


@contextlib.contextmanager
def whole_state(path: Path) -> Iterator[None]:
    """Around whoever takes a state out of a checkpoint: one without a part, or of another shape, is a CheckpointError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold the state that this run needs ({type(error).__name__}: {error}); was it written by another version, or its run's configuration changed?"
        ) from error


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write named arrays as safetensors, C order. Structured arrays become bytes, with their dtype in the file's metadata.

    Raises SchemaError for a dtype without a place there; OSError where the disk refuses.
    """
    stored: Arrays = {}
    structured: dict[str, object] = {}
    for name, given in arrays.items():
        array = np.asarray(given, order="C")
        if array.dtype.names is not None and not array.dtype.hasobject:
            structured[name] = [array.dtype.descr, list(array.shape)]
            stored[name] = np.frombuffer(array.tobytes(), np.uint8)
        elif array.dtype.kind in "biuf":
            stored[name] = array
        else:
            raise SchemaError(f"array {name!r} of {path.name} has dtype {array.dtype}; numbers, booleans and records of them can be saved")
    try:
        safetensors_numpy.save_file(stored, path, {"structured": json.dumps(structured)} if structured else None)
    except SafetensorError as error:  # its words for an OSError
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def arrays_from_bytes(content: bytes) -> Arrays:
    """The inverse of `write_arrays`. Raises CheckpointError where the bytes are no safetensors file."""
    try:
        arrays: Arrays = safetensors_numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        structured = json.loads(header.get("__metadata__", {}).get("structured", "{}"))
        for name, (fields, shape) in structured.items():
            arrays[name] = arrays[name].view(np.dtype([tuple(field) for field in fields])).reshape(shape)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"not a safetensors file that shoal wrote: {error}") from error
    return arrays


def to_json(value: object) -> str:
    """JSON with sorted keys; numpy numbers and arrays become plain ones."""
    return json.dumps(value, sort_keys=True, indent=1, default=_plain)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file in one step: whoever reads it sees the old text or the new, also after a loss of power.

    A file that holds the text already is left alone. Raises RunError where the disk refuses; the old text is whole then.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_file() and path.read_bytes() == text.encode():
            return
        try:
            with open(aside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _sync(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {os.strerror(error.errno or errno.EIO)}") from error


def _committed(root: Path) -> list[tuple[int, int, Path]]:
    """(update, revision, path) of every committed checkpoint, oldest first."""
    if not root.is_dir():
        return []
    named = ((checkpoint_place(path.name), path) for path in root.iterdir())
    return sorted((*place, path) for place, path in named if place)


def checkpoint_place(name: str) -> tuple[int, int] | None:
    """Update and revision of a checkpoint of this name; None where it is the name of none."""
    match = _COMMITTED.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _committed_digests(root: Path) -> dict[tuple[int, int], tuple[int, str]]:
    """Size and SHA-256 of the files of committed checkpoints, by device and inode."""
    known: dict[tuple[int, int], tuple[int, str]] = {}
    for _, _, checkpoint in _committed(root):
        with contextlib.suppress(CheckpointError, OSError):  # a torn one says nothing
            for name, (size_bytes, sha256) in _read_manifest(checkpoint)[1].items():
                status = (checkpoint / name).stat()
                if status.st_size == size_bytes:
                    known[status.st_dev, status.st_ino] = size_bytes, sha256
    return known


def checkpoint_name(update: int, revision: int) -> str:
    """The inverse of `checkpoint_place`."""
    return f"update-{update:09d}" + (f".{revision}" if revision else "")


def _manifest_bytes(manifest: Mapping[str, object]) -> bytes:
    body = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    return b'{"manifest":%s,"sha256":"%s"}\n' % (body, hashlib.sha256(body).hexdigest().encode())


def _read_manifest(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    return parse_manifest(_bounded_bytes(path / MANIFEST), path)


def parse_manifest(content: bytes, path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """The update, and size and SHA-256 of every file, of the manifest of the checkpoint at `path`. Raises TornError, or CheckpointError for another format."""
    try:
        manifest = json.loads(content)["manifest"]
        whole = _manifest_bytes(manifest) == content
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole or not isinstance(manifest, dict):
        raise TornError(f"{MANIFEST} is damaged")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest.get('format')}; this version of shoal reads format {FORMAT}: use the version that wrote it"
        )
    try:
        update = int(manifest["update"])
        files = {_plain_name(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise TornError(f"{MANIFEST} does not list update and files") from error
    place = checkpoint_place(path.name)
    if place and place[0] != update:
        raise TornError(f"{MANIFEST} is that of update {update}")
    return update, files


def _bounded_bytes(path: Path) -> bytes:
    _only_plain(path)
    with open(path, "rb") as file:
        content = file.read(_MANIFEST_BYTES + 1)
    if len(content) > _MANIFEST_BYTES:
        raise TornError(f"{path.name} is too long")
    return content


def _plain_name(name: str) -> str:
    """A name that stays inside the checkpoint. Raises ValueError."""
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{name!r} lies outside")
    return name


def _only_plain(path: Path) -> int:
    """Its size; a pipe in a file's place would be waited for without end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise TornError(f"{path.name} is no plain file")
    return status.st_size


def verify_file(directory: Path, name: str, size_bytes: int, sha256: str) -> None:
    """Raise TornError where a file of a checkpoint is not what its manifest says, OSError where it cannot be read."""
    path = directory / name
    actual_bytes = _only_plain(path)
    if actual_bytes != size_bytes:
        raise TornError(f"{name} has {actual_bytes} bytes instead of {size_bytes}")
    if _digest(path)[1] != sha256:
        raise TornError(f"{name} does not have the SHA-256 that the manifest says")


def _digest(path: Path, *, sync: bool = False) -> tuple[int, str]:
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return file.tell(), sha256


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
