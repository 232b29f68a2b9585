"""What may change where a run is gone on with, and whether there is anything to go on with."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.config import RunConfig
from shoal.errors import CheckpointError, ConfigError
from shoal.files import CheckpointDirectory, without_replay


def is_over(directory: Path, result: Mapping[str, Any]) -> bool:
    """Whether a run ended by its stop condition, and stands where its result says."""
    if result.get("reason") in (None, "interrupted"):
        return False
    with contextlib.suppress(CheckpointError):
        return CheckpointDirectory(directory / "checkpoints").newest(without_replay).update == result.get("updates")
    return False


def refuse_changes(before: RunConfig, now: RunConfig) -> None:
    """Only how a run ends, where its roles run and how it saves may change on the way."""
    free = {"stop", "engine", "ray", "actors", "autoscale", "checkpoint", "evaluation", "run_dir", "preset", "device"}
    old, new = (_flat({k: v for k, v in c.model_dump(mode="json", by_alias=True).items() if k not in free}) for c in (before, now))
    for key in old | new:
        if old.get(key) != new.get(key):
            raise ConfigError(f"{key} was {old.get(key)} when the run began and cannot become {new.get(key)}; start a new run for it")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
