"""A run executed again in this process, up to its newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shoal.config import RunConfig
from shoal.engines.replay import replay
from shoal.engines.roles import Blueprint, UserObjects
from shoal.errors import RunError
from shoal.files import CheckpointDirectory, without_replay
from shoal.monitoring.store import RunReader
from shoal.training.facts import run_id
from shoal.types import EnvironmentSpec


def repeat(config: RunConfig, directory: Path, objects: UserObjects, progress: Callable[[int], None]) -> dict[str, Any]:
    """Returns updates, weights_sha256, expected_sha256, equal. Raises as `shoal.replay` does."""
    newest = CheckpointDirectory(directory / "checkpoints").newest(without_replay)
    expected = newest.json("learner")
    _refuse_what_cannot_be(newest.json("coordinator"), directory)
    with RunReader(directory / "run.db") as reader:
        log = dict(reader.consumed())
        spec = EnvironmentSpec.from_json(reader.meta()["spec"])
        given_up = {(event["group"], event["sequence"]): event["places"] for event in reader.events("given_up")}
    threads = torch.get_num_threads()
    torch.set_num_threads(config.learner.threads)
    try:
        sha = replay(Blueprint(config, spec, objects, run_id(directory)), log, int(expected["version"]), progress, given_up)
    finally:
        torch.set_num_threads(threads)
    wanted = expected["weights_sha256"]
    return {"updates": expected["version"], "weights_sha256": sha, "expected_sha256": wanted, "equal": sha == wanted}


def _refuse_what_cannot_be(facts: dict[str, Any], directory: Path) -> None:
    """Raises RunError for a run that did what cannot be executed again. facts: of its newest checkpoint."""
    if facts.get("epoch", 0):
        raise RunError(
            f"{directory.name} diverged once and went back to a checkpoint; what it did since cannot be replayed from the beginning"
        )
    if facts.get("replay_lost", False):
        raise RunError(
            f"{directory.name} went on once from a checkpoint without the replay that it learns from (checkpoint.replay false), and filled it anew; "
            "what it did since cannot be replayed from the beginning"
        )
