"""Asking a run that has no place for one more question."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from shoal.errors import RunError
from shoal.supervision.control import NAME, ask


def test_a_run_with_too_many_waiting_connections_is_busy(tmp_path: Path) -> None:
    waiting = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / NAME))
        listener.listen(0)
        for _ in range(2):
            waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            waiting[-1].setblocking(False)
            try:
                waiting[-1].connect(str(tmp_path / NAME))
            except BlockingIOError:
                break
        with pytest.raises(RunError, match=r"too many connections waiting|did not answer within 0\.2 s"):
            ask(tmp_path, {"ask": "state"}, timeout_seconds=0.2)
        for one in waiting:
            one.close()
