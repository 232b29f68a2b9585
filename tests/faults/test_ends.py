"""How a run ends: with a checkpoint, with its code, and with nothing left of it. How soon is measured by benchmarks/soak_files.py."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import time
from pathlib import Path

import pytest

import shoal
from faults.living import GONE_SECONDS, SMALL, TINY, command, living, saved
from faults.simulated import UNDER_WAY, make
from shoal.errors import EnvironmentFault
from shoal.files import CheckpointDirectory
from shoal.monitoring.live import SilentView

HERE = Path(__file__).parent / "simulated.py"
ZOO = f"{HERE.parents[1] / 'environments' / 'faulty.py'}:make"
ENDLESS = [*TINY, "--stop.updates", "1000000", "--checkpoint.every-updates", "2", "--json"]


def in_shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def nothing_more_than(before: set[str]) -> None:
    """What other processes of this machine put there has its name for a moment only, though they may go on to put more there."""
    deadline, more = time.monotonic() + GONE_SECONDS, in_shared_memory() - before
    while more := more & in_shared_memory():
        assert time.monotonic() < deadline, f"left in shared memory: {more}"
        time.sleep(0.05)


SERVER = ("--policy.inference", "server", "--device", "cpu")


def check_interrupted_before_an_update(directory: Path) -> None:
    """The result is that of the first checkpoint, and the ledger balances."""
    result = json.loads((directory / "result.json").read_text())
    newest = CheckpointDirectory(directory / "checkpoints").newest()
    assert (result["reason"], result["updates"], newest.update) == ("interrupted", 0, 0)
    assert result["weights_sha256"] == newest.json("learner")["weights_sha256"]
    ledger = result["ledger"]
    assert ledger["produced"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["in_flight"]


@pytest.mark.parametrize(("how", "more"), [("once", ()), ("twice", ()), ("kill -9", ()), ("once", SERVER), ("kill -9", SERVER)])
def test_a_run_ends_and_leaves_nothing_but_a_checkpoint(how: str, more: tuple[str, ...], tmp_path: Path) -> None:
    before = in_shared_memory()
    with living("train", f"{HERE}:make", *ENDLESS, *more, "--actors", "2", "--run-dir", "run", cwd=tmp_path) as run:
        directory = tmp_path / "run"
        run.until(lambda: len(saved(directory)) > 1, "checkpoint")
        run.until(lambda: len(run.left()) > 4 + bool(more) + 2 * 2 * 2, "processes of the run, and simulators")
        run.process.send_signal(signal.SIGKILL if how == "kill -9" else signal.SIGINT)
        if how == "twice":
            run.process.send_signal(signal.SIGINT)
        assert run.ends() == (-signal.SIGKILL if how == "kill -9" else 130)
        run.gone()
        newest = CheckpointDirectory(directory / "checkpoints").newest()
        assert not newest.warnings
        if how == "once":
            result = json.loads((directory / "result.json").read_text())
            assert (result["reason"], result["updates"]) == ("interrupted", newest.update)
    nothing_more_than(before)
    code, _, said = command("resume", "run", "--stop.updates", str(newest.update + 1), cwd=tmp_path)
    assert code == 0, said


def test_an_update_that_takes_long_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNDER_WAY, str(tmp_path / "under way"))
    with living(
        "train", "CartPole-v1", *SMALL, "--algorithm", f"{HERE}:Slow", "--actors", "1", "--run-dir", "run", cwd=tmp_path
    ) as run:  # fmt: skip
        directory = tmp_path / "run"
        run.until(lambda: saved(directory) and (tmp_path / "under way").exists(), "the update")
        run.process.send_signal(signal.SIGINT)
        assert run.ends() == 130
        run.gone()
        check_interrupted_before_an_update(directory)


def test_all_in_one_process_ends_between_two_steps(tmp_path: Path) -> None:
    args = [
        f"{HERE}:make",
        *ENDLESS,
        "--env.kwargs.seconds",
        "0.5",
        "--env.kwargs.simulators",
        "false",
        "--sampling.rollout-length",
        "4096",
        "--actors",
        "0",
        "--run-dir",
        "run",
    ]
    with living("train", *args, cwd=tmp_path) as run:
        run.until(lambda: len(saved(tmp_path / "run")) > 0, "checkpoint")
        run.process.send_signal(signal.SIGINT)
        assert run.ends() == 130, "a rollout takes hours"
        assert len(saved(tmp_path / "run")) >= 1


@pytest.mark.parametrize(
    "args",
    [
        (ZOO, "--env.kwargs.fault", "sleeps", "--env.kwargs.hidden", "true", "--env.kwargs.told", "under way"),
        ("CartPole-v1", "--algorithm", f"{HERE}:Slow"),
    ],
    ids=["step", "update"],
)
def test_all_in_one_process_does_not_wait_for_a_long_call(args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNDER_WAY, str(tmp_path / "under way"))
    with living("train", *args, *SMALL, "--actors", "0", "--run-dir", "run", cwd=tmp_path) as run:
        directory = tmp_path / "run"
        run.until(lambda: saved(directory) and (tmp_path / "under way").exists(), "the call")
        run.process.send_signal(signal.SIGINT)
        assert run.ends() == 130
        check_interrupted_before_an_update(directory)


def test_all_in_one_process_closes_environments_and_memory_on_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    note = tmp_path / "closed"

    def breaks() -> object:
        made = make(note=str(note), simulators=False)
        made.step = lambda action: 1 / 0 if note.with_name("trained").exists() else type(made).step(made, action)  # type: ignore[method-assign]
        return made

    def train() -> None:
        note.with_name("trained").unlink(missing_ok=True)
        shoal.train(
            breaks, actors=0, preset="none", progress=SilentView(io.StringIO()), callbacks=[lambda _: note.with_name("trained").touch()],
            sampling={"groups": 1, "group_size": 1, "rollout_length": 8},
        )  # fmt: skip

    descriptors = []
    for _ in range(2):
        with pytest.raises(EnvironmentFault, match="division by zero"):
            train()
        assert note.exists()
        note.unlink()
        gc.collect()
        descriptors.append(len(os.listdir("/proc/self/fd")))
    assert descriptors[1] <= descriptors[0]
    for run in (tmp_path / "runs").iterdir():
        assert CheckpointDirectory(run / "checkpoints").newest().update == 0


@pytest.mark.parametrize(("fault", "says"), [("segfaults", "Fatal Python error: Segmentation fault"), ("loops", "Timeout (0:00:02)!")])
def test_all_in_one_process_shows_the_stack_of_what_it_cannot_survive(fault: str, says: str, tmp_path: Path) -> None:
    args = ["--actors", "0", "--env.kwargs.fault", fault, "--env.kwargs.hidden", "true", "--env.step-timeout-seconds", "1"]
    with living("train", ZOO, *TINY, *args, cwd=tmp_path) as run:
        run.until(lambda: says in run.said and "faulty.py" in run.said, "stack") if fault == "loops" else run.ends()
        assert says in run.said
        assert "faulty.py" in run.said
