"""A real Ray cluster one of whose nodes has not what the run needs: raylets whose processes find other modules than the driver's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.cluster_utils

from faults.test_ray_cluster import started

LIMIT_SECONDS = 300.0
SOURCES = str(Path(__file__).resolve().parents[2] / "src")
WORLD = "import gymnasium\n\ndef make():\n    return gymnasium.make('CartPole-v1')\n"
# A package shoal of another time, which does not have what the driver asks for.
OTHER_SHOAL = "raise ImportError('this is another shoal')\n"


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A directory with a module that is on some machines' path."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "worlds_of_mine.py").write_text(WORLD)
    return tmp_path / "modules"


@pytest.fixture
def cluster(modules: Path, tmp_path: Path) -> Iterator[Any]:
    """Three nodes: the head is as the driver's machine, one does not have the module, and one has another shoal."""
    other = tmp_path / "other"
    (other / "shoal").mkdir(parents=True)
    (other / "shoal" / "__init__.py").write_text(OTHER_SHOAL)
    paths = [[SOURCES, str(modules)], [SOURCES], [str(other)]]
    nodes = [{"num_cpus": 1, "env_vars": {"PYTHONPATH": os.pathsep.join(path)}} for path in paths]
    head = {**nodes[0], "include_dashboard": False, "dashboard_agent_listen_port": 0}
    made = started(lambda: ray.cluster_utils.Cluster(initialize_head=True, head_node_args=head))
    for node in nodes[1:]:
        started(lambda node=node: made.add_node(**node))  # type: ignore[misc]
    made.wait_for_nodes()
    yield made
    made.shutdown()


def test_nodes_that_lack_what_the_run_needs_are_named_before_anything_runs(cluster: Any, modules: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "shoal.cli", "train", "worlds_of_mine:make", "--engine", "ray", "--address", str(cluster.address), "--allow-insecure-cluster",
        "--actors-per-node", "1", "--sampling.groups", "3", "--stop.updates", "2", "--run-dir", str(run), "--view", "silent",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([SOURCES, str(modules)]), "TERM": "dumb"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("shoal: ray: node ")
    assert (
        said.count("cannot import what the run is made of: env.id worlds_of_mine:make: cannot import worlds_of_mine: No module named") == 1
    )
    assert said.count("gives no report: it could not be started: ImportError: this is another shoal; ") == 1
    assert "what an import path names must be there on every node" in said
    assert not run.exists(), "a run that was refused leaves nothing"
