"""A driver that is submitted: `ray job submit -- shoal train ...` to a cluster with a token and TLS, stopped by `ray job stop`, and resumed by another job.

One cluster on this host. What Ray's dashboard says over HTTP is not encrypted by Ray; the token is asked for there, too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.engines.ray_security import local_environment
from shoal.errors import RunError
from shoal.files import CheckpointDirectory
from shoal.monitoring.store import RunReader
from standing_cluster import LIMIT_SECONDS, standing_cluster

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'shoal[ray]'", allow_module_level=True)
MISSING = [
    name
    for name in ("aiohttp", "aiohttp_cors", "opencensus", "opentelemetry", "prometheus_client")
    if importlib.util.find_spec(name) is None
]
if MISSING:
    pytest.skip(f"Ray has no job server without {', '.join(MISSING)}: pip install 'shoal[ray-jobs]'", allow_module_level=True)

SOURCES = str(Path(__file__).resolve().parents[2] / "src")
TESTS = str(Path(__file__).resolve().parents[1])  # of `held`: a run that is stopped there waits for its update, however slow the machine
# Ray looks in its own directory for the address that a job gets, where more than one cluster is on a host. The agent that starts jobs takes
# one fixed port unless told otherwise, and where another cluster has it already, it goes on without its server: no job is ever started.
CLUSTER = """
import functools
import sys
import ray
from ray._private import parameter
from ray._private.utils import write_ray_address
parameter.RayParams = functools.partial(parameter.RayParams, dashboard_agent_listen_port=0)
context = ray.init(address="local", num_cpus=2, include_dashboard=True, dashboard_port=0, object_store_memory=80_000_000, log_to_driver=False, _temp_dir=sys.argv[1])
write_ray_address(context.address_info["gcs_address"], sys.argv[1])
print(context.dashboard_url, flush=True)
sys.stdin.read()
"""
SHOAL = [sys.executable, "-m", "shoal.cli"]
SMALL = [
    "CartPole-v1", "--preset", "none", "--sampling.groups", "2", "--sampling.group-size", "2", "--sampling.rollout-length", "16",
    "--algorithm.minibatch-size", "64", "--algorithm.epochs", "2", "--policy.hidden-sizes", "8", "--seed", "3", "--checkpoint.every-seconds", "1000",
]  # fmt: skip
ON_RAY = ["--engine", "ray", "--address", "auto", "--actors-per-node", "1"]


@dataclass
class Head:
    """A cluster of this node alone, with a job server."""

    url: str
    environment: dict[str, str]

    def ray(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", *arguments]
        return subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)

    def submit(self, job: str, entrypoint: Sequence[str], cwd: Path, *more: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, which waits for the job unless told otherwise."""
        return self.ray("submit", "--address", self.url, "--submission-id", job, *more, "--", *entrypoint, cwd=cwd)

    def job(self, job: str) -> dict[str, Any]:
        """What the job server says of it."""
        import requests

        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
        answer = requests.get(f"{self.url}/api/jobs/{job}", headers={"Authorization": f"Bearer {token}"}, timeout=120)
        assert answer.ok, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def until_it_ended(self, job: str) -> dict[str, Any]:
        wait_for(lambda: self.job(job)["status"] in ("SUCCEEDED", "FAILED", "STOPPED"))
        return self.job(job)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    directory = tmp_path_factory.mktemp("head")
    own = tempfile.mkdtemp(prefix="ray-")  # its sockets want a short path
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, **local_environment(directory / "private"), "HOME": str(directory), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "TERM": "dumb", "RAY_ADDRESS": ""}
    try:
        with standing_cluster(CLUSTER, own, environment=environment, cwd=directory) as url:
            yield Head(f"http://{url}", environment)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def wait_for(true: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def progress(run: Path) -> int:
    """Updates made; -1 before the first, also while there is no whole database yet."""
    try:
        with RunReader(run / "run.db") as reader:
            point = reader.progress()
    except RunError:
        return -1
    return -1 if point is None else point.update


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is submitted along, with an environment in it."""
    directory = tmp_path_factory.mktemp("work")
    (directory / "worlds.py").write_text("import gymnasium\n\ndef make():\n    return gymnasium.make('CartPole-v1')\n")
    return directory


def test_the_exit_code_and_the_message_of_a_refusal_come_through(head: Head, work: Path, tmp_path: Path) -> None:
    done = head.submit("refused", [*SHOAL, "train", *SMALL, *ON_RAY, "--stop.updates", "10"], tmp_path, "--working-dir", str(work))
    assert done.returncode == 1, "Ray's own code for a job that failed"
    assert head.job("refused")["driver_exit_code"] == 2
    assert "lies in what Ray unpacked for this job, and removes again; give --run-dir" in done.stdout + done.stderr


def test_a_stopped_job_ends_with_a_last_checkpoint_and_another_goes_on_to_the_bits_of_one_process(
    head: Head, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    path = os.pathsep.join([SOURCES, TESTS])  # of this driver alone: what lies in tests/ hides modules of Ray's own agents
    endless = [
        "env",
        f"PYTHONPATH={path}",
        sys.executable,
        "-m",
        "held",
        "train",
        "worlds:make",
        *SMALL[1:],
        *ON_RAY,
        "--stop.updates",
        "1000000",
        "--run-dir",
        str(run),
    ]
    patient = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}})  # until SIGKILL follows
    along = ("--working-dir", str(work))
    assert head.submit("stopped", endless, tmp_path, *along, "--no-wait", "--runtime-env-json", patient).returncode == 0
    wait_for(lambda: progress(run) > 20)
    stopped = head.ray("stop", "--address", head.url, "stopped", cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert head.until_it_ended("stopped")["status"] == "STOPPED"
    newest = CheckpointDirectory(run / "checkpoints").newest()
    assert (result(run)["reason"], result(run)["updates"]) == ("interrupted", newest.update)
    assert newest.update > 20, "the first checkpoint is not the last"
    with RunReader(run / "run.db") as reader:
        assert {event["kind"] for event in reader.events()}.isdisjoint({"died", "rolled_back", "node_lost", "failed"})

    end = ["--stop.updates", str(newest.update + 5)]
    done = head.submit("resumed", [*SHOAL, "resume", str(run), *end], tmp_path, *along)
    assert done.returncode == 0, done.stdout + done.stderr
    assert head.job("resumed")["driver_exit_code"] == 0
    with RunReader(run / "run.db") as reader:
        assert reader.events("warning") == [], "token and TLS are on"
    monkeypatch.syspath_prepend(work)
    again = shoal.replay(run)  # in this process
    assert (again["updates"], again["equal"]) == (newest.update + 5, True)
    assert again["weights_sha256"] == result(run)["weights_sha256"]
