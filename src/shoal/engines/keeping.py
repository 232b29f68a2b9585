"""What several learners go on from when one of them is lost: the state after the last update that was told, in memory that outlives them.

Each writes its part before it tells of an update (the first: the state of all; of what it samples from: each for itself), into one of two anonymous
files in turn: so the state of the last update that was told is whole, wherever the writer was killed. Rows of a replay are too many for that: they lie in a
file of their own, and what the update under way changed there is undone by its journal (experience/replay_memory.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from shoal.algorithms.ranks import Ranks, said_by_all
from shoal.errors import LearnersError
from shoal.experience.replay import Replay
from shoal.files import arrays_from_bytes, to_json, whole_state
from shoal.learners.learner import Learner
from shoal.types import Arrays

_FACTS = "facts"
_PIECE_BYTES = 1 << 26  # of what is handed over in one exchange
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


def hand_over(learner: Learner, ranks: Ranks, build: Mapping[str, str]) -> None:
    """All go on from the state of the first, where the others are on machines that have no other way to it. An exchange, as `Ranks.sum` is.

    Args:
      build: what else the bits of a run depend on, of this machine (Blueprint.build_facts).
    Raises:
      LearnersError: the machines differ in that, and the weights would not stay the same; all raise it.
    """
    content = packed(learner.version, *learner.get_state()) if ranks.rank == 0 else b""
    told = hashlib.sha256(to_json(build).encode()).hexdigest()[:12]  # 48 bits, which float64 holds
    said = said_by_all(ranks, [int(told, 16), len(content)])
    unlike = [f"learner-{rank}" for rank in range(ranks.size) if said[rank, 0] != said[0, 0]]
    if unlike:
        raise LearnersError(
            f"the machine of {', '.join(unlike)} computes otherwise than that of learner-0, and their weights would not stay the same; that of "
            f"learner-{ranks.rank} has {dict(build)}: take machines of one kind, or --learners-on driver"
        )
    whole = torch.zeros(int(said[0, 1]), dtype=torch.uint8)
    if ranks.rank == 0:
        whole.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    for begin in range(0, len(whole), _PIECE_BYTES):
        ranks.sum(whole[begin : begin + _PIECE_BYTES])
    if ranks.rank != 0:
        with whole_state(Path("what learner-0 handed over")):
            learner.set_state(*unpacked(whole.numpy().tobytes()))


def packed(version: int, arrays: Arrays, facts: dict[str, Any]) -> bytes:
    """A state as one piece; the inverse is `unpacked`."""
    contents = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    contents[_FACTS] = np.frombuffer(to_json({**facts, "version": version}).encode(), np.uint8)
    return save(contents)


def unpacked(content: bytes) -> tuple[Arrays, dict[str, Any]]:
    """Raises CheckpointError for bytes that are no tensors, KeyError or ValueError for some that are no state."""
    arrays = arrays_from_bytes(content)
    facts: dict[str, Any] = json.loads(arrays.pop(_FACTS).tobytes())
    return arrays, facts


def _write(fds: Files, version: int, arrays: Arrays, facts: dict[str, Any]) -> None:
    left, fd, place = memoryview(packed(version, arrays, facts)), fds[version % 2], 0
    os.ftruncate(fd, len(left))
    while left:
        written = os.pwrite(fd, left, place)
        left, place = left[written:], place + written


def _read(fds: Files, version: int) -> tuple[Arrays, dict[str, Any]]:
    fd, parts, place = fds[version % 2], [], 0
    while part := os.pread(fd, 1 << 30, place):
        parts.append(part)
        place += len(part)
    with whole_state(_name(version)):
        arrays, facts = unpacked(b"".join(parts))
        if facts["version"] != version:
            raise ValueError(f"it holds version {facts['version']}")
        return arrays, facts


def _name(version: int) -> Path:
    return Path(f"the state of update {version} in memory")
