"""What may befall a run on hosts: each fault strikes once, waits until the run has got over it, and says how long that took.

For tests/faults/test_ray_hosts.py and benchmarks/soak_hosts.py. Times are those of the events in run.db, from the moment of the blow.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.hosts import Host, RayHosts, network, until
from faults.living import Living, command
from shoal.errors import ShoalError
from shoal.monitoring.store import RunReader
from shoal.supervision.injector import roles_below

TRAINING = [
    f"{Path(__file__).with_name('simulated.py')}:make", "--env.kwargs.simulators", "false", "--env.form", "python", "--preset", "none",
    "--sampling.groups", "4", "--sampling.group-size", "2", "--sampling.rollout-length", "16", "--algorithm.minibatch-size", "64",
    "--algorithm.epochs", "2", "--seed", "3", "--evaluation.episodes", "0",
]  # fmt: skip
STEP_SECONDS = "0.002"  # so that there are not thousands of updates for the local engine to make again, which takes none
ENDLESS = ["--stop.updates", "10000000", "--checkpoint.every-updates", "10"]
PARTITION_SECONDS = 60.0
ENDS_SECONDS = 90.0  # a driver without a head; Ray's own processes end a minute after they lost it
GONE_SECONDS = 100.0
WAIT_SECONDS = 300.0  # for anything else, on a busy machine


@dataclass(frozen=True)
class Absence:
    """Seconds from a blow until the run noticed it, and until it had made up for what was lost."""

    noticed: float
    back: float


class Training:
    """A run whose driver is on a host of its own, and may be killed and resumed."""

    def __init__(self, hosts: RayHosts, at: Host, place: Path, *more: str, size: tuple[str, ...] = ()) -> None:
        self.hosts, self.at, self.place, self.directory, self.size = hosts, at, place, place / "run", size
        self.run = self._start(
            "train", *TRAINING, *size, "--env.kwargs.seconds", STEP_SECONDS, "--engine", "ray", "--address", hosts.address,
            "--actors-per-node", "1", "--run-dir", str(self.directory), *(more or ENDLESS),
        )  # fmt: skip
        self.until_updates(20 if not more else 0)

    def _start(self, *arguments: str) -> Living:
        return Living([*arguments, "--json"], self.place, "driver", self.at.inside(directory=self.place))

    def resume(self, *more: str) -> None:
        self.run.close()
        self.run = self._start("resume", str(self.directory), *more)

    @property
    def driver(self) -> int:
        """The number of its process."""
        children = Path(f"/proc/{self.run.process.pid}/task/{self.run.process.pid}/children").read_text().split()
        return int(children[0])

    def events(self, kind: str, since: float = 0.0) -> list[dict[str, Any]]:
        with contextlib.suppress(ShoalError), RunReader(self.directory / "run.db") as reader:
            return [event for event in reader.events(kind) if event["time"] >= since]
        return []

    @property
    def updates(self) -> int:
        """As run.db says, which is written once a second."""
        with contextlib.suppress(ShoalError), RunReader(self.directory / "run.db") as reader:
            progress = reader.progress()
            return -1 if progress is None else progress.update
        return -1

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something of a run that goes on."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert self.run.process.poll() is None, f"ended with {self.run.process.returncode} before {what}:\n{self.run.said[-4000:]}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.run.said[-4000:]}"
            time.sleep(0.05)

    def until_updates(self, count: int) -> None:
        self.until(lambda: self.updates >= count, f"update {count}")

    def absence(self, before: float, notice: str, role: str) -> Absence:
        """Waits until an update is made after an event `notice`: in sync mode it is made of rollouts of all groups."""

        def noticed() -> list[dict[str, Any]]:
            return [event for event in self.events(notice, before) if event.get("role", role) == role]

        def back() -> list[dict[str, Any]]:
            return [event for event in self.events("recovered", before) if event["role"] == role]

        self.until(noticed, f"event {notice}")
        first = noticed()[0]
        self.until_updates(first["update"] + 2)
        self.until(back, f"recovery of {role}")
        return Absence(first["time"] - before, back()[-1]["time"] - before)

    def end(self) -> dict[str, Any]:
        """Ctrl-C. The result, whose ledger balances."""
        os.kill(self.driver, signal.SIGINT)
        return self.answer(130)

    def answer(self, code: int) -> dict[str, Any]:
        said, _ = self.run.process.communicate(timeout=GONE_SECONDS)
        assert self.run.process.returncode == code, f"code {self.run.process.returncode}: {self.run.said[-4000:]}"
        result: dict[str, Any] = json.loads(said)
        if ledger := result.get("ledger"):
            assert ledger["produced"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["in_flight"], ledger
        return result

    def expected(self, updates: int) -> str:
        """The weights of the local engine after so many updates."""
        here = self.place / "local"
        here.mkdir()
        more = ["--actors", "2", "--stop.updates", str(updates), "--run-dir", str(here / "run"), "--json"]
        code, said, errors = command("train", *TRAINING, *self.size, *more, cwd=here, seconds=300.0)
        assert code == 0, errors
        return str(json.loads(said)["weights_sha256"])


@dataclass
class World:
    """A cluster of hosts `head` and `driver`, which host no actors, and the others, with a processor each; a run on it."""

    hosts: RayHosts
    named: dict[str, Host]
    place: Path

    def train(self, *more: str, size: tuple[str, ...] = ()) -> Training:
        return Training(self.hosts, self.named["driver"], self.place, *more, size=size)

    @property
    def workers(self) -> list[Host]:
        return [host for name, host in self.named.items() if name not in ("head", "driver")]

    def is_left(self) -> list[int]:
        """Processes of fleets."""
        return [pid for host in self.workers for name in ("shoal:", "ray::Node") for pid in host.processes(name)]


@contextlib.contextmanager
def world(place: Path, *workers: str) -> Iterator[World]:
    with network(place / "hosts") as net:
        hosts = RayHosts(net)
        named = {name: hosts.host(name) for name in ("head", "driver", *workers)}
        hosts.head(named["head"])
        hosts.join({named["driver"]: 0, **{named[name]: 1 for name in workers}})
        yield World(hosts, named, place)


# ---- faults ---------------------------------------------------------------------------------------------------------------
def kill_actor(training: Training, host: Host) -> Absence:
    before = time.time()
    host.kill("shoal:actor")
    return training.absence(before, "died", "actor")


def kill_fleet(training: Training, host: Host) -> Absence:
    """The process that holds a node's fleet, and with it all of the fleet."""
    before = time.time()
    host.kill("ray::Node")
    return training.absence(before, "node_lost", "group")


