"""Trainings on real Ray, one after the other in one Python program: each with a cluster of its own, and what is refused rather than waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from faults.living import SOURCES

LIMIT_SECONDS = 400.0
PROGRAM = """
import json, os, sys
import shoal
from shoal.errors import ConfigError

def train(name, **how):
    settings = {"preset": "none", "sampling": {"groups": 2, "group_size": 2, "rollout_length": 16}, "algorithm": {"name": "ppo", "epochs": 1, "minibatch_size": 32}}
    return shoal.train("CartPole-v1", run_dir=f"{sys.argv[1]}/{name}", stop={"updates": 2}, seed=5, evaluation={"episodes": 0}, **settings, **how)

def refused(name, **how):
    try:
        train(name, **how)
    except ConfigError as error:
        return str(error)

def told():
    return {name: value for name, value in os.environ.items() if name.startswith(("RAY_AUTH", "RAY_TLS", "RAY_USE_TLS"))}

if sys.argv[2] == "twice":
    weights = [train(f"run{count}", engine="ray", ray={"actors_per_node": 1}).result["weights_sha256"] for count in range(2)]
    weights.append(train("local", actors=1).result["weights_sha256"])
    print(json.dumps([weights, told(), refused("joined", engine="ray", ray={"address": f"127.0.0.1:{sys.argv[3]}"})]))
else:
    import ray
    print(json.dumps([refused("run", engine="ray"), told()]))
"""
USERS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-the-user"}


def program(*arguments: str) -> list[object]:
    """What it prints last."""
    around = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**around, **USERS, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join([*SOURCES, around.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[object] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return found


def test_a_program_trains_twice_on_clusters_of_its_own_and_its_environment_is_the_users(tmp_path: Path) -> None:
    weights, told, refused = program(str(tmp_path), "twice", "6379")
    assert isinstance(weights, list)
    assert len(weights) == 3
    assert len(set(weights)) == 1
    assert told == USERS
    assert "join another one in another process" in str(refused)


def test_a_program_that_has_imported_ray_is_told_at_once_that_it_can_have_no_cluster_of_its_own(tmp_path: Path) -> None:
    refused, told = program(str(tmp_path), "imported")
    assert "it is imported in this process already" in str(refused)
    assert told == USERS
