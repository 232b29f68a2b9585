"""Runs on a real Ray cluster: several raylets on this machine, the command line in processes of its own, nodes and drivers that are killed.

Weights of a sync run are those of one process, with two and three nodes, and with one killed on the way.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import ray.cluster_utils
from ray._private.ray_constants import PROCESS_TYPE_RAYLET

from commands import answer_here
from faults.living import SOURCES
from held import Line
from shoal.monitoring.store import RunReader
from shoal.supervision.processes import process_state

SMALL = [
    "CartPole-v1", "--preset", "none", "--sampling.groups", "4", "--sampling.group-size", "2", "--sampling.rollout-length", "16",
    "--algorithm.minibatch-size", "64", "--algorithm.epochs", "2", "--seed", "3", "--evaluation.episodes", "0",
]  # fmt: skip
UPDATES = 24
LIMIT_SECONDS = 300.0
KNOWN: dict[int, str] = {}  # weights by updates


T = TypeVar("T")


def started(start: Callable[[], T], times: int = 3) -> T:
    """Ray gives its processes half a minute to come up, which they do not always do on a busy machine: then it is tried again."""
    for _ in range(times - 1):
        with contextlib.suppress(Exception):  # a plain one is all that Ray raises
            return start()
    return start()


class Machines:
    """A cluster of raylets, each with two CPUs."""

    def __init__(self) -> None:
        # Tokens and TLS are tried in tests/engines/test_ray_tokens.py; here a cluster without them is allowed by hand.
        head = {"num_cpus": 2, "include_dashboard": False, "dashboard_agent_listen_port": 0}  # a port that is free
        self.cluster = started(lambda: ray.cluster_utils.Cluster(initialize_head=True, head_node_args=head))
        self.others: list[Any] = []

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def be(self, count: int) -> None:
        """Have this many nodes, the head included."""
        while len(self.others) + 1 > count:
            self.cluster.remove_node(self.others.pop())
        while len(self.others) + 1 < count:
            self.others.append(started(lambda: self.cluster.add_node(num_cpus=2)))
        self.cluster.wait_for_nodes()

    def kill_one(self) -> None:
        """kill -9 of a raylet. What it started ends when it sees that, which is waited for."""
        raylet = self.others.pop()
        started = descendants([raylet])
        self.cluster.remove_node(raylet, allow_graceful=False)
        wait_for(lambda: all(process_state(pid) in (None, "Z") for pid in started))

    def named(self, prefix: str, driver: subprocess.Popen[str] | None = None) -> list[int]:
        """Processes that the nodes have started, and the driver, whose name begins so."""
        below = descendants([self.cluster.head_node, *self.others], *([] if driver is None else [driver.pid]))
        return [pid for pid, name in below.items() if name.startswith(prefix)]

    def named_below(self, raylet: Any, prefix: str) -> list[int]:
        """As `named`, of one node."""
        return [pid for pid, name in descendants([raylet]).items() if name.startswith(prefix)]

    def niceness(self) -> set[int]:
        """Of all actors on the nodes."""
        return {os.getpriority(os.PRIO_PROCESS, pid) for pid in self.named("shoal:actor")}

    def close(self) -> None:
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    made = Machines()
    yield made
    made.close()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """process: who has to live meanwhile."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert process is None or process.poll() is None, f"the run ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def descendants(raylets: list[Any], *others: int) -> dict[int, str]:
    """Names of all processes that nodes of a `Cluster` and these processes have started, by their ids; zombies are none."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                before, _, after = (entry / "stat").read_text().rpartition(")")
            except OSError:
                continue
            state, parent = after.split()[:2]
            if state != "Z":
                parents[int(entry.name)], names[int(entry.name)] = int(parent), before.partition("(")[2]
    roots = {*others, *(raylet.all_processes[PROCESS_TYPE_RAYLET][0].process.pid for raylet in raylets)}
    found: dict[int, str] = {}
    for pid in parents:
        at = pid
        while at := parents.get(at, 0):
            if at in roots:
                found[pid] = names[pid]
                break
    return found


def start(run: Path, *arguments: str, line: Line | None = None) -> subprocess.Popen[str]:
    """The command line, at once; with a line, the run waits after every update (tests/held.py)."""
    environment = {**os.environ, "TERM": "dumb", "PYTHONPATH": os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])}
    with run.with_suffix(".log").open("a") as log:
        if line is not None:
            return line.start([*arguments, "--json"], environment, stdout=subprocess.PIPE, stderr=log, cwd=run.parent)
        command = [sys.executable, "-m", "shoal.cli", *arguments, "--json"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=run.parent)


def answer(process: subprocess.Popen[str], run: Path) -> dict[str, Any]:
    said, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, run.with_suffix(".log").read_text()[-4000:]
    found: dict[str, Any] = json.loads(said)
    return found


def train(run: Path, *arguments: str) -> dict[str, Any]:
    return answer(start(run, "train", *SMALL, *arguments, "--run-dir", str(run)), run)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    with RunReader(run / "run.db") as reader:
        return list(reader.events(kind))


def expected(directory: Path, updates: int) -> str:
    """Of one process, once for each number of updates."""
    if updates not in KNOWN:
        one = ("--actors", "0", "--stop.updates", str(updates), "--run-dir", str(directory / "one"))
        KNOWN[updates] = str(answer_here("train", *SMALL, *one)["weights_sha256"])
    return KNOWN[updates]


def test_three_nodes_learn_the_bits_of_one_process(machines: Machines, tmp_path: Path) -> None:
    """One node does in tests/engines/test_ray_job.py, two do below."""
    machines.be(3)
    where = ("--engine", "ray", "--address", machines.address, "--allow-insecure-cluster", "--nodes", "3", "--actors-per-node", "1")
    found = train(tmp_path / "run", *where, "--stop.updates", str(UPDATES))
    assert found["weights_sha256"] == expected(tmp_path, UPDATES)


def begun_on_two_nodes(machines: Machines, run: Path, line: Line) -> subprocess.Popen[str]:
    """A run that has made half of its updates, and is let go on to the next of them."""
    machines.be(2)
    where = ("--engine", "ray", "--address", machines.address, "--allow-insecure-cluster", "--actors-per-node", "1")
    ends = ("--checkpoint.every-updates", "5", "--stop.updates", str(UPDATES))
    process = start(run, "train", *SMALL, *where, *ends, "--run-dir", str(run), line=line)
    line.reach(UPDATES // 2, process, run.with_suffix(".log"))
    line.go_on()
    return process


def test_a_raylet_that_is_killed_costs_no_bit(machines: Machines, tmp_path: Path) -> None:
    wanted, run = expected(tmp_path, UPDATES), tmp_path / "run"
    with contextlib.closing(Line()) as line:
        process = begun_on_two_nodes(machines, run, line)
        assert machines.niceness() == (
            {os.getpriority(os.PRIO_PROCESS, 0)} if os.geteuid() == 0 else {15}
        )  # Ray's own, where nobody may change it
        machines.kill_one()
        line.reach(UPDATES // 2 + 1, process, run.with_suffix(".log"))
        line.go_on(for_good=True)
        assert answer(process, run)["weights_sha256"] == wanted
    assert len(events(run, "node_lost")) == 1


def test_a_helper_of_a_node_that_is_stopped_while_an_actor_dies_costs_neither_a_bit_nor_the_node(
    machines: Machines, tmp_path: Path
) -> None:
    wanted, run = expected(tmp_path, UPDATES), tmp_path / "run"
    with contextlib.closing(Line()) as line:
        process = begun_on_two_nodes(machines, run, line)
        line.reach(UPDATES // 2 + 1, process, run.with_suffix(".log"))
        (zygote,), (actor,) = (machines.named_below(machines.others[0], name) for name in ("shoal:zygote", "shoal:actor"))
        os.kill(zygote, signal.SIGSTOP)
        os.kill(actor, signal.SIGKILL)
        line.go_on(for_good=True)
        assert answer(process, run)["weights_sha256"] == wanted
    assert [(event["role"], event["how"]) for event in events(run, "died")] == [("actor", "killed by SIGKILL")]
    assert events(run, "node_lost") == []


def test_a_driver_that_is_killed_leaves_nothing_on_the_nodes_and_is_resumed(machines: Machines, tmp_path: Path) -> None:
    wanted, run = expected(tmp_path, UPDATES), tmp_path / "run"
    with contextlib.closing(Line()) as line:
        process = begun_on_two_nodes(machines, run, line)
        os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not machines.named("shoal:actor") and not machines.named("ray::OwnNode"))
    result = answer(start(run, "resume", str(run)), run)
    assert result["weights_sha256"] == wanted


def test_a_run_in_a_store_whose_driver_is_killed_is_resumed_by_another_machine(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, url = expected(tmp_path, UPDATES), f"file://{tmp_path}/store/run"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    machines.be(2)
    where = ("--engine", "ray", "--address", machines.address, "--allow-insecure-cluster", "--actors-per-node", "1")
    ends = ("--checkpoint.every-updates", "5", "--stop.updates", str(UPDATES), "--run-dir", url)
    log = tmp_path / "run"
    with contextlib.closing(Line()) as line:
        process = start(log, "train", *SMALL, *where, *ends, line=line)
        line.reach(UPDATES // 2, process, log.with_suffix(".log"))
        line.go_on()
        deadline = time.monotonic() + LIMIT_SECONDS
        while not any((tmp_path / "store/run/checkpoints").glob("update-*[1-9]*/manifest.json")):
            assert time.monotonic() < deadline, "no checkpoint came to the store"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    result = answer(start(log, "resume", url), log)
    assert (result["run"], result["weights_sha256"]) == (url, wanted)


def test_a_run_that_asks_for_more_nodes_than_this_machine_is_told_so(tmp_path: Path) -> None:
    """No Ray is started for it."""
    run = tmp_path / "run"
    process = start(run, "train", *SMALL, "--engine", "ray", "--nodes", "2", "--stop.updates", "1", "--run-dir", str(run))
    process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 2
    assert "ray.nodes: 2 were asked for" in run.with_suffix(".log").read_text()


def test_a_cluster_without_a_token_is_refused(machines: Machines, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "train", *SMALL, "--engine", "ray", "--address", machines.address, "--stop.updates", "1", "--run-dir", str(run))
    process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 2
    assert "CVE-2023-48022" in run.with_suffix(".log").read_text()


def test_an_address_without_a_cluster_is_told_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    where = ("--address", "127.0.0.1:1", "--allow-insecure-cluster")
    process = start(run, "train", *SMALL, "--engine", "ray", *where, "--stop.updates", "1", "--run-dir", str(run))
    process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 2
    said = run.with_suffix(".log").read_text()
    assert "no cluster could be joined at 127.0.0.1:1" in said
    assert "`ray start --head`" in said
