"""A user's own algorithms, taken by their import path: APPO that writes down which stamps it trained, and PPO that dies while it is saved."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
from torch import Tensor

from exactness.environments import STAMP, stamps_of
from shoal.algorithms.appo import APPO
from shoal.algorithms.base import UpdateContext
from shoal.algorithms.ppo import PPO
from shoal.config import APPOConfig, PPOConfig
from shoal.experience.batch import Batch

DEATHS = "SHOAL_TEST_DEATHS"  # environment variable: a directory, with a file for each death that is still to come: LEARNER-6, RUN-40
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


class DyingConfig(PPOConfig):
    name: str = "dying"  # type: ignore[assignment]


class DyingPPO(PPO):
    """PPO that is killed, or kills the whole run, in the middle of the checkpoints that the files in DEATHS name by their update."""

    Config = DyingConfig
    num_updates = 0

    def update(self, batch: Batch, context: UpdateContext) -> dict[str, float]:
        self.num_updates = context.update + 1
        return super().update(batch, context)

    def get_state(self) -> dict[str, Tensor]:
        for who, pid in (("LEARNER", os.getpid()), ("RUN", _supervisor())):
            order = Path(os.environ[DEATHS]) / f"{who}-{self.num_updates}"
            if order.exists():
                order.unlink()
                os.kill(pid, signal.SIGKILL)
                signal.pause()
        return super().get_state()


def _supervisor() -> int:
    """The parent of the helper process that this learner was forked from."""
    return int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1])
