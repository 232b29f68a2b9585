"""Clusters of Ray that benches place runs on: several nodes on this machine, with a token and TLS as those that shoal starts; what crosses a link of
theirs costs, and what lies in their object stores.

    python benchmarks/clusters.py NODES CPUS      starts one, says where it is (JSON), and ends it with its standard input
    python benchmarks/clusters.py --link ADDRESS  measures the way to the last node of the cluster at ADDRESS
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rows import CommandError, answer_of

from shoal.engines.ray_security import AUTHORITY, CERTIFICATE, KEY, TOKEN, make_certificate, make_secrets, own_names

SCRIPT = str(Path(__file__).resolve())
START_SECONDS = 120.0
STORE_BYTES = 150 << 20  # of each node; Ray's least is 75 MB
WATCH_SECONDS = 0.5
CALLS, LARGE_CALLS, SMALL_BYTES, LARGE_BYTES = 400, 20, 600, 4 << 20


@dataclass(frozen=True)
class Place:
    """Where a run goes.

    Attributes:
      address: of the cluster. session: the directory of Ray's session.
      environment: what its drivers need. prefix: of their commands, where they do not run in this network namespace.
    """

    address: str
    session: Path
    environment: Mapping[str, str]
    prefix: tuple[str, ...] = ()

    def command(self, arguments: Sequence[str]) -> list[str]:
        return [*self.prefix, "env", *(f"{name}={value}" for name, value in self.environment.items()), *arguments]


def bare_environment() -> dict[str, str]:
    """This process's, without what says something of Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "RAY_USAGE_STATS_ENABLED": "0"}


