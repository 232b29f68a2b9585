"""The driver's own helper process is lost: with it the learner, but nobody on the nodes (test_ray_fleet.py has those in this process)."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from test_ray_fleet import SETTINGS, ClusterHere, at, events

import shoal
from shoal.engines import ray_fleet


def zygotes() -> set[int]:
    """Those that this process has started."""
    me = os.getpid()
    children = Path(f"/proc/{me}/task").glob("*/children")
    found = {int(pid) for each in children for pid in each.read_text().split()}
    return {pid for pid in found if Path(f"/proc/{pid}/comm").read_text().startswith("shoal:zygote")}


@pytest.mark.parametrize("several", [{}, {"learners": 2, "ray": {"learners_on": "nodes"}}], ids=["one", "two"])
def test_the_run_goes_back_to_its_checkpoint_and_all_are_made_anew(
    several: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = ClusterHere(["a", "b"], actors_per_node=1)
    monkeypatch.setattr(ray_fleet, "connect", lambda config, warn: cluster)

    killed: list[int] = []

    def kill() -> None:
        if not killed:  # the update is made again
            killed.extend(zygotes() - {node._node._zygote.pid for node in cluster.here.values()})
            os.kill(*killed, signal.SIGKILL)

    run = shoal.train("CartPole-v1", run_dir=str(tmp_path / "run"), callbacks=[at(6, kill)], **{**SETTINGS, "engine": "ray", **several})
    (rolled_back,) = events(run, "rolled_back")
    assert rolled_back["update"] == 4
    alone = {"learners": several.get("learners", 1), "actors": 2}
    expected = shoal.train("CartPole-v1", run_dir=str(tmp_path / "alone"), **{**SETTINGS, **alone})
    assert run.result["weights_sha256"] == expected.result["weights_sha256"]
    assert events(run, "node_lost") == []
