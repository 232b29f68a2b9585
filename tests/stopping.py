"""Stopping a process, which is done when it stands still, not when the signal is sent: a busy process, or one on a busy machine, runs on for a while."""

from __future__ import annotations

import os
import signal
import time

from shoal.supervision.processes import process_state

WAIT_SECONDS = 300.0


def stop_process(pid: int) -> None:
    """SIGSTOP; returns once it stands still."""
    os.kill(pid, signal.SIGSTOP)
    _until(pid, stopped=True)


def wake_process(pid: int) -> None:
    """SIGCONT; returns once it no longer stands still."""
    os.kill(pid, signal.SIGCONT)
    _until(pid, stopped=False)


def _until(pid: int, stopped: bool) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while (process_state(pid) == "T") != stopped:
        assert process_state(pid) not in (None, "Z"), f"process {pid} is gone"
        assert time.monotonic() < deadline, f"process {pid} was {'not stopped' if stopped else 'not woken'} within {WAIT_SECONDS:g} s"
        time.sleep(0.001)
