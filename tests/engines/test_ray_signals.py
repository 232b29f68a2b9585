"""SIGTERM and Ctrl-C while Ray starts: the end that is documented, whatever Ray does with signals meanwhile."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.living import SOURCES, TINY
from shoal.engines import ray_connecting
from shoal.settings import resolve
from shoal.training.wishes import listening

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
SIGNALLED = """
import os, signal, sys
from shoal.cli import main
from shoal.engines import ray_secrets

environment = ray_secrets.local_environment

def then_be_signalled(directory):
    made = environment(directory)
    os.environ.update(made)  # before Ray is imported
    from ray._private.node import Node
    start = Node.start_head_processes

    def started(node):
        start(node)
        os.kill(os.getpid(), signal.SIGTERM)  # Ray has put its handler there

    Node.start_head_processes = started
    return made

ray_secrets.local_environment = then_be_signalled
sys.argv[0] = "shoal"
main()
"""


def ends_the_process(number: int, frame: object) -> None:
    sys.exit(number)


def dies(number: int) -> None:
    signal.signal(signal.SIGTERM, ends_the_process)
    os.kill(os.getpid(), number)


def passes_over(number: int) -> None:
    try:
        dies(number)
    except BaseException:
        return


def fails_of_it(number: int) -> None:
    try:
        dies(number)
    except BaseException:
        raise RuntimeError("Ray could not start") from None


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Joins a cluster; what it is called with happens in `ray.init`."""
    fake = types.ModuleType("ray")
    fake.__spec__ = importlib.machinery.ModuleSpec("ray", None)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(ray_connecting, "check_cluster", lambda *asked: [])
    monkeypatch.setattr(ray_connecting, "_check_there_is_one", lambda: None)
    monkeypatch.setattr(ray_connecting, "Roll", lambda machines: types.SimpleNamespace(machines=[]))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config, _ = resolve("CartPole-v1", {"engine": "ray", "ray.address": "auto"})

    def connect(init: Callable[[], None]) -> None:
        told = types.SimpleNamespace(get_node_id=lambda: "a")
        monkeypatch.setattr(fake, "init", lambda *args, **how: init(), raising=False)
        monkeypatch.setattr(fake, "get_runtime_context", lambda: told, raising=False)
        ray_connecting.connect(config, print)

    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as it is where the tests are run by nohup
    before = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        with listening():
            yield connect
        assert {number: signal.getsignal(number) for number in NUMBERS} == before
    finally:
        signal.signal(signal.SIGHUP, ignored)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("init", [dies, passes_over, fails_of_it])
def test_a_signal_while_ray_starts_interrupts_whatever_ray_makes_of_it(init: Callable[[int], None], number: int, connect: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        connect(lambda: init(number))


def test_handlers_are_what_they_were_before_ray_started(connect: Any) -> None:
    before, real = [signal.getsignal(number) for number in NUMBERS], signal.signal
    connect(lambda: signal.signal(signal.SIGTERM, ends_the_process))
    assert [signal.getsignal(number) for number in NUMBERS] == before
    assert signal.signal is real


def test_a_training_in_another_thread_joins_too(connect: Any) -> None:
    raised: list[BaseException] = []

    def join() -> None:
        try:
            connect(lambda: None)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=join)
    thread.start()
    thread.join()
    assert raised == []


def test_a_run_that_is_terminated_while_its_cluster_starts_ends_as_documented_and_keeps_nothing(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed, so no cluster can be started: pip install 'ray>=2.52'")
    temporary = tempfile.mkdtemp(prefix="t")  # Ray's sockets want a short path
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "TMPDIR": temporary, "PYTHONPATH": os.pathsep.join(SOURCES[:1]), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    args = ["train", "CartPole-v1", *TINY, "--engine", "ray", "--actors-per-node", "1", "--run-dir", "run"]
    try:
        done = subprocess.run(
            [sys.executable, "-c", SIGNALLED, *args],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        left = [path.name for path in Path(temporary).glob("shoal-ray-*")]
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert not (tmp_path / "run").exists()
    assert left == [], "secrets"
