"""The sbatch script: its directives, and all of it executed by bash with executables that stand for Slurm, Ray and the training."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shoal.deploying.deployment import Deployment
from shoal.deploying.rendering import slurm

Planned = Callable[..., Deployment]
SOURCES = Path(__file__).parents[2] / "src"
LIMIT_SECONDS = 180.0
FAKES = {
    "scontrol": """
        echo "$*" >> "$FAKE/scontrol"
        case $1 in show) printf 'node-%s\\n' $(seq "$SLURM_JOB_NUM_NODES") ;; esac
    """,
    "hostname": """
        case ${1:-} in -I) echo "127.0.0.1 10.0.0.1" ;; *) echo "${FAKE_HOST:-node-1}" ;; esac
    """,
    # Executes the command once for each task, as the host that the options name.
    "srun": """
        echo "$*" >> "$FAKE/srun"
        tasks=1
        first=1
        while [ "${1#--}" != "$1" ]; do
            case $1 in --ntasks=*) tasks=${1#*=} ;; --exclude=*) first=2 ;; esac
            shift
        done
        trap 'kill $(jobs -p); exit 143' TERM
        for task in $(seq "$tasks"); do
            FAKE_HOST=node-$((first + task - 1)) "$@" &
        done
        wait
    """,
    "ray": """
        if [ "$1" = health-check ]; then
            [ -e "$FAKE/head" ] && [ "$3" = "127.0.0.1:$((20000 + SLURM_JOB_ID % 10000))" ]
            exit
        fi
        [ -z "${FAKE_NO_RAY:-}" ] || exit 1
        for file in "$RAY_TLS_SERVER_CERT" "$RAY_TLS_SERVER_KEY" "$RAY_TLS_CA_CERT" "$RAY_AUTH_TOKEN_PATH"; do [ -s "$file" ]; done
        echo "$(hostname) auth=$RAY_AUTH_MODE tls=$RAY_USE_TLS cert=$RAY_TLS_SERVER_CERT address=${RAY_ADDRESS:-} $*" >> "$FAKE/ray"
        echo $$ >> "$FAKE/pids"
        case "$*" in *--head*) touch "$FAKE/head" ;; esac
        exec /bin/sleep 600
    """,
    # Two seconds, as between two looks for the head, or less where it is there: a busy machine takes its time to start it.
    "sleep": """
        [ -z "${FAKE_NO_RAY:-}" ] || exec /bin/sleep 0.01
        for _ in $(seq 100); do [ ! -e "$FAKE/head" ] || exit 0; /bin/sleep 0.02; done
    """,
    # `deploy` is the real one. A training waits for its nodes, then goes on until it is told to stop, or ends with FAKE_CODE.
    "shoal": """
        if [ "$1" = deploy ]; then exec "$FAKE_PYTHON" -m shoal.cli "$@"; fi
        if [ "$1" = show ]; then [ -e "$FAKE/begun" ] && exit 0 || exit 2; fi
        echo "$*" >> "$FAKE/shoal"
        env | grep '^RAY_' | sort > "$FAKE/environment"
        ls -ld "$SHOAL_SECRETS" "$SHOAL_SECRETS"/* "$SHOAL_SECRETS"/*/* > "$FAKE/modes"
        cat "$SHOAL_SECRETS/token" > "$FAKE/token"
        if [ "$1" = train ]; then touch "$FAKE/begun"; case $4 in *:*) ;; *) mkdir -p "$4" && cp "$2" "$4/config.yaml" ;; esac; fi
        until [ -e "$FAKE/ray" ] && [ "$(wc -l < "$FAKE/ray")" -eq "$SLURM_JOB_NUM_NODES" ]; do /bin/sleep 0.05; done
        [ -z "${FAKE_CODE:-}" ] || exit "$FAKE_CODE"
        trap 'echo saved >> "$FAKE/shoal"; exit 130' TERM
        touch "$FAKE/training"
        while :; do /bin/sleep 0.05; done
    """,
}


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not asked how does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] != "Z"
    except OSError:
        return False


@dataclass
class Cluster:
    """A directory with the executables, and what they write down."""

    root: Path
    script: Path
    path: Path
    jobs: list[subprocess.Popen[str]] = field(default_factory=list)

    def submit(self, nodes: int = 3, job: int = 41234, **environment: str) -> subprocess.Popen[str]:
        """The script as Slurm starts it: the batch step, on the first node."""
        for name in ("head", "training", "ray"):
            (self.root / name).unlink(missing_ok=True)
        known = {
            "PATH": f"{self.path}:{os.environ['PATH']}", "HOME": str(self.root), "PYTHONPATH": os.pathsep.join([str(SOURCES), *filter(None, sys.path)]),
            "FAKE": str(self.root), "FAKE_PYTHON": sys.executable, "SLURM_JOB_ID": str(job), "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": f"node-[1-{nodes}]", "SLURM_CPUS_PER_TASK": "4", "SLURM_SUBMIT_DIR": str(self.root), "RAY_AUTH_TOKEN": "of another cluster",
        }  # fmt: skip
        started = subprocess.Popen(
            ["bash", self.script], env={**known, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.root
        )
        self.jobs.append(started)
        return started

    def said(self, name: str) -> list[str]:
        file = self.root / name
        return file.read_text().splitlines() if file.exists() else []

    def until_it_trains(self, job: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not (self.root / "training").exists():
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline, "no training was begun"
            time.sleep(0.02)

    def end(self, job: subprocess.Popen[str]) -> tuple[int, str]:
        output, _ = job.communicate(timeout=LIMIT_SECONDS)
        return job.returncode, output

    def rays_that_live(self) -> list[int]:
        """Those that were started and have not ended within a moment: they get their signal as the script ends."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while (alive := [pid for pid in map(int, self.said("pids")) if lives(pid)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return alive


