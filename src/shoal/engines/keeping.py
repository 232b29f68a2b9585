"""What several learners go on from when one of them is lost: the state after the last update that was told, in memory that outlives them.

The first learner writes it before it tells of an update, into one of two anonymous files in turn: so the state of the last update that was told is
whole, wherever the writer was killed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from shoal.files import arrays_from_bytes, to_json, whole_state
from shoal.learners.learner import Learner

_FACTS = "facts"


def keep(learner: Learner, fds: tuple[int, int]) -> None:
    """Write the state of its version."""
    arrays, facts = learner.get_state()
    contents = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    contents[_FACTS] = np.frombuffer(to_json(facts).encode(), np.uint8)
    left, fd, place = memoryview(save(contents)), fds[learner.version % 2], 0
    os.ftruncate(fd, len(left))
    while left:
        written = os.pwrite(fd, left, place)
        left, place = left[written:], place + written


def load_kept(learner: Learner, fds: tuple[int, int], version: int) -> None:
    """Go on from the state that was kept of this version. Raises CheckpointError where that is not what lies there."""
    fd, parts, place = fds[version % 2], [], 0
    while part := os.pread(fd, 1 << 30, place):
        parts.append(part)
        place += len(part)
    arrays = arrays_from_bytes(b"".join(parts))
    with whole_state(Path(f"the state of update {version} in memory")):
        facts = json.loads(arrays.pop(_FACTS).tobytes())
        if facts["version"] != version:
            raise ValueError(f"it holds version {facts['version']}")
        learner.set_state(arrays, facts)
