"""`shoal control`, `shoal scale` and `shoal stalls`: one request to a living run, through the socket in its directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.errors import RunError
from shoal.locks import run_holder
from shoal.supervision.control import NAME, ask
from shoal.supervision.processes import process_state


def tell_run(directory: Path, command: str, what: Mapping[str, Any] | None = None, timeout_seconds: float = 60.0) -> dict[str, Any]:
    """The run's answer to a command; `what` goes with it. Raises RunError where it is not alive, takes no requests, or refuses."""
    holder = run_holder(directory)
    if holder is None:
        raise RunError(f"{directory.name} is not running, so there is nobody to tell; `shoal resume {directory}` goes on with it")
    if not (directory / NAME).exists():
        raise RunError(
            f"{directory.name} (process {holder}) takes no requests: it is starting or ending, or runs all roles in its own process (actors: 0)"
        )
    request: dict[str, Any] = {"command": command, **(what or {})}
    _refuse_stopped(directory, holder)
    try:
        return ask(directory, request, timeout_seconds)
    except RunError:
        _refuse_stopped(directory, holder)  # it may just have been
        raise


def _refuse_stopped(directory: Path, holder: int) -> None:
    if process_state(holder) == "T":
        raise RunError(f"{directory.name} is stopped as a whole: its supervisor got SIGSTOP; `kill -CONT {holder}` lets it go on")