def secured(directory: Path, names: Sequence[str] = ()) -> dict[str, str]:
    """Token and TLS for a cluster whose nodes are reached at this host's names and at `names`; the secrets lie in `directory`."""
    private = directory / "private"
    make_secrets(private)
    make_certificate(private, private / "node", [*own_names(), *names])
    return {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(private / TOKEN), "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(private / "node" / CERTIFICATE), "RAY_TLS_SERVER_KEY": str(private / "node" / KEY),
        "RAY_TLS_CA_CERT": str(private / "node" / AUTHORITY), "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip


@contextlib.contextmanager
def nodes_here(nodes: int, cpus: int) -> Iterator[Place]:
    """A cluster of so many nodes on this machine, `cpus` each. Raises CommandError: it did not come up."""
    with tempfile.TemporaryDirectory(prefix="shoal-cluster-") as directory:
        environment = secured(Path(directory))
        command = [sys.executable, SCRIPT, str(nodes), str(cpus)]
        with (Path(directory) / "log").open("w+") as log:
            started = subprocess.Popen(
                command, env={**bare_environment(), **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
            try:
                yield _place_of(started, environment, log.name)
            finally:
                _end(started)


def _place_of(started: subprocess.Popen[str], environment: Mapping[str, str], log: str) -> Place:
    assert started.stdout is not None
    timer = threading.Timer(START_SECONDS, started.kill)
    timer.start()
    try:
        for text in started.stdout:  # Ray may say something before
            if text.startswith("{"):
                told = json.loads(text)
                return Place(told["address"], Path(told["session"]), environment)
    finally:
        timer.cancel()
    raise CommandError(f"no cluster came up:\n{Path(log).read_text(errors='replace')[-2000:]}")


def _end(started: subprocess.Popen[str]) -> None:
    for stream in (started.stdin, started.stdout):
        assert stream is not None
        stream.close()
    try:
        started.wait(60.0)
    except subprocess.TimeoutExpired:
        started.kill()
        started.wait()


def serve(nodes: int, cpus: int) -> None:
    """The process of `nodes_here`."""
    from ray.cluster_utils import Cluster

    size: dict[str, Any] = {"num_cpus": cpus, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(**size)
    assert cluster.head_node is not None
    print(json.dumps({"address": cluster.address, "session": cluster.head_node.get_session_dir_path()}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


# ---- what is watched while a run goes on -----------------------------------------------------------------------------
@dataclass
class Watched:
    """(seconds on the monotonic clock, bytes of the object stores, bytes that were spilled, seconds that all cores were busy) a few times a second."""

    samples: list[tuple[float, int, int, float]] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """store_mb, and by how much it grew in the second half; spilled_mb; cores that were busy in the second half, on average, the bench's own included."""
        half = self.samples[len(self.samples) // 2 :]
        if len(half) < 2:
            raise CommandError("the run was too short to be watched; raise --seconds")
        (begin, store, _, busy), (end, last, spilled, busier) = half[0], half[-1]
        return {
            "store_mb": last / 1e6,
            "store_growth_mb": (last - store) / 1e6,
            "spilled_mb": spilled / 1e6,
            "cores_busy": (busier - busy) / (end - begin),
        }


@contextlib.contextmanager
def watching(session: Path, every_seconds: float = WATCH_SECONDS) -> Iterator[Watched]:
    """Watch the cluster of a session and the machine's cores, in a thread."""
    watched, ended = Watched(), threading.Event()

    def watch() -> None:
        files = plasma_files(session)
        while not ended.wait(every_seconds):
            watched.samples.append((time.monotonic(), held_bytes(files), spilled_bytes(session), busy_seconds()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        ended.set()
        thread.join()


def plasma_files(session: Path) -> list[Path]:
    """The memory of each object store of a session: an unlinked file that its raylet holds. It is as large as what has lain there at once, at most."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if not words[0].endswith(b"raylet") or f"--session_dir={session}".encode() not in words:
                continue
            found += [fd for fd in (process / "fd").iterdir() if "/plasma" in str(fd.readlink())]
    return found


def held_bytes(files: Sequence[Path]) -> int:
    held = 0
    for file in files:
        with contextlib.suppress(OSError):  # that node is gone
            held += 512 * file.stat().st_blocks
    return held


def spilled_bytes(session: Path) -> int:
    """What Ray has put on disk because its object stores were full."""
    return sum(file.stat().st_size for file in session.glob("ray_spilled_objects*/**/*") if file.is_file())


def busy_seconds() -> float:
    """That all cores together have worked since the machine was started."""
    words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


# ---- a link ----------------------------------------------------------------------------------------------------------
def measured_link(place: Place) -> dict[str, float]:
    """latency_us (half of a call and its answer), gbit (of large messages), message_us (processor time of a small call, at one end)."""
    return answer_of(place.command([sys.executable, SCRIPT, "--link", place.address]), START_SECONDS)


def measure_link(address: str) -> dict[str, float]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address, log_to_driver=False, logging_level="ERROR")
    here = ray.get_runtime_context().get_node_id()
    nodes = sorted((node["NodeID"] for node in ray.nodes() if node["Alive"]), key=lambda node: node == here)
    kind: Any = ray.remote(concurrency_groups={"say": 1})(Echo)
    echo = kind.options(num_cpus=1, scheduling_strategy=NodeAffinitySchedulingStrategy(nodes[0], soft=False)).remote()
    say = echo.say.options(concurrency_group="say")

    def seconds(message: bytes, calls: int) -> list[float]:
        found = []
        for _ in range(calls):
            begun = time.perf_counter()
            ray.get(say.remote(message))
            found.append(time.perf_counter() - begun)
        return found

    small, large = bytes(SMALL_BYTES), bytes(LARGE_BYTES)
    seconds(small, CALLS // 4)
    seconds(large, 2)
    before = time.process_time() + ray.get(echo.spent.remote())
    call = median(seconds(small, CALLS))
    spent = time.process_time() + ray.get(echo.spent.remote()) - before
    many = median(seconds(large, LARGE_CALLS))
    ray.shutdown()
    return {"latency_us": 1e6 * call / 2, "gbit": 8e-9 * LARGE_BYTES / max(1e-9, many - call), "message_us": 1e6 * spent / CALLS / 2}


class Echo:
    """The other end."""

    def say(self, message: bytes) -> None:
        pass

    def spent(self) -> float:
        return time.process_time()


if __name__ == "__main__":
    if sys.argv[1] == "--link":
        print(json.dumps(measure_link(sys.argv[2])))
    else:
        serve(*map(int, sys.argv[1:3]))
