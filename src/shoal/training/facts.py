"""`run.json` of a run: its id, how often it was begun, and by which build. What else the bits of a run depend on."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from shoal.errors import RunError
from shoal.files import FACTS, CheckpointDirectory, write_text_atomically


def known_facts(directory: Path) -> dict[str, Any]:
    """Empty where the file is not there yet. Raises RunError where it is damaged."""
    path = directory / FACTS
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        bytes.fromhex(known.get("run_id", ""))
    except (ValueError, AttributeError, TypeError) as error:
        raise RunError(
            f"{path} is damaged: {error}. Move it away and resume again: the run goes on, and its builds are not compared"
        ) from error
    return dict(known)


def run_id(directory: Path) -> bytes:
    """16 bytes that name the run in every envelope and checkpoint; made once. Where the file is lost, its checkpoints have it still."""
    known = known_facts(directory)
    if "run_id" not in known:
        known["run_id"] = CheckpointDirectory(directory / "checkpoints").named_run() or secrets.token_hex(16)
        write_text_atomically(directory / FACTS, json.dumps(known))
    return bytes.fromhex(known["run_id"])
