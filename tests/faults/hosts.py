"""Hosts of a cluster on one machine, which share its processors and its files, and a network that can be cut and slowed.

A host is a set of namespaces of the kernel: a network of its own, processes that see no others, a name, /tmp/ray. All hosts hang on a bridge that lies in
a network namespace too, so nothing of the machine's own network is touched, and nothing leads out. None of it has a name that would stay: it is there as
long as its first process, which ends with the process that made it, however that ends.

Ray is started on hosts as a user starts it, with token and TLS, and again by itself where it ended, as Kubernetes and Slurm do it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.living import SOURCES
from shoal.engines.ray_security import AUTHORITY, CERTIFICATE, KEY, TOKEN, make_certificate, make_secrets

PORT = 6379
START_SECONDS = 240.0
END_SECONDS = 20.0
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux"}
_RAY = Path("/tmp/ray")
_DIES_WITH_ME = ("setpriv", "--pdeathsig", "KILL")
# The first process of a host: it has nothing to do but to reap those that lost their parents.
_INIT = """
set -e
echo "$1" > /proc/sys/kernel/hostname
mount --bind "$2/ray" /tmp/ray
mount --bind "$3/hosts" /etc/hosts
mount --bind "$3/resolv.conf" /etc/resolv.conf
ip link set lo up
: > "$2/up"
while :; do sleep 3600 & wait; done
"""
_AGAIN = 'while :; do "$@" || :; sleep 1; done'


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are network namespaces of Linux, which root makes"
    if absent := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"hosts need {', '.join(absent)}: apt-get install {' '.join(dict.fromkeys(_TOOLS[tool] for tool in absent))}"
    trial = "ip link add bridge type bridge && ip link add one type veth peer name other && mount -t tmpfs none /mnt"
    done = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c", trial], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else f"the kernel gives no namespaces, or no bridge in them: {done.stderr.strip()}"


@dataclass(eq=False)
class Host:
    """One host. `init` is its first process, in the namespace `space`; `directory` holds what is its own of the disk: /tmp/ray, certificate, logs."""

    network: Network
    name: str
    address: str
    directory: Path
    holder: subprocess.Popen[bytes]
    init: int
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
        return [pid for pid in _members({self.space}) if pid != self.init and _comm(pid).startswith(name)]

    def kill(self, name: str) -> int:
        """kill -9 of the first process whose name begins so, once it is there. Returns its number."""
        until(lambda: self.processes(name), f"{name} on {self.name}")
        pid = self.processes(name)[0]
        os.kill(pid, signal.SIGKILL)
        return pid

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
    def times_up(self) -> int:
        """How often Ray came up here."""
        path = self.directory / "ray.log"
        return path.read_text(errors="replace").count("Ray runtime started") if path.exists() else 0

    def stop_ray(self) -> None:
        """End all processes of the host but its first one, at once."""
        deadline = time.monotonic() + END_SECONDS
        while left := self.processes():
            assert time.monotonic() < deadline, f"{[_comm(pid) for pid in left]} cannot be ended on {self.name}"
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
        """Its first process, and with it all others."""
        self.holder.kill()
        self.holder.wait()
        if self.ray is not None:
            self.ray.wait()

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
        self._made_ray = not _RAY.exists()
        _RAY.mkdir(exist_ok=True)
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
        (place / "ray").mkdir(parents=True)
        with (self.directory / "hosts").open("a") as known:
            known.write(f"{address} {name}\n")
        own = ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (place / "init.log").open("wb") as log:
            holder = subprocess.Popen([*_DIES_WITH_ME, *own, "sh", "-c", _INIT, "sh", name, place, self.directory], stderr=log)
        until((place / "up").exists, f"host {name}: {(place / 'init.log').read_text()}")
        (init,) = _children(holder.pid)
        made = Host(self, name, address, place, holder, init, _link(init, "pid"))
        self.hosts.append(made)
        port = f"to-{name}"
        self.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(init))
        self.run("ip", "link", "set", port, "master", "bridge", "up")
        made.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        made.run("ip", "link", "set", "eth0", "up")
        return made

    def close(self) -> None:
        """Nothing is left: no process, and so no namespace and no link; nothing in /tmp/ray."""
        for host in self.hosts:
            host.end()
        self._hub.kill()
        self._hub.wait()
        spaces = {host.space for host in self.hosts}
        until(lambda: not _members(spaces), "end of all processes of the hosts")
        sessions = {path.name for host in self.hosts for path in (host.directory / "ray").iterdir() if path.name.startswith("session_2")}
        assert not [name for name in sessions if (_RAY / name).exists()], "a host wrote into the machine's /tmp/ray"
        if self._made_ray:
            with contextlib.suppress(OSError):  # others use it by now
                _RAY.rmdir()


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
        until(lambda: _listens(host.init, PORT), f"head: {host.directory / 'ray.log'}", START_SECONDS)

    def join(self, hosts: dict[Host, int]) -> None:
        """Each with so many CPUs. Returns once all are there."""
        before = {host.name: host.times_up for host in hosts}
        for host, cpus in hosts.items():
            host.start_ray(f"--address={self.address}", f"--num-cpus={cpus}")
        for host in hosts:
            until(lambda host=host: host.times_up > before[host.name], f"Ray on {host.name}: {host.directory / 'ray.log'}", START_SECONDS)


def until(condition: Callable[[], Any], what: str, seconds: float = END_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
        time.sleep(0.05)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


# ---- what the kernel says of processes ----------------------------------------------------------------------------------
def _members(spaces: Collection[str]) -> list[int]:
    """Living processes of these namespaces."""
    every = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [pid for pid in every if _link(pid, "pid") in spaces and _state(pid) not in "ZX"]


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


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _listens(pid: int, port: int) -> bool:
    """Whether a socket of a process's network listens there."""
    tables = (Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6"))
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)
