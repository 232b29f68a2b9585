"""Learners on nodes of a real Ray cluster: several raylets on this machine, of which one, a learner or the driver is killed.

Weights of a sync run with two learners are those of the local engine with two, wherever the second of them lives.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.test_ray_cluster import LIMIT_SECONDS, SMALL, Machines, answer, events, start, train, wait_for
from held import Line

UPDATES = 16
ENDS = ("--stop.updates", str(UPDATES), "--checkpoint.every-updates", "5")
DETECTED_SECONDS = 10.0  # by the supervisor, of a node that is gone, at most; Ray says of a raylet that was killed sooner


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    made = Machines()
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train(tmp_path_factory.mktemp("local") / "local", "--learners", "2", "--actors", "2", *ENDS)["weights_sha256"])


def where(machines: Machines) -> list[str]:
    return [
        "--engine", "ray", "--address", machines.address, "--allow-insecure-cluster", "--actors-per-node", "1",
        "--learners", "2", "--learners-on", "nodes",
    ]  # fmt: skip


def begun(machines: Machines, run: Path, line: Line, nodes: int) -> subprocess.Popen[str]:
    """A run that has made half of its updates, and is let go on to the next of them."""
    machines.be(nodes)
    process = start(run, "train", *SMALL, *where(machines), *ENDS, "--run-dir", str(run), line=line)
    line.reach(UPDATES // 2, process, run.with_suffix(".log"))
    line.go_on()
    return process


def ended(process: subprocess.Popen[str], run: Path, line: Line) -> dict[str, Any]:
    line.reach(UPDATES // 2 + 1, process, run.with_suffix(".log"))
    line.go_on(for_good=True)
    return answer(process, run)


def test_a_learner_on_another_node_learns_the_bits_of_one_beside_the_driver(machines: Machines, tmp_path: Path, expected: str) -> None:
    run = tmp_path / "run"
    with contextlib.closing(Line()) as line:
        process = begun(machines, run, line, 2)
        lives = [len(machines.named_below(raylet, "shoal:learner-1")) for raylet in (machines.cluster.head_node, *machines.others)]
        assert lives == [0, 1], "on the node that is not the driver's"
        assert machines.named("shoal:learner-0") == []
        result = ended(process, run, line)
    assert (result["weights_sha256"], result["restarts"]) == (expected, 0)


def test_a_learner_that_is_killed_on_its_node_is_made_anew(machines: Machines, tmp_path: Path, expected: str) -> None:
    run = tmp_path / "run"
    with contextlib.closing(Line()) as line:
        process = begun(machines, run, line, 2)
        (victim,) = machines.named("shoal:learner-1")
        os.kill(victim, signal.SIGKILL)
        assert ended(process, run, line)["weights_sha256"] == expected
    (back,) = events(run, "recovered")
    assert (back["role"], back["index"]) == ("learner", 1)
    assert back["ready_seconds"] < 10.0
    assert events(run, "rolled_back") == []


@pytest.mark.parametrize("nodes", [3, 2], ids=["to another node", "to the driver"])
def test_a_learner_whose_raylet_is_killed_goes_on_elsewhere(nodes: int, machines: Machines, tmp_path: Path, expected: str) -> None:
    run = tmp_path / "run"
    with contextlib.closing(Line()) as line:
        machines.be(nodes)
        process = begun(machines, run, line, nodes)
        machines.others.sort(key=lambda raylet: len(machines.named_below(raylet, "shoal:learner-1")))
        machines.kill_one()
        result = ended(process, run, line)
    assert result["weights_sha256"] == expected
    assert events(run, "rolled_back") == []
    assert set(result["ledger"]["dropped"]) <= {"actor_died"}
    back = [event for event in events(run, "recovered") if event["role"] == "learner"]
    assert back
    assert all(event["ready_seconds"] < DETECTED_SECONDS for event in back)


def test_a_driver_that_is_killed_leaves_no_learner_behind_and_is_resumed(machines: Machines, tmp_path: Path, expected: str) -> None:
    run = tmp_path / "run"
    with contextlib.closing(Line()) as line:
        process = begun(machines, run, line, 2)
        os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=LIMIT_SECONDS)
    wait_for(lambda: not machines.named("shoal:"))
    assert answer(start(run, "resume", str(run)), run)["weights_sha256"] == expected


def test_learners_for_which_there_are_too_few_nodes_are_refused(machines: Machines, tmp_path: Path) -> None:
    machines.be(1)
    run = tmp_path / "run"
    process = start(run, "train", *SMALL, *where(machines), *ENDS, "--run-dir", str(run))
    process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 2
    assert "besides that machine the run has 0 nodes" in run.with_suffix(".log").read_text()
