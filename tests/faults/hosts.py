"""Hosts of a cluster on one machine, which share its processors and its files, and a network that can be cut and slowed.

A host is a set of namespaces of the kernel: a network of its own, processes that see no others, a name, a place for
temporary files. All hosts hang on a bridge that lies in a network namespace too, so nothing of the machine's own network is touched, and nothing leads out. None of
it has a name that would stay: it is there as long as its first process, which ends with the process that made it, however that ends.

Ray is started on hosts as a user starts it, with token and TLS, and again by itself where it ended, as Kubernetes and Slurm do it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.living import SOURCES
from shoal.engines.ray_security import AUTHORITY, CERTIFICATE, KEY, TOKEN, make_certificate, make_secrets

PORT = 6379
WAIT_SECONDS = 240.0  # for anything, on a busy machine: it only ends what hangs
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux"}
_OWN = "/mnt"  # where a host finds its own directory
_DIES_WITH_ME = ("setpriv", "--pdeathsig", "KILL")
# The first process of a host. It has no children of its own; those that lost their parents are reaped by the kernel, since it ignores their ends.
_INIT = """
set -e
echo "$1" > /proc/sys/kernel/hostname
mount --bind "$2" "$4"
mount --bind "$3/hosts" /etc/hosts
mount --bind "$3/resolv.conf" /etc/resolv.conf
ip link set lo up
: > "$2/up"
exec env --ignore-signal=CHLD sleep infinity
"""
_AGAIN = 'while :; do "$@" || :; sleep 1; done'


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are network namespaces of Linux, which root makes"
    if absent := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"hosts need {', '.join(absent)}: apt-get install {' '.join(dict.fromkeys(_TOOLS[tool] for tool in absent))}"
    trial = "ip link add bridge type bridge && ip link add one type veth peer name other && mount -t tmpfs none /mnt && env --ignore-signal=CHLD true"
    done = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c", trial], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else f"the kernel gives no namespaces, or no bridge in them: {done.stderr.strip()}"


@dataclass(eq=False)
class Host:
    """One host. `init` is its first process, in the namespace `space`, and `life` a descriptor of that; `directory` holds what is its own of the disk:
    Ray's files, temporary ones, certificate, logs."""

    network: Network
    name: str
    address: str
    directory: Path
    holder: subprocess.Popen[bytes]
    init: int
    life: int
    space: str
    environment: dict[str, str] = field(default_factory=dict)
    ray: subprocess.Popen[bytes] | None = None

    def inside(self, *command: str, directory: Path | None = None) -> list[str]:
        """A command line that runs this one on the host. It is a child of the process that one starts."""
        given = [f"{name}={value}" for name, value in self.environment.items()]
        where = ["env", "-C", str(directory or self.directory), "-u", "RAY_ADDRESS", *given]
        return ["nsenter", "--target", str(self.init), "--net", "--uts", "--pid", "--mount", "--", *where, *command]

    def run(self, *command: str) -> str:
        return _run(*self.inside(*command))

    # ---- its processes -----------------------------------------------------------------------------------------
    def processes(self, name: str = "") -> list[int]:
        """Numbers, as the machine counts, of its living processes whose name begins so, the first one apart."""
        return [pid for pid in _members(self.space) if pid != self.init and _comm(pid).startswith(name)]

    def kill(self, name: str) -> int:
        """kill -9 of the first process whose name begins so, once it is there. Returns its number."""
        found: list[int] = []
        until(lambda: found.extend(self.processes(name)) or found, f"{name} on {self.name}")
        os.kill(found[0], signal.SIGKILL)
        return found[0]

    def start_ray(self, *arguments: str, again: bool = True) -> None:
        """`ray start` with these arguments; again: started anew where it ended. Returns at once."""
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--disable-usage-stats",
            "--object-store-memory=100000000",
        ]
        command += [f"--node-ip-address={self.address}", "--include-log-monitor=false", *arguments]
        looped = ["sh", "-c", _AGAIN, "sh", *command] if again else command
        with (self.directory / "ray.log").open("ab") as log:
            self.ray = subprocess.Popen([*_DIES_WITH_ME, *self.inside(*looped)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def ray_ended(self) -> bool:
        return self.ray is None or self.ray.poll() is not None

    @property
    def times_up(self) -> int:
        """How often Ray came up here."""
        path = self.directory / "ray.log"
        return path.read_text(errors="replace").count("Ray runtime started") if path.exists() else 0

    def stop_ray(self) -> None:
        """End all processes of the host but its first one, at once."""
        deadline = time.monotonic() + WAIT_SECONDS
        while left := self.processes():
            assert time.monotonic() < deadline, f"{[_told(pid) for pid in left]} cannot be ended on {self.name}"
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if self.ray is not None:
            self.ray.wait()
            self.ray = None

    def power_off(self) -> None:
        """All at once, without a word to anybody: the link goes first."""
        self.cut()
        self.end()

    def end(self) -> None:
        """Its first process, which the kernel ends after all others. May be called twice."""
        if self.life < 0:
            return
        self.holder.kill()
        self.holder.wait()
        assert select.select([self.life], [], [], WAIT_SECONDS)[0], (
            f"{[_told(pid) for pid in _members(self.space)]} do not end with {self.name}"
        )
        os.close(self.life)
        self.life = -1
        if self.ray is not None:
            self.ray.wait()

    @property
    def left(self) -> list[str]:
        """Files of ours where temporary ones lie."""
        return sorted(path.name for path in (self.directory / "tmp").glob("shoal*"))

    # ---- its link ------------------------------------------------------------------------------------------------
    @property
    def _port(self) -> str:
        return f"to-{self.name}"

    def cut(self) -> None:
        """From now on whatever is sent to it or by it is lost; neither end is told."""
        self.network.run("ip", "link", "set", self._port, "nomaster")

    def heal(self) -> None:
        self.network.run("ip", "link", "set", self._port, "master", "bridge")

    def slow(self, rate: str) -> None:
        """Its link carries so much each way (as tc says it: 2mbit)."""
        shape = ["root", "tbf", "rate", rate, "burst", "32kb", "latency", "400ms"]
        self.network.run("tc", "qdisc", "add", "dev", self._port, *shape)
        self.run("tc", "qdisc", "add", "dev", "eth0", *shape)

    def carried_bytes(self) -> tuple[int, int]:
        """What its link has carried: to the host, and from it."""
        (link,) = json.loads(self.network.run("ip", "-s", "-j", "link", "show", "dev", self._port))
        return int(link["stats64"]["tx"]["bytes"]), int(link["stats64"]["rx"]["bytes"])


class Network:
    """A bridge, and hosts that hang on it. `directory` is theirs."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.hosts = directory, list[Host]()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "resolv.conf").write_text("")  # nobody outside is asked for a name
        (directory / "hosts").write_text("127.0.0.1 localhost\n")
        self._hub = subprocess.Popen([*_DIES_WITH_ME, "unshare", "--net", "sleep", "infinity"])
        own = _link(os.getpid(), "net")
        until(lambda: _link(self._hub.pid, "net") not in ("", own), "a network namespace")
        self.run("ip", "link", "add", "bridge", "type", "bridge")
        self.run("ip", "link", "set", "bridge", "up")

    def run(self, *command: str) -> str:
        """Where the bridge is."""
        return _run("nsenter", "--target", str(self._hub.pid), "--net", "--", *command)

    def host(self, name: str) -> Host:
        """One more host, with a link, an address and a name that the others know."""
        address, place = f"10.77.0.{len(self.hosts) + 1}", self.directory / name
        (place / "tmp").mkdir(parents=True)
        with (self.directory / "hosts").open("a") as known:
            known.write(f"{address} {name}\n")
        own = ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (place / "init.log").open("wb") as log:
            holder = subprocess.Popen([*_DIES_WITH_ME, *own, "sh", "-c", _INIT, "sh", name, place, self.directory, _OWN], stderr=log)
        until(lambda: (place / "up").exists() or holder.poll() is not None, f"host {name}")
        assert holder.poll() is None, (place / "init.log").read_text()
        (init,) = _children(holder.pid)
        made = Host(self, name, address, place, holder, init, os.pidfd_open(init), _link(init, "pid"))
        self.hosts.append(made)
        port = f"to-{name}"
        self.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(init))
        self.run("ip", "link", "set", port, "master", "bridge", "up")
        made.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        made.run("ip", "link", "set", "eth0", "up")
        return made

    def close(self) -> None:
        """Nothing is left: no process, and so no namespace and no link."""
        for host in self.hosts:
            host.end()
        self._hub.kill()
        self._hub.wait()


@contextlib.contextmanager
def network(directory: Path) -> Iterator[Network]:
    made = Network(directory)
    try:
        yield made
    finally:
        made.close()


class RayHosts:
    """A Ray cluster on hosts of a network, with token and TLS."""

    def __init__(self, network: Network) -> None:
        self.network, self.head_address = network, ""
        self._secrets = network.directory / "secrets"
        make_secrets(self._secrets)

    @property
    def address(self) -> str:
        return f"{self.head_address}:{PORT}"

    def host(self, name: str) -> Host:
        """A host with a certificate, and all that `ray start` and a driver find in their environment."""
        made = self.network.host(name)
        make_certificate(self._secrets, made.directory / "tls", [made.address, name, "localhost", "127.0.0.1"])
        made.environment = {
            "PYTHONPATH": os.pathsep.join(SOURCES),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TMPDIR": f"{_OWN}/tmp",
            "RAY_TMPDIR": _OWN,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "",
            "RAY_AUTH_TOKEN_PATH": str(self._secrets / TOKEN),
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": str(made.directory / "tls" / CERTIFICATE),
            "RAY_TLS_SERVER_KEY": str(made.directory / "tls" / KEY),
            "RAY_TLS_CA_CERT": str(made.directory / "tls" / AUTHORITY),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "120",
            "RAY_worker_niceness": "0",  # else a busy machine leaves nothing to actors
        }
        return made

    def head(self, host: Host) -> None:
        """Returns once it listens. A head is not started again by itself."""
        host.start_ray("--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false", again=False)
        self.head_address = host.address
        until(lambda: _listens(host.init, PORT) or host.ray_ended, f"head: {host.directory / 'ray.log'}")
        assert not host.ray_ended, (host.directory / "ray.log").read_text()[-2000:]

    def join(self, hosts: dict[Host, int]) -> None:
        """Each with so many CPUs. Returns once all are there."""
        before = {host.name: host.times_up for host in hosts}
        for host, cpus in hosts.items():
            host.start_ray(f"--address={self.address}", f"--num-cpus={cpus}")
        for host in hosts:
            until(lambda host=host: host.times_up > before[host.name], f"Ray on {host.name}: {host.directory / 'ray.log'}")


def until(condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
        time.sleep(0.05)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


# ---- what the kernel says of processes ----------------------------------------------------------------------------------
def _members(space: str) -> list[int]:
    """Living processes of a namespace."""
    every = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [pid for pid in every if _link(pid, "pid") == space and _state(pid) not in "ZX"]


def _link(pid: int, kind: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:  # it is gone
        return ""


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def _told(pid: int) -> str:
    return f"{pid} {_comm(pid)} {_state(pid)}"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _listens(pid: int, port: int) -> bool:
    """Whether a socket of a process's network listens there."""
    tables = (Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6"))
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)