@pytest.fixture
def cluster(tmp_path: Path, executable: Callable[[str, str], Path]) -> Iterator[Callable[[str], Cluster]]:
    made: list[Cluster] = []

    def make(text: str) -> Cluster:
        for name, body in FAKES.items():
            path = executable(name, f"#!/bin/bash\nset -eu\n{body}")
        script = tmp_path / "job.sh"
        script.write_text(text)
        made.append(Cluster(tmp_path, script, path))
        return made[-1]

    yield make
    for found in made:
        for job in found.jobs:
            job.kill()
            job.wait()
        for pid in found.rays_that_live():
            os.kill(pid, signal.SIGKILL)


def text_of(planned: Deployment, **how: Any) -> str:
    return slurm(planned, **{"runs": "$SLURM_SUBMIT_DIR/runs", "partition": None, "time": "24:00:00", **how})


def test_what_slurm_is_asked_for(planned: Planned) -> None:
    text = text_of(planned(name="one", nodes=4, cpus=16, memory_gib=64, gpus=2), partition="gpu", time="1-12")
    before, _, _ = text.partition("set -euo pipefail")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", before, re.M))
    assert asked == {
        "job-name": "one", "nodes": "4", "ntasks-per-node": "1", "cpus-per-task": "16", "mem": "64G", "gpus-per-node": "2", "partition": "gpu",
        "time": "1-12", "requeue": "", "open-mode": "append", "output": "one-%j.log", "signal": "B:USR1@180",
    }  # fmt: skip
    assert text.count("#SBATCH") == len(asked), "Slurm reads no directive after the first command"
    assert "--gpus-per-node" not in text_of(planned())
    assert "--partition" not in text_of(planned())


