"""Whose checkpoints these are: `run.json`, beside the directory of the checkpoints, has the run's id."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeGuard

FACTS = "run.json"
_ID = re.compile("[0-9a-f]{32}")


def run_beside(root: Path) -> str | None:
    """The id of the run whose checkpoints lie in `root`; None where nothing says it."""
    try:
        return run_named((root.parent / FACTS).read_bytes())
    except OSError:
        return None


def run_named(facts: bytes | None) -> str | None:
    """The id that the content of a `run.json` gives; None where there is none, or it is damaged."""
    try:
        run = None if facts is None else json.loads(facts).get("run_id")
    except (ValueError, AttributeError, RecursionError):
        return None
    return run if is_run_id(run) else None


def is_run_id(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and _ID.fullmatch(value) is not None
