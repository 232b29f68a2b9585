"""What several learners go on from when one of them is lost: the state after the last update that was told, in memory that outlives them.

Each writes its part before it tells of an update (the first: the state of all; of what it samples from: each for itself), into one of two anonymous
files in turn: so the state of the last update that was told is whole, wherever the writer was killed. Rows of a replay are too many for that: they lie in a
file of their own, and what the update under way changed there is undone by its journal (experience/replay_memory.py).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from shoal.experience.replay import Replay
from shoal.files import arrays_from_bytes, to_json, whole_state
from shoal.learners.learner import Learner
from shoal.types import Arrays

_FACTS = "facts"
Files = tuple[int, int]


def keep(learner: Learner, fds: Files) -> None:
    """Write the state of its version."""
    _write(fds, learner.version, *learner.get_state())


def load_kept(learner: Learner, fds: Files, version: int) -> None:
    """Go on from the state that was kept of this version. Raises CheckpointError where that is not what lies there."""
    arrays, facts = _read(fds, version)
    with whole_state(_name(version)):
        learner.set_state(arrays, facts)


def keep_replay(replay: Replay, fds: Files, version: int) -> None:
    """Write what is to be known of a replay, besides what lies in its memory, once this version was made."""
    arrays, facts = replay.kept_state()
    _write(fds, version, arrays, {"replay": facts})


def load_kept_replay(replay: Replay, fds: Files, version: int) -> None:
    """Go on from the memory that a replay left, as it was once this version was made. Raises CheckpointError where that is not what lies there."""
    arrays, facts = _read(fds, version)
    with whole_state(_name(version)):
        replay.go_on(arrays, facts["replay"], version)


def _write(fds: Files, version: int, arrays: Arrays, facts: dict[str, Any]) -> None:
    contents = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    contents[_FACTS] = np.frombuffer(to_json({**facts, "version": version}).encode(), np.uint8)
    left, fd, place = memoryview(save(contents)), fds[version % 2], 0
    os.ftruncate(fd, len(left))
    while left:
        written = os.pwrite(fd, left, place)
        left, place = left[written:], place + written


def _read(fds: Files, version: int) -> tuple[Arrays, dict[str, Any]]:
    fd, parts, place = fds[version % 2], [], 0
    while part := os.pread(fd, 1 << 30, place):
        parts.append(part)
        place += len(part)
    arrays = arrays_from_bytes(b"".join(parts))
    with whole_state(_name(version)):
        facts: dict[str, Any] = json.loads(arrays.pop(_FACTS).tobytes())
        if facts["version"] != version:
            raise ValueError(f"it holds version {facts['version']}")
        return arrays, facts


def _name(version: int) -> Path:
    return Path(f"the state of update {version} in memory")
