"""The way into a cluster: joining the one at an address, or starting a local one with a token and TLS of its own; else what is wrong, in a line."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from shoal.config import RunConfig
from shoal.engines.ray_cluster import DRAINS, Cluster
from shoal.engines.ray_roll import Roll
from shoal.engines.ray_secrets import OwnSecrets, check_joining, check_unused
from shoal.engines.ray_security import asks_for_token, check_cluster, has_tls, redact, use_token, why_not_joined
from shoal.errors import ConfigError
from shoal.settings import available_cores, check_spread

ASK_SECONDS = 10.0  # for the head to say which machines there are
CONNECT_SECONDS = 10.0


def connect(config: RunConfig, warn: Callable[[str], None]) -> Cluster:
    """Join the cluster at `ray.address`, or start a local one, with a token and TLS of its own, where none is named.

    Args:
      warn: is told what is not safe about it.
    Raises:
      ConfigError: Ray is not installed, there is no cluster at that address, it asks for no token, or whether it does cannot be found out.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine: ray needs the extra `ray`: pip install 'shoal[ray]'")
    address, named = config.ray.address, "--address"
    if address in (None, "auto") and os.environ.get("RAY_ADDRESS"):  # as Ray takes it, and as it is in a job that was submitted
        address, named = os.environ["RAY_ADDRESS"], "RAY_ADDRESS"
    if config.ray.learners_on == "nodes" and address is not None and address.startswith("ray://"):
        raise ConfigError(
            "ray.learners_on: a driver that joins by ray:// is no machine of the cluster, and learners on nodes have no way to it; run it on one of them, "
            "with --address HEAD:PORT, or give --learners-on driver"
        )
    _check_asked_for(config, alone=address is None)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    check_unused()
    secrets: OwnSecrets | None = None
    if address is None:
        secrets, address = OwnSecrets(), "local"  # before Ray is imported
        quiet |= {"num_cpus": max(available_cores(), config.ray.actors_per_node or 1), "include_dashboard": False}
    else:
        check_joining()
        if address == "auto":
            _check_there_is_one()
        else:
            _check_reachable(address, named)
        if not config.ray.allow_insecure_cluster:
            os.environ.update(use_token(os.environ))
        for warning in check_cluster(os.environ, config.ray.allow_insecure_cluster, lambda: asks_for_token(address, os.environ)):
            warn(warning)
    try:
        with _own_signals():
            import ray

            ray.init(address, **quiet)
        own = "" if address.startswith("ray://") else ray.get_runtime_context().get_node_id()
        roll = Roll(_machines)
    except BaseException as error:
        said = redact(" ".join(str(error).split()))[:300]  # while its token is there
        _leave_ray(secrets)
        if not isinstance(error, Exception):  # Ray raises a plain one where its own processes start too slowly
            raise
        done, busy = (
            (f"joined at {address}", why_not_joined(address, os.environ))
            if secrets is None
            else ("started on this machine", "; is it too busy for Ray to start in time?")
        )
        raise ConfigError(f"ray.address: no cluster could be {done}: {said}{busy}") from None
    per_node = config.ray.actors_per_node or _cpus_of_the_smallest(roll.machines)
    return Cluster(1 if secrets and config.ray.nodes is None else config.ray.nodes, per_node, secrets, roll, own=own)


def _leave_ray(secrets: OwnSecrets | None) -> None:
    """Of a cluster that was joined or started in vain, nothing stays."""
    with contextlib.suppress(Exception):  # it is not there
        import ray

        ray.shutdown()
    if secrets is not None:
        secrets.cleanup()


def _check_asked_for(config: RunConfig, *, alone: bool) -> None:
    """Raise ConfigError for what no cluster could give, whoever joins or starts it. alone: this machine is all of it."""
    nodes = config.ray.nodes
    if alone and (nodes or 1) > 1:
        raise ConfigError(
            f"ray.nodes: {nodes} were asked for (--nodes), and the Ray that is started for a run is this machine alone; leave --nodes out, or join a "
            "cluster of several machines with --address HEAD:PORT"
        )
    if config.learners > 1 and config.ray.learners_on == "nodes":
        others = 0 if alone else config.learners - 1 if nodes is None else nodes
        check_spread(config, others=others, tls=not alone and has_tls(os.environ))


