"""A learner's part of a checkpoint: its state, and the policy as a bundle that can be used without anything else.

Of several learners the first writes what all hold alike, and each what it samples from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.engines.roles import Blueprint
from shoal.errors import CheckpointError
from shoal.evaluation.bundle import save_bundle
from shoal.files import REPLAY, everything, load_checkpoint, to_json, whole_state, without_replay, write_arrays
from shoal.learners.learner import Learner
from shoal.learners.replay_learner import ReplayLearner


def save_learner(learner: Learner, directory: Path, blueprint: Blueprint, previous: Path | None = None) -> None:
    """Write `learner.safetensors`, `learner.json` and the bundle `policy/` into a checkpoint in the making, and what the learner samples from, in
    `replay/` (of several learners: in a directory of its own there). Raises OSError.

    Args:
      previous: the checkpoint before, whose files of the replay are taken over where nothing changed in them.
    """
    if learner.rank == 0:
        arrays, facts = learner.get_state()
        write_arrays(directory / "learner.safetensors", arrays)
        facts["weights_sha256"] = learner.weights_sha256
        (directory / "learner.json").write_text(to_json(facts), encoding="utf-8")
        save_bundle(
            directory / "policy",
            learner.policy_arrays,
            blueprint.spec,
            blueprint.config.policy,
            blueprint.config.env,
            blueprint.network_kind,
        )
    if isinstance(learner, ReplayLearner) and blueprint.config.checkpoint.replay:
        place = replay_place(learner.rank, blueprint.config.learners)
        before = None if previous is None else previous / place
        for made in (REPLAY, place):
            (directory / made).mkdir(exist_ok=True)
        learner.replay.save(directory / place, before if before is not None and before.is_dir() else None)


def load_learner(learner: Learner, path: Path, learners: int, *, replay: bool = True) -> None:
    """Go on from a committed checkpoint, whose hashes are verified as it is read. Raises CheckpointError where it does not fit.

    learners: of the run. replay: whether what is there of it to learn from is whole, and to be read.
    """
    loaded = load_checkpoint(path, wanted=everything if replay else without_replay)
    arrays, facts = loaded.arrays("learner"), loaded.json("learner")
    with whole_state(loaded.path):
        learner.set_state(arrays, facts)
        if replay and isinstance(learner, ReplayLearner) and (path / REPLAY).is_dir():
            learner.replay.load(path / replay_place(learner.rank, learners))
            _check_replay(learner, loaded.json("coordinator"), path, learners)


def _check_replay(learner: ReplayLearner, facts: dict[str, Any], path: Path, learners: int) -> None:
    """Raise CheckpointError where what it samples from is not what went in up to this checkpoint. facts: of the supervisor, whose ledger and limiter count that."""
    replay, inserted = learner.replay, int(facts["limiter"]["inserted"])
    groups = [int(group["sequence"]) for group in facts["groups"][learner.rank :: learners]]
    gone_in = all(held in (-1, due) for held, due in zip(replay.next_sequences, groups, strict=True))
    if not gone_in or (learners == 1 and replay.inserted_steps != inserted):
        raise CheckpointError(
            f"{path / replay_place(learner.rank, learners)} is not the replay of this checkpoint: it holds other rollouts than were consumed up to "
            f"update {facts['version']:,} ({replay.inserted_steps:,} env steps went in; {inserted:,}{' in all' if learners > 1 else ''} are due). "
            f"Move {path} away, and `shoal resume` goes on from the one before"
        )


def replay_place(rank: int, learners: int) -> str:
    """Where in a checkpoint the replay of one of so many learners lies. One that was saved by another number of them is not found."""
    return REPLAY if learners == 1 else f"{REPLAY}/{rank}-of-{learners}"
