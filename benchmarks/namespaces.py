"""Hosts that are network namespaces of this machine, each with a node of a Ray cluster: nothing of them reaches the machine's own network.

A bridge in a namespace of its own joins them by pairs of virtual interfaces. Everything goes with the namespaces, which are removed at the end, whatever happened.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from clusters import STORE_BYTES, Place, bare_environment, secured
from rows import CommandError

PORT = 6379
END_SECONDS = 10.0
RAY = str(Path(sys.executable).with_name("ray"))


def why_not() -> str:
    """Why no hosts can be made here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces are made by root alone"
    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is missing"
    probe = f"shoal-{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", "name", "left", "type", "veth", "peer", "name", "right")
    except CommandError as error:
        return f"network namespaces are not permitted: {error}"
    finally:
        subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return ""


@contextlib.contextmanager
def hosts(number: int, cpus: int) -> Iterator[Place]:
    """A cluster of so many hosts, `cpus` each; drivers run on the first. Raises CommandError: it did not come up."""
    sweep()
    tag = f"shoal-{os.getpid()}-{_started(os.getpid())}"
    names = [f"{tag}-{n}" for n in range(number)]
    addresses = [f"10.213.0.{n + 1}" for n in range(number)]
    with tempfile.TemporaryDirectory(prefix="shoal-hosts-") as directory:
        try:
            _connect(f"{tag}-bridge", names, addresses)
            environment = secured(Path(directory), addresses)
            yield _cluster(names, addresses, cpus, Path(directory), environment)
        finally:
            remove_all([*names, f"{tag}-bridge"])


def remove_all(names: Sequence[str]) -> None:
    """All of them, whatever becomes of one. Raises CommandError in the end: names what is left, and why."""
    left = []
    for name in names:
        try:
            _remove(name)
        except (CommandError, OSError, subprocess.SubprocessError) as error:
            left.append(str(error))
    if left:
        raise CommandError("; ".join(left))


def sweep() -> None:
    """Remove what makers that were killed left behind: namespaces whose process, by number and start, is gone."""
    made = [re.fullmatch(r"shoal-(\d+)-(\d+)-\w+", name) for name in _names()]
    remove_all([found[0] for found in made if found and _started(int(found[1])) != found[2]])


def _names() -> list[str]:
    found = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    return [line.split()[0] for line in found.stdout.splitlines() if line.strip()]


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]
    except OSError:
        return ""


def _connect(bridge: str, names: Sequence[str], addresses: Sequence[str]) -> None:
    _ip("netns", "add", bridge)
    _ip("-n", bridge, "link", "add", "name", "bridge", "type", "bridge")
    _ip("-n", bridge, "link", "set", "bridge", "up")
    for number, (name, address) in enumerate(zip(names, addresses, strict=True)):
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "add", "name", "eth0", "type", "veth", "peer", "name", f"port{number}", "netns", bridge)
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", bridge, "link", "set", f"port{number}", "master", "bridge", "up")


def _cluster(names: Sequence[str], addresses: Sequence[str], cpus: int, directory: Path, environment: dict[str, str]) -> Place:
    head = f"{addresses[0]}:{PORT}"
    temporary = directory / "ray"
    for name, address in zip(names, addresses, strict=True):
        place = Place(head, temporary, environment, ("ip", "netns", "exec", name))
        where = (
            ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={temporary}"]
            if address == addresses[0]
            else [f"--address={head}"]
        )
        size = [f"--node-ip-address={address}", f"--num-cpus={cpus}", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats"]
        _run(place.command([RAY, "start", *where, *size]), bare_environment())
    session = (temporary / "session_latest").resolve()
    return Place(head, session, environment, ("ip", "netns", "exec", names[0]))


def _remove(name: str) -> None:
    """A namespace with all that runs in it; one that is not there is no fault."""
    deadline = time.monotonic() + END_SECONDS
    while pids := _inside(name):
        if time.monotonic() > deadline:
            raise CommandError(f"processes {pids} in the namespace {name} do not end")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    done = subprocess.run(["ip", "netns", "delete", name], capture_output=True, text=True, check=False)
    if name in _names():
        raise CommandError(f"the namespace {name} cannot be removed: {done.stderr.strip()}")


def _inside(name: str) -> list[int]:
    """Processes that live in a namespace; zombies have none."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()] if found.returncode == 0 else []


def _ip(*words: str) -> None:
    _run(["ip", *words])


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120.0)
    if done.returncode != 0:
        raise CommandError(f"{' '.join(command)} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
