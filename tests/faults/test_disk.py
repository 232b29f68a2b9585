"""Disks that refuse: a run goes on where it can, says so, and its checkpoints stay whole."""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

import shoal
from faults.living import TINY, command, living, saved, small_disk
from shoal.errors import RunError
from shoal.files import CheckpointDirectory
from shoal.monitoring.live import SilentView
from shoal.runs import show
from shoal.supervision.control import ask
from shoal.supervision.injector import roles_below

CHATTY = str(Path(__file__).parent / "chatty.py") + ":make"
ENDLESS = [*TINY, "--stop.updates", "1000000", "--checkpoint.every-updates", "2"]

INLINE = {
    "actors": 0, "preset": "none", "sampling": {"groups": 2, "group_size": 2, "rollout_length": 8}, "stop": {"updates": 2},
    "policy": {"hidden_sizes": [8]}, "algorithm": {"name": "ppo", "minibatch_size": 16, "epochs": 1},
}  # fmt: skip


def silent() -> SilentView:
    return SilentView(io.StringIO())


@pytest.mark.parametrize(("actors", "environment"), [("0", "CartPole-v1"), ("1", CHATTY)])
def test_a_run_goes_on_while_its_disk_is_full_and_saves_again_once_there_is_room(actors: str, environment: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk, living(
        "train", environment, *ENDLESS, "--actors", actors, "--run-dir", str(disk.path / "run"), cwd=tmp_path
    ) as run:  # fmt: skip
        directory = disk.path / "run"
        run.until(lambda: len(saved(directory)) > 1, "checkpoint")
        run.until(lambda: disk.fill() or "no checkpoint could be saved" in run.said, "alarm about checkpoints")
        run.until(lambda: disk.fill() or "numbers of this run are not kept for now" in run.said, "alarm about numbers")
        before = saved(directory)
        assert CheckpointDirectory(directory / "checkpoints").newest().update > 0
        disk.free()
        run.until(lambda: saved(directory) and saved(directory)[-1] > before[-1], "checkpoint once there is room")
        run.until(lambda: "numbers of this run are kept again" in run.said, "end of the alarm")
        run.process.send_signal(signal.SIGINT)
        assert run.ends() == 130
        assert not CheckpointDirectory(directory / "checkpoints").newest().warnings
        assert not list((directory / "checkpoints").glob(".*"))
        assert "OSError" not in run.said


def test_a_disk_without_room_or_read_only_is_refused_in_one_line_and_can_be_read(tmp_path: Path) -> None:
    def make(directory: Path) -> Path:
        return shoal.train("CartPole-v1", **INLINE, run_dir=str(directory), progress=silent()).path

    with small_disk(tmp_path / "disk") as disk:
        run = make(disk.path / "run")
        disk.fill()
        with pytest.raises(RunError, match=r"^[^\n]*(No space left on device|is the disk full)[^\n]*$"):
            make(disk.path / "other")
        with pytest.raises(RunError, match=r"^[^\n]*(No space left on device|is the disk full)[^\n]*$"):
            shoal.resume(run, **{"stop.updates": 4}, progress=silent())
        disk.free()
        subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], check=True)
        with pytest.raises(RunError, match=r"^[^\n]*Read-only file system[^\n]*$"):
            shoal.resume(run, **{"stop.updates": 4}, progress=silent())
        assert shoal.evaluate(run, episodes=1)["episodes"] == 1
        assert show(run)["warnings"] == []


@pytest.mark.parametrize("actors", ["0", "1"])
def test_a_run_that_never_could_save_does_not_speak_of_checkpoints_before(actors: str, tmp_path: Path) -> None:
    dqn = ["--preset", "none", "--algorithm", "dqn", "--policy.hidden-sizes", "512,512", "--replay.learning-starts", "100"]
    with small_disk(tmp_path / "disk", 2_560) as disk:
        code, _, said = command(
            "train", "CartPole-v1", *dqn, "--actors", actors, "--stop.updates", "6", "--run-dir", str(disk.path), cwd=tmp_path
        )  # fmt: skip
        assert code == 1, said
        assert not saved(disk.path)
    assert "No space left on device" in said
    assert "there is none before it, and the run goes on" in said
    assert "no checkpoint could be saved, so `shoal resume` begins again from the start. " in said
    for wrong in ("whole", "goes on from the one before", "None"):
        assert wrong not in said, said


def test_a_run_without_a_place_for_its_socket_goes_on(tmp_path: Path) -> None:
    (tmp_path / "run" / "control.sock").mkdir(parents=True)
    code, _, said = command("train", "CartPole-v1", *TINY, "--actors", "1", "--stop.updates", "2", "--run-dir", "run", cwd=tmp_path)
    assert code == 0, said
    assert "takes no requests" in said


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux only")
def test_a_run_without_descriptors_left_goes_on_and_saves_again_once_there_are(tmp_path: Path) -> None:
    with living("train", "CartPole-v1", *ENDLESS, "--actors", "1", "--run-dir", "run", cwd=tmp_path) as run:
        directory, pid = tmp_path / "run", run.process.pid
        run.until(lambda: len(saved(directory)) > 1, "checkpoint")
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        looks = []
        for _ in range(100):  # what is open at one look only may be closed again, and leave a place
            looks.append({int(name) for name in os.listdir(f"/proc/{pid}/fd")})
            time.sleep(0.02)
        held = set.intersection(*looks)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(1000)) - held), before[1]))  # not one more
        run.until(lambda: "no checkpoint could be saved" in run.said, "alarm")
        last = saved(directory)[-1]
        with pytest.raises(RunError, match="did not answer within 1 s"):
            ask(directory, {"command": "state"}, 1.0)
        os.kill(roles_below(pid)["actor", 0], signal.SIGKILL)
        run.until(lambda: "a process (actor) cannot be started for now: Too many open files" in run.said, "alarm")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        run.until(lambda: saved(directory)[-1] > last, "checkpoint once there are descriptors")
        run.process.send_signal(signal.SIGINT)
        assert run.ends() == 130
        run.gone()
