"""A user's own algorithm, taken by its import path: APPO that writes down which stamps it trained, and with which lag."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from shoal.algorithms.appo import APPO
from shoal.algorithms.base import UpdateContext
from shoal.config import APPOConfig
from shoal.experience.batch import Batch

from exactness.environments import STAMP, stamps_of

RECORD = "SHOAL_TEST_RECORD"  # environment variable: the directory into which updates are written
TRAINED = np.dtype([("stamp", STAMP), ("lag", np.int64)])


class RecordingConfig(APPOConfig):
    name: str = "recording"  # type: ignore[assignment]


class RecordingAPPO(APPO):
    """One file per update; an update that is made again after a roll-back replaces it."""

    Config = RecordingConfig

    def update(self, batch: Batch, context: UpdateContext) -> dict[str, float]:
        directory = Path(os.environ[RECORD])
        valid = batch.valid_TN.numpy()
        rows = np.empty(int(valid.sum()), TRAINED)
        rows["stamp"] = stamps_of(batch.observation["observation"].numpy()[:-1])[valid]
        rows["lag"] = batch.policy_lag_TN.numpy()[valid]
        aside = directory / f".{os.getpid()}"
        rows.tofile(aside)
        aside.replace(directory / f"{context.update:06d}")
        return super().update(batch, context)


def trained_in(directory: Path) -> list[np.ndarray[tuple[int], np.dtype[np.void]]]:
    """TRAINED records of each update, in order. Raises AssertionError where an update is missing."""
    files = sorted(file for file in directory.iterdir() if not file.name.startswith("."))
    assert [int(file.name) for file in files] == list(range(len(files)))
    return [np.fromfile(file, TRAINED) for file in files]
