"""Sections of soak_files.py: ends of runs, wanted and not, and what is left of them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from endured import ENDLESS, ROOT, Row  # first: it finds the tests' helpers

from faults.living import TINY, Living, command, living, saved
from shoal.files import CheckpointDirectory

SIMULATED = str(ROOT / "tests" / "faults" / "simulated.py") + ":make"
PROMISED_SECONDS = 3.0  # from Ctrl-C to the end
GONE_SECONDS = 2.0


def cycles(scale: float) -> Iterator[Row]:
    """Start, train, Ctrl-C; every fifth with simulators of the environment's own."""
    times, before, seconds = max(2, round(200 * scale)), in_shared_memory(), []
    semaphores = semaphore_sets()
    with tempfile.TemporaryDirectory() as place:
        for number in range(times):
            environment = SIMULATED if number % 5 == 0 else "CartPole-v1"
            run_directory = Path(place) / f"run{number}"
            with living("train", environment, *ENDLESS, "--actors", "2", "--run-dir", str(run_directory), cwd=Path(place)) as run:
                run.until(lambda: len(saved(run_directory)) > 1, "checkpoint")  # noqa: B023
                begun = time.monotonic()
                run.process.send_signal(signal.SIGINT)
                assert run.ends() == 130, run.said[-2000:]
                seconds.append(round(time.monotonic() - begun, 3))
                run.gone(GONE_SECONDS)
            assert not CheckpointDirectory(run_directory / "checkpoints").newest().warnings
            shutil.rmtree(run_directory)
    assert in_shared_memory() <= before
    assert semaphore_sets() <= semaphores
    yield cycles_row(seconds)


def cycles_row(seconds: list[float]) -> Row:
    late = sum(one > PROMISED_SECONDS for one in seconds)
    return Row(
        "start, train, Ctrl-C", len(seconds),
        f"code 130 and a checkpoint within {PROMISED_SECONDS:g} s; no process, /dev/shm entry or semaphore is left",
        f"p50 {percentile(seconds, 50):.2f} s, p99 {percentile(seconds, 99):.2f} s, {late} over {PROMISED_SECONDS:g} s",
        late <= len(seconds) // 100, seconds,
    )  # fmt: skip


def kills(scale: float) -> Iterator[Row]:
    """kill -9 of the parent at any moment, from its first line on; simulators included."""
    times, before, rng, seconds = max(2, round(50 * scale)), in_shared_memory(), random.Random(), []
    semaphores = semaphore_sets()
    with tempfile.TemporaryDirectory() as place:
        for number in range(times):
            run_directory = Path(place) / f"run{number}"
            with living("train", SIMULATED, *ENDLESS, "--actors", "2", "--run-dir", str(run_directory), cwd=Path(place)) as run:
                if rng.random() < 0.3:
                    time.sleep(rng.random() * 4)
                else:
                    run.until(lambda: len(saved(run_directory)) > 0, "checkpoint")  # noqa: B023
                    time.sleep(rng.random())
                begun = time.monotonic()
                run.process.kill()
                run.process.wait()
                run.gone(GONE_SECONDS)
                seconds.append(round(time.monotonic() - begun, 3))
            if saved(run_directory):
                newest = CheckpointDirectory(run_directory / "checkpoints").newest()
                if number % 5 == 0:
                    code, _, said = command("resume", str(run_directory), "--stop.updates", str(newest.update + 1), cwd=Path(place))
                    assert code == 0, said
    assert in_shared_memory() <= before
    assert semaphore_sets() <= semaphores
    yield kills_row(seconds)


def kills_row(seconds: list[float]) -> Row:
    return Row(
        "kill -9 of the parent, with simulators", len(seconds), f"nothing is left after {GONE_SECONDS:g} s; `resume` works, where there is a checkpoint",
        f"gone after p50 {percentile(seconds, 50):.2f} s, at most {max(seconds):.2f} s; every fifth resumed", seconds=seconds,
    )  # fmt: skip


def together(scale: float) -> Iterator[Row]:
    """Ten runs at once, in directories that are named after the same second: each ends with the weights that it has alone."""
    args = ["train", "CartPole-v1", *TINY, "--actors", "1", "--stop.updates", "10", "--json", "--view", "silent"]
    with tempfile.TemporaryDirectory() as place:
        _, out, _ = command(*args, cwd=Path(place))
        alone = json.loads(out)["weights_sha256"]
        runs = [Living(args, Path(place), f"together{n}") for n in range(10)]
        results = []
        for run in runs:
            out, _ = run.process.communicate(timeout=600)
            results.append(json.loads(out))
            run.gone(2.0)
        assert len({result["run"] for result in results}) == 10
        same = sum(result["weights_sha256"] == alone for result in results)
    yield Row("ten runs at once", 10, "each ends with the weights that it has alone", f"{same} of 10", same == 10)


def in_shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def semaphore_sets() -> set[str]:
    """System V semaphores; named POSIX ones are files in /dev/shm."""
    path = Path("/proc/sysvipc/sem")
    return {line.split()[1] for line in path.read_text().splitlines()[1:]} if path.exists() else set()


def percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]
