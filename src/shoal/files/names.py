"""The names of checkpoints: `update-000000123`, and of an update that was saved again `update-000000123.1`."""

from __future__ import annotations

import re
from pathlib import Path

REPLAY = "replay"  # the part of a checkpoint that a run learns from; nobody else needs it
_COMMITTED = re.compile(r"update-(\d{9,18})(?:\.(\d{1,9}))?")


def committed(root: Path) -> list[tuple[int, int, Path]]:
    """(update, revision, path) of every committed checkpoint, oldest first."""
    if not root.is_dir():
        return []
    named = ((checkpoint_place(path.name), path) for path in root.iterdir())
    return sorted((*place, path) for place, path in named if place)


def everything(file: str) -> bool:
    """Which files of a checkpoint are wanted: all."""
    return True


def without_replay(file: str) -> bool:
    """Which files of a checkpoint are wanted: those that everybody needs who does not go on learning from it."""
    return not file.startswith(f"{REPLAY}/")


def checkpoint_place(name: str) -> tuple[int, int] | None:
    """Update and revision of a checkpoint of this name; None where it is the name of none."""
    match = _COMMITTED.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def checkpoint_name(update: int, revision: int) -> str:
    """The inverse of `checkpoint_place`."""
    return f"update-{update:09d}" + (f".{revision}" if revision else "")
