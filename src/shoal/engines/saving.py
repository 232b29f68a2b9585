"""The learner's part of a checkpoint: its state, and the policy as a bundle that can be used without anything else."""

from __future__ import annotations

from pathlib import Path

from shoal.engines.roles import Blueprint
from shoal.evaluation.bundle import save_bundle
from shoal.files import load_checkpoint, to_json, whole_state, write_arrays
from shoal.learners.learner import Learner
from shoal.learners.replay_learner import ReplayLearner

REPLAY = "replay"


def save_learner(learner: Learner, directory: Path, blueprint: Blueprint, previous: Path | None = None) -> None:
    """Write `learner.safetensors`, `learner.json` and the bundle `policy/` into a checkpoint in the making, and what the learner samples from, in
    `replay/`. Raises OSError.

    Args:
      previous: the checkpoint before, whose files of the replay are taken over where nothing changed in them.
    """
    arrays, facts = learner.get_state()
    write_arrays(directory / "learner.safetensors", arrays)
    facts["weights_sha256"] = learner.weights_sha256
    (directory / "learner.json").write_text(to_json(facts), encoding="utf-8")
    save_bundle(
        directory / "policy", learner.policy_arrays, blueprint.spec, blueprint.config.policy, blueprint.config.env, blueprint.network_kind
    )
    if isinstance(learner, ReplayLearner) and blueprint.config.checkpoint.replay:
        before = None if previous is None else previous / REPLAY
        (directory / REPLAY).mkdir(exist_ok=True)
        learner.replay.save(directory / REPLAY, before if before is not None and before.is_dir() else None)


def load_learner(learner: Learner, path: Path) -> None:
    """Go on from a committed checkpoint, whose hashes are verified as it is read. Raises CheckpointError where it does not fit."""
    loaded = load_checkpoint(path)
    arrays, facts = loaded.arrays("learner"), loaded.json("learner")
    with whole_state(loaded.path):
        learner.set_state(arrays, facts)
        if isinstance(learner, ReplayLearner) and (path / REPLAY).is_dir():
            learner.replay.load(path / REPLAY)
