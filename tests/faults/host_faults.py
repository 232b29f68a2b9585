"""What may befall a run on hosts: each fault strikes once, waits until the run has got over it, and says how long that took.

For tests/faults/test_ray_hosts.py and benchmarks/soak_hosts.py. Times are those of the events in run.db, from the moment of the blow.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from faults.hosts import Host, RayHosts, network, until
from faults.living import Living, command
from shoal.engines.ray_cluster import BEAT_SECONDS, QUIET_SECONDS
from shoal.engines.ray_node import SignalledNode
from shoal.engines.watch import UNHEARD_SECONDS
from shoal.errors import ShoalError
from shoal.monitoring.store import RunReader
from shoal.supervision.processes import NAME_BYTES

TRAINING = [
    f"{Path(__file__).with_name('simulated.py')}:make", "--env.kwargs.simulators", "false", "--env.form", "python", "--preset", "none",
    "--sampling.groups", "4", "--sampling.group-size", "2", "--sampling.rollout-length", "16", "--algorithm.minibatch-size", "64",
    "--algorithm.epochs", "2", "--seed", "3", "--evaluation.episodes", "0",
]  # fmt: skip
STEP_SECONDS = "0.002"  # so that there are not thousands of updates for the local engine to make again, which takes none
ENDLESS = ["--stop.updates", "10000000", "--checkpoint.every-updates", "10"]
PARTITION_SECONDS = 60.0
WAIT_SECONDS = 300.0  # for anything, on a busy machine: it only ends what hangs
FLEET = f"ray::{SignalledNode.__name__}"[:NAME_BYTES]  # what Ray names the process that holds a fleet


@dataclass(frozen=True)
class Absence:
    """Seconds from a blow until the run noticed it, and until it had made up for what was lost; again: until the host took part again, where it was to."""

    noticed: float
    back: float
    again: float | None = None


class Training:
    """A run whose driver is on a host of its own, and may be killed and resumed."""

    def __init__(self, hosts: RayHosts, at: Host, place: Path, *more: str, size: tuple[str, ...] = ()) -> None:
        self.hosts, self.at, self.place, self.directory, self.size = hosts, at, place, place / "run", size
        self.run = self._start(
            "train", *TRAINING, *size, "--env.kwargs.seconds", STEP_SECONDS, "--engine", "ray", "--address", hosts.address,
            "--actors-per-node", "1", "--run-dir", str(self.directory), *(more or ENDLESS),
        )  # fmt: skip
        if not more:
            self.until_updates(11)  # of which ten have a checkpoint

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

    def stalls(self) -> dict[str, Any]:
        """What `shoal stalls` says of it; nothing where nobody answers yet."""
        asked = Living(["stalls", str(self.directory), "--json"], self.place, "stalls", self.at.inside(directory=self.place))
        said, _ = asked.process.communicate(timeout=WAIT_SECONDS)
        found: dict[str, Any] = json.loads(said)["stalls"] if asked.process.returncode == 0 else {}
        return found

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
        said, _ = self.run.process.communicate(timeout=WAIT_SECONDS)
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
        code, said, errors = command("train", *TRAINING, *self.size, *more, cwd=here, seconds=WAIT_SECONDS)
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

    def is_left(self) -> list[str]:
        """Processes and files of a run, of its driver and of its fleets."""
        hosts = [host for name, host in self.named.items() if name != "head"]
        processes = [f"{name} on {host.name}" for host in hosts for name in ("shoal:", FLEET) if host.processes(name)]
        return processes + [f"{name} on {host.name}" for host in hosts for name in host.left]

    def until_nothing_is_left(self) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while left := self.is_left():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


@contextlib.contextmanager
def world(place: Path, *workers: str) -> Iterator[World]:
    """In the end nothing of a run is left there."""
    with network(place / "hosts") as net:
        hosts = RayHosts(net)
        named = {name: hosts.host(name) for name in ("head", "driver", *workers)}
        hosts.head(named["head"])
        hosts.join({named["driver"]: 0, **{named[name]: 1 for name in workers}})
        made = World(hosts, named, place)
        yield made
        made.until_nothing_is_left()


# ---- faults ---------------------------------------------------------------------------------------------------------------
def kill_actor(training: Training, host: Host) -> Absence:
    before = time.time()
    host.kill("shoal:actor")
    return training.absence(before, "died", "actor")


def kill_fleet(training: Training, host: Host) -> Absence:
    """The process that holds a node's fleet, and with it all of the fleet."""
    before = time.time()
    host.kill(FLEET)
    return training.absence(before, "node_lost", "group")


def kill_raylet(training: Training, host: Host) -> Absence:
    """Ray's own process of a host, and with it all that it started."""
    before = time.time()
    host.kill("raylet")
    return training.absence(before, "node_lost", "group")


def kill_learner(training: Training) -> Absence:
    before = time.time()
    training.at.kill("shoal:learner")
    return training.absence(before, "died", "learner")


def kill_driver(training: Training, world: World) -> Absence:
    """Noticed: nothing of it is left on any host. Then it is resumed; back: the first update after that, from the blow on."""
    before = time.time()
    os.kill(training.driver, signal.SIGKILL)
    world.until_nothing_is_left()
    gone = time.time()
    training.resume()
    training.until(lambda: training.events("resumed", gone), "event resumed")
    training.until_updates(training.events("resumed", gone)[-1]["update"] + 1)
    return Absence(gone - before, time.time() - before)


