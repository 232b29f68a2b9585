"""Runs of the command line in processes of their own, what is left of them, and disks that can be filled."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from held import Line
from shoal.errors import RunError
from shoal.monitoring.store import RunReader

SMALL = [
    "--preset", "none", "--sampling.groups", "2", "--sampling.group-size", "2", "--sampling.rollout-length", "16", "--policy.hidden-sizes", "8"
]  # fmt: skip
TINY = [*SMALL, "--algorithm.epochs", "1", "--algorithm.minibatch-size", "64"]
SOURCES = [str(Path(__file__).resolve().parents[2] / "src"), str(Path(__file__).resolve().parents[1])]
WAIT_SECONDS = 300.0
GONE_SECONDS = 120.0  # a busy machine takes its time to bury processes; benchmarks/soak_files.py measures how long
MARK = "SHOAL_TEST_MARK"


class Living:
    """One command, its standard error in a file, and every process that descends from it (by a mark in their environment). `limits`: a command before it, such as prlimit.
    `line`: it waits after every update (tests/held.py)."""

    def __init__(self, args: Sequence[str], cwd: Path, mark: str, limits: Sequence[str] = (), line: Line | None = None) -> None:
        self.mark = f"{MARK}={mark}-{os.getpid()}-{time.monotonic_ns()}"
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TERM": "dumb", name: value}
        environment["PYTHONPATH"] = os.pathsep.join([*SOURCES, environment.get("PYTHONPATH", "")])
        self.log = cwd / f"{value}.err"
        with self.log.open("wb") as errors:
            how: dict[str, Any] = {"cwd": cwd, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
            if line is not None:
                self.process = line.start(args, environment, **how)
            else:
                command = [*limits, sys.executable, "-m", "shoal.cli", *args]
                self.process = subprocess.Popen(command, env=environment, text=True, **how)

    @property
    def said(self) -> str:
        """Standard error so far."""
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}:\n{self.said[-4000:]}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.said[-4000:]}"
            time.sleep(0.02)

    def ends(self, seconds: float = WAIT_SECONDS) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {seconds} s:\n{self.said[-4000:]}") from None

    def left(self) -> list[int]:
        """Living processes that were made by it, itself included; zombies are dead."""
        return [pid for pid, environ in _environments() if self.mark.encode() in environ and _state(pid) not in "ZX"]

    def gone(self, seconds: float = GONE_SECONDS) -> None:
        """Nothing of it is left within this time."""
        deadline = time.monotonic() + seconds
        while (pids := self.left()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not pids, f"{len(pids)} processes were left: {[_named(pid) for pid in pids]}"

    def close(self) -> None:
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


@contextlib.contextmanager
def living(*args: str, cwd: Path, mark: str = "run", limits: Sequence[str] = (), line: Line | None = None) -> Iterator[Living]:
    run = Living(args, cwd, mark, limits, line)
    try:
        yield run
    finally:
        run.close()


def command(*args: str, cwd: Path, seconds: float = WAIT_SECONDS) -> tuple[int, str, str]:
    """One command from its beginning to its end: code, standard output, standard error."""
    with living(*args, cwd=cwd) as run:
        out, _ = run.process.communicate(timeout=seconds)
        return run.process.returncode, out, run.said


def _environments() -> Iterator[tuple[int, list[bytes]]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry), Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _named(pid: int) -> str:
    with contextlib.suppress(OSError):
        return f"{pid} {Path(f'/proc/{pid}/comm').read_text().strip()} {_state(pid)}"
    return f"{pid} gone"


def saved(run: Path) -> list[str]:
    """Names of the committed checkpoints."""
    place = run / "checkpoints"
    return sorted(name for name in os.listdir(place) if name.startswith("update-")) if place.is_dir() else []


def newest(run: Path) -> int:
    """Update of the newest committed checkpoint, -1 where there is none: by its name, since a living run may remove it at any moment."""
    return max((int(name[7:16]) for name in saved(run)), default=-1)


def updates_of(run: Path) -> int:
    """Updates that are in the database of a run, living or not; 0 before the first."""
    with contextlib.suppress(RunError), RunReader(run / "run.db") as reader:
        point = reader.progress()
        return 0 if point is None else point.update
    return 0


class Disk:
    """A small file system of its own that can be filled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fill = path / "fill"

    def fill(self) -> None:
        """Take what room there is; whoever uses the disk may make more, so that it has to be done again."""
        with contextlib.suppress(OSError), self._fill.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        self._fill.unlink()


@contextlib.contextmanager
def small_disk(path: Path, size_kib: int = 16_384) -> Iterator[Disk]:
    """Skips the test where nothing may be mounted."""
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