def kill_raylet(training: Training, host: Host) -> Absence:
    """Ray's own process of a host, and with it all that it started."""
    before = time.time()
    host.kill("raylet")
    return training.absence(before, "node_lost", "group")


def kill_learner(training: Training) -> Absence:
    before = time.time()
    os.kill(roles_below(training.run.process.pid)["learner", 0], signal.SIGKILL)
    return training.absence(before, "died", "learner")


def kill_driver(training: Training, world: World) -> Absence:
    """Noticed: nothing of its fleets is left. Then it is resumed; back: the first update after that."""
    before = time.time()
    os.kill(training.driver, signal.SIGKILL)
    until(lambda: not world.is_left(), "end of the fleets", GONE_SECONDS)
    gone, reached = time.time(), training.updates
    training.resume()
    training.until(lambda: training.events("resumed", gone), "event resumed")
    training.until_updates(training.events("resumed", gone)[-1]["update"] + 1)
    assert reached >= 0
    return Absence(gone - before, time.time() - before)


def join_again(training: Training, host: Host, since: float) -> float:
    """Waits until the run has taken the host in again; seconds since then. Its fleet is the only one there."""

    def joined() -> list[dict[str, Any]]:
        return [event for event in training.events("node_joined", since) if event["node"] == host.name]

    training.until(joined, f"node_joined of {host.name}")
    until(lambda: [len(host.processes(name)) for name in ("shoal:actor", "ray::Node")] == [1, 1], f"single fleet on {host.name}")
    return float(joined()[0]["time"]) - since


def part(training: Training, host: Host, seconds: float = PARTITION_SECONDS) -> tuple[Absence, float]:
    """A host that nobody reaches for so long. Returns also how long after it could be reached again it took part again."""
    before = time.time()
    host.cut()
    absence = training.absence(before, "node_lost", "group")
    while time.time() < before + seconds:
        reached = training.updates
        time.sleep(2.5)
        assert training.updates > reached, "the run stands still"
    host.heal()
    return absence, join_again(training, host, time.time())


def lose_head(training: Training, world: World) -> Absence:
    """The head's power goes, the driver ends by itself; a head elsewhere, and the run goes on there."""
    before = time.time()
    world.named["head"].power_off()
    code = training.run.ends(ENDS_SECONDS)
    ended = time.time()
    assert code == 1, f"code {code}: {training.run.said[-4000:]}"
    assert f"shoal resume {training.directory}" in training.run.said, training.run.said[-4000:]
    (failed,) = training.events("failed", before)
    assert "the head of the cluster" in failed["message"]
    for host in (world.named["driver"], *world.workers):
        host.stop_ray()
    elsewhere = world.hosts.host("spare")
    world.hosts.head(elsewhere)
    world.hosts.join({world.named["driver"]: 0, **dict.fromkeys(world.workers, 1)})
    training.resume("--address", world.hosts.address)
    training.until(lambda: training.events("resumed", ended), "event resumed")
    training.until_updates(training.events("resumed", ended)[-1]["update"] + 1)
    return Absence(failed["time"] - before, time.time() - ended)


# ---- a slow link ------------------------------------------------------------------------------------------------------------
SLOW_RATE, SLOW_UPDATES = "2mbit", 4
LARGE = ("--policy.hidden-sizes", "1024,1024")  # the weights take longer than a node may be silent, and than an actor may leave an order
LARGE_BYTES = 4 * 2 * (4 * 1024 + 1024 + 1024 * 1024 + 1024)  # of actor and critic, without their heads


@dataclass(frozen=True)
class Slowness:
    """result: of the run. carried: bytes that went to the host and came from it. seconds: for one update."""

    training: Training
    result: dict[str, Any]
    carried: tuple[int, int]
    seconds: float


def slow_down(world: World) -> Slowness:
    """A run with one host behind a slow link: nobody is given up, nothing is dropped, and what goes over the link is what is needed."""
    host = world.workers[0]
    host.slow(SLOW_RATE)
    before = host.carried_bytes()
    training = world.train("--stop.updates", str(SLOW_UPDATES), size=LARGE)
    training.run.ends(SLOW_UPDATES * 100.0 + 120.0)
    result = training.answer(0)
    there, back = (now - then for now, then in zip(host.carried_bytes(), before, strict=True))
    lost = [event for kind in ("node_lost", "died", "killed") for event in training.events(kind)]
    assert (lost, result["restarts"], result["ledger"]["dropped"]) == ([], 0, {})
    assert SLOW_UPDATES * LARGE_BYTES < there < 1.5 * (SLOW_UPDATES + 1) * LARGE_BYTES, there
    assert back < LARGE_BYTES, back
    return Slowness(training, result, (there, back), result["seconds"] / SLOW_UPDATES)