def test_bash_reads_it(planned: Planned, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(text_of(planned()))
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed; the script is executed by the other tests")
def test_shellcheck_finds_nothing(planned: Planned, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(text_of(planned(), partition="cpu"))
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_job_whose_time_is_over_is_requeued_and_goes_on(planned: Planned, cluster: Callable[[str], Cluster]) -> None:
    deployment = planned(name="one", nodes=3, cpus=4, learners=2)
    slurm_cluster = cluster(text_of(deployment))
    first = slurm_cluster.submit()
    slurm_cluster.until_it_trains(first)
    first.send_signal(signal.SIGUSR1)
    code, output = slurm_cluster.end(first)
    assert code == 130, output
    assert slurm_cluster.said("scontrol") == ["show hostnames node-[1-3]", "requeue 41234"]
    assert slurm_cluster.rays_that_live() == []

    second = slurm_cluster.submit(SLURM_RESTART_COUNT="1", FAKE_CODE="0")
    code, output = slurm_cluster.end(second)
    assert code == 0, output
    runs = slurm_cluster.root / "runs"
    assert slurm_cluster.said("shoal") == [
        f"train {runs}/one.yaml --run-dir {runs}/one --engine ray --address auto --actors-per-node 4 --learners 2 --nodes 3 --view lines",
        "saved",
        f"resume {runs}/one --view lines",
    ]
    assert slurm_cluster.said("scontrol")[2:] == ["show hostnames node-[1-3]"], "a run that ended is not requeued"
    assert (runs / "one" / "config.yaml").read_text() == deployment.settings
    assert slurm_cluster.rays_that_live() == []


def test_every_node_has_the_token_and_a_certificate_of_its_own(planned: Planned, cluster: Callable[[str], Cluster]) -> None:
    slurm_cluster = cluster(text_of(planned(name="one", nodes=3)))
    code, output = slurm_cluster.end(slurm_cluster.submit(FAKE_CODE="0", job=50007))
    assert code == 0, output
    secrets = slurm_cluster.root / "runs" / ".one-50007"
    started = sorted(slurm_cluster.said("ray"))
    shared = "--disable-usage-stats --num-cpus=4 --min-worker-port=0 --max-worker-port=0"
    head = "--head --node-ip-address=127.0.0.1 --port=20007 --ray-client-server-port=30007 --include-dashboard=false"
    assert started == [
        f"node-{node} auth=token tls=1 cert={secrets}/node-{node}/tls.crt address= start --block {shared} {own}"
        for node, own in ((1, head), (2, "--address=127.0.0.1:20007"), (3, "--address=127.0.0.1:20007"))
    ]
    steps = [line for line in slurm_cluster.said("srun") if line.startswith("--")]
    assert steps == [
        "--nodes=1 --ntasks=1 --nodelist=node-1 --cpus-per-task=4 bash -c ",
        "--nodes=2 --ntasks=2 --exclude=node-1 --cpus-per-task=4 bash -c ",
    ]
    environment = dict(line.split("=", 1) for line in slurm_cluster.said("environment"))
    assert environment == {
        "RAY_ADDRESS": "127.0.0.1:20007", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{secrets}/token", "RAY_USE_TLS": "1", "RAY_worker_niceness": "0",
        "RAY_TLS_CA_CERT": f"{secrets}/ca.crt", "RAY_TLS_SERVER_CERT": f"{secrets}/driver/tls.crt", "RAY_TLS_SERVER_KEY": f"{secrets}/driver/tls.key",
    }  # fmt: skip
    modes = [line.split()[0] for line in slurm_cluster.said("modes") if line]
    assert modes
    assert all(mode[4:10] == "------" for mode in modes if len(mode) >= 10), "others may read it"
    (token,) = slurm_cluster.said("token")
    assert len(token) == 64
    everything = [file for file in slurm_cluster.root.rglob("*") if file.is_file() and file.name != "token"]
    assert not any(token in file.read_text(errors="replace") for file in everything), "the token is in a file that stays"
    assert token not in output
    assert not secrets.exists()


def test_a_job_that_is_preempted_saves_and_leaves_the_rest_to_slurm(planned: Planned, cluster: Callable[[str], Cluster]) -> None:
    slurm_cluster = cluster(text_of(planned(name="one")))
    job = slurm_cluster.submit(nodes=2)
    slurm_cluster.until_it_trains(job)
    job.send_signal(signal.SIGTERM)
    code, output = slurm_cluster.end(job)
    assert code == 130, output
    assert slurm_cluster.said("shoal")[-1] == "saved"
    assert not any("requeue" in line for line in slurm_cluster.said("scontrol"))
    assert not (slurm_cluster.root / "runs" / ".one-41234").exists()


@pytest.mark.parametrize("code", ["1", "2", "3", "4"])
def test_a_training_that_fails_ends_the_job_with_its_code(code: str, planned: Planned, cluster: Callable[[str], Cluster]) -> None:
    slurm_cluster = cluster(text_of(planned(name="one", nodes=1)))
    ended, output = slurm_cluster.end(slurm_cluster.submit(nodes=1, FAKE_CODE=code))
    assert ended == int(code), output
    assert not any("requeue" in line for line in slurm_cluster.said("scontrol"))
    assert len(slurm_cluster.said("srun")) > 0
    assert not any("--exclude" in line for line in slurm_cluster.said("srun")), "a job of one node has no workers"


def test_a_cluster_that_does_not_come_up_ends_the_job(planned: Planned, cluster: Callable[[str], Cluster]) -> None:
    slurm_cluster = cluster(text_of(planned(name="one")))
    code, output = slurm_cluster.end(slurm_cluster.submit(nodes=2, FAKE_NO_RAY="yes"))
    assert code == 1
    assert "one: no Ray head at 127.0.0.1:21234" in output
    assert slurm_cluster.said("shoal") == []
    assert not (slurm_cluster.root / "runs" / ".one-41234").exists()


def test_a_run_in_an_object_store_is_begun_and_resumed_there(stored: Planned, cluster: Callable[[str], Cluster]) -> None:
    slurm_cluster = cluster(text_of(stored(name="one", nodes=2)))
    for _ in range(2):
        code, output = slurm_cluster.end(slurm_cluster.submit(nodes=2, FAKE_CODE="0"))
        assert code == 0, output
    runs = slurm_cluster.root / "runs"
    assert slurm_cluster.said("shoal") == [
        f"train {runs}/one.yaml --run-dir s3://bucket/runs/one --engine ray --address auto --actors-per-node 8 --nodes 2 --view lines",
        "resume s3://bucket/runs/one --view lines",
    ]
