"""Where whole runs live, and where the soak writes what it found."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SOAK_LOG = "SHOAL_SOAK_LOG"  # environment variable: file to which each soak test appends a line of JSON


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """One directory for all test processes of this session."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if hasattr(request.config, "workerinput") else base) / "exactness"
    place.mkdir(exist_ok=True)
    return place


@pytest.fixture
def soaked(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Says what a soak test found; it is written when the test is over, as a row that failed where nothing was said."""
    row: dict[str, Any] = {}
    begun = time.monotonic()
    yield lambda **found: row.update(found)
    if path := os.environ.get(SOAK_LOG):
        with Path(path).open("a") as file:
            line = {"test": request.node.name, "passed": bool(row), "seconds": time.monotonic() - begun, **row}
            file.write(json.dumps(line) + "\n")
