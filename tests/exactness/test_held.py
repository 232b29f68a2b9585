"""What a run that waits after every update (tests/held.py) does, and does not: kills that are aimed at an update hit it on every machine."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from held import Line

from .harness import TASKS, TIMEOUT_SECONDS, answer, start


def test_a_held_run_makes_no_update_before_it_is_let_go_on(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "run.log"
    with contextlib.closing(Line()) as line:
        process = start(["train", *TASKS["cartpole"], "--stop.updates", "6", "--actors", "2", "--run-dir", str(run)], log, line=line)
        try:
            for update in (2, 3):
                line.reach(update, process, log)
                time.sleep(0.5)  # the whole run takes about as long
                assert (process.poll(), line.update, line.waits, line.hear(0.0)) == (None, update, True, False)
            line.go_on(for_good=True)
            process.wait(TIMEOUT_SECONDS)
        finally:
            process.kill()
    assert answer(process, log)["updates"] == 6
