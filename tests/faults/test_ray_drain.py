"""Actors and nodes that come and go on a real Ray cluster, with the weights of one process: scaled by hand, drained by Ray, ended by SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from commands import answer_here
from faults.test_ray_cluster import LIMIT_SECONDS, SMALL, Machines, answer, events, start, wait_for
from held import Line
from shoal.cli.control import tell_run
from shoal.supervision.processes import NAME_BYTES


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    made = Machines()
    yield made
    made.close()


@pytest.fixture
def living(machines: Machines, tmp_path: Path) -> Callable[[Callable[[Path, subprocess.Popen[str]], None]], dict[str, Any]]:
    """Have a run on two nodes, and do something with it once it has made ten updates; its result, with the weights that they should be."""

    def run_while(do: Callable[[Path, subprocess.Popen[str]], None]) -> dict[str, Any]:
        machines.be(2)
        run = tmp_path / "run"
        where = ("--engine", "ray", "--address", machines.address, "--allow-insecure-cluster", "--actors-per-node", "2")
        with contextlib.closing(Line()) as line:
            process = start(run, "train", *SMALL, *where, "--stop.updates", "1000000", "--run-dir", str(run), line=line)
            line.reach(10, process, run.with_suffix(".log"))
            line.go_on(for_good=True)
            begun = tell_run(run, "state")["state"]  # on a busy machine an actor may have taken too long to start
            wait_for(lambda: len(machines.named("shoal:zygote")) == 1, process)  # those of a run before may still be ending
            do(run, process)
            at = update_of(run)
            wait_for(lambda: update_of(run) >= at + 5, process)
            tell_run(run, "stop")
            result = ended(process, run)
        again = shoal.replay(run)  # in this process
        assert (again["updates"], again["expected_sha256"], again["equal"]) == (result["updates"], result["weights_sha256"], True)
        dropped = {**result["ledger"]["dropped"], "shutdown": 0}
        assert dropped == {**begun["dropped"], "shutdown": 0}
        assert (result["restarts"], events(run, "node_lost")) == (begun["restarts"], [])
        return result

    return run_while


def ended(process: subprocess.Popen[str], run: Path) -> dict[str, Any]:
    """As `answer`, of a run that was told to end."""
    process.wait(LIMIT_SECONDS)
    assert process.returncode == 130, run.with_suffix(".log").read_text()[-4000:]
    process.returncode = 0
    return answer(process, run)


def update_of(run: Path) -> int:
    return int(tell_run(run, "state")["state"]["update"])


def hosting(run: Path) -> int:
    return sum(bool(actor["groups"]) for actor in tell_run(run, "state")["state"]["actors"])


def test_actors_are_scaled_over_two_nodes_and_one_without_any_is_given_back(machines: Machines, living: Any) -> None:
    def do(run: Path, process: subprocess.Popen[str]) -> None:
        assert hosting(run) == 4
        said = answer_here("scale", str(run), "--actors", "2")
        assert (said["actors"], sorted(said["nodes"].values())) == (2, [1, 1])
        wait_for(lambda: hosting(run) == 2, process)
        answer_here("scale", str(run), "--actors", "1")
        wait_for(lambda: len(events(run, "node_left")) == 1, process)
        wait_for(lambda: len(machines.named("shoal:actor", process)) == 1, process)
        said = answer_here("scale", str(run), "--actors", "4")
        assert said["actors"] == 4
        wait_for(lambda: hosting(run) == 4, process)
        assert len(events(run, "node_joined")) == 1

    living(do)


def worker_node(machines: Machines) -> str:
    """The id of the node that is not the head."""
    return str(machines.others[-1].node_id)


def test_a_node_that_ray_drains_is_left_with_nothing_lost_and_may_go(machines: Machines, living: Any) -> None:
    seen: list[Path] = []

    def do(run: Path, process: subprocess.Popen[str]) -> None:
        seen.append(run)
        node = worker_node(machines)
        drain = [
            sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", machines.address, "--node-id", node,
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "300",
        ]  # fmt: skip
        subprocess.run(drain, check=True, timeout=LIMIT_SECONDS, capture_output=True)
        wait_for(lambda: len(events(run, "node_left")) == 1, process)

    living(do)
    (noticed,), (left,) = events(seen[0], "node_draining"), events(seen[0], "node_left")
    assert (noticed["reason"], left["reason"], len(noticed["actors"])) == ("preempted", "preempted", 2)
    assert 0.0 < noticed["seconds"] <= 300.0
    raylet = machines.others.pop()
    machines.cluster.remove_node(raylet, allow_graceful=True)


@pytest.mark.parametrize(("name", "elsewhere"), [("ray::SignalledNode", 0), ("ray::OwnNode", 2)])
def test_a_node_whose_process_gets_sigterm_is_left_with_nothing_lost(name: str, elsewhere: int, machines: Machines, living: Any) -> None:
    """elsewhere: actors that are then on the node that is not the driver's machine."""
    seen: list[Path] = []

    def do(run: Path, process: subprocess.Popen[str]) -> None:
        seen.append(run)
        wait_for(lambda: (len(machines.named("shoal:actor")), len(machines.named("shoal:actor", process))) == (2, 4), process)
        (pid,) = machines.named(name[:NAME_BYTES])
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: len(events(run, "node_left")) == 1, process)
        assert hosting(run) == 2
        wait_for(lambda: (len(machines.named("shoal:actor")), len(machines.named("shoal:actor", process))) == (elsewhere, 2), process)

    living(do)
    (noticed,) = events(seen[0], "node_draining")
    assert (noticed["reason"], noticed["notice"], noticed["seconds"]) == ("preempted", "its process got SIGTERM", None)
