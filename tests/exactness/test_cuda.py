"""A learner on a GPU: every algorithm learns there what it learns on the processor, up to rounding, and a resumed run goes on there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.files import CheckpointDirectory

from .harness import TASKS, shoal, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
UPDATES = 4
CUDA_TASKS = {
    **{name: arguments for name, arguments in TASKS.items() if name != "learners"},
    "appo": ["CartPole-v1", *TASKS["cartpole"][1:], "--algorithm", "appo", "--mode", "sync"],
    "impala": ["CartPole-v1", "--preset", "none", "--algorithm", "impala", "--mode", "sync"],
    "appo-memory": [*TASKS["memory"], "--algorithm", "appo", "--mode", "sync"],
}


def weights(run: Path) -> np.ndarray:
    """All that the learner learned: the policy, and critics where there are some."""
    arrays = CheckpointDirectory(run / "checkpoints").newest().arrays("learner")
    kept = [name for name in sorted(arrays) if name.startswith("policy/") or name.endswith("/flat")]
    return np.concatenate([arrays[name].reshape(-1) for name in kept])


@pytest.mark.parametrize("task", CUDA_TASKS)
def test_a_gpu_learns_what_the_processor_learns(task: str, tmp_path: Path) -> None:
    def trained(device: str, updates: int) -> tuple[np.ndarray, dict[str, object]]:
        run = tmp_path / f"{device}-{updates}"
        result = train([*CUDA_TASKS[task], "--device", device, "--stop.updates", str(updates), "--actors", "2"], run).result
        return weights(run), result

    there, result = trained("cuda", UPDATES)
    here, _ = trained("cpu", UPDATES)
    before, _ = trained("cpu", 1)
    moved = np.linalg.norm(here - before)
    assert moved > 0
    # Actions are the same as long as no two are nearly equally likely: what differs is rounding, far below what was learned.
    assert np.linalg.norm(there - here) < 0.02 * moved
    assert math.isfinite(float(str(result["mean_return"])))


@pytest.mark.parametrize("task", ["cartpole", "dqn", "sac", "r2d2"])
def test_a_run_on_a_gpu_is_resumed(task: str, tmp_path: Path) -> None:
    args = [*CUDA_TASKS[task], "--device", "cuda", "--actors", "2"]
    whole = train([*args, "--stop.updates", "8"], tmp_path / "whole")
    train([*args, "--stop.updates", "4"], tmp_path / "half")
    resumed = shoal("resume", str(tmp_path / "half"), "--stop.updates", "8", log=tmp_path / "resumed.log")
    assert resumed["updates"] == 8
    assert resumed["ledger"] == whole.result["ledger"]
    difference = np.linalg.norm(weights(tmp_path / "half") - weights(tmp_path / "whole"))
    assert difference < 1e-3 * np.linalg.norm(weights(tmp_path / "whole"))
