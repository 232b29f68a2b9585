"""The manifest of a checkpoint: whose it is, and size and SHA-256 of each of its files, in canonical JSON that carries a hash of itself.

That rule outlives the format number, so another version's checkpoint is told from a torn one.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from shoal.errors import CheckpointError
from shoal.files.names import checkpoint_place
from shoal.files.owner import is_run_id

FORMAT = 1
MANIFEST = "manifest.json"
_MANIFEST_BYTES = 2**24  # a manifest is shorter; a longer file is none, and is not read into memory


class TornError(CheckpointError):
    """A checkpoint that is not whole: the caller takes the one before."""


class ForeignError(CheckpointError):
    """A checkpoint of another run: the caller takes the one before."""


def passed_over(name: str, error: TornError | ForeignError) -> str:
    """Why a checkpoint is not taken, in words."""
    return f"checkpoint {name} is of another run" if isinstance(error, ForeignError) else f"checkpoint {name} is not whole ({error})"


def way_out(run: object, *, replay_alone: bool) -> str:
    """What `shoal resume` can do with a run none of whose checkpoints is whole. replay_alone: one of them is damaged in nothing but its replay."""
    if replay_alone:
        return f"go on without what the run learned from, which alone is damaged: `shoal resume {run} --checkpoint.replay false`"
    return "move them away, and `shoal resume` begins again from the start"


class Manifest(NamedTuple):
    """Attributes:
    files: size and SHA-256 by name.
    run: the id of the run that made it; None of one that was made before manifests said so.
    """

    update: int
    files: dict[str, tuple[int, str]]
    run: str | None

    def check_run(self, run: str | None) -> None:
        """Raise ForeignError where it is not of this run; one that does not say, or nobody to compare with, is taken as it is."""
        if None not in (run, self.run) and run != self.run:
            raise ForeignError(f"it is of run {self.run}, and not of {run}")


def manifest_bytes(manifest: Mapping[str, object]) -> bytes:
    """A manifest as it lies in its file."""
    body = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    return b'{"manifest":%s,"sha256":"%s"}\n' % (body, hashlib.sha256(body).hexdigest().encode())


def read_manifest(path: Path) -> Manifest:
    """`parse_manifest` of a checkpoint's own. Raises OSError, too."""
    return parse_manifest(_bounded_bytes(path / MANIFEST), path)


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """What the manifest of the checkpoint at `path` says. Raises TornError, or CheckpointError for another format."""
    try:
        manifest = json.loads(content)["manifest"]
        whole = manifest_bytes(manifest) == content
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
    run = manifest.get("run")
    if run is not None and not is_run_id(run):
        raise TornError(f"{MANIFEST} names no run")
    place = checkpoint_place(path.name)
    if place and place[0] != update:
        raise TornError(f"{MANIFEST} is that of update {update}")
    return Manifest(update, files, run)


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
    if digest(path)[1] != sha256:
        raise TornError(f"{name} does not have the SHA-256 that the manifest says")


def digest(path: Path, *, sync: bool = False) -> tuple[int, str]:
    """Size and SHA-256 of a file; sync: which is durable then."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return file.tell(), sha256
