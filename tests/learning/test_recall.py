"""With a memory every algorithm learns to answer with a cue that was shown some steps before, through the engine; without one it guesses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.monitoring.live import SilentView

RECALL = f"{Path(__file__).parents[2] / 'examples' / 'memory.py'}:Recall"
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"epochs": 4, "minibatch_size": 256},
    "appo": {"epochs": 4, "minibatch_size": 256},
    "impala": {"minibatch_size": 256},
}


def share_of_right_answers(directory: Path, algorithm: str, memory: str, updates: int) -> float:
    """An answer, one of two, is asked for three steps after the cue."""
    run = shoal.train(
        RECALL,
        env={"kwargs": {"cues": 2, "delay": 3}},
        algorithm={"name": algorithm, "learning_rate": 3e-3, "gamma": 0.9, "entropy_coefficient": 0.01, **SETTINGS[algorithm]},
        policy={"memory": memory, "hidden_sizes": [16], **({} if memory == "none" else {"memory_size": 16})},
        sampling={"groups": 2, "group_size": 16, "rollout_length": 32},
        stop={"return": 0.98, "updates": updates},
        actors=0,
        mode="sync",
        run_dir=str(directory),
        checkpoint={"every_seconds": None},
        progress=SilentView(sys.stderr),
    )
    return float(run.evaluate(episodes=100)["mean_return"])


@pytest.mark.parametrize(("algorithm", "memory"), [("ppo", "lstm"), ("appo", "gru"), ("impala", "lstm")])
def test_a_cue_is_remembered(algorithm: str, memory: str, tmp_path: Path) -> None:
    assert share_of_right_answers(tmp_path / "run", algorithm, memory, 100) >= 0.95


def test_without_a_memory_it_is_guessed(tmp_path: Path) -> None:
    assert share_of_right_answers(tmp_path / "run", "ppo", "none", 20) <= 0.7
