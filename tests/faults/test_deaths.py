"""Actors that are killed, from outside of the run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from faults.living import TINY, living, saved
from shoal.monitoring.store import RunReader
from shoal.supervision.injector import roles_below
from shoal.supervision.processes import process_state
from stopping import stop_process


def test_actors_that_die_together_are_all_counted_and_replaced_at_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    more = ["--actors", "2", "--stop.updates", "1000000", "--run-dir", str(run_dir), "--json"]
    with living("train", "CartPole-v1", *TINY, *more, cwd=tmp_path) as run:
        run.until(lambda: saved(run_dir), "checkpoint")
        run.until(lambda: len(roles_below(run.process.pid)) == 3, "roles")
        actors = [pid for (role, _), pid in roles_below(run.process.pid).items() if role == "actor"]
        stop_process(run.process.pid)  # it hears of both at once
        for pid in actors:
            os.kill(pid, signal.SIGKILL)
        run.until(lambda: not any(map(process_state, actors)), "end of both, whom the helper process reaps")
        run.process.send_signal(signal.SIGCONT)
        run.until(lambda: _count(run_dir, "recovered") == 2, "recovery of both")
        assert _count(run_dir, "died") == 2
        assert not _count(run_dir, "killed"), "who is not replaced at once is killed, since it does not take up its order"


def _count(run_dir: Path, kind: str) -> int:
    with RunReader(run_dir / "run.db") as reader:
        return len(reader.events(kind))


def test_a_run_that_cannot_start_a_process_at_its_beginning_ends_and_says_what_to_raise(tmp_path: Path) -> None:
    args = ("train", "CartPole-v1", *TINY, "--actors", "1", "--stop.updates", "1", "--run-dir", "run")
    with living(*args, cwd=tmp_path, limits=["prlimit", "--nofile=16"]) as run:
        assert run.ends() == 1
        assert "Too many open files" in run.said
        assert "ulimit -n" in run.said