def join_again(training: Training, host: Host, since: float) -> float:
    """Waits until the run has taken the host in again, and made updates with it; seconds until it was taken in. Its fleet is the only one there."""

    def joined() -> list[dict[str, Any]]:
        return [event for event in training.events("node_joined", since) if event["node"] == host.name]

    training.until(joined, f"node_joined of {host.name}")
    until(lambda: [len(host.processes(name)) for name in ("shoal:actor", FLEET)] == [1, 1], f"single fleet on {host.name}")
    training.until_updates(training.updates + 3)  # in sync mode the last of them is made of rollouts of the groups that moved there
    return float(joined()[0]["time"]) - since


def part(training: Training, host: Host, seconds: float = PARTITION_SECONDS) -> Absence:
    """A host that nobody reaches for so long. Again: from when it could be reached again."""
    before = time.time()
    host.cut()
    absence = training.absence(before, "node_lost", "group")
    while time.time() < before + seconds:
        training.until_updates(training.updates + 1)  # it does not stand still meanwhile
    host.heal()
    return replace(absence, again=join_again(training, host, time.time()))


def lose_head(training: Training, world: World) -> Absence:
    """The head's power goes, the driver ends by itself; a head elsewhere, and the run goes on there."""
    before = time.time()
    world.named["head"].power_off()
    code = training.run.ends(WAIT_SECONDS)
    ended = time.time()
    assert code == 1, f"code {code}: {training.run.said[-4000:]}"
    assert f"shoal resume {training.directory}" in training.run.said, training.run.said[-4000:]
    (failed,) = training.events("failed", before)
    assert "the head of the cluster" in failed["message"]
    for host in (world.named["driver"], *world.workers):
        host.stop_ray()
    world.hosts.head(world.hosts.host("spare"))
    world.hosts.join({world.named["driver"]: 0, **dict.fromkeys(world.workers, 1)})
    training.resume("--address", world.hosts.address)
    training.until(lambda: training.events("resumed", ended), "event resumed")
    training.until_updates(training.events("resumed", ended)[-1]["update"] + 1)
    return Absence(failed["time"] - before, time.time() - ended)


# ---- a slow link ------------------------------------------------------------------------------------------------------------
SLOW_MBIT, SLOW_UPDATES = 2, 2
LARGE = ("--policy.hidden-sizes", "1000,1000")  # on its way for longer than a node may be silent, and than an actor may leave an order
LARGE_BYTES = 4 * 2 * (4 * 1000 + 1000 + 1000 * 1000 + 1000)  # of actor and critic, without their heads
LARGE_SECONDS = LARGE_BYTES * 8 / (SLOW_MBIT * 1e6)  # of the weights on that link, at least


@dataclass(frozen=True)
class Slowness:
    """result: of the run. carried: bytes that went to the host and came from it. blamed: whom all wait for meanwhile, in the run's words, which it said so many
    seconds after the weights had begun to go there."""

    training: Training
    result: dict[str, Any]
    carried: tuple[int, int]
    blamed: str
    said_after: float

    @property
    def seconds(self) -> float:
        """For one update."""
        return float(self.result["seconds"]) / SLOW_UPDATES


def slow_down(world: World) -> Slowness:
    """A run with one host behind a slow link: the link is what bounds it, which it says itself; nobody is given up, nothing is dropped, and what goes over the
    link is what is needed."""
    assert max(UNHEARD_SECONDS, QUIET_SECONDS + BEAT_SECONDS) < LARGE_SECONDS
    host, said = world.workers[0], list[tuple[str, float] | None]()
    host.slow(f"{SLOW_MBIT}mbit")
    before = host.carried_bytes()
    training = world.train("--stop.updates", str(SLOW_UPDATES), size=LARGE)
    training.until(lambda: said.append(waited_for(training.stalls())) or said[-1], "word of what is on its way")
    training.run.ends(WAIT_SECONDS)
    result = training.answer(0)
    there, back = (now - then for now, then in zip(host.carried_bytes(), before, strict=True))
    lost = [event for kind in ("node_lost", "died", "killed") for event in training.events(kind)]
    assert (lost, result["restarts"], result["ledger"]["dropped"]) == ([], 0, {})
    assert result["seconds"] > 0.95 * SLOW_UPDATES * LARGE_SECONDS, "the link does not bound it"
    said_bytes = result["network"]["nodes"][host.name]["bytes_said"]
    assert SLOW_UPDATES * LARGE_BYTES < said_bytes < there < 1.25 * (SLOW_UPDATES + 1) * LARGE_BYTES, (said_bytes, there)
    assert back < LARGE_BYTES, back
    return Slowness(training, result, (there, back), *(said[-1] or ("", 0.0)))


def waited_for(stalls: dict[str, Any]) -> tuple[str, float] | None:
    """The one for whom the learner and the other actor wait, since large weights have been on their way to it for so many seconds; None where it is not so."""
    awaited = {name for each in stalls.get("waits", []) for name in each["for"]}
    waiting = {each["who"] for each in stalls.get("waits", [])}
    if len(awaited) != 1 or waiting != {"learner-0", "actor-0", "actor-1"} - awaited:
        return None
    (blamed,) = stalls["blamed"]
    on_its_way = re.search(r"\(what it is told is on its way: [\d,]+ of ([\d,]+) bytes after (\d+) s\)", blamed)
    if on_its_way is None or int(on_its_way[1].replace(",", "")) < LARGE_BYTES:
        return None
    return blamed, float(on_its_way[2])
