"""Where whole runs live, and where the soak writes what it found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SOAK_LOG = "SHOAL_SOAK_LOG"  # environment variable: file to which each soak test appends one line of JSON


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One directory for all test processes of this session."""
    base = tmp_path_factory.getbasetemp()
    place = (base if worker_id == "master" else base.parent) / "exactness"
    place.mkdir(exist_ok=True)
    return place


@pytest.fixture
def soaked() -> Callable[..., None]:
    """Adds a row to the soak's result."""

    def add(**row: Any) -> None:
        if path := os.environ.get(SOAK_LOG):
            with Path(path).open("a") as file:
                file.write(json.dumps(row) + "\n")

    return add
