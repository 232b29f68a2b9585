"""Sections of soak_files.py: a disk that is full, and too few file descriptors."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from endured import ENDLESS, ROOT, Row, Skipped  # first: it finds the tests' helpers

from faults.living import TINY, Living, living, saved, small_disk
from shoal.files import CheckpointDirectory

SMALL_KIB, LARGE_KIB = 16_384, 262_144  # of disks; what an environment prints in a minute fills the small one


def disk(scale: float) -> Iterator[Row]:
    """Full while the run goes on, again and again, in both engines."""
    with tempfile.TemporaryDirectory() as place:
        for actors, environment in (("0", "CartPole-v1"), ("1", str(ROOT / "tests" / "faults" / "chatty.py") + ":make")):
            times = max(1, round(10 * scale))
            with mounted(Path(place) / f"disk{actors}", LARGE_KIB if "chatty" in environment else SMALL_KIB) as small:
                run_directory = small.path / "run"
                with living("train", environment, *ENDLESS, "--actors", actors, "--run-dir", str(run_directory), cwd=Path(place)) as run:
                    run.until(lambda: len(saved(run_directory)) > 1, "checkpoint")  # noqa: B023
                    for _ in range(times):
                        alarms = run.said.count("no checkpoint could be saved")
                        small.fill()
                        run.until(lambda: run.said.count("no checkpoint could be saved") > alarms, "alarm")  # noqa: B023
                        CheckpointDirectory(run_directory / "checkpoints").newest()
                        before = saved(run_directory)
                        small.free()
                        run.until(lambda: saved(run_directory) and saved(run_directory)[-1] > before[-1], "checkpoint")  # noqa: B023
                        time.sleep(1.1)  # so that the next failing is said again
                    run.process.send_signal(signal.SIGINT)
                    assert run.ends() == 130, run.said[-2000:]
                yield Row(
                    f"disk full under a living run (checkpoint, run.db, TensorBoard, logs), {actors} actors", times,
                    "training goes on with an alarm, checkpoints stay whole and are made again once there is room", f"{times} of {times}",
                )  # fmt: skip


@contextlib.contextmanager
def mounted(path: Path, size_kib: int) -> Iterator[object]:
    import _pytest.outcomes

    try:
        with small_disk(path, size_kib) as small:
            yield small
    except _pytest.outcomes.Skipped as reason:
        raise Skipped(str(reason)) from None


def descriptors(scale: float) -> Iterator[Row]:
    """Too few file descriptors from the beginning: whatever the number, the run works or says so in a few lines, and nothing is left."""
    worked = refused_runs = 0
    limits = [*range(4, 64, max(4, round(4 / scale))), 96, 128]
    with tempfile.TemporaryDirectory() as place:
        for actors in ("0", "2"):
            for limit in limits:
                args = ["train", "CartPole-v1", *TINY, "--actors", actors, "--stop.updates", "3", "--run-dir", f"run-{actors}-{limit}"]
                run = Living([*args, "--view", "silent"], Path(place), f"fds{limit}", ["prlimit", f"--nofile={limit}:{limit}"])
                try:
                    code = run.ends()
                    run.gone(2.0)
                    worked += code == 0
                    refused_runs += code != 0
                    assert code == 0 or limit < 64, (limit, run.said[-2000:])
                finally:
                    run.close()
    yield Row(
        "4 to 128 file descriptors for all processes", worked + refused_runs, "the run works, or ends with an error; nothing hangs or is left",
        f"{worked} worked, {refused_runs} ended with an error",
    )  # fmt: skip