def _check_there_is_one() -> None:
    """Raise ConfigError where `auto` finds no cluster on this machine."""
    for address in local_clusters():
        host, _, port = address.rpartition(":")
        with contextlib.suppress(OSError, ValueError):
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            return
    raise ConfigError(
        "ray.address: --address auto joins the cluster of this machine, and none runs here: `ray start --head` starts one, --address HEAD:PORT names one "
        "elsewhere; without --address this machine has its own"
    )


def local_clusters() -> list[str]:
    """The addresses of clusters whose nodes run here, as Ray finds them: by the processes of nodes, and in the file that `ray start` writes."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = place.read_bytes().decode(errors="replace").split("\0")
            if Path(arguments[0]).name == "raylet":
                found += [each.partition("=")[2] for each in arguments if each.startswith("--gcs-address=")]
    with contextlib.suppress(OSError):
        found.append((Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster").read_text().strip())
    return list(dict.fromkeys(filter(None, found)))


def _check_reachable(address: str, named: str) -> None:
    """Raise ConfigError where nobody listens at `HOST:PORT`, on which Ray would wait for minutes. named: what names it."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        without = "without --address" if named == "--address" else "with neither RAY_ADDRESS (`unset RAY_ADDRESS`) nor --address"
        raise ConfigError(
            f"ray.address: no cluster could be joined at {address}, which {named} names: {error}; `ray start --head` on that machine starts one; {without} "
            "this machine has its own"
        ) from error


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """While Ray starts, which puts a handler of its own on SIGTERM that ends this process: ours stay. What they raise may be lost in Ray, or come out as an
    error of Ray's, so KeyboardInterrupt is raised at the end for a signal that came meanwhile. In another thread than the main one there are none of ours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    ours = {number: handler for number, handler in before.items() if callable(handler)}
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        ours[signal.Signals(number)](number, frame)

    def put(number: Any, handler: Any) -> Any:
        return before[number] if number in before else real(number, handler)

    real = signal.signal
    for number in ours:
        real(number, note)
    signal.signal = put  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = real
        for number, handler in ours.items():
            signal.signal(number, handler)
        if came:
            raise KeyboardInterrupt


def _machines() -> list[dict[str, Any]]:
    """As `ray.nodes`, which waits a minute for a head that is gone, and keeps this process from ending meanwhile; a driver by ray:// has nothing else."""
    import ray
    from ray._private.worker import global_worker

    client = getattr(global_worker, "gcs_client", None)
    if client is None:
        machines: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        return machines
    found = client.get_all_node_info(timeout=ASK_SECONDS).values()
    drains = _draining()  # after the head has answered: this question has no limit
    return [
        {
            "NodeID": info.node_id.hex(),
            DRAINS: None if drains is None else drains.get(info.node_id.hex(), -1.0),
            "Alive": info.state == info.ALIVE,
            "NodeManagerHostname": info.node_manager_hostname,
            "NodeManagerAddress": info.node_manager_address,
            "Resources": dict(info.resources_total),
        }
        for info in found
    ]


def _draining() -> dict[str, float] | None:
    """Nodes that Ray is about to take away, by id: when, in seconds since the epoch, 0 where nobody said. None: this Ray does not tell."""
    try:
        from ray._private.state import state  # what Ray Serve asks, too; there is no public way

        deadlines_ms: dict[str, int] = state.get_draining_nodes()
    except Exception:
        return None
    return {node: at / 1000 for node, at in deadlines_ms.items()}


def _cpus_of_the_smallest(nodes: list[dict[str, Any]]) -> int:
    cpus = [int(each["Resources"].get("CPU", 0)) for each in nodes if each["Alive"]]
    return max(1, min((count for count in cpus if count), default=1))
