"""A cluster of Ray in a process of its own, for tests that join it from others: it stands until its standard input ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT_SECONDS = 300.0
TRIES = 3  # Ray gives its own processes half a minute to come up


@contextmanager
def standing_cluster(script: str, *arguments: str, environment: dict[str, str], cwd: Path) -> Iterator[str]:
    """What the script prints first, which is where the cluster is found. Ray's own reaper sees to what the script leaves."""
    command = [sys.executable, "-c", script, *arguments]
    for _ in range(TRIES):
        started = subprocess.Popen(command, env=environment, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert started.stdout is not None
            if found := started.stdout.readline().strip():
                yield found
                return
        finally:
            _end(started)
    raise AssertionError("no cluster was started")


def _end(started: subprocess.Popen[str]) -> None:
    assert started.stdin is not None
    assert started.stdout is not None
    started.stdin.close()
    started.stdout.close()
    try:
        started.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        started.kill()
