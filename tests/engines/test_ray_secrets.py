"""Clusters that a process starts for its runs, with what stands for Ray: what its environment says meanwhile and afterwards, and where the secrets lie."""

from __future__ import annotations

import importlib.machinery
import os
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.engines import ray_cluster, ray_connecting, ray_secrets
from shoal.engines.ray_secrets import OwnSecrets, check_joining, sweep
from shoal.errors import ConfigError
from shoal.settings import resolve

USERS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-the-user"}


class StandIn:
    """For Ray. fails: what `init` raises. initialised: whether it is at work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails: BaseException | None = None
        self.initialised = False
        self.seen: dict[str, str] = {}  # of the environment, as it was initialised
        module: Any = types.ModuleType("ray")
        module.__spec__ = importlib.machinery.ModuleSpec("ray", None)
        module.init, module.shutdown, module.wait = self._init, self._shutdown, lambda *asked, **how: ([], [])
        module.is_initialized = lambda: self.initialised
        module.get_runtime_context = lambda: SimpleNamespace(get_node_id=lambda: "a")
        monkeypatch.setitem(sys.modules, "ray", module)
        self.module = module

    def _init(self, *where: Any, **how: Any) -> None:
        self.seen = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
        if self.fails is not None:
            raise self.fails
        self.initialised = True
        self.module._raylet = "what it read of the environment"

    def _shutdown(self) -> None:
        self.initialised = False


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    """A process that has started no cluster yet, whose user has a token in the environment."""
    kept: dict[Path, bytes] = {}
    monkeypatch.setattr(ray_secrets, "_kept", kept)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    around = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    monkeypatch.setattr(os, "environ", {**around, **USERS})
    monkeypatch.setattr(
        ray_connecting, "_machines", lambda: [{"NodeID": "a", "Alive": True, "NodeManagerAddress": "127.0.0.1", "Resources": {"CPU": 2.0}}]
    )
    monkeypatch.setattr(ray_connecting, "_check_reachable", lambda *asked: None)
    monkeypatch.setattr(ray_connecting, "asks_for_token", lambda *asked: True)
    return StandIn(monkeypatch)


def connect(address: str | None = None) -> ray_cluster.Cluster:
    return ray_connecting.connect(resolve("CartPole-v1", {"engine": "ray", "ray.address": address})[0], lambda message: None)


def said() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_")}


def lies(place: Path) -> list[str]:
    return sorted(each.name for each in place.rglob("*"))


def test_a_run_that_had_a_cluster_of_its_own_leaves_the_users_environment_and_no_file(ray: StandIn, tmp_path: Path) -> None:
    cluster = connect()
    assert (ray.seen["RAY_AUTH_TOKEN"], ray.seen["RAY_USE_TLS"]) == ("", "1")
    assert Path(ray.seen["RAY_AUTH_TOKEN_PATH"]).is_relative_to(tmp_path)
    assert said() == ray.seen, "as long as it lasts"
    cluster.close()
    assert (said(), lies(tmp_path), ray.initialised) == (USERS, [], False)


def test_the_next_cluster_of_a_process_has_the_same_token_and_authority_in_the_same_place(ray: StandIn, tmp_path: Path) -> None:
    read = []
    for _ in range(2):
        cluster = connect()
        place = Path(ray.seen["RAY_AUTH_TOKEN_PATH"]).parent
        assert not (place / "ca.key").exists()
        read.append((dict(ray.seen), [(place / name).read_bytes() for name in ("token", "ca.crt", "node/ca.crt")]))
        assert {each.stat().st_mode & 0o077 for each in (place, *place.rglob("*"))} == {0}
        cluster.close()
        assert lies(tmp_path) == []
    assert read[0] == read[1]


@pytest.mark.parametrize("error", [Exception("timed out"), KeyboardInterrupt()], ids=["Exception", "KeyboardInterrupt"])
def test_a_cluster_that_was_not_started_leaves_nothing(error: BaseException, ray: StandIn, tmp_path: Path) -> None:
    ray.fails = error
    with pytest.raises(ConfigError if isinstance(error, Exception) else KeyboardInterrupt):
        connect()
    assert (said(), lies(tmp_path)) == (USERS, [])


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_cluster_that_does_not_say_which_machines_it_has_is_left(
    address: str | None, ray: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nobody() -> list[dict[str, Any]]:
        raise TimeoutError("the head does not answer")

    monkeypatch.setattr(ray_connecting, "_machines", nobody)
    with pytest.raises(ConfigError, match=r"^ray\.address: no cluster could be .*the head does not answer"):
        connect(address)
    assert (ray.initialised, said(), lies(tmp_path)) == (False, USERS, [])


def test_a_process_that_has_imported_ray_before_can_have_no_cluster_of_its_own(ray: StandIn, tmp_path: Path) -> None:
    connect("10.0.0.1:6379").close()
    with pytest.raises(ConfigError, match="it is imported in this process already"):
        connect()
    assert (said(), lies(tmp_path)) == (USERS, [])
    connect("10.0.0.1:6379").close()


def test_a_process_that_had_a_cluster_of_its_own_can_join_no_other(ray: StandIn) -> None:
    check_joining()
    connect().close()
    with pytest.raises(ConfigError, match="Ray keeps the token of that one until the process ends"):
        connect("10.0.0.1:6379")


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_what_the_user_does_with_ray_in_this_process_goes_on(address: str | None, ray: StandIn) -> None:
    ray.initialised = True
    with pytest.raises(ConfigError, match="Ray is at work in this process already"):
        connect(address)
    assert (ray.initialised, said()) == (True, USERS)


def test_secrets_that_cannot_be_written_are_a_word_and_leave_the_environment(
    ray: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(directory: Path) -> dict[str, str]:
        (directory / "token").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ray_secrets, "local_environment", full)
    with pytest.raises(ConfigError, match=r"cannot be written to .*: No space left on device; TMPDIR"):
        connect()
    assert (said(), lies(tmp_path)) == (USERS, [])


# ---- drivers that were killed
DRIVER = """
import sys
from shoal.engines.ray_secrets import OwnSecrets
secrets = OwnSecrets()
print(secrets._directory, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def drivers(tmp_path: Path) -> Iterator[list[tuple[subprocess.Popen[str], Path]]]:
    """Two, each with the directory of its cluster's secrets."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    yield [(driver, Path(driver.stdout.readline().strip())) for driver in started if driver.stdout is not None]
    for driver in started:
        driver.kill()
        driver.communicate()


def test_what_a_killed_driver_left_is_swept_as_the_next_cluster_is_started_and_nothing_else(
    drivers: list[tuple[subprocess.Popen[str], Path]], ray: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (killed, left), (_, living) = drivers
    others = tmp_path / f"{ray_secrets.PREFIX}of-somebody-else"
    others.symlink_to(living)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (left / "token").exists()
    sweep()
    assert (left / "token").exists(), "it is too young to tell"
    monkeypatch.setattr(ray_secrets, "YOUNG_SECONDS", 0.0)
    OwnSecrets().cleanup()
    assert sorted(tmp_path.iterdir()) == sorted([living, others])
    assert (living / "token").exists()
