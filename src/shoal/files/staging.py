"""A checkpoint in the making: aside, where nobody takes it for one, until it is whole and durable."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

from safetensors import SafetensorError

from shoal.errors import CheckpointError
from shoal.files.arrays import to_json, write_arrays
from shoal.files.durable import sync
from shoal.files.manifest import FORMAT, MANIFEST, digest, manifest_bytes, read_manifest
from shoal.files.names import checkpoint_name, committed
from shoal.types import Array


class Staging:
    """A checkpoint in the making, in a directory of its own: write, then `commit` or `discard`.

    As a context manager it is discarded at the end unless it was committed.
    Raises CheckpointError from each method where the disk refuses, after discarding what was written.
    """

    def __init__(self, root: Path, update: int, active: set[Path], run: str | None = None) -> None:
        """run: the id of whose it is, which the manifest is to say."""
        self.path = root / f".staging-{update}-{os.getpid()}"
        self.update = update
        self._root = root
        self._active = active
        self._run = run
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
        return max(committed(self._root), default=(0, 0, None))[2]

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

    def commit(self, lacking: Mapping[str, tuple[int, str]] = MappingProxyType({})) -> Path:
        """Make it durable and visible in one step; returns its final path.

        Args:
          lacking: size and SHA-256 of files that belong to it and are not here: whoever needs them finds that it is not whole.
        """
        with self.disk_errors():
            return self._commit(lacking)

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._active.discard(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.path in self._active:
            self.discard()

    def _commit(self, lacking: Mapping[str, tuple[int, str]]) -> Path:
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
                linked = (known or {}).get((status.st_dev, status.st_ino))
                size_bytes, sha256 = linked or digest(path, sync=True)
                files[path.relative_to(self.path).as_posix()] = {"bytes": size_bytes, "sha256": sha256}
        files |= {name: {"bytes": size_bytes, "sha256": sha256} for name, (size_bytes, sha256) in lacking.items()}
        manifest = self.path / MANIFEST
        whose = {} if self._run is None else {"run": self._run}
        manifest.write_bytes(manifest_bytes({"format": FORMAT, "update": self.update, "files": files, **whose}))
        for path in [manifest, *reversed(directories)]:
            sync(path)
        final = self._root / checkpoint_name(self.update, self._next_revision())
        self.path.rename(final)
        self._active.discard(self.path)
        sync(self._root)
        return final

    def _next_revision(self) -> int:
        return max((revision + 1 for update, revision, _ in committed(self._root) if update == self.update), default=0)

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
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            where = f" ({error.filename})" if isinstance(error, OSError) and error.errno and error.filename else ""
            raise CheckpointError(
                f"checkpoint of update {self.update} was not saved: {reason}{where}. Free space in, or mend, {self._root}"
            ) from error


def _committed_digests(root: Path) -> dict[tuple[int, int], tuple[int, str]]:
    """Size and SHA-256 of the files of committed checkpoints, by device and inode."""
    known: dict[tuple[int, int], tuple[int, str]] = {}
    for _, _, checkpoint in committed(root):
        with contextlib.suppress(CheckpointError, OSError):  # a torn one says nothing
            for name, (size_bytes, sha256) in read_manifest(checkpoint).files.items():
                status = (checkpoint / name).stat()
                if status.st_size == size_bytes:
                    known[status.st_dev, status.st_ino] = size_bytes, sha256
    return known
