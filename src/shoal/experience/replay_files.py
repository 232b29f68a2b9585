"""The replay's files: chunks of rows as safetensors, each with a checksum that the small state beside them lists.

A chunk that did not change keeps its file: it is linked into the next checkpoint, where the file in `previous` is known to be the one
that this object wrote or read (same device, inode, size and time of change). Where that cannot be shown it is written again.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from shoal.errors import CheckpointError
from shoal.experience.replay_rows import Rows
from shoal.files import arrays_from_bytes, to_json, whole_state
from shoal.types import Arrays

_STATE, _ARRAYS = "state.json", "state.safetensors"
_WAY_OUT = "Move its checkpoint away, and `shoal resume` goes on from the one before"


class _File(NamedTuple):
    """Which file it is, and the checksum of its bytes."""

    device: int
    inode: int
    size: int
    changed_ns: int
    crc32: int

    @classmethod
    def of(cls, path: Path, crc32: int) -> _File:
        status = path.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, crc32)


class ReplayFiles:
    """Remembers which file each chunk lies in."""

    def __init__(self) -> None:
        self._known: dict[str, _File] = {}
        self._checksums: dict[str, int] = {}

    def save(self, directory: Path, previous: Path | None, facts: Mapping[str, Any], arrays: Arrays, parts: Mapping[str, Rows]) -> None:
        """Write the state and every chunk that was ever used; afterwards no chunk counts as touched."""
        directory.mkdir(parents=True, exist_ok=True)
        checksums: dict[str, int] = {}
        for part, rows in parts.items():
            rows.used |= rows.touched
            for chunk in np.flatnonzero(rows.used):
                name = _name(part, int(chunk))
                if rows.touched[chunk] or previous is None or not self._link(name, previous, directory):
                    content = save({field: np.concatenate(blocks) for field, blocks in rows.chunk(int(chunk))})
                    self._known[name] = _write(directory / name, content)
                    rows.touched[chunk] = False
                checksums[name] = self._known[name].crc32
        checksums[_ARRAYS] = _write(directory / _ARRAYS, save({name: np.asarray(array, order="C") for name, array in arrays.items()})).crc32
        body = to_json({"facts": facts, "files": checksums}).encode()
        _write(directory / _STATE, b"%08x\n" % zlib.crc32(body) + body)

    def read_state(self, directory: Path, run: str | None = None) -> tuple[dict[str, Any], Arrays]:
        """Facts and arrays as they were saved. Raises CheckpointError for one that is missing or damaged, or says that it is of another run than this."""
        content = _read(directory / _STATE)
        if content[:9] != b"%08x\n" % zlib.crc32(content[9:]):
            raise CheckpointError(f"{directory / _STATE} is damaged: its checksum is another. {_WAY_OUT}")
        with whole_state(directory):
            state = json.loads(content[9:])
            self._checksums = {str(name): int(crc32) for name, crc32 in state["files"].items()}
            facts = dict(state["facts"])
        theirs = facts.get("run")  # None of one that was saved before replays said so
        if None not in (run, theirs) and theirs != run:
            raise CheckpointError(f"{directory} is the replay of run {theirs}, and not of this one, {run}. {_WAY_OUT}")
        with whole_state(directory):
            return facts, arrays_from_bytes(self._checked(directory, _ARRAYS))

    def load(self, directory: Path, parts: Mapping[str, Rows]) -> None:
        """Fill rows from the chunks that `read_state` found listed. Raises CheckpointError as it does."""
        self._known.clear()
        for part, rows in parts.items():
            for chunk in range(len(rows.used)):
                name = _name(part, chunk)
                rows.used[chunk], rows.touched[chunk] = name in self._checksums, False
                if not rows.used[chunk]:
                    continue
                arrays = arrays_from_bytes(self._checked(directory, name))
                for field, blocks in rows.chunk(chunk):
                    for block, saved in zip(blocks, arrays[field].reshape(rows.num_groups, *blocks[0].shape), strict=True):
                        block[...] = saved
                self._known[name] = _File.of(directory / name, self._checksums[name])

    def _checked(self, directory: Path, name: str) -> bytes:
        content = _read(directory / name)
        if zlib.crc32(content) != self._checksums[name]:
            raise CheckpointError(f"{directory / name} is damaged: its checksum is not the one that was saved. {_WAY_OUT}")
        return content

    def _link(self, name: str, previous: Path, directory: Path) -> bool:
        known = self._known.get(name)
        try:
            if known is None or _File.of(previous / name, known.crc32) != known:
                return False
            os.link(previous / name, directory / name)
        except OSError:  # not there any more, or a file system without links
            return False
        return True


def _name(part: str, chunk: int) -> str:
    return f"{part}-{chunk:03d}.safetensors"


def _write(path: Path, content: bytes) -> _File:
    path.write_bytes(content)
    return _File.of(path, zlib.crc32(content))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
