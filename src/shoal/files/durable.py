"""Files that are whole or as they were, also after a loss of power."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from shoal.errors import RunError


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
        sync(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {os.strerror(error.errno or errno.EIO)}") from error


def sync(path: Path) -> None:
    """What was written to a file, or the names in a directory, survives a loss of power. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
