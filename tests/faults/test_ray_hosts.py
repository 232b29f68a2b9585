"""Runs on a Ray cluster of several hosts (tests/faults/hosts.py), whose processes are killed, whose links are cut or slow, whose head is lost.

Whatever befalls them, in sync mode the weights are those of the local engine after as many updates. benchmarks/soak_hosts.py measures the same.
"""

from __future__ import annotations

import importlib.util
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.hosts import Host, missing, network, until

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'ray>=2.52'", allow_module_level=True)
if why := missing():
    pytest.skip(why, allow_module_level=True)

from faults.host_faults import (
    join_again,
    kill_actor,
    kill_driver,
    kill_fleet,
    kill_learner,
    kill_raylet,
    lose_head,
    part,
    slow_down,
    world,
)

REFUSED, NO_ANSWER = 1, 124
LISTENS = """
import socket
server = socket.create_server(("", 9))
print("listens", flush=True)
connection, _ = server.accept()
while connection.recv(1 << 16):
    pass
"""


def asks(host: Host, name: str, seconds: float = 60.0) -> int:
    """What comes within this time of a call to a port at which nobody listens."""
    call = host.inside("timeout", f"{seconds:g}", "bash", "-c", f"exec 3<>/dev/tcp/{name}/9")
    return subprocess.run(call, capture_output=True, check=False).returncode


def seconds_for(count: int, source: Host, target: Host) -> float:
    """How long it takes until so many bytes are there."""
    listens = subprocess.Popen(target.inside(sys.executable, "-c", LISTENS), stdout=subprocess.PIPE)
    assert listens.stdout is not None
    listens.stdout.readline()
    before = time.monotonic()
    source.run("bash", "-c", f"head -c {count} /dev/zero > /dev/tcp/{target.name}/9")
    assert listens.wait(300.0) == 0
    listens.stdout.close()
    return time.monotonic() - before


def test_hosts_reach_each_other_until_a_link_is_cut_and_later_where_it_is_slow(tmp_path: Path) -> None:
    with network(tmp_path) as net:
        a, b = net.host("a"), net.host("b")
        assert a.run("cat", "/proc/sys/kernel/hostname").strip() == "a"
        assert asks(a, "b") == REFUSED
        b.cut()
        assert asks(a, "b", 2.0) == NO_ANSWER
        b.heal()
        assert asks(a, "b") == REFUSED
        seconds_for(500_000, a, b)
        before = b.carried_bytes()
        b.slow("2mbit")
        assert seconds_for(500_000, a, b) > 500_000 * 8 / 2e6 - 0.2, "its queue lets 32 kB go at once"
        assert b.carried_bytes()[0] - before[0] > 500_000


def test_all_processes_of_a_host_can_be_ended_and_it_is_still_there(tmp_path: Path) -> None:
    with network(tmp_path) as net:
        host = net.host("a")
        subprocess.run(host.inside("sh", "-c", "for n in 1 2 3; do setsid sleep 600 & done"), check=True)
        until(lambda: len(host.processes("sleep")) == len(host.processes()) == 3, "three orphans")
        host.kill("sleep")
        host.stop_ray()
        assert host.processes() == []
        assert host.run("sh", "-c", "ls -d /proc/[0-9]*").split()[0] == "/proc/1"
        until(lambda: host.run("sh", "-c", "cat /proc/[0-9]*/stat 2> /dev/null || :").count(" Z ") == 0, "reaping of all orphans")


def test_nothing_of_a_host_is_left_where_a_test_fails_on_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a test failed"), network(tmp_path) as net:  # noqa: PT012
        host = net.host("a")
        left = subprocess.Popen(host.inside("sh", "-c", "sleep 600 & setsid sleep 600"))
        until(lambda: len(host.processes("sleep")) == 2, "processes to be left")
        lives = [os.pidfd_open(pid) for pid in (host.init, *host.processes())]
        raise RuntimeError("a test failed")
    assert left.wait(300.0) != 0
    assert select.select(lives, [], [], 0.0)[0] == lives, "all have ended"
    for life in lives:
        os.close(life)


def test_a_raylet_that_is_killed_on_a_host_costs_no_bit(tmp_path: Path) -> None:
    """The one of these that `make test` has: on a busy machine Ray may take more raylets for dead, which costs no bit either."""
    with world(tmp_path, "a", "b") as there:
        training = there.train()
        kill_raylet(training, there.workers[0])
        result = training.end()
    assert result["weights_sha256"] == training.expected(result["updates"])


@pytest.mark.soak  # Ray's own limits: a busy machine's raylets are taken for dead
def test_kills_of_every_process_of_a_run_cost_no_bit(tmp_path: Path) -> None:
    with world(tmp_path, "a", "b") as there:
        a, b = there.workers
        training = there.train()
        kill_actor(training, a)
        kill_learner(training)
        before = time.time()
        kill_fleet(training, b)
        join_again(training, b, before)
        kill_raylet(training, a)
        kill_driver(training, there)
        result = training.end()
    assert result["weights_sha256"] == training.expected(result["updates"])


@pytest.mark.soak  # Ray's own limits: a busy machine's raylets are taken for dead
def test_a_head_that_is_lost_ends_the_run_with_a_word_and_it_goes_on_at_another(tmp_path: Path) -> None:
    with world(tmp_path, "a") as there:
        training = there.train()
        lose_head(training, there)
        result = training.end()
    assert result["weights_sha256"] == training.expected(result["updates"])


@pytest.mark.soak
def test_a_partition_that_heals_costs_no_bit(tmp_path: Path) -> None:
    with world(tmp_path, "a", "b") as there:
        training = there.train()
        part(training, there.workers[1])
        result = training.end()
    assert result["weights_sha256"] == training.expected(result["updates"])


@pytest.mark.soak
def test_a_slow_link_loses_nobody_and_nothing(tmp_path: Path) -> None:
    with world(tmp_path, "a", "b") as there:
        outcome = slow_down(there)
    assert outcome.result["weights_sha256"] == outcome.training.expected(outcome.result["updates"])
